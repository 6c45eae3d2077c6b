"""The first two convolutions of a network in one kernel, from uint8 frames.

The activation between them, 32 channels at full resolution, is the largest of the network: it stays
in shared memory. The second convolution has stride 2, so the pixels between lie in four planes, of
even and odd rows and columns, and each of its taps reads one plane without gaps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from daskshare.kernels.hopper import HopperKernel
from daskshare.kernels.residual_unit import pack_planes

__all__ = ["STEM_VARIANTS", "Stem", "StemTile"]

_ROWS = 64

_SOURCE = r"""
#define PW (TW + 1)
#define IN_BLOCKS (((TH + 1) * PW + 63) / 64)
#define OUT_BLOCKS ((TH * PW + 63) / 64)
#define PART (PIXELS * 16)          // one of four interleaved parts of a plane
#define PLANE (4 * PART)
#define FRAME_ROWS (2 * TH + 4)
#define THREADS (GROUPS * 128)

__device__ __forceinline__ u32 widen(const u8* at, bool aligned)
{
    u32 bytes;
    if (aligned) bytes = *(const u16*)at;
    else bytes = at[0] | (u32)at[1] << 8;
#if BF16
    return pack((float)(bytes & 255), (float)(bytes >> 8));
#else
    // Bytes as the low bits of 1024 in float16, less 1024: exact.
    u32 both = __byte_perm(bytes, 0x64646464u, 0x4140);
    asm("sub.rn.f16x2 %0, %0, %1;" : "+r"(both) : "r"(0x64006400u));
    return both;
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) stem(
    const u8* __restrict__ input, const u16* __restrict__ weights_1,
    const u16* __restrict__ bias_1, const u16* __restrict__ weights_2,
    const u16* __restrict__ bias_2, u16* __restrict__ output, int frames, int height, int width)
{
    extern __shared__ __align__(128) u8 shared[];
    u8* const mid = shared;                                  // 4 planes
    u8* const kernel_1 = mid + 4 * PLANE;                    // 4 x 32 x 16 bytes
    u8* const kernel_2 = kernel_1 + 4 * 32 * 16;             // 9 x 4 x 64 x 16 bytes
    float* const offset_1 = (float*)(kernel_2 + 9 * 4 * 64 * 16);
    float* const offset_2 = offset_1 + 32;
    u8* const pixels = (u8*)(offset_2 + 64);                 // FRAME_ROWS x PITCH

    const int thread = threadIdx.x;
    const int lane = thread & 31;
    const int group = thread >> 7;
    const int row_in_block = ((thread >> 5) & 3) * 16 + (lane >> 2);
    const int quad = lane & 3;
    const int pair = quad * 2;

    for (int i = thread; i < 4 * 32; i += THREADS)
        ((uint4*)kernel_1)[i] = ((const uint4*)weights_1)[i];
    for (int i = thread; i < 9 * 4 * 64; i += THREADS)
        ((uint4*)kernel_2)[i] = ((const uint4*)weights_2)[i];
    for (int i = thread; i < 96; i += THREADS) {
        float low, high;
        unpack(i < 32 ? bias_1[i] : bias_2[i - 32], low, high);
        offset_1[i] = low;
    }
    publish();

    const int out_height = height / 2, out_width = width / 2;
    const int tiles_x = (out_width + TW - 1) / TW;
    const int tiles_y = (out_height + TH - 1) / TH;
    const int tiles = tiles_x * tiles_y * frames;
    const u32 mid_address = shared_address(mid);
    const u32 kernel_1_address = shared_address(kernel_1);
    const u32 kernel_2_address = shared_address(kernel_2);
    const u32 pixels_address = shared_address(pixels);

    // Rows of a frame are multiples of four bytes, so a word lies in the frame or beside it.
    auto load = [&](int tile) {
        const int first = (tile % tiles_x) * TW * 6 - 6;
        const int base = first - (first & 3);
        const int top = (tile / tiles_x % tiles_y) * TH * 2 - 2;
        const u8* const frame = input + (u64)(tile / (tiles_x * tiles_y)) * height * width * 3;
        for (int i = thread; i < FRAME_ROWS * (PITCH / 4); i += THREADS) {
            const int row = top + i / (PITCH / 4), at = base + i % (PITCH / 4) * 4;
            const bool inside = row >= 0 && row < height && at >= 0 && at < width * 3;
            copy_4(pixels_address + i * 4, frame + (inside ? row * width * 3 + at : 0), inside);
        }
    };

    if (blockIdx.x < tiles) load(blockIdx.x);
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        copies_end();
        __syncthreads();
        const int left = (tile % tiles_x) * TW;
        const int top = (tile / tiles_x % tiles_y) * TH;
        const u8* const origin = pixels + ((left * 6 - 6) & 3);

        for (int work = group; work < 4 * IN_BLOCKS; work += GROUPS) {
            const int part = work / IN_BLOCKS, block = work % IN_BLOCKS;
            u32 a[2][4];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int pixel = block * 64 + row_in_block + half * 8;
                const int i = min(pixel / PW, TH) * 2 + (part >> 1);
                const int j = pixel % PW * 2 + (part & 1);
                const u8* const window = origin + i * PITCH + j * 3;
#pragma unroll
                for (int step = 0; step < 4; ++step) {
                    const int q = step * 4 + quad;  // a pair of the 3 x 9 bytes, in rows of ten
                    const int at = q < 15 ? q / 5 * PITCH + q % 5 * 2 : 0;
                    a[step >> 1][(step & 1) * 2 + half] = widen(window + at, !(part & 1));
                }
            }
            float sum[16];
            mma_begin();
            mma_registers_32(sum, a[0], operand(kernel_1_address, 512), 0);
            mma_registers_32(sum, a[1], operand(kernel_1_address + 2 * 512, 512), 1);
            mma_end();
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int pixel = block * 64 + row_in_block + half * 8;
                const int row = top * 2 - 1 + pixel / PW * 2 + (part >> 1);
                const int column = left * 2 - 1 + pixel % PW * 2 + (part & 1);
                const bool inside = row >= 0 && row < height && column >= 0 && column < width;
                u8* const target = mid + part * PART + pixel * 16 + pair * 2;
#pragma unroll
                for (int plane = 0; plane < 4; ++plane) {
                    const float2 b = *(const float2*)(offset_1 + plane * 8 + pair);
                    const u32 value = pack(leaky(sum[plane * 4 + half * 2] + b.x),
                                           leaky(sum[plane * 4 + half * 2 + 1] + b.y));
                    *(u32*)(target + plane * PLANE) = inside ? value : 0;
                }
            }
        }
        publish();
        __syncthreads();
        if (tile + gridDim.x < tiles) load(tile + gridDim.x);

        for (int block = group; block < OUT_BLOCKS; block += GROUPS) {
            float sum[32];
            mma_begin();
#pragma unroll
            for (int tap = 0; tap < 9; ++tap)
#pragma unroll
                for (int k = 0; k < 2; ++k) {
                    const int dy = tap / 3, dx = tap % 3;
                    const int part = (dy & 1) * 2 + (dx & 1);
                    const int first = block * 64 + (dy >> 1) * PW + (dx >> 1);
                    mma_64(sum,
                           operand(mid_address + 2 * k * PLANE + part * PART + first * 16, PLANE),
                           operand(kernel_2_address + (tap * 4 + 2 * k) * 1024, 1024),
                           tap + k > 0);
                }
            mma_end();
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int pixel = block * 64 + row_in_block + half * 8;
                const int row = pixel / PW, column = pixel % PW;
                const bool wanted = row < TH && column < TW && top + row < out_height &&
                                    left + column < out_width;
                const u64 frame = tile / (tiles_x * tiles_y);
                u16* const target = output +
                    ((frame * out_height + top + row) * out_width + left + column) * 64;
#pragma unroll
                for (int quarter = 0; quarter < 2; ++quarter) {
                    u32 out[4];
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const int plane = quarter * 4 + i;
                        const float2 b = *(const float2*)(offset_2 + plane * 8 + pair);
                        out[i] = pack(leaky(sum[plane * 4 + half * 2] + b.x),
                                      leaky(sum[plane * 4 + half * 2 + 1] + b.y));
                    }
                    quad_transpose(out, lane);
                    if (wanted)
                        *(uint4*)(target + (quarter * 4 + quad) * 8) =
                            make_uint4(out[0], out[1], out[2], out[3]);
                }
            }
        }
    }
}
"""


@dataclass(frozen=True, slots=True)
class StemTile:
    """How the kernel divides the work.

    Parameters
    ----------
    height, width : int
        Output pixels of a block's tile.
    groups : int
        Groups of four warps in a block.
    """

    height: int
    width: int
    groups: int

    @property
    def pixels(self) -> int:
        """Pixels that a quarter of a plane has room for."""
        # The last rows of the second product read on into the next part; nobody wants them.
        return -((self.height + 1) * (self.width + 1) // -_ROWS) * _ROWS

    @property
    def pitch_bytes(self) -> int:
        """Bytes of a row of the frame in shared memory."""
        return -((3 + (2 * self.width + 4) * 3 + 1) // -4) * 4

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block."""
        kernels = 4 * 32 * 16 + 9 * 4 * 64 * 16 + 96 * 4
        return 16 * self.pixels * 16 + kernels + (2 * self.height + 4) * self.pitch_bytes

    @property
    def resident(self) -> int:
        """Blocks that a multiprocessor holds."""
        return max(1, min(232448 // (self.shared_bytes + 1024), 2048 // (self.groups * 128)))


#: What is worth trying; the widths divide the maps of inputs of 416 and 608 pixels.
STEM_VARIANTS = (
    StemTile(8, 26, 2),
    StemTile(8, 26, 4),
    StemTile(16, 26, 4),
    StemTile(8, 52, 4),
    StemTile(4, 26, 2),
    StemTile(8, 13, 2),
    StemTile(8, 19, 3),
    StemTile(8, 38, 4),
    StemTile(16, 19, 4),
)


class Stem:
    """Two convolutions 3 x 3 with leaky ReLU: 3 to 32 channels, then 32 to 64 with stride 2.

    Parameters
    ----------
    first, second : tuple of torch.Tensor
        Weights and bias of each, (32, 3, 3, 3) and (64, 32, 3, 3), in float16 or bfloat16 on the
        device. Bytes are taken as they are: a division belongs into the first weights.
    tile : StemTile
        How to divide the work.

    Raises
    ------
    RuntimeError
        When the tile does not fit the device.

    Notes
    -----
    Compiled in the constructor. Calls run on torch's current stream and can be captured.
    """

    def __init__(
        self,
        first: tuple[torch.Tensor, torch.Tensor],
        second: tuple[torch.Tensor, torch.Tensor],
        tile: StemTile,
    ) -> None:
        if tuple(first[0].shape) != (32, 3, 3, 3) or tuple(second[0].shape) != (64, 32, 3, 3):
            raise ValueError(
                f"got weights {tuple(first[0].shape)} and {tuple(second[0].shape)}; expected "
                "(32, 3, 3, 3) and (64, 32, 3, 3)"
            )
        self._tile = tile
        self._constants = (
            pack_bytes(first[0]),
            first[1].contiguous(),
            pack_planes(second[0]),
            second[1].contiguous(),
        )
        self._kernel = HopperKernel(
            _SOURCE,
            "stem",
            constants={
                "BF16": int(first[0].dtype == torch.bfloat16),
                "TH": tile.height,
                "TW": tile.width,
                "GROUPS": tile.groups,
                "PIXELS": tile.pixels,
                "PITCH": tile.pitch_bytes,
                "RESIDENT": tile.resident,
            },
            threads=tile.groups * 128,
            shared_bytes=tile.shared_bytes,
        )
        self._kernel.compile(first[0].device)

    def __call__(self, frames: torch.Tensor, out: torch.Tensor) -> None:
        """Compute ``out`` (n, 64, h / 2, w / 2), channels-last, from uint8 (n, h, w, 3).

        Height must be even and width a multiple of four.
        """
        n, height, width, _ = frames.shape
        if height % 2 or width % 4:
            raise ValueError(
                f"got frames of {height} x {width}; expected an even height and a width in fours"
            )
        tiles = n * -(height // 2 // -self._tile.height) * -(width // 2 // -self._tile.width)
        self._kernel(tiles, frames, *self._constants, out, n, height, width, device=frames.device)


def pack_bytes(weight: torch.Tensor) -> torch.Tensor:
    """Weights (out, 3, 3, 3) as (4, out, 8): rows of nine bytes, each padded to ten."""
    out = weight.shape[0]
    rows = weight.permute(2, 3, 1, 0).reshape(3, 9, out)
    taps = torch.nn.functional.pad(rows, (0, 0, 0, 1)).reshape(30, out)
    taps = torch.nn.functional.pad(taps, (0, 0, 0, 2))
    return taps.reshape(4, 8, out).transpose(1, 2).contiguous()
