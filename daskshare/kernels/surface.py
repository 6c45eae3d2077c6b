"""From a decoder's surface to a network's input in one step: colour and letterbox at once.

The arithmetic is that of :mod:`daskshare.kernels.colour` followed by that of
:mod:`daskshare.kernels.preprocess`, so the bytes equal those of the two kernels one after the
other; the frame of full size between them is never made.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from daskshare.kernels.colour import SAMPLE_SOURCE, YuvConversion, semiplanar_to_rgb
from daskshare.kernels.launch import KernelLaunch
from daskshare.kernels.preprocess import FILL, TAP_SOURCE, Letterbox, letterbox_torch

__all__ = ["MAX_SURFACES", "SurfaceLetterbox", "surface_letterbox_host"]

#: Surfaces that one launch takes.
MAX_SURFACES = 8

_SOURCE = (
    SAMPLE_SOURCE
    + TAP_SOURCE
    + r"""
struct Surfaces {
    unsigned char* out;
    const unsigned char* luma[MAX_SURFACES];
};

struct Plan {
    long long luma_pitch, chroma_pitch, chroma_offset;
    int source_height, source_width, height, width, inner_height, inner_width, top, left;
    float scale_y, scale_x;
    int offset, ky, krv, kgu, kgv, kbu;
};

template <typename T>
__device__ __forceinline__ void pixel_at(
    const unsigned char* luma, const unsigned char* chroma, const Plan& p, int x, int y, int* rgb)
{
    const T* uv = reinterpret_cast<const T*>(chroma + (y >> 1) * p.chroma_pitch) + (x >> 1) * 2;
    const int u = (sample(uv) - 128) * 8;
    const int v = (sample(uv + 1) - 128) * 8;
    const int level = sample(reinterpret_cast<const T*>(luma + y * p.luma_pitch) + x);
    const int l = ((level - p.offset) * 8 * p.ky) >> 16;
    rgb[0] = clamp(l + ((v * p.krv) >> 16));
    rgb[1] = clamp(l + ((u * p.kgu) >> 16) + ((v * p.kgv) >> 16));
    rgb[2] = clamp(l + ((u * p.kbu) >> 16));
}

template <typename T>
__global__ void surface_letterbox(const Surfaces surfaces, const Plan p)
{
    const unsigned char* luma = surfaces.luma[blockIdx.z];
    const unsigned char* chroma = luma + p.chroma_offset;
    unsigned char* out = surfaces.out + (long long)blockIdx.z * p.height * p.width * 3;
    const int x = blockIdx.x * blockDim.x + threadIdx.x;
    const int y = blockIdx.y * blockDim.y + threadIdx.y;
    if (x >= p.width || y >= p.height) return;
    unsigned char* pixel = out + (y * p.width + x) * 3;
    const int inner_x = x - p.left, inner_y = y - p.top;
    if (inner_x < 0 || inner_y < 0 || inner_x >= p.inner_width || inner_y >= p.inner_height) {
        pixel[0] = pixel[1] = pixel[2] = FILL;
        return;
    }
    int x0, x1, y0, y1;
    const int weight_x = tap(inner_x, p.scale_x, p.source_width, &x0, &x1);
    const int weight_y = tap(inner_y, p.scale_y, p.source_height, &y0, &y1);
    int a[3], b[3], c[3], d[3];
    pixel_at<T>(luma, chroma, p, x0, y0, a);
    pixel_at<T>(luma, chroma, p, x1, y0, b);
    pixel_at<T>(luma, chroma, p, x0, y1, c);
    pixel_at<T>(luma, chroma, p, x1, y1, d);
    for (int i = 0; i < 3; ++i) {
        const int upper = a[i] * (2048 - weight_x) + b[i] * weight_x;
        const int lower = c[i] * (2048 - weight_x) + d[i] * weight_x;
        pixel[i] = (unsigned char)(((((2048 - weight_y) * (upper >> 4)) >> 16)
            + ((weight_y * (lower >> 4)) >> 16) + 2) >> 2);
    }
}
""".replace("FILL", str(FILL)).replace("MAX_SURFACES", str(MAX_SURFACES))
)

_PLAN = np.dtype(
    [(name, "<i8") for name in ("luma_pitch", "chroma_pitch", "chroma_offset")]
    + [
        (name, "<i4")
        for name in (
            *("source_height", "source_width", "height", "width"),
            *("inner_height", "inner_width", "top", "left"),
        )
    ]
    + [(name, "<f4") for name in ("scale_y", "scale_x")]
    + [(name, "<i4") for name in ("offset", "ky", "krv", "kgu", "kgv", "kbu")]
)
_BLOCK = (32, 8, 1)


@functools.cache
def _kernel(device_index: int, sample_bytes: int) -> Any:
    import cupy

    name = f"surface_letterbox<{'unsigned char' if sample_bytes == 1 else 'unsigned short'}>"
    with cupy.cuda.Device(device_index):
        module = cupy.RawModule(code=_SOURCE, options=("--std=c++17",), name_expressions=(name,))
        return module.get_function(name)


class SurfaceLetterbox:
    """Letterboxes NV12 or P016 surfaces of one video on a CUDA device.

    Parameters
    ----------
    box : Letterbox
        From the surface's visible pixels to the network's input.
    conversion : YuvConversion
    pitch_bytes : int
        From a row to the next, of luma and of chroma.
    chroma_offset : int
        Bytes from a surface's luma to its chroma.
    sample_bytes : int
        1 for NV12, 2 for P016.
    device_index : int
        CUDA ordinal.
    stream : int
        Handle of the CUDA stream on which the kernel is queued.

    Notes
    -----
    Used by one thread, the decoding task's. What does not change from frame to frame is worked out
    once, and several surfaces take one launch, because callers share one interpreter.
    """

    def __init__(
        self,
        box: Letterbox,
        conversion: YuvConversion,
        *,
        pitch_bytes: int,
        chroma_offset: int,
        sample_bytes: int,
        device_index: int,
        stream: int,
    ) -> None:
        plan = np.zeros((), _PLAN)
        plan[()] = (
            *(pitch_bytes, pitch_bytes, chroma_offset),
            *(box.source_height, box.source_width, box.height, box.width),
            *(box.inner_height, box.inner_width, box.top, box.left),
            *(box.source_height / box.inner_height, box.source_width / box.inner_width),
            *(conversion.offset, conversion.luma, conversion.red_v),
            *(conversion.green_u, conversion.green_v, conversion.blue_u),
        )
        grid = (-(-box.width // _BLOCK[0]), -(-box.height // _BLOCK[1]), 1)
        self._launch = KernelLaunch(
            _kernel(device_index, sample_bytes),
            grid,
            _BLOCK,
            num_pointers=1 + MAX_SURFACES,
            constant=plan.tobytes(),
            stream=stream,
            max_depth=MAX_SURFACES,
        )
        self._frame_bytes = box.height * box.width * 3

    def __call__(self, luma_pointers: Sequence[int], out_pointer: int) -> None:
        """Queue some surfaces; returns before the kernel has run.

        Parameters
        ----------
        luma_pointers : sequence of int
            Device addresses of the surfaces.
        out_pointer : int
            Device address of as many frames in a row, height x width x 3 bytes each, RGB, written
            completely.

        Raises
        ------
        LaunchError
            When the driver refuses.

        Notes
        -----
        The device must be current in the calling thread.
        """
        for begin in range(0, len(luma_pointers), MAX_SURFACES):
            some = luma_pointers[begin : begin + MAX_SURFACES]
            self._launch(out_pointer + begin * self._frame_bytes, *some, depth=len(some))


def surface_letterbox_host(
    luma: np.ndarray, chroma: np.ndarray, conversion: YuvConversion, *, height: int, width: int
) -> np.ndarray:
    """Compute what :class:`SurfaceLetterbox` computes, in host memory: the kernel's twin.

    Parameters
    ----------
    luma : numpy.ndarray, shape (h, w), uint8 or uint16
    chroma : numpy.ndarray, shape (ceil(h / 2), ceil(w / 2), 2), same dtype
    conversion : YuvConversion
    height, width : int
        Of the network's input.

    Returns
    -------
    numpy.ndarray, shape (height, width, 3), uint8
    """
    frame = torch.from_numpy(semiplanar_to_rgb(luma, chroma, conversion))[None]
    out = torch.empty((1, height, width, 3), dtype=torch.uint8)
    letterbox_torch(frame, out)
    return out[0].numpy()
