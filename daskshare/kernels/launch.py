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
    """A kernel of CuPy's that takes some addresses, which change, and a constant.

    Parameters
    ----------
    kernel : cupy.RawKernel
        Compiled for the device. Its two arguments are structures passed by value: the addresses,
        and the constant.
    grid, block : tuple of int
        Three sizes each; a launch may multiply the grid's third one.
    num_pointers : int
        Device addresses in the first structure.
    constant : bytes
        The second structure.
    stream : int
        Handle of the CUDA stream.
    max_depth : int
        Largest ``depth`` of a launch.

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
        max_depth: int = 1,
    ) -> None:
        self._kernel = kernel  # keeps its module loaded
        self._pointers = (ctypes.c_uint64 * num_pointers)()
        self._constant = ctypes.create_string_buffer(constant, len(constant))
        addresses = [ctypes.addressof(value) for value in (self._pointers, self._constant)]
        self._addresses = (ctypes.c_void_p * len(addresses))(*addresses)
        x, y, z = grid
        self._launches = [
            functools.partial(
                _driver(),
                *(kernel.kernel.ptr, x, y, z * depth, *block),
                *(0, stream, self._addresses, None),
            )
            for depth in range(1, max_depth + 1)
        ]

    def __call__(self, *pointers: int, depth: int = 1) -> None:
        """Queue the kernel with these device addresses.

        Parameters
        ----------
        *pointers : int
            The first of the addresses; others keep their values.
        depth : int
            By how much the grid's third size is multiplied; 1 to ``max_depth``.

        Raises
        ------
        ValueError
            When more addresses come than the kernel takes, or ``depth`` is out of range.
        LaunchError
            When the driver refuses.
        """
        if len(pointers) > len(self._pointers):
            raise ValueError(
                f"got {len(pointers)} addresses for {self._kernel.name}; expected at most "
                f"{len(self._pointers)}"
            )
        if not 1 <= depth <= len(self._launches):
            raise ValueError(f"got a depth of {depth}; expected 1 to {len(self._launches)}")
        self._pointers[: len(pointers)] = list(pointers)
        error = self._launches[depth - 1]()
        if error:
            raise LaunchError(
                f"cuLaunchKernel returned {error} for {self._kernel.name}; expected 0. The device "
                "may be in an unusable state: restart the worker."
            )
