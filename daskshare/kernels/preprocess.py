"""Letterboxing: OpenCV on the host, a CuPy kernel on the GPU, and that kernel's twin in torch.

The image keeps its aspect, is scaled bilinearly with half-pixel centres, centred, and surrounded by
grey 114. OpenCV's arithmetic for bytes (weights of 11 bits, two rounding shifts) is imitated, so
that all three agree within one grey level.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch

from daskshare.kernels.cupy_kernel import CudaKernel

__all__ = [
    "FILL",
    "TAP_SOURCE",
    "Letterbox",
    "letterbox_cuda",
    "letterbox_host",
    "letterbox_kernel",
    "letterbox_torch",
]

#: Grey level around the image.
FILL = 114


@dataclass(frozen=True, slots=True)
class Letterbox:
    """Where a source frame lies in the network's input.

    Parameters
    ----------
    source_height, source_width : int
        Pixels of the frame.
    height, width : int
        Pixels of the network's input.
    """

    source_height: int
    source_width: int
    height: int
    width: int

    @property
    def scale(self) -> float:
        """Input pixels to one source pixel, the same along both axes."""
        return min(self.height / self.source_height, self.width / self.source_width)

    @property
    def inner_height(self) -> int:
        """Rows that the image takes."""
        return max(1, round(self.source_height * self.scale))

    @property
    def inner_width(self) -> int:
        """Columns that the image takes."""
        return max(1, round(self.source_width * self.scale))

    @property
    def top(self) -> int:
        """Rows of fill above the image."""
        return (self.height - self.inner_height) // 2

    @property
    def left(self) -> int:
        """Columns of fill to its left."""
        return (self.width - self.inner_width) // 2

    def to_source(self, xyxy: np.ndarray) -> np.ndarray:
        """Map boxes (n, 4) from input pixels to source pixels, float32, not clipped."""
        offset = np.array([self.left, self.top] * 2, dtype=np.float64)
        return ((xyxy - offset) / self.scale).astype(np.float32)


def letterbox_host(frame: np.ndarray, out: np.ndarray) -> None:
    """Letterbox one frame into ``out`` with OpenCV.

    Parameters
    ----------
    frame : numpy.ndarray, shape (h, w, 3), uint8
        Source; any strides.
    out : numpy.ndarray, shape (height, width, 3), uint8
        Destination, written completely; rows may be apart, pixels must be together.

    Notes
    -----
    Runs in the caller's thread; OpenCV releases the interpreter lock.
    """
    box = Letterbox(*frame.shape[:2], *out.shape[:2])
    top, left = box.top, box.left
    bottom, right = top + box.inner_height, left + box.inner_width
    out[:top] = out[bottom:] = FILL
    out[top:bottom, :left] = out[top:bottom, right:] = FILL
    inner = out[top:bottom, left:right]
    if inner.shape == frame.shape:
        inner[:] = frame
    else:
        cv2.resize(
            frame, (box.inner_width, box.inner_height), inner, interpolation=cv2.INTER_LINEAR
        )


#: CUDA C++: the two source positions of an output position, and the second's weight of 2048.
TAP_SOURCE = r"""
__device__ __forceinline__ int tap(
    int at, float scale, int length, int* first, int* second)
{
    // Half-pixel centres; beyond the edge both taps are the edge itself.
    const float position = __fsub_rn(__fmul_rn((float)at + 0.5f, scale), 0.5f);
    const int floor_position = (int)floorf(position);
    *first = min(max(floor_position, 0), length - 1);
    *second = min(max(floor_position + 1, 0), length - 1);
    return __float2int_rn(__fmul_rn(__fsub_rn(position, (float)floor_position), 2048.0f));
}
"""

_SOURCE = (
    TAP_SOURCE
    + r"""
extern "C" __global__ void letterbox(
    const unsigned char* __restrict__ source, unsigned char* __restrict__ out,
    int source_height, int source_width, int height, int width,
    int inner_height, int inner_width, int top, int left, float scale_y, float scale_x)
{
    const int x = blockIdx.x * blockDim.x + threadIdx.x;
    const int y = blockIdx.y * blockDim.y + threadIdx.y;
    if (x >= width || y >= height) return;
    const long long frame = blockIdx.z;
    unsigned char* pixel = out + ((frame * height + y) * width + x) * 3;
    const int inner_x = x - left, inner_y = y - top;
    if (inner_x < 0 || inner_y < 0 || inner_x >= inner_width || inner_y >= inner_height) {
        pixel[0] = pixel[1] = pixel[2] = FILL;
        return;
    }
    int x0, x1, y0, y1;
    const int weight_x = tap(inner_x, scale_x, source_width, &x0, &x1);
    const int weight_y = tap(inner_y, scale_y, source_height, &y0, &y1);
    const unsigned char* row0 = source + (frame * source_height + y0) * source_width * 3;
    const unsigned char* row1 = source + (frame * source_height + y1) * source_width * 3;
    for (int c = 0; c < 3; ++c) {
        const int upper = row0[x0 * 3 + c] * (2048 - weight_x) + row0[x1 * 3 + c] * weight_x;
        const int lower = row1[x0 * 3 + c] * (2048 - weight_x) + row1[x1 * 3 + c] * weight_x;
        pixel[c] = (unsigned char)(((((2048 - weight_y) * (upper >> 4)) >> 16)
            + ((weight_y * (lower >> 4)) >> 16) + 2) >> 2);
    }
}
""".replace("FILL", str(FILL))
)

#: The compiled kernel.
letterbox_kernel = CudaKernel(_SOURCE, "letterbox")


def letterbox_cuda(frames: torch.Tensor, out: torch.Tensor) -> None:
    """Letterbox frames of one size on the GPU.

    Parameters
    ----------
    frames : torch.Tensor, shape (n, h, w, 3), uint8, CUDA, contiguous
        Sources.
    out : torch.Tensor, shape (n, height, width, 3), uint8, contiguous
        Destination on the same device, written completely.

    Notes
    -----
    Runs on the calling thread's current torch stream and returns before it is done.
    """
    box = Letterbox(*frames.shape[1:3], *out.shape[1:3])
    block = (32, 8, 1)
    grid = (-(-box.width // block[0]), -(-box.height // block[1]), len(frames))
    letterbox_kernel(
        grid,
        block,
        frames,
        out,
        box.source_height,
        box.source_width,
        box.height,
        box.width,
        box.inner_height,
        box.inner_width,
        box.top,
        box.left,
        box.source_height / box.inner_height,
        box.source_width / box.inner_width,
        device=out.device,
    )


def _taps(length: int, inner: int, device: Any) -> tuple[torch.Tensor, ...]:
    scale = torch.tensor(length / inner, dtype=torch.float32, device=device)
    position = (torch.arange(inner, dtype=torch.float32, device=device) + 0.5) * scale - 0.5
    below = position.floor()
    weight = ((position - below) * 2048).round().to(torch.int32)
    first = below.to(torch.int64)
    return first.clamp(0, length - 1), (first + 1).clamp(0, length - 1), weight


def letterbox_torch(frames: torch.Tensor, out: torch.Tensor) -> None:
    """The kernel's twin, for comparison: arguments of :func:`letterbox_cuda`, any device."""
    box = Letterbox(*frames.shape[1:3], *out.shape[1:3])
    x0, x1, weight_x = _taps(box.source_width, box.inner_width, frames.device)
    y0, y1, weight_y = _taps(box.source_height, box.inner_height, frames.device)
    weight_x, weight_y = weight_x[:, None], weight_y[:, None, None]
    wide = frames.to(torch.int32)
    rows = wide[:, :, x0] * (2048 - weight_x) + wide[:, :, x1] * weight_x
    upper, lower = rows[:, y0] >> 4, rows[:, y1] >> 4
    value = (((2048 - weight_y) * upper >> 16) + (weight_y * lower >> 16) + 2) >> 2
    out.fill_(FILL)
    bottom, right = box.top + box.inner_height, box.left + box.inner_width
    out[:, box.top : bottom, box.left : right] = value.to(torch.uint8)
