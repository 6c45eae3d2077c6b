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


_DIRECT = r"""
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


_GROUPED = r"""
#define PW (TW + 2)
#define BLOCKS (PIXELS / 64)
#define X_PLANE (PIXELS * 16 + 16)
#define MID_PLANE (PIXELS * 16)
#define OWN (8 * X_PLANE + 4 * MID_PLANE)
#define THREADS (GROUPS * 128)

// Every group of four warps works on tiles of its own; only the weights are shared. While one waits
// for memory, another multiplies and a third stores.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) residual_unit(
    const u16* __restrict__ input, const u16* __restrict__ weights_1,
    const u16* __restrict__ bias_1, const u16* __restrict__ weights_2,
    const u16* __restrict__ bias_2, u16* __restrict__ output, int frames, int height, int width)
{
    extern __shared__ __align__(128) u8 shared[];
    u8* const kernel_1 = shared;                             // 8 x 32 x 16 bytes
    u8* const kernel_2 = kernel_1 + 8 * 32 * 16;             // 9 x 4 x 64 x 16 bytes

    const int thread = threadIdx.x & 127;
    const int group = threadIdx.x >> 7;
    const int warp = thread >> 5;
    const int lane = thread & 31;
    u8* const x = kernel_2 + 9 * 4 * 64 * 16 + group * OWN;  // 8 planes
    u8* const mid = x + 8 * X_PLANE;                         // 4 planes

    for (int i = threadIdx.x; i < 8 * 32; i += THREADS)
        ((uint4*)kernel_1)[i] = ((const uint4*)weights_1)[i];
    for (int i = threadIdx.x; i < 9 * 4 * 64; i += THREADS)
        ((uint4*)kernel_2)[i] = ((const uint4*)weights_2)[i];
    float offset_1[8], offset_2[2], unused;
#pragma unroll
    for (int plane = 0; plane < 4; ++plane)
        unpack(*(const u32*)(bias_1 + plane * 8 + (lane & 3) * 2), offset_1[plane * 2],
               offset_1[plane * 2 + 1]);
    unpack(bias_2[warp * 16 + (lane >> 2)], offset_2[0], unused);
    unpack(bias_2[warp * 16 + (lane >> 2) + 8], offset_2[1], unused);
    publish();
    __syncthreads();

    const int tiles_x = (width + TW - 1) / TW;
    const int tiles_y = (height + TH - 1) / TH;
    const int tiles = tiles_x * tiles_y * frames;
    const u32 x_address = shared_address(x);
    const u32 mid_address = shared_address(mid);
    const u32 kernel_1_address = shared_address(kernel_1);
    const u32 kernel_2_address = shared_address(kernel_2);
    // Where this lane's rows of matrices lie: of the inner activation, and of the sums.
    const u32 mid_row = mid_address + (lane >> 4) * MID_PLANE +
                        (warp * 16 + (lane >> 3 & 1) * 8 + (lane & 7)) * 16;
    const u32 x_row = x_address + (warp * 2 + (lane >> 3 & 1)) * X_PLANE +
                      ((lane >> 4) * 8 + (lane & 7) + PW + 1) * 16;

    for (int tile = blockIdx.x * GROUPS + group; tile < tiles; tile += gridDim.x * GROUPS) {
        const int left = (tile % tiles_x) * TW;
        const int top = (tile / tiles_x % tiles_y) * TH;
        const u64 frame = (u64)(tile / (tiles_x * tiles_y)) * height * width * 64;
        for (int i = thread; i < (TH + 2) * PW * 8; i += 128) {
            const int pixel = i >> 3, plane = i & 7;
            const int row = top - 1 + pixel / PW, column = left - 1 + pixel % PW;
            const bool inside = row >= 0 && row < height && column >= 0 && column < width;
            const int at = inside ? (row * width + column) * 64 + plane * 8 : 0;
            copy_16(x_address + plane * X_PLANE + pixel * 16, input + frame + at, inside);
        }
        copies_end();
        publish();
        group_barrier(group);

        {
            float sum[BLOCKS][16];
            mma_begin();
#pragma unroll
            for (int block = 0; block < BLOCKS; ++block)
#pragma unroll
                for (int k = 0; k < 4; ++k)
                    mma_32(sum[block],
                           operand(x_address + 2 * k * X_PLANE + block * 1024, X_PLANE),
                           operand(kernel_1_address + 2 * k * 512, 512), k > 0);
            mma_end();
#pragma unroll
            for (int block = 0; block < BLOCKS; ++block) {
                u32 out[4][2];
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int pixel = block * 64 + warp * 16 + (lane >> 2) + half * 8;
                    const int row = top - 1 + pixel / PW, column = left - 1 + pixel % PW;
                    const bool inside = row >= 0 && row < height && column >= 0 && column < width;
#pragma unroll
                    for (int plane = 0; plane < 4; ++plane) {
                        const float* const d = sum[block] + plane * 4 + half * 2;
                        const u32 value = leaky_pair(
                            pack(d[0] + offset_1[plane * 2], d[1] + offset_1[plane * 2 + 1]));
                        // Around the image lie zeros, not what 1 x 1 weights make of zeros.
                        out[plane][half] = inside ? value : 0;
                    }
                }
#pragma unroll
                for (int plane = 0; plane < 4; plane += 2)
                    store_matrices(mid_row + plane * MID_PLANE + block * 1024, out[plane][0],
                                   out[plane][1], out[plane + 1][0], out[plane + 1][1]);
            }
        }
        publish();
        group_barrier(group);

        // Channels are the rows of this product and pixels its columns: of the operands in shared
        // memory the weights are the smaller then.
        float sum[N / 2];
        mma_begin();
#pragma unroll
        for (int tap = 0; tap < 9; ++tap)
#pragma unroll
            for (int k = 0; k < 2; ++k)
                MMA_2(sum, operand(kernel_2_address + (tap * 4 + 2 * k) * 1024, 1024),
                      operand(mid_address + 2 * k * MID_PLANE + (tap / 3 * PW + tap % 3) * 16,
                              MID_PLANE),
                      tap + k > 0);
        mma_end();
#pragma unroll
        for (int i = 0; i < N / 16; ++i) {
            const u32 at = x_row + i * 256;
            const float* const d = sum + i * 8;
            u32 residual[4];
            load_transposed(at, residual);
            store_transposed(
                at,
                add_pair(leaky_pair(pack(d[0] + offset_2[0], d[1] + offset_2[0])), residual[0]),
                add_pair(leaky_pair(pack(d[2] + offset_2[1], d[3] + offset_2[1])), residual[1]),
                add_pair(leaky_pair(pack(d[4] + offset_2[0], d[5] + offset_2[0])), residual[2]),
                add_pair(leaky_pair(pack(d[6] + offset_2[1], d[7] + offset_2[1])), residual[3]));
        }
        group_barrier(group);

        for (int i = thread; i < TH * TW * 8; i += 128) {
            const int pixel = i >> 3, plane = i & 7;
            const int row = pixel / TW, column = pixel % TW;
            if (top + row < height && left + column < width)
                *(uint4*)(output + frame + ((top + row) * width + left + column) * 64 +
                          plane * 8) =
                    *(const uint4*)(x + plane * X_PLANE + ((row + 1) * PW + column + 1) * 16);
        }
        group_barrier(group);
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
        0: the input goes into registers; 1 or 2: into shared memory, with 2 the next tile's while
        this one is computed; 3: every group has a tile of its own.
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

    def shared_bytes(self, channels: int) -> int:
        """Shared memory of a block."""
        between = channels // 2
        if self.stages == 3:
            own = 8 * (self.pixels * 16 + 16) + 4 * self.pixels * 16
            return 8 * 32 * 16 + 9 * 4 * 64 * 16 + self.groups * own
        x = self.stages * channels // 8 * (self.pixels * 16 + 16)
        kernels = channels * between * 2 + 9 * between * channels * 2
        return x + between * self.pixels * 2 + kernels + (between + channels) * 4

    @property
    def columns(self) -> int:
        """Columns of the second product where pixels are columns."""
        return -(self.height * (self.width + 2) // -16) * 16

    def resident(self, channels: int) -> int:
        """Blocks that a multiprocessor holds."""
        if self.stages == 3:
            return 1
        threads = 1024 if self.stages else 512 if channels > 64 else 768
        by_memory = _SHARED_BYTES // (self.shared_bytes(channels) + 1024)
        return max(1, min(by_memory, threads // (self.groups * 128)))


_SHARED_BYTES = 233472

#: What is worth trying by channels; the widths divide the maps of 416 and 608 pixels.
RESIDUAL_UNIT_VARIANTS = {
    64: (
        UnitTile(8, 26, 3, 3),
        UnitTile(16, 13, 3, 3),
        UnitTile(4, 26, 4, 3),
        UnitTile(10, 19, 3, 3),
        UnitTile(8, 26, 2, 3),
        UnitTile(16, 26, 4, 0),
        UnitTile(8, 26, 2, 0),
        UnitTile(16, 26, 4, 2),
    ),
    128: (
        UnitTile(16, 26, 4, 0),
        UnitTile(13, 26, 3, 0),
        UnitTile(8, 26, 4, 0),
        UnitTile(8, 26, 2, 0),
        UnitTile(16, 19, 4, 0),
        UnitTile(8, 38, 3, 0),
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
        direct = tile.stages == 0
        self._tile = tile
        self._constants = (
            pack_planes(in_register_order(first[0]) if direct else first[0]),
            first[1].contiguous(),
            pack_planes(second[0]),
            second[1].contiguous(),
        )
        self._kernel = HopperKernel(
            _DIRECT if direct else _GROUPED if tile.stages == 3 else _SOURCE,
            "residual_unit",
            constants={
                "BF16": int(first[0].dtype == torch.bfloat16),
                "TH": tile.height,
                "TW": tile.width,
                "GROUPS": tile.groups,
                "STAGES": tile.stages,
                "PIXELS": tile.pixels,
                "RESIDENT": tile.resident(channels),
                "C": channels,
                "MMA_1": f"mma_registers_{between}",
                "N": tile.columns,
                "MMA_2": f"mma_{tile.columns if tile.stages == 3 else channels}",
            },
            products=[
                (between, direct),
                (tile.columns if tile.stages == 3 else channels, False),
            ],
            threads=tile.groups * 128,
            shared_bytes=tile.shared_bytes(channels),
        )
        self._kernel.compile(first[0].device)

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Compute ``out`` from ``x``: both (n, c, height, width), channels-last, not the same."""
        n, _, height, width = x.shape
        tiles = n * -(height // -self._tile.height) * -(width // -self._tile.width)
        if self._tile.stages == 3:
            tiles = -(tiles // -self._tile.groups)
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
