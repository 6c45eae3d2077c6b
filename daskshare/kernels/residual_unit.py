"""A residual unit in one kernel: 1 x 1 convolution, 3 x 3 convolution, sum with its input.

With few channels the unit moves bytes rather than computes: apart, the two convolutions read or
write the activations five times, in one kernel twice. The input goes from memory into registers;
the inner activation of a tile and its margin stays in shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from daskshare.kernels.hopper import SHARED_BYTES, HopperKernel

__all__ = ["RESIDUAL_UNIT_VARIANTS", "SOURCE", "ResidualUnit", "UnitTile"]

# Rows of a matrix instruction.
_ROWS = 64

SOURCE = r"""
#define MID (C / 2)
#define PLANES_1 (C / 8)
#define PLANES_2 (MID / 8)
#define PW (TW + 2)
#define IN_BLOCKS ((((TH + 2) * PW) + 63) / 64)
#define OUT_BLOCKS ((TH * PW + 63) / 64)
#define MID_PLANE (IN_BLOCKS * 64 * 16)
#define THREADS (GROUPS * 128)

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) residual_unit(
    const u16* __restrict__ input, const u16* __restrict__ weights_1,
    const u16* __restrict__ bias_1, const u16* __restrict__ weights_2,
    const u16* __restrict__ bias_2, u16* __restrict__ output, int frames, int height, int width)
{
    extern __shared__ __align__(128) u8 shared[];
    u8* const mid = shared;                                    // PLANES_2 planes
    u8* const kernel_1 = mid + PLANES_2 * MID_PLANE;           // PLANES_1 x MID x 16 bytes
    u8* const kernel_2 = kernel_1 + PLANES_1 * MID * 16;       // 9 x PLANES_2 x C x 16 bytes
    float* const offset_1 = (float*)(kernel_2 + 9 * PLANES_2 * C * 16);
    float* const offset_2 = offset_1 + MID;

    const int thread = threadIdx.x;
    const int lane = thread & 31;
    const int quad = lane & 3;
    const int group = thread >> 7;
    const int row_in_block = ((thread >> 5) & 3) * 16 + (lane >> 2);

    for (int i = thread; i < PLANES_1 * MID; i += THREADS)
        ((uint4*)kernel_1)[i] = ((const uint4*)weights_1)[i];
    for (int i = thread; i < 9 * PLANES_2 * C; i += THREADS)
        ((uint4*)kernel_2)[i] = ((const uint4*)weights_2)[i];
    for (int i = thread; i < MID + C; i += THREADS) {
        float low, high;
        unpack(i < MID ? bias_1[i] : bias_2[i - MID], low, high);
        offset_1[i] = low;
    }
    publish();
    __syncthreads();

    const int tiles_x = (width + TW - 1) / TW;
    const int tiles_y = (height + TH - 1) / TH;
    const int tiles = tiles_x * tiles_y * frames;
    const u32 mid_address = shared_address(mid);
    const u32 kernel_1_address = shared_address(kernel_1);
    const u32 kernel_2_address = shared_address(kernel_2);

    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const int left = (tile % tiles_x) * TW;
        const int top = (tile / tiles_x % tiles_y) * TH;
        const u64 first_pixel = (u64)(tile / (tiles_x * tiles_y)) * height * width;

        for (int block = group; block < IN_BLOCKS; block += GROUPS) {
            // The input goes from memory into registers as the matrix instruction wants it; the
            // order of its channels is that of the weights.
            uint4 x[2][C / 32];
            bool inside[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int pixel = block * 64 + row_in_block + half * 8;
                const int row = top - 1 + pixel / PW, column = left - 1 + pixel % PW;
                inside[half] = row >= 0 && row < height && column >= 0 && column < width;
                const u16* const source =
                    input + (first_pixel + (inside[half] ? row * width + column : 0)) * C;
#pragma unroll
                for (int i = 0; i < C / 32; ++i)
                    x[half][i] = *(const uint4*)(source + i * 32 + quad * 8);
            }
            float sum[MID / 2];
            mma_begin();
#pragma unroll
            for (int i = 0; i < C / 32; ++i) {
                const u32 a[4] = {x[0][i].x, x[1][i].x, x[0][i].y, x[1][i].y};
                const u32 b[4] = {x[0][i].z, x[1][i].z, x[0][i].w, x[1][i].w};
                MMA_1(sum, a, operand(kernel_1_address + 4 * i * MID * 16, MID * 16), i > 0);
                MMA_1(sum, b, operand(kernel_1_address + (4 * i + 2) * MID * 16, MID * 16), 1);
            }
            mma_end();
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int pixel = block * 64 + row_in_block + half * 8;
#pragma unroll
                for (int plane = 0; plane < PLANES_2; ++plane) {
                    const float2 b = *(const float2*)(offset_1 + plane * 8 + quad * 2);
                    const u32 value = pack(leaky(sum[plane * 4 + half * 2] + b.x),
                                           leaky(sum[plane * 4 + half * 2 + 1] + b.y));
                    // Around the image lie zeros, not what the 1 x 1 convolution makes of zeros.
                    *(u32*)(mid + plane * MID_PLANE + pixel * 16 + quad * 4) =
                        inside[half] ? value : 0;
                }
            }
        }
        publish();
        __syncthreads();

        for (int block = group; block < OUT_BLOCKS; block += GROUPS) {
            float sum[C / 2];
            mma_begin();
#pragma unroll
            for (int tap = 0; tap < 9; ++tap)
#pragma unroll
                for (int k = 0; k < MID / 16; ++k) {
                    const int first = block * 64 + tap / 3 * PW + tap % 3;
                    MMA_2(sum, operand(mid_address + 2 * k * MID_PLANE + first * 16, MID_PLANE),
                          operand(kernel_2_address + (tap * PLANES_2 + 2 * k) * C * 16, C * 16),
                          tap + k > 0);
                }
            mma_end();
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int pixel = block * 64 + row_in_block + half * 8;
                const int row = pixel / PW, column = pixel % PW;
                const bool wanted = row < TH && column < TW && top + row < height &&
                                    left + column < width;
                const u64 at =
                    (first_pixel + (wanted ? (top + row) * width + left + column : 0)) * C;
#pragma unroll
                for (int part = 0; part < C / 32; ++part) {
                    u32 out[4];
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const int plane = part * 4 + i;
                        const float2 b = *(const float2*)(offset_2 + plane * 8 + quad * 2);
                        out[i] = pack(leaky(sum[plane * 4 + half * 2] + b.x),
                                      leaky(sum[plane * 4 + half * 2 + 1] + b.y));
                    }
                    quad_transpose(out, lane);
                    const int channel = (part * 4 + quad) * 8;
                    const uint4 residual = *(const uint4*)(input + at + channel);
                    add_pairs(out, residual);
                    if (wanted)
                        *(uint4*)(output + at + channel) =
                            make_uint4(out[0], out[1], out[2], out[3]);
                }
            }
        }
        __syncthreads();
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
    """

    height: int
    width: int
    groups: int

    @property
    def pixels(self) -> int:
        """Pixels that a plane of shared memory has room for: the tile and its margin."""
        return -((self.height + 2) * (self.width + 2) // -_ROWS) * _ROWS

    def shared_bytes(self, channels: int) -> int:
        """Shared memory of a block."""
        between = channels // 2
        kernels = channels * between * 2 + 9 * between * channels * 2
        return between * self.pixels * 2 + kernels + (between + channels) * 4

    def reach_bytes(self, channels: int) -> int:
        """How far into shared memory the second product reads.

        Its last rows are pixels that nobody wants; of the last plane they lie beyond the plane.
        """
        pitch = self.width + 2
        rows = -(self.height * pitch // -_ROWS) * _ROWS
        planes = channels // 16
        return (planes - 1) * self.pixels * 16 + (rows + 2 * pitch + 2) * 16

    def resident(self, channels: int) -> int:
        """Blocks that a multiprocessor holds."""
        threads = 512 if channels > 64 else 768
        by_memory = SHARED_BYTES // (self.shared_bytes(channels) + 1024)
        return max(1, min(by_memory, threads // (self.groups * 128)))


#: What is worth trying, by channels; the widths divide the maps of 416 and 608 pixels. Each was
#: seen to run: a tile that reads beyond a block's memory would end the process's use of the GPU.
RESIDUAL_UNIT_VARIANTS = {
    64: (UnitTile(8, 26, 2), UnitTile(16, 26, 4)),
    128: (
        UnitTile(16, 26, 4),
        UnitTile(13, 26, 3),
        UnitTile(8, 26, 4),
        UnitTile(8, 26, 2),
        UnitTile(16, 19, 4),
        UnitTile(8, 38, 3),
    ),
}


class ResidualUnit:
    """Leaky(conv3x3(leaky(conv1x1(x)))) + x with half the channels between.

    Parameters
    ----------
    first, second : tuple of torch.Tensor
        Weights and bias of the 1 x 1 convolution (c / 2, c, 1, 1) and of the 3 x 3 one
        (c, c / 2, 3, 3), in float16 or bfloat16 on the device; c is 64 or 128.
    tile : UnitTile
        How to divide the work.

    Raises
    ------
    ValueError
        For weights of other shapes, or a tile that would read beyond its shared memory.
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
        channels = second[0].shape[0]
        between = channels // 2
        expected = [(between, channels, 1, 1), (channels, between, 3, 3)]
        shapes = [tuple(first[0].shape), tuple(second[0].shape)]
        if shapes != expected or channels not in RESIDUAL_UNIT_VARIANTS:
            raise ValueError(f"got weights {shapes}; expected {expected} with 64 or 128 channels")
        used, reached = tile.shared_bytes(channels), tile.reach_bytes(channels)
        if reached > used:
            raise ValueError(
                f"{tile} reads {reached} bytes of shared memory, of which it has {used}"
            )
        self._tile = tile
        self._constants = (
            pack_planes(in_register_order(first[0])),
            first[1].contiguous(),
            pack_planes(second[0]),
            second[1].contiguous(),
        )
        self._kernel = HopperKernel(
            SOURCE,
            "residual_unit",
            constants={
                "BF16": int(first[0].dtype == torch.bfloat16),
                "C": channels,
                "TH": tile.height,
                "TW": tile.width,
                "GROUPS": tile.groups,
                "RESIDENT": tile.resident(channels),
                "MMA_1": f"mma_registers_{between}",
                "MMA_2": f"mma_{channels}",
            },
            products=[(between, True), (channels, False)],
            threads=tile.groups * 128,
            shared_bytes=used,
        )
        self._kernel.compile(first[0].device)

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Compute ``out`` from ``x``: both (n, c, height, width), channels-last, not the same."""
        n, _, height, width = x.shape
        tiles = n * -(height // -self._tile.height) * -(width // -self._tile.width)
        self._kernel(tiles, x, *self._constants, out, n, height, width, device=x.device)


def pack_planes(weight: torch.Tensor) -> torch.Tensor:
    """Weights (out, in, rows, columns) as (rows, columns, in / 8, out, 8), contiguous."""
    out, inner, rows, columns = weight.shape
    planes = weight.permute(2, 3, 1, 0).reshape(rows, columns, inner // 8, 8, out)
    return planes.transpose(3, 4).contiguous()


def in_register_order(weight: torch.Tensor) -> torch.Tensor:
    """Reorder input channels of 1 x 1 weights as four lanes hold them, eight in a row each."""
    out, inner = weight.shape[:2]
    # Of 32 channels a lane has eight; a matrix instruction takes two pairs of each lane.
    lanes = weight.reshape(out, inner // 32, 4, 2, 2, 2)
    return lanes.permute(0, 1, 3, 4, 2, 5).reshape(out, inner, 1, 1)
