"""Decoded YUV 4:2:0 frames to RGB: one integer formula for the CPU's and the GPU's decoder.

libswscale's quick conversion is defined by 16-bit multiplications that keep the high half. The
CuPy kernel repeats that arithmetic instead of the textbook's, so that a model sees the same frame
wherever it was decoded, and the CPU keeps its fastest road.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

__all__ = [
    "SAMPLE_SOURCE",
    "YuvConversion",
    "semiplanar_to_rgb",
    "surface_to_rgb",
    "to_eight_bits",
    "yuv420_to_rgb",
    "yuv_conversion",
]

#: swscale's names (SWS_CS_*) of the matrices, from ISO/IEC 23091-4's MatrixCoefficients.
_SWS_COLORSPACE = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9, 10: 9}

# Red from V, blue from U, green from U, green from V: 16.16 fixed point, limited range.
_LIMITED_RANGE = {
    1: (117489, 138438, 13975, 34925),  # BT.709
    4: (104448, 132798, 24759, 53109),  # FCC
    5: (104597, 132201, 25675, 53279),  # BT.601
    7: (117579, 136230, 16907, 35559),  # SMPTE 240M
    9: (110013, 140363, 12277, 42626),  # BT.2020
}


@dataclass(frozen=True, slots=True)
class YuvConversion:
    """Coefficients of one YUV to RGB conversion, 2.13 fixed point.

    Parameters
    ----------
    luma, red_v, green_u, green_v, blue_u : int
        Factors of (Y - offset), V - 128, U - 128; green's are negative.
    offset : int
        Black's luma: 16, or 0 for the full range.
    sws_colorspace : int
        The same matrix as swscale calls it.
    full_range : bool
        Whether 0 to 255 are all used.
    """

    luma: int
    red_v: int
    green_u: int
    green_v: int
    blue_u: int
    offset: int
    sws_colorspace: int
    full_range: bool


@functools.lru_cache(maxsize=64)
def yuv_conversion(
    matrix: int, *, full_range: bool, width: int = 0, height: int = 0
) -> YuvConversion:
    """Choose the conversion of a stream.

    Parameters
    ----------
    matrix : int
        The stream's MatrixCoefficients (1 is BT.709, 2 unspecified, 5 and 6 BT.601, ...).
    full_range : bool
        Whether luma uses 0 to 255 instead of 16 to 235.
    width, height : int
        Coded size, pixels. Where a stream names no matrix, BT.709 is taken for high definition
        (more than 1024 wide or 576 high), else BT.601, as players do.
    """
    default = 1 if width > 1024 or height > 576 else 5
    colorspace = _SWS_COLORSPACE.get(matrix, default)
    red_v, blue_u, green_u, green_v = _LIMITED_RANGE[colorspace]
    luma, offset = (1 << 16) * 255 // 219, 16
    if full_range:
        luma, offset = 1 << 16, 0
        red_v, blue_u = red_v * 224 // 255, blue_u * 224 // 255
        green_u, green_v = green_u * 224 // 255, green_v * 224 // 255

    def narrow(value: int) -> int:
        return ((value << 13) + (1 << 15)) >> 16

    return YuvConversion(
        luma=narrow(luma),
        red_v=narrow(red_v),
        green_u=narrow(-green_u),
        green_v=narrow(-green_v),
        blue_u=narrow(blue_u),
        offset=offset,
        sws_colorspace=colorspace,
        full_range=full_range,
    )


def to_eight_bits(samples: np.ndarray, bit_depth: int) -> np.ndarray:
    """Round samples of 9 to 16 bits to 8 bits.

    Parameters
    ----------
    samples : numpy.ndarray, uint16
        Values in the low ``bit_depth`` bits.
    bit_depth : int
        Bits in use.

    Returns
    -------
    numpy.ndarray, uint8, the same shape
    """
    shift = bit_depth - 8
    # Clipping before adding keeps 16-bit samples from wrapping around.
    top = np.uint16((1 << bit_depth) - 1 - (1 << shift - 1))
    rounded = np.minimum(samples, top)
    rounded += np.uint16(1 << shift - 1)
    rounded >>= np.uint16(shift)
    narrow: np.ndarray = rounded.astype(np.uint8)
    return narrow


def yuv420_to_rgb(
    y: np.ndarray, u: np.ndarray, v: np.ndarray, conversion: YuvConversion
) -> np.ndarray:
    """Convert three planes to RGB; the reference for swscale and for the CuPy kernel.

    Parameters
    ----------
    y : numpy.ndarray, shape (height, width), uint8
    u, v : numpy.ndarray, shape (ceil(height / 2), ceil(width / 2)), uint8
        Each chroma sample colours its 2x2 pixels.
    conversion : YuvConversion

    Returns
    -------
    numpy.ndarray, shape (height, width, 3), uint8
    """
    height, width = y.shape
    luma = ((y.astype(np.int32) - conversion.offset) * 8 * conversion.luma) >> 16
    blue_difference = (u.astype(np.int32) - 128) * 8
    red_difference = (v.astype(np.int32) - 128) * 8

    def spread(term: np.ndarray) -> np.ndarray:
        return term.repeat(2, axis=0).repeat(2, axis=1)[:height, :width]

    rgb = np.empty((height, width, 3), np.int32)
    rgb[..., 0] = luma + spread((red_difference * conversion.red_v) >> 16)
    rgb[..., 1] = luma + spread(
        ((blue_difference * conversion.green_u) >> 16)
        + ((red_difference * conversion.green_v) >> 16)
    )
    rgb[..., 2] = luma + spread((blue_difference * conversion.blue_u) >> 16)
    return np.clip(rgb, 0, 255).astype(np.uint8)


def semiplanar_to_rgb(
    luma: np.ndarray, chroma: np.ndarray, conversion: YuvConversion
) -> np.ndarray:
    """Convert an NV12 or P016 surface in host memory: the kernel's twin.

    Parameters
    ----------
    luma : numpy.ndarray, shape (height, width), uint8 or uint16
        uint16: values in the high bits, as NVDEC delivers more than 8 bits.
    chroma : numpy.ndarray, shape (ceil(height / 2), ceil(width / 2), 2), same dtype
        U and V of 2x2 pixels.
    conversion : YuvConversion

    Returns
    -------
    numpy.ndarray, shape (height, width, 3), uint8
    """
    if luma.dtype == np.uint16:
        luma, chroma = to_eight_bits(luma, 16), to_eight_bits(chroma, 16)
    return yuv420_to_rgb(luma, chroma[..., 0], chroma[..., 1], conversion)


#: CUDA C++: reads a sample as 8 bits, and clamps to them.
SAMPLE_SOURCE = r"""
__device__ __forceinline__ int sample(const unsigned char* p) { return *p; }

// High-bit samples are rounded to 8 bits, with the top value kept from wrapping.
__device__ __forceinline__ int sample(const unsigned short* p) {
    return min((int(*p) + 128) >> 8, 255);
}

__device__ __forceinline__ unsigned char clamp(int x) { return min(max(x, 0), 255); }
"""

_SOURCE = (
    SAMPLE_SOURCE
    + r"""
template <typename T>
__global__ void semiplanar_to_rgb(
    const unsigned char* luma, const unsigned char* chroma, unsigned char* rgb,
    int width, int height, long long luma_pitch, long long chroma_pitch,
    int offset, int ky, int krv, int kgu, int kgv, int kbu)
{
    // A thread converts the 2x2 pixels that share one chroma sample.
    const int cx = blockIdx.x * blockDim.x + threadIdx.x;
    const int cy = blockIdx.y * blockDim.y + threadIdx.y;
    if (2 * cx >= width || 2 * cy >= height) return;
    const T* uv = reinterpret_cast<const T*>(chroma + cy * chroma_pitch) + 2 * cx;
    const int u = (sample(uv) - 128) * 8;
    const int v = (sample(uv + 1) - 128) * 8;
    const int red = (v * krv) >> 16;
    const int green = ((u * kgu) >> 16) + ((v * kgv) >> 16);
    const int blue = (u * kbu) >> 16;
    for (int y = 2 * cy; y < min(2 * cy + 2, height); ++y) {
        const T* row = reinterpret_cast<const T*>(luma + y * luma_pitch);
        unsigned char* out = rgb + (static_cast<long long>(y) * width + 2 * cx) * 3;
        for (int x = 2 * cx; x < min(2 * cx + 2, width); ++x, out += 3) {
            const int l = ((sample(row + x) - offset) * 8 * ky) >> 16;
            out[0] = clamp(l + red);
            out[1] = clamp(l + green);
            out[2] = clamp(l + blue);
        }
    }
}
"""
)


@functools.cache
def _kernel(sample_bytes: int) -> Any:
    import cupy

    name = f"semiplanar_to_rgb<{'unsigned char' if sample_bytes == 1 else 'unsigned short'}>"
    module = cupy.RawModule(code=_SOURCE, options=("--std=c++17",), name_expressions=(name,))
    return module.get_function(name)


def surface_to_rgb(
    luma_pointer: int,
    chroma_pointer: int,
    out: torch.Tensor,
    conversion: YuvConversion,
    *,
    luma_pitch_bytes: int,
    chroma_pitch_bytes: int,
    sample_bytes: int,
    stream: int,
) -> None:
    """Convert a surface in GPU memory, written by NVDEC, into one frame of a batch.

    Parameters
    ----------
    luma_pointer, chroma_pointer : int
        Device addresses of the luma plane and of the interleaved chroma plane.
    out : torch.Tensor, shape (height, width, 3), uint8, CUDA, contiguous
        Where the frame goes; its shape says how much of the surface is visible.
    conversion : YuvConversion
    luma_pitch_bytes, chroma_pitch_bytes : int
        Bytes from a row to the next.
    sample_bytes : int
        1 for NV12, 2 for P016.
    stream : int
        CUDA stream's handle on which the kernel is queued.

    Notes
    -----
    Runs in the decoding task's thread, with ``out``'s device current; returns before the kernel
    has run. Same results as :func:`semiplanar_to_rgb`.
    """
    from daskshare.kernels.cupy_kernel import cupy_stream

    height, width = int(out.shape[0]), int(out.shape[1])
    block = (32, 8)
    grid = (-(-width // (2 * block[0])), -(-height // (2 * block[1])))
    with cupy_stream(stream):
        _kernel(sample_bytes)(
            grid,
            block,
            (
                np.uint64(luma_pointer),
                np.uint64(chroma_pointer),
                np.uint64(out.data_ptr()),
                np.int32(width),
                np.int32(height),
                np.int64(luma_pitch_bytes),
                np.int64(chroma_pitch_bytes),
                np.int32(conversion.offset),
                np.int32(conversion.luma),
                np.int32(conversion.red_v),
                np.int32(conversion.green_u),
                np.int32(conversion.green_v),
                np.int32(conversion.blue_u),
            ),
        )
