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

import torch

from daskshare.kernels.launch import LaunchError

__all__ = ["Event", "copy_async", "stream_is_idle", "wait_event"]

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
    driver.cuStreamQuery.argtypes = [ctypes.c_void_p]
    driver.cuEventRecord.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    driver.cuEventQuery.argtypes = [ctypes.c_void_p]
    return driver


class Event:
    """A point in a stream's work, to be recorded again and again.

    Parameters
    ----------
    blocking : bool
        Whether who waits sleeps in the driver instead of spinning on a core.

    Notes
    -----
    The first :meth:`record` is torch's, which makes the event; threads that record it again have
    worked on a CUDA device before.
    """

    def __init__(self, *, blocking: bool = False) -> None:
        self._event = torch.cuda.Event(blocking=blocking)  # type: ignore[no-untyped-call]
        self._handle = 0

    def record(self, stream: torch.cuda.Stream) -> None:
        """Move it to the end of what is queued on a stream.

        Raises
        ------
        LaunchError
            When the driver refuses.
        """
        if self._handle:
            _check(_driver().cuEventRecord(self._handle, stream.cuda_stream), "cuEventRecord")
        else:
            self._event.record(stream)
            self._handle = self._event.cuda_event

    def hold(self, stream: torch.cuda.Stream) -> None:
        """Let what is queued on a stream from now on wait for it; see :func:`wait_event`."""
        wait_event(stream.cuda_stream, self._handle)

    def synchronize(self) -> None:
        """Wait until the device has reached it; keeps the lock when it has."""
        if not self._handle or _driver().cuEventQuery(self._handle):
            self._event.synchronize()


def stream_is_idle(stream: int) -> bool:
    """Whether all that was queued on a stream is done.

    Parameters
    ----------
    stream : int
        Its CUDA handle; 0 is the default stream of the device that is current in the driver.

    Returns
    -------
    bool
        False also when the driver cannot say, as when no device is current in this thread.
    """
    idle: bool = _driver().cuStreamQuery(stream) == 0
    return idle


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
