"""What a Python worker holds without using it, while it waits for its host."""

from __future__ import annotations

import pyarrow as pa

from daskshare._malloc import release_freed

__all__ = ["release_unused"]


def release_unused() -> None:
    """Give the system back what Arrow's pool and the C library keep for later allocations.

    Notes
    -----
    Some milliseconds, and as many again when the memory is needed: for who waits longer than that.
    A C library that cannot do it is left alone.
    """
    pa.default_memory_pool().release_unused()
    release_freed()
