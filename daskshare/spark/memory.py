"""What a Python worker holds without using it, while it waits for its host."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import pyarrow as pa

__all__ = ["release_unused"]


def release_unused() -> None:
    """Give the system back what Arrow's pool and the C library keep for later allocations.

    Notes
    -----
    Some milliseconds, and as many again when the memory is needed: for who waits longer than that.
    A C library that cannot do it is left alone.
    """
    pa.default_memory_pool().release_unused()
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    # glibc's own; musl has none.
    trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim
