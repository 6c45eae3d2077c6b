"""What the first batch on a GPU would wait for, fetched while the weights are still being read."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch.nn import functional

from daskshare.kernels.postprocess import greedy_nms_cuda
from daskshare.kernels.preprocess import letterbox_kernel
from daskshare.models.network import first_convolution_channels
from daskshare.models.plan import NetworkPlan

__all__ = ["warm_up"]

# Input sizes are multiples of 32 in all networks that come with daskshare, and Triton compiles anew
# for numbers that are not multiples of 16.
_SIDE = 32


def warm_up(plan: NetworkPlan, device: torch.device, dtype: torch.dtype) -> None:
    """Make a CUDA device ready for a network, without its weights.

    Parameters
    ----------
    plan : NetworkPlan
        The network.
    device : torch.device
        A CUDA device with an index; its context is made, if there is none yet.
    dtype : torch.dtype
        In which the network computes.

    Raises
    ------
    ConfigurationError
        When CuPy is not installed.
    RuntimeError
        When the device refuses.

    Notes
    -----
    Loads cuDNN and CuPy, and compiles the kernels that a first batch needs or reads them from
    their caches on disk. Runs in any thread, and in one of its own besides.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="daskshare-load") as pool:
        # A library that is loaded beside packages that are imported.
        loading = pool.submit(_load_cudnn, device, dtype)
        _compile_kernels(plan, device, dtype)
        loading.result()


@torch.inference_mode()
def _load_cudnn(device: torch.device, dtype: torch.dtype) -> None:
    with torch.cuda.device(device):
        frames = torch.zeros((1, 8, _SIDE, _SIDE), dtype=dtype, device=device)
        kernel = torch.zeros((8, 8, 3, 3), dtype=dtype, device=device)
        functional.conv2d(
            frames.contiguous(memory_format=torch.channels_last),
            kernel.contiguous(memory_format=torch.channels_last),
        )
        torch.cuda.current_stream(device).synchronize()


@torch.inference_mode()
def _compile_kernels(plan: NetworkPlan, device: torch.device, dtype: torch.dtype) -> None:
    with torch.cuda.device(device):
        channels = first_convolution_channels(plan, dtype)
        if channels:
            from daskshare.kernels.first_convolution import compile_convolution

            compile_convolution(channels, dtype, device, side=_SIDE)
        letterbox_kernel.compile(device)
        greedy_nms_cuda.compile(device)
        torch.cuda.current_stream(device).synchronize()
