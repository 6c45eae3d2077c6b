"""Calls of the CUDA driver for microseconds of work, which keep the interpreter's lock.

Torch's functions give the lock away. With a dozen threads that want it, getting it back takes
longer than the work, and who feeds the device with a hundred such calls a batch cannot keep up.
The price: while another thread holds the driver's own lock, as it does to take memory or to open a
decoder, a call waits for that, and all threads of the interpreter with it.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

from daskshare.kernels.launch import LaunchError

__all__ = ["copy_async", "wait_event"]

_OUT_OF_MEMORY = 2


@functools.cache
def _driver() -> Any:
    driver = ctypes.PyDLL("libcuda.so.1")
    driver.cuMemcpyAsync.argtypes = [
        ctypes.c_uint64,
        ctypes.c_uint64,
        ctypes.c_size_t,
        ctypes.c_void_p,
    ]
    driver.cuStreamWaitEvent.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint]
    return driver


def copy_async(target: int, source: int, num_bytes: int, stream: int) -> None:
    """Queue a copy between memories of the device and page-locked ones of the host.

    Parameters
    ----------
    target, source : int
        Addresses. Both memories must stay as they are until the copy has been made.
    num_bytes : int
        None are copied, if it is 0.
    stream : int
        Handle of the CUDA stream.

    Raises
    ------
    LaunchError
        When the driver refuses.

    Notes
    -----
    The stream's device must be current in the calling thread.
    """
    if num_bytes:
        _check(_driver().cuMemcpyAsync(target, source, num_bytes, stream), "cuMemcpyAsync")


def wait_event(stream: int, event: int) -> None:
    """Let what is queued on a stream from now on wait for an event.

    Parameters
    ----------
    stream, event : int
        Their CUDA handles; the event was recorded before.

    Raises
    ------
    LaunchError
        When the driver refuses.
    """
    _check(_driver().cuStreamWaitEvent(stream, event, 0), "cuStreamWaitEvent")


def _check(error: int, function: str) -> None:
    if error == _OUT_OF_MEMORY:
        raise LaunchError(f"CUDA error: out of memory ({function}). Use smaller batches.")
    if error:
        raise LaunchError(
            f"CUDA error: {function} returned {error}; expected 0. The device may be in an "
            "unusable state: restart the worker."
        )
