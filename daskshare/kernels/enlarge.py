"""Nearest-neighbour enlargement that writes into part of a wider buffer."""

from __future__ import annotations

import torch

from daskshare.kernels.cupy_kernel import CudaKernel

__all__ = ["enlarge", "enlarge_kernel"]

_THREADS = 256

# A thread moves 16 bytes: eight channels of one pixel.
_SOURCE = r"""
extern "C" __global__ void enlarge(
    const uint4* __restrict__ source, uint4* __restrict__ target, int pixels, int width,
    int groups, int source_pitch, int target_pitch, int factor)
{
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    const int pixel = i / groups, group = i % groups;
    if (pixel >= pixels) return;
    const uint4 value = source[(long long)pixel * source_pitch + group];
    const long long first =
        ((long long)(pixel / width) * factor * width + pixel % width) * factor;
    for (int y = 0; y < factor; ++y)
        for (int x = 0; x < factor; ++x)
            target[(first + (long long)y * width * factor + x) * target_pitch + group] = value;
}
"""

#: The compiled kernel; ``compile(device)`` it before capturing a graph.
enlarge_kernel = CudaKernel(_SOURCE, "enlarge")


def enlarge(source: torch.Tensor, target: torch.Tensor, *, factor: int) -> None:
    """Make every pixel of ``source`` ``factor`` x ``factor`` pixels of ``target``.

    Parameters
    ----------
    source : torch.Tensor, shape (n, channels, height, width)
        Half precision on a CUDA device, channels innermost; channels, and those of the buffers that
        the tensors are parts of, come in eights.
    target : torch.Tensor, shape (n, channels, height * factor, width * factor)
        Written.
    factor : int
        Of the enlargement.

    Notes
    -----
    Runs on torch's current stream and can be captured.
    """
    n, channels, height, width = source.shape
    pixels = n * height * width
    groups = channels // 8
    enlarge_kernel(
        (-(pixels * groups // -_THREADS), 1, 1),
        (_THREADS, 1, 1),
        source,
        target,
        pixels,
        width,
        groups,
        source.stride(3) // 8,
        target.stride(3) // 8,
        factor,
        device=source.device,
    )
