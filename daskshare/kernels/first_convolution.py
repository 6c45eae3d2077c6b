"""The first convolution of a network, from uint8 frames: a Triton kernel.

With three input channels, libraries pad them to eight and spend a pass of their own on converting
the frames, on the padding and on the activation. Here one kernel reads the frames' bytes,
multiplies on the tensor cores and writes the activated output once: its floor is the bytes
of that output.

Imported only where CUDA is: Triton comes with torch's CUDA builds. The twin for the CPU, and for
other shapes, is the ordinary path of :mod:`daskshare.models.network`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["compile_convolution", "convolve_frames", "pack_weights"]

# Inner dimension of the product: 3 rows x 3 columns x 3 channels, padded for the tensor cores.
_TAPS = 32


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _convolve(  # type: ignore[no-untyped-def]
    frames,
    weights,
    bias,
    out,
    height,
    width,
    num_pixels,
    slope,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    TAPS: tl.constexpr,
):
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = pixel % width
    row = pixel // width
    y = row % height
    tap = tl.arange(0, TAPS)
    dy = tap // 9 - 1
    dx = tap % 9 // 3 - 1
    channel = tap % 3
    tap_x = x[:, None] + dx[None, :]
    tap_y = y[:, None] + dy[None, :]
    inside = (tap_x >= 0) & (tap_x < width) & (tap_y >= 0) & (tap_y < height)
    inside = inside & (tap[None, :] < 27) & (pixel[:, None] < num_pixels)
    # Frames lie one after another, so a pixel's number finds its frame as well.
    source = (pixel[:, None] + dy[None, :] * width + dx[None, :]) * 3 + channel[None, :]
    values = tl.load(frames + source, mask=inside, other=0)
    feature = tl.arange(0, CHANNELS)
    kernel = tl.load(weights + tap[:, None] * CHANNELS + feature[None, :])
    total = tl.dot(values.to(kernel.dtype), kernel) + tl.load(bias + feature)[None, :]
    total = tl.where(total > 0, total, total * slope)
    target = out + pixel[:, None].to(tl.int64) * CHANNELS + feature[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=pixel[:, None] < num_pixels)


def pack_weights(weight: torch.Tensor) -> torch.Tensor:
    """Arrange a convolution's weights as the kernel reads them.

    Parameters
    ----------
    weight : torch.Tensor, shape (channels, 3, 3, 3)
        Output channels, input channels, rows, columns; float16 or bfloat16.

    Returns
    -------
    torch.Tensor, shape (32, channels)
        Taps in the order rows, columns, input channels; five rows of zeros at the end.
    """
    taps = weight.permute(2, 3, 1, 0).reshape(27, -1)
    return torch.nn.functional.pad(taps, (0, 0, 0, _TAPS - 27)).contiguous()


def convolve_frames(
    frames: torch.Tensor, taps: torch.Tensor, bias: torch.Tensor, *, slope: float
) -> torch.Tensor:
    """Convolve frames 3 x 3 with stride 1 and padding 1, add a bias, apply a leaky ReLU.

    Parameters
    ----------
    frames : torch.Tensor, shape (n, height, width, 3), uint8
        Contiguous, on a CUDA device. Bytes are taken as they are: a division belongs into ``taps``.
    taps : torch.Tensor, shape (32, channels)
        From :func:`pack_weights`; ``channels`` is a power of two from 16 to 128.
    bias : torch.Tensor, shape (channels,)
        In the dtype of ``taps``.
    slope : float
        Of the leaky ReLU for negative values.

    Returns
    -------
    torch.Tensor, shape (n, channels, height, width)
        Channels-last, in the dtype of ``taps``.

    Notes
    -----
    Runs in the engine's thread on torch's current stream; can be captured in a CUDA graph and
    traced by ``torch.compile``.
    """
    number, height, width, _ = frames.shape
    channels = taps.shape[1]
    out = torch.empty((number, height, width, channels), dtype=taps.dtype, device=frames.device)
    num_pixels = number * height * width
    block = 128
    _convolve[(triton.cdiv(num_pixels, block),)](
        frames,
        taps,
        bias,
        out,
        height,
        width,
        num_pixels,
        slope,
        CHANNELS=channels,
        BLOCK=block,
        TAPS=_TAPS,
        num_warps=4,
    )
    return out.permute(0, 3, 1, 2)


def compile_convolution(
    channels: int, dtype: torch.dtype, device: torch.device, *, side: int
) -> None:
    """Compile the kernel, or read it from Triton's cache on disk.

    Parameters
    ----------
    channels : int
        Output channels.
    dtype : torch.dtype
        float16 or bfloat16.
    device : torch.device
        A CUDA device, the current one.
    side : int
        Pixels of a frame's side, of the same kind (a multiple of 16 or not) as those to come.
    """
    convolve_frames(
        torch.zeros((1, side, side, 3), dtype=torch.uint8, device=device),
        torch.zeros((_TAPS, channels), dtype=dtype, device=device),
        torch.zeros(channels, dtype=dtype, device=device),
        slope=0.0,
    )
