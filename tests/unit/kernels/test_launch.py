"""What the driver is handed, with a function of Python's in its place."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest

from daskshare.kernels import launch
from daskshare.kernels.launch import KernelLaunch, LaunchError


@pytest.fixture
def calls(monkeypatch):
    """What a stand-in for the driver was called with; its answer is ``calls.answer``."""
    found = SimpleNamespace(made=[], answer=0)

    def stand_in(function, *sizes_and_rest):
        *sizes, shared_bytes, stream, addresses, extra = sizes_and_rest
        pointers = list((ctypes.c_uint64 * 2).from_address(addresses[0]))
        constant = ctypes.string_at(addresses[1], 5)
        found.made.append((function, sizes, shared_bytes, stream, pointers, constant, extra))
        return found.answer

    monkeypatch.setattr(launch, "_driver", lambda: stand_in)
    return found


@pytest.fixture
def kernel():
    return SimpleNamespace(kernel=SimpleNamespace(ptr=77), name="blur")


def test_arguments_reach_the_driver(calls, kernel):
    queue = KernelLaunch(
        kernel, (3, 2, 1), (32, 8, 1), num_pointers=2, constant=b"plan\0", stream=9
    )
    queue(2**40, 5)
    queue(6, 7)
    assert calls.made == [
        (77, [3, 2, 1, 32, 8, 1], 0, 9, pointers, b"plan\0", None)
        for pointers in ([2**40, 5], [6, 7])
    ]


def test_a_refused_launch_is_an_error(calls, kernel):
    calls.answer = 700
    queue = KernelLaunch(kernel, (1, 1, 1), (1, 1, 1), num_pointers=2, constant=b"plan\0", stream=0)
    with pytest.raises(LaunchError, match="700 for blur"):
        queue(1, 2)


def test_depth_multiplies_the_grid_and_addresses_left_out_stay(calls, kernel):
    queue = KernelLaunch(
        *(kernel, (3, 2, 5), (32, 8, 1)),
        **{"num_pointers": 2, "constant": b"plan\0", "stream": 9, "max_depth": 3},
    )
    queue(4, 5, depth=3)
    queue(6, depth=2)
    assert [(sizes[:3], pointers) for _, sizes, _, _, pointers, _, _ in calls.made] == [
        ([3, 2, 15], [4, 5]),
        ([3, 2, 10], [6, 5]),
    ]


@pytest.mark.parametrize("depth", [-1, 0, 3])
def test_the_depth_is_checked(depth, calls, kernel):
    queue = KernelLaunch(
        *(kernel, (1, 1, 1), (1, 1, 1)),
        **{"num_pointers": 2, "constant": b"plan\0", "stream": 0, "max_depth": 2},
    )
    with pytest.raises(ValueError, match=f"got a depth of {depth}; expected 1 to 2"):
        queue(1, depth=depth)
    assert calls.made == []


def test_the_number_of_pointers_is_checked(calls, kernel):
    queue = KernelLaunch(kernel, (1, 1, 1), (1, 1, 1), num_pointers=2, constant=b"plan\0", stream=0)
    with pytest.raises(ValueError, match="got 3 addresses for blur; expected at most 2"):
        queue(1, 2, 3)
    assert calls.made == []
