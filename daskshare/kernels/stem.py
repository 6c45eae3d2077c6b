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

__all__ = ["SOURCE", "STEM_VARIANTS", "Stem", "StemTile"]

SOURCE = r"""
#define PW (TW + 1)
#define EVEN ((TH + 1) * PW)                 // pixels of the parts with even rows
#define ODD (TH * PW)
#define BLOCKS ((EVEN + 63) / 64)
#define PLANE ((EVEN + ODD) * 2 * 16)
#define OUT_PLANE (N * 16 + 16)
#define FRAME_ROWS (2 * TH + 4)
#define OWN (4 * PLANE + 128 + FRAME_ROWS * PITCH + OWN_PAD)
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

// Every group of four warps works on tiles of its own; only the weights are shared. While one waits
// for memory, another multiplies and a third stores.
extern "C" __global__ void __launch_bounds__(THREADS, 1) stem(
    const u8* __restrict__ input, const u16* __restrict__ weights_1,
    const u16* __restrict__ weights_2, const u16* __restrict__ bias_2,
    u16* __restrict__ output, int frames, int height, int width)
{
    extern __shared__ __align__(128) u8 shared[];
    u8* const kernel_1 = shared;                             // 4 x 32 x 16 bytes
    u8* const kernel_2 = kernel_1 + 4 * 32 * 16;             // 9 x 4 x 64 x 16 bytes

    const int thread = threadIdx.x & 127;
    const int group = threadIdx.x >> 7;
    const int warp = thread >> 5;
    const int lane = thread & 31;
    const int quad = lane & 3;
    u8* const mid = kernel_2 + 9 * 4 * 64 * 16 + group * OWN;  // 4 planes of 4 parts
    u8* const spill = mid + 4 * PLANE;                       // what lies beyond a part
    u8* const pixels = spill + 128;                          // FRAME_ROWS x PITCH

    for (int i = threadIdx.x; i < 4 * 32; i += THREADS)
        ((uint4*)kernel_1)[i] = ((const uint4*)weights_1)[i];
    for (int i = threadIdx.x; i < 9 * 4 * 64; i += THREADS)
        ((uint4*)kernel_2)[i] = ((const uint4*)weights_2)[i];
    float offset[2], unused;
    unpack(bias_2[warp * 16 + (lane >> 2)], offset[0], unused);
    unpack(bias_2[warp * 16 + (lane >> 2) + 8], offset[1], unused);
    publish();
    __syncthreads();

    const int out_height = height / 2, out_width = width / 2;
    const int tiles_x = (out_width + TW - 1) / TW;
    const int tiles_y = (out_height + TH - 1) / TH;
    const int tiles = tiles_x * tiles_y * frames;
    const u32 mid_address = shared_address(mid);
    const u32 spill_address = shared_address(spill);
    const u32 kernel_1_address = shared_address(kernel_1);
    const u32 kernel_2_address = shared_address(kernel_2);
    const u32 pixels_address = shared_address(pixels);
    const u32 out_row = mid_address + (warp * 2 + (lane >> 3 & 1)) * OUT_PLANE +
                        ((lane >> 4) * 8 + (lane & 7)) * 16;
    // Pairs of the 3 x 9 bytes, in rows of ten; the sixteenth pair is one and nothing: the bias.
    int taps[4];
#pragma unroll
    for (int step = 0; step < 4; ++step) {
        const int q = step * 4 + quad;
        taps[step] = q < 15 ? q / 5 * PITCH + q % 5 * 2 : 0;
    }

    // Rows of a frame are multiples of four bytes, so a word lies in the frame or beside it.
    auto load = [&](int tile) {
        const int first = (tile % tiles_x) * TW * 6 - 6;
        const int base = first - (first & 3);
        const int top = (tile / tiles_x % tiles_y) * TH * 2 - 2;
        const u8* const frame = input + (u64)(tile / (tiles_x * tiles_y)) * height * width * 3;
        for (int i = thread; i < FRAME_ROWS * (PITCH / 4); i += 128) {
            const int row = top + i / (PITCH / 4), at = base + i % (PITCH / 4) * 4;
            const bool inside = row >= 0 && row < height && at >= 0 && at < width * 3;
            copy_4(pixels_address + i * 4, frame + (inside ? row * width * 3 + at : 0), inside);
        }
    };

    const int stride = gridDim.x * GROUPS;
    int tile = blockIdx.x * GROUPS + group;
    if (tile < tiles) load(tile);
    for (; tile < tiles; tile += stride) {
        copies_end();
        group_barrier(group);
        const int left = (tile % tiles_x) * TW;
        const int top = (tile / tiles_x % tiles_y) * TH;
        const u8* const origin = pixels + ((left * 6 - 6) & 3);

#pragma unroll
        for (int part = 0; part < 4; ++part) {
            const int first = (part & 1) * (part < 2 ? EVEN : ODD) + (part < 2 ? 0 : 2 * EVEN);
            const int count = part < 2 ? EVEN : ODD;
#pragma unroll 1
            for (int block = 0; block < BLOCKS; ++block) {
                u32 a[2][4];
                bool inside[2];
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int pixel = block * 64 + warp * 16 + (lane >> 2) + half * 8;
                    const int row = pixel / PW, column = pixel - row * PW;
                    const int i = min(row, TH) * 2 + (part >> 1), j = column * 2 + (part & 1);
                    const u8* const window = origin + i * PITCH + j * 3;
                    // Only the first row and column can lie outside the frame.
                    inside[half] = top * 2 - 1 + i >= 0 && left * 2 - 1 + j >= 0;
#pragma unroll
                    for (int step = 0; step < 4; ++step)
                        a[step >> 1][(step & 1) * 2 + half] =
                            widen(window + taps[step], !(part & 1));
                    if (quad == 3) a[1][2 + half] = BF16 ? 0x3f80 : 0x3c00;
                }
                float sum[16];
                mma_begin();
                mma_registers_32(sum, a[0], operand(kernel_1_address, 512), 0);
                mma_registers_32(sum, a[1], operand(kernel_1_address + 2 * 512, 512), 1);
                mma_end();
                u32 out[4][2];
#pragma unroll
                for (int plane = 0; plane < 4; ++plane)
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const float* const d = sum + plane * 4 + half * 2;
                        const u32 value = leaky_pair(pack(d[0], d[1]));
                        out[plane][half] = inside[half] ? value : 0;
                    }
                const int own = block * 64 + warp * 16 + (lane >> 3 & 1) * 8 + (lane & 7);
#pragma unroll
                for (int plane = 0; plane < 4; plane += 2) {
                    const u32 at = mid_address + (plane + (lane >> 4)) * PLANE +
                                   (first + own) * 16;
                    store_matrices(own < count ? at : spill_address + (lane & 7) * 16,
                                   out[plane][0], out[plane][1], out[plane + 1][0],
                                   out[plane + 1][1]);
                }
            }
        }
        publish();
        group_barrier(group);
        if (tile + stride < tiles) load(tile + stride);

        // Channels are the rows of this product and pixels its columns: of the operands in shared
        // memory the weights are the smaller then.
        float sum[N / 2];
        mma_begin();
#pragma unroll
        for (int tap = 0; tap < 9; ++tap)
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const int dy = tap / 3, dx = tap % 3;
                const int first = (dy & 1 ? 2 * EVEN : 0) + (dx & 1) * (dy & 1 ? ODD : EVEN) +
                                  (dy >> 1) * PW + (dx >> 1);
                MMA_2(sum, operand(kernel_2_address + (tap * 4 + 2 * k) * 1024, 1024),
                      operand(mid_address + 2 * k * PLANE + first * 16, PLANE), tap + k > 0);
            }
        mma_end();
        // All have read what the results now overwrite.
        group_barrier(group);
#pragma unroll
        for (int i = 0; i < N / 16; ++i) {
            const float* const d = sum + i * 8;
            store_transposed(out_row + i * 256,
                             leaky_pair(pack(d[0] + offset[0], d[1] + offset[0])),
                             leaky_pair(pack(d[2] + offset[1], d[3] + offset[1])),
                             leaky_pair(pack(d[4] + offset[0], d[5] + offset[0])),
                             leaky_pair(pack(d[6] + offset[1], d[7] + offset[1])));
        }
        group_barrier(group);
        const u64 frame = tile / (tiles_x * tiles_y);
        for (int i = thread; i < TH * TW * 8; i += 128) {
            const int pixel = i >> 3, plane = i & 7;
            const int row = pixel / TW, column = pixel % TW;
            if (top + row < out_height && left + column < out_width)
                *(uint4*)(output +
                          ((frame * out_height + top + row) * out_width + left + column) * 64 +
                          plane * 8) =
                    *(const uint4*)(mid + plane * OUT_PLANE + (row * PW + column) * 16);
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
    def columns(self) -> int:
        """Columns of the second product, whose columns are pixels."""
        return -(self.height * (self.width + 1) // -16) * 16

    @property
    def pitch_bytes(self) -> int:
        """Bytes of a row of the frame in shared memory."""
        return -((3 + (2 * self.width + 4) * 3 + 1) // -4) * 4

    @property
    def reach_bytes(self) -> int:
        """How far into shared memory the last group's kernels read, whoever wants what they read.

        The last columns of the second product lie beyond the last plane, and the pixels of the
        last rows and columns of the frame beyond what the tile needs.
        """
        pitch, pixels = self.width + 1, (2 * self.height + 1) * (self.width + 1) * 2
        even, odd = (self.height + 1) * pitch, self.height * pitch
        firsts = (
            (2 * even if dy & 1 else 0)
            + (dx & 1) * (odd if dy & 1 else even)
            + (dy >> 1) * pitch
            + (dx >> 1)
            for dy in range(3)
            for dx in range(3)
        )
        product = (3 * pixels + max(firsts) + self.columns) * 16
        row = 2 * self.height + 1 + 2
        byte = 3 + (2 * self.width + 1) * 3 + 10
        window = 4 * pixels * 16 + 128 + row * self.pitch_bytes + byte
        results = 8 * (self.columns + 1) * 16
        own = self._own_bytes + self.padding_bytes
        return self.shared_bytes - own + max(product, window, results)

    @property
    def padding_bytes(self) -> int:
        """What a group's memory lacks to a multiple of 128 bytes."""
        return -self._own_bytes % 128

    @property
    def _own_bytes(self) -> int:
        between = 4 * (2 * self.height + 1) * (self.width + 1) * 2 * 16
        return between + 128 + (2 * self.height + 4) * self.pitch_bytes

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block."""
        own = self._own_bytes + self.padding_bytes
        return 4 * 32 * 16 + 9 * 4 * 64 * 16 + self.groups * own


#: What is worth trying; the widths divide the maps of 416 and 608 pixels. Each was seen to run: a
#: tile that reads beyond a block's memory would end the process's use of the GPU.
STEM_VARIANTS = (
    StemTile(8, 26, 3),
    StemTile(16, 13, 3),
    StemTile(4, 26, 4),
    StemTile(8, 26, 2),
    StemTile(8, 19, 3),
    StemTile(12, 19, 2),
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
        tile: StemTile,
    ) -> None:
        if tuple(first[0].shape) != (32, 3, 3, 3) or tuple(second[0].shape) != (64, 32, 3, 3):
            raise ValueError(
                f"got weights {tuple(first[0].shape)} and {tuple(second[0].shape)}; expected "
                "(32, 3, 3, 3) and (64, 32, 3, 3)"
            )
        if tile.reach_bytes > tile.shared_bytes:
            raise ValueError(
                f"{tile} reads {tile.reach_bytes} bytes of shared memory, of which it has "
                f"{tile.shared_bytes}"
            )
        self._tile = tile
        self._constants = (
            pack_bytes(*first),
            pack_planes(second[0]),
            second[1].contiguous(),
        )
        self._kernel = HopperKernel(
            SOURCE,
            "stem",
            constants={
                "BF16": int(first[0].dtype == torch.bfloat16),
                "TH": tile.height,
                "TW": tile.width,
                "GROUPS": tile.groups,
                "PITCH": tile.pitch_bytes,
                "OWN_PAD": tile.padding_bytes,
                "N": tile.columns,
                "MMA_2": f"mma_{tile.columns}",
            },
            products=[(32, True), (tile.columns, False)],
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
        tiles = -(tiles // -self._tile.groups)
        self._kernel(tiles, frames, *self._constants, out, n, height, width, device=frames.device)


def pack_bytes(weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Weights (out, 3, 3, 3) as (4, out, 8): rows of nine bytes, each padded to ten; the bias."""
    out = weight.shape[0]
    rows = weight.permute(2, 3, 1, 0).reshape(3, 9, out)
    taps = torch.nn.functional.pad(rows, (0, 0, 0, 1)).reshape(30, out)
    taps = torch.cat((taps, bias[None], torch.zeros_like(bias)[None]))
    return taps.reshape(4, 8, out).transpose(1, 2).contiguous()
