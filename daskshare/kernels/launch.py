"""Launching one kernel again and again, cheaply for those who share the interpreter."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

__all__ = ["KernelLaunch", "LaunchError"]


class LaunchError(RuntimeError):
    """The driver did not take a kernel."""


@functools.cache
def _driver() -> Any:
    # A call by CDLL or by CuPy gives the interpreter's lock away and waits to get it back, behind
    # all other threads; a launch takes two microseconds.
    launch = ctypes.PyDLL("libcuda.so.1").cuLaunchKernel
    launch.argtypes = [
        ctypes.c_void_p,
        *[ctypes.c_uint] * 7,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_void_p,
    ]
    launch.restype = ctypes.c_int
    return launch


class KernelLaunch:
    """A kernel of CuPy's whose arguments are some pointers, which change, and a constant.

    Parameters
    ----------
    kernel : cupy.RawKernel
        Compiled for the device.
    grid, block : tuple of int
        Three sizes each.
    num_pointers : int
        Leading arguments, device addresses.
    constant : bytes
        The last argument, a structure passed by value.
    stream : int
        Handle of the CUDA stream.

    Notes
    -----
    Used by one thread at a time, in which the kernel's device is current.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        *,
        num_pointers: int,
        constant: bytes,
        stream: int,
    ) -> None:
        self._kernel = kernel  # keeps its module loaded
        self._pointers = [ctypes.c_uint64() for _ in range(num_pointers)]
        self._constant = ctypes.create_string_buffer(constant, len(constant))
        addresses = [ctypes.addressof(value) for value in (*self._pointers, self._constant)]
        self._addresses = (ctypes.c_void_p * len(addresses))(*addresses)
        self._launch = functools.partial(
            _driver(), kernel.kernel.ptr, *grid, *block, 0, stream, self._addresses, None
        )

    def __call__(self, *pointers: int) -> None:
        """Queue the kernel with these device addresses.

        Raises
        ------
        LaunchError
            When the driver refuses.
        """
        for value, pointer in zip(self._pointers, pointers, strict=True):
            value.value = pointer
        error = self._launch()
        if error:
            raise LaunchError(
                f"cuLaunchKernel returned {error} for {self._kernel.name}; expected 0. The device "
                "may be in an unusable state: restart the worker."
            )
