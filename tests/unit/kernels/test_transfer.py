"""What the driver is handed, with a stand-in in its place."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from daskshare._engine_runner import is_out_of_memory
from daskshare.kernels import transfer
from daskshare.kernels.launch import LaunchError
from daskshare.kernels.transfer import copy_async, wait_event


@pytest.fixture
def calls(monkeypatch):
    """What the stand-in was called with; its answer is ``calls.answer``."""
    found = SimpleNamespace(made=[], answer=0)

    def function(name):
        def call(*arguments):
            found.made.append((name, *arguments))
            return found.answer

        return call

    names = ("cuMemcpyAsync", "cuStreamWaitEvent")
    driver = SimpleNamespace(**{name: function(name) for name in names})
    monkeypatch.setattr(transfer, "_driver", lambda: driver)
    return found


def test_arguments_reach_the_driver(calls):
    copy_async(2**40, 7, 64, 9)
    wait_event(9, 2**41)
    assert calls.made == [("cuMemcpyAsync", 2**40, 7, 64, 9), ("cuStreamWaitEvent", 9, 2**41, 0)]


def test_nothing_is_not_copied(calls):
    copy_async(0, 0, 0, 9)
    assert calls.made == []


@pytest.mark.parametrize(
    ("call", "name"),
    [(lambda: copy_async(1, 2, 3, 4), "cuMemcpyAsync"), (lambda: wait_event(1, 2), "cuStreamWait")],
)
def test_a_refusal_is_an_error(calls, call, name):
    calls.answer = 700
    with pytest.raises(LaunchError, match=f"{name}.* returned 700"):
        call()


def test_memory_that_ran_out_is_known_as_such(calls):
    calls.answer = 2
    with pytest.raises(LaunchError, match="cuMemcpyAsync") as caught:
        copy_async(1, 2, 3, 4)
    assert is_out_of_memory(caught.value)
