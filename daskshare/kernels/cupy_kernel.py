"""CuPy's run-time compiled kernels, launched on PyTorch's current stream and memory."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import numpy as np
import torch

from daskshare.errors import ConfigurationError

__all__ = ["CudaKernel", "cupy_stream"]


@cache
def _cupy() -> Any:
    try:
        return importlib.import_module("cupy")
    except ImportError as error:
        raise ConfigurationError(
            f"CuPy cannot be imported here ({error}); expected it wherever a model runs on a GPU. "
            "Install daskshare's extra: pip install 'daskshare[gpu]'.",
            option="cupy",
        ) from error


class _CudaStream:
    """A stream's handle under the protocol by which CUDA libraries exchange streams."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._handle


def cupy_stream(handle: int) -> Any:
    """CuPy's view of a CUDA stream that another library owns; a context manager.

    Parameters
    ----------
    handle : int
        The stream's ``cudaStream_t``, of the current device.
    """
    return _cupy().cuda.Stream.from_external(_CudaStream(handle))


class CudaKernel:
    """One CUDA C++ kernel that works on torch tensors.

    Parameters
    ----------
    source : str
        CUDA C++ without includes, holding ``extern "C" __global__ void name(...)``.
    name : str
        The kernel.

    Notes
    -----
    Launches go to the calling thread's current torch stream, allocate nothing and wait for
    nothing, so they can be captured in a CUDA graph. The first use on a device compiles; call
    :meth:`compile` before a capture. Thread-safe.
    """

    def __init__(self, source: str, name: str) -> None:
        self._source = source
        self._name = name
        self._kernel: Any = None

    def compile(self, device: torch.device) -> None:
        """Compile for ``device`` (a CUDA device with an index).

        Raises
        ------
        ConfigurationError
            When CuPy is not installed.
        """
        cupy = _cupy()
        with cupy.cuda.Device(device.index):
            if self._kernel is None:
                self._kernel = cupy.RawKernel(self._source, self._name)
            self._kernel.compile()

    def __call__(
        self, grid: tuple[int, ...], block: tuple[int, ...], *args: Any, device: torch.device
    ) -> None:
        """Launch; tensors are passed as pointers, ``int`` as int32, ``float`` as float32."""
        if self._kernel is None:
            self.compile(device)
        cupy = _cupy()
        stream = torch.cuda.current_stream(device).cuda_stream
        values = tuple(
            np.uint64(arg.data_ptr())
            if isinstance(arg, torch.Tensor)
            else np.int32(arg)
            if isinstance(arg, int)
            else np.float32(arg)
            for arg in args
        )
        with cupy.cuda.Device(device.index), cupy_stream(stream):
            self._kernel(grid, block, values)
