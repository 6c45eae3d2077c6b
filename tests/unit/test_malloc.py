"""What is asked of the C library, and of which; tests/cluster has it in a real worker."""

from __future__ import annotations

import ctypes
import os

import pytest

from daskshare import _malloc
from daskshare._malloc import release_freed, retain_freed

MIB = 2**20
TRIM, MMAP, ARENAS = -1, -3, -8


class Libc:
    def __init__(self, refused=()):
        self.calls = []
        self.refused = refused

    def mallopt(self, parameter, value):
        self.calls.append((parameter, value))
        return int(parameter not in self.refused)

    def malloc_trim(self, pad):
        self.calls.append(("trim", pad))
        return 1


@pytest.fixture
def use(monkeypatch):
    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)

    def use(libc):
        monkeypatch.setattr(_malloc, "_glibc", lambda: libc)
        return libc

    return use


@pytest.mark.parametrize(("retained", "mapped"), [(64, 32), (32, 32), (8, 8)])
def test_thresholds_and_a_single_arena_are_set(use, caplog, retained, mapped):
    libc = use(Libc())
    retain_freed(retained * MIB)
    assert libc.calls == [(MMAP, mapped * MIB), (TRIM, retained * MIB), (ARENAS, 1)]
    assert not caplog.records


def test_arenas_of_the_environment_stay(use, monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "4")
    libc = use(Libc())
    retain_freed(64 * MIB)
    assert ARENAS not in dict(libc.calls)


def test_a_refusal_is_logged_and_the_rest_is_set(use, caplog):
    libc = use(Libc(refused=[MMAP]))
    retain_freed(64 * MIB)
    assert len(libc.calls) == 3
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert "malloc refuses M_MMAP_THRESHOLD=33554432" in record.message


def test_free_memory_is_given_back(use):
    libc = use(Libc())
    release_freed()
    assert libc.calls == [("trim", 0)]


def musl(name):
    raise ValueError("unrecognized configuration name")


def unsupported(name):
    raise OSError(22, "Invalid argument")


@pytest.mark.parametrize(
    "confstr", [musl, unsupported, lambda name: None, lambda name: "NPTL", None]
)
def test_another_c_library_is_left_alone(monkeypatch, caplog, confstr):
    if confstr is None:
        monkeypatch.delattr(os, "confstr", raising=False)
    else:
        monkeypatch.setattr(os, "confstr", confstr, raising=False)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("looked into the C library"))
    _malloc._glibc.cache_clear()
    try:
        retain_freed(64 * MIB)
        release_freed()
    finally:
        _malloc._glibc.cache_clear()
    assert not caplog.records
