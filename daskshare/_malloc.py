"""What the C library's malloc keeps of freed memory, where that library is glibc.

With another one (musl, macOS's) nothing here does anything.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from typing import Any

__all__ = ["MAX_RETAINED_BYTES", "release_freed", "retain_freed"]

#: mallopt takes an int.
MAX_RETAINED_BYTES = 2**31 - 1

# mallopt's parameters, as malloc.h numbers them.
_PARAMETERS = {"M_TRIM_THRESHOLD": -1, "M_MMAP_THRESHOLD": -3, "M_ARENA_MAX": -8}

# The most that glibc's own rule ever takes on 64 bits; some versions refuse more.
_MAX_MMAP_THRESHOLD = 32 * 2**20

logger = logging.getLogger("daskshare.worker")


@functools.cache
def _glibc() -> Any:
    """The C library if it is glibc, else None."""
    try:
        version = os.confstr("CS_GNU_LIBC_VERSION")
    except (AttributeError, ValueError, OSError):
        # Windows has no confstr, and others do not know the name.
        return None
    return ctypes.CDLL(None) if version and version.startswith("glibc") else None


def retain_freed(num_bytes: int) -> None:
    """Have malloc keep freed memory for later allocations, in one arena for all threads.

    Parameters
    ----------
    num_bytes : int
        How much at most stays free at the arena's end, up to ``MAX_RETAINED_BYTES``. Blocks larger
        than this, or than 32 MiB, are still mapped one by one and unmapped when they are freed.

    Notes
    -----
    For the whole process, and for good. A thread that has an arena of its own already keeps it, and
    ``MALLOC_ARENA_MAX`` in the environment goes before the single arena. What glibc refuses is
    logged.
    """
    libc = _glibc()
    if libc is None:
        return
    values = {
        "M_MMAP_THRESHOLD": min(num_bytes, _MAX_MMAP_THRESHOLD),
        "M_TRIM_THRESHOLD": num_bytes,
    }
    if "MALLOC_ARENA_MAX" not in os.environ:
        values["M_ARENA_MAX"] = 1
    for name, value in values.items():
        if not libc.mallopt(_PARAMETERS[name], value):
            logger.warning("malloc refuses %s=%d; models may run slower", name, value)


def release_freed() -> None:
    """Give the system back all memory that malloc has free."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)
