"""A residual unit in one kernel: 1 x 1 convolution, 3 x 3 convolution, sum with its input.

With 64 channels the unit moves bytes rather than computes: apart, the two convolutions read or
write the activations five times, in one kernel twice. Each block keeps the input of one tile and
its margin, and the inner activation, in shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from daskshare.kernels.hopper import HopperKernel

__all__ = ["RESIDUAL_UNIT_VARIANTS", "ResidualUnit", "UnitTile"]

# Rows of a matrix instruction.
_ROWS = 64

_SOURCE = r"""
#define PW (TW + 2)
#define IN_BLOCKS ((((TH + 2) * PW) + 63) / 64)
#define OUT_BLOCKS ((TH * PW + 63) / 64)
#define X_PLANE (PIXELS * 16 + 16)
#define MID_PLANE (PIXELS * 16)
#define THREADS (GROUPS * 128)

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) residual_unit(
    const u16* __restrict__ input, const u16* __restrict__ weights_1,
    const u16* __restrict__ bias_1, const u16* __restrict__ weights_2,
    const u16* __restrict__ bias_2, u16* __restrict__ output, int frames, int height, int width)
{
    extern __shared__ __align__(128) u8 shared[];
    u8* const x = shared;                                    // STAGES x 8 planes
    u8* const mid = x + STAGES * 8 * X_PLANE;                // 4 planes
    u8* const kernel_1 = mid + 4 * MID_PLANE;                // 8 x 32 x 16 bytes
    u8* const kernel_2 = kernel_1 + 8 * 32 * 16;             // 9 x 4 x 64 x 16 bytes
    float* const offset_1 = (float*)(kernel_2 + 9 * 4 * 64 * 16);
    float* const offset_2 = offset_1 + 32;

    const int thread = threadIdx.x;
    const int lane = thread & 31;
    const int group = thread >> 7;
    const int row_in_block = ((thread >> 5) & 3) * 16 + (lane >> 2);
    const int pair = (lane & 3) * 2;

    for (int i = thread; i < 8 * 32; i += THREADS)
        ((uint4*)kernel_1)[i] = ((const uint4*)weights_1)[i];
    for (int i = thread; i < 9 * 4 * 64; i += THREADS)
        ((uint4*)kernel_2)[i] = ((const uint4*)weights_2)[i];
    for (int i = thread; i < 96; i += THREADS) {
        float low, high;
        unpack(i < 32 ? bias_1[i] : bias_2[i - 32], low, high);
        offset_1[i] = low;
    }
    publish();

    const int tiles_x = (width + TW - 1) / TW;
    const int tiles_y = (height + TH - 1) / TH;
    const int tiles = tiles_x * tiles_y * frames;
    const u32 x_address = shared_address(x);
    const u32 mid_address = shared_address(mid);
    const u32 kernel_1_address = shared_address(kernel_1);
    const u32 kernel_2_address = shared_address(kernel_2);

    auto load = [&](int tile, int stage) {
        const int left = (tile % tiles_x) * TW - 1;
        const int top = (tile / tiles_x % tiles_y) * TH - 1;
        const u16* const frame = input + (u64)(tile / (tiles_x * tiles_y)) * height * width * 64;
        const u32 target = x_address + stage * 8 * X_PLANE;
        for (int i = thread; i < (TH + 2) * PW * 8; i += THREADS) {
            const int pixel = i >> 3, plane = i & 7;
            const int row = top + pixel / PW, column = left + pixel % PW;
            const bool inside = row >= 0 && row < height && column >= 0 && column < width;
            const int at = inside ? (row * width + column) * 64 + plane * 8 : 0;
            copy_16(target + plane * X_PLANE + pixel * 16, frame + at, inside);
        }
    };

    int stage = 0;
    if (blockIdx.x < tiles) load(blockIdx.x, 0);
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        copies_end();
        publish();
        __syncthreads();
        if (STAGES == 2 && tile + gridDim.x < tiles) load(tile + gridDim.x, stage ^ 1);

        const int left = (tile % tiles_x) * TW;
        const int top = (tile / tiles_x % tiles_y) * TH;
        const u32 x_stage = x_address + stage * 8 * X_PLANE;
        const u8* const x_here = x + stage * 8 * X_PLANE;

        for (int block = group; block < IN_BLOCKS; block += GROUPS) {
            float sum[16];
            mma_begin();
#pragma unroll
            for (int k = 0; k < 4; ++k)
                mma_32(sum, operand(x_stage + 2 * k * X_PLANE + block * 1024, X_PLANE),
                       operand(kernel_1_address + 2 * k * 512, 512), k > 0);
            mma_end();
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int pixel = block * 64 + row_in_block + half * 8;
                const int row = top - 1 + pixel / PW, column = left - 1 + pixel % PW;
                const bool inside = row >= 0 && row < height && column >= 0 && column < width;
#pragma unroll
                for (int plane = 0; plane < 4; ++plane) {
                    const float2 b = *(const float2*)(offset_1 + plane * 8 + pair);
                    const u32 value = pack(leaky(sum[plane * 4 + half * 2] + b.x),
                                           leaky(sum[plane * 4 + half * 2 + 1] + b.y));
                    // Around the image lie zeros, not what the 1 x 1 convolution makes of zeros.
                    *(u32*)(mid + plane * MID_PLANE + pixel * 16 + pair * 2) = inside ? value : 0;
                }
            }
        }
        publish();
        __syncthreads();

        for (int block = group; block < OUT_BLOCKS; block += GROUPS) {
            float sum[32];
            mma_begin();
#pragma unroll
            for (int tap = 0; tap < 9; ++tap)
#pragma unroll
                for (int k = 0; k < 2; ++k) {
                    const int first = block * 64 + tap / 3 * PW + tap % 3;
                    mma_64(sum, operand(mid_address + 2 * k * MID_PLANE + first * 16, MID_PLANE),
                           operand(kernel_2_address + (tap * 4 + 2 * k) * 1024, 1024),
                           tap + k > 0);
                }
            mma_end();
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int pixel = block * 64 + row_in_block + half * 8;
                const int row = pixel / PW, column = pixel % PW;
                const bool wanted = row < TH && column < TW && top + row < height &&
                                    left + column < width;
                const u64 frame = tile / (tiles_x * tiles_y);
                u16* const target = output +
                    ((frame * height + top + row) * width + left + column) * 64;
#pragma unroll
                for (int quarter = 0; quarter < 2; ++quarter) {
                    u32 out[4];
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const int plane = quarter * 4 + i;
                        const float2 b = *(const float2*)(offset_2 + plane * 8 + pair);
                        float low, high;
                        unpack(*(const u32*)(x_here + plane * X_PLANE + (pixel + PW + 1) * 16 +
                                             pair * 2), low, high);
                        out[i] = pack(leaky(sum[plane * 4 + half * 2] + b.x) + low,
                                      leaky(sum[plane * 4 + half * 2 + 1] + b.y) + high);
                    }
                    quad_transpose(out, lane);
                    if (wanted)
                        *(uint4*)(target + (quarter * 4 + (lane & 3)) * 8) =
                            make_uint4(out[0], out[1], out[2], out[3]);
                }
            }
        }
        if (STAGES == 2) {
            stage ^= 1;
        } else {
            __syncthreads();
            if (tile + gridDim.x < tiles) load(tile + gridDim.x, 0);
        }
    }
}
"""


@dataclass(frozen=True, slots=True)
class UnitTile:
    """How the kernel divides the work.

    Parameters
    ----------
    height, width : int
        Pixels of a block's tile.
    groups : int
        Groups of four warps in a block.
    stages : int
        2: the next tile's input arrives while this one is computed.
    """

    height: int
    width: int
    groups: int
    stages: int

    @property
    def pixels(self) -> int:
        """Pixels that a plane of shared memory has room for."""
        # The last rows of the second product read on into the next plane; nobody wants them.
        return -((self.height + 2) * (self.width + 2) // -_ROWS) * _ROWS

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block."""
        x = self.stages * 8 * (self.pixels * 16 + 16)
        return x + 4 * self.pixels * 16 + 8 * 32 * 16 + 9 * 4 * 64 * 16 + 96 * 4

    @property
    def resident(self) -> int:
        """Blocks that a multiprocessor holds."""
        return max(1, min(232448 // (self.shared_bytes + 1024), 2048 // (self.groups * 128)))


#: What is worth trying; the widths divide the maps of inputs of 416 and 608 pixels.
RESIDUAL_UNIT_VARIANTS = (
    UnitTile(16, 26, 4, 2),
    UnitTile(8, 52, 4, 2),
    UnitTile(8, 26, 2, 1),
    UnitTile(8, 26, 4, 1),
    UnitTile(8, 26, 4, 2),
    UnitTile(8, 38, 4, 2),
    UnitTile(8, 19, 3, 1),
    UnitTile(16, 19, 3, 2),
    UnitTile(16, 13, 4, 1),
)


class ResidualUnit:
    """Leaky(conv3x3(leaky(conv1x1(x)))) + x for 64 channels and 32 between.

    Parameters
    ----------
    first, second : tuple of torch.Tensor
        Weights and bias of the 1 x 1 convolution (32, 64, 1, 1) and of the 3 x 3 (64, 32, 3, 3), in
        float16 or bfloat16 on the device.
    tile : UnitTile
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
        tile: UnitTile,
    ) -> None:
        if tuple(first[0].shape) != (32, 64, 1, 1) or tuple(second[0].shape) != (64, 32, 3, 3):
            raise ValueError(
                f"got weights {tuple(first[0].shape)} and {tuple(second[0].shape)}; expected "
                "(32, 64, 1, 1) and (64, 32, 3, 3)"
            )
        self._tile = tile
        self._constants = (
            pack_planes(first[0]),
            first[1].contiguous(),
            pack_planes(second[0]),
            second[1].contiguous(),
        )
        self._kernel = HopperKernel(
            _SOURCE,
            "residual_unit",
            constants={
                "BF16": int(first[0].dtype == torch.bfloat16),
                "TH": tile.height,
                "TW": tile.width,
                "GROUPS": tile.groups,
                "STAGES": tile.stages,
                "PIXELS": tile.pixels,
                "RESIDENT": tile.resident,
            },
            threads=tile.groups * 128,
            shared_bytes=tile.shared_bytes,
        )
        self._kernel.compile(first[0].device)

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Compute ``out`` from ``x``: both (n, 64, height, width), channels-last, not the same."""
        n, _, height, width = x.shape
        tiles = n * -(height // -self._tile.height) * -(width // -self._tile.width)
        self._kernel(tiles, x, *self._constants, out, n, height, width, device=x.device)


def pack_planes(weight: torch.Tensor) -> torch.Tensor:
    """Weights (out, in, rows, columns) as (rows, columns, in / 8, out, 8), contiguous."""
    out, inner, rows, columns = weight.shape
    planes = weight.permute(2, 3, 1, 0).reshape(rows, columns, inner // 8, 8, out)
    return planes.transpose(3, 4).contiguous()
