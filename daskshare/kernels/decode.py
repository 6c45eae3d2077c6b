"""From what the detection heads read to the best candidates of each frame, on the GPU.

Most boxes of a frame are nothing, and their objectness says so already: one kernel looks at that
alone and reads the classes of the others; a second sorts each frame's survivors and computes
geometry for these only. The twin in torch is
:meth:`daskshare.models.network.YoloNetwork.candidates`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from daskshare.kernels.cupy_kernel import CudaKernel

__all__ = ["HeadDecoder", "HeadShape"]

_THREADS = 256
_MOST = 1024

_SOURCE = r"""
#if BF16
__device__ __forceinline__ float value(const unsigned short* at)
{
    return __uint_as_float((unsigned int)*at << 16);
}
#else
__device__ __forceinline__ float value(const unsigned short* at)
{
    float out;
    asm("{\n.reg .b16 h;\nmov.b16 h, %1;\ncvt.f32.f16 %0, h;\n}" : "=f"(out) : "h"(*at));
    return out;
}
#endif

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// One thread a box; the classes of the few that may count are read by the warp together.
extern "C" __global__ void find_candidates(
    const unsigned short* __restrict__ head, const unsigned char* __restrict__ allowed,
    unsigned long long* __restrict__ keys, short* __restrict__ kinds, int* __restrict__ counts,
    int boxes, int anchors, int classes, int pitch, int first_box, int all_boxes, float threshold)
{
    const int lane = threadIdx.x & 31;
    const int frame = blockIdx.y;
    const int box = blockIdx.x * blockDim.x + threadIdx.x;
    const unsigned short* const own =
        head + ((long long)frame * (boxes / anchors) + box / anchors) * pitch +
        box % anchors * (5 + classes);
    const float objectness = box < boxes ? sigmoid(value(own + 4)) : 0.0f;
    unsigned int left = __ballot_sync(0xffffffffu, objectness > threshold);
    while (left) {
        const int turn = __ffs(left) - 1;
        left &= left - 1;
        const unsigned short* const scores = (const unsigned short*)__shfl_sync(
            0xffffffffu, (unsigned long long)own, turn) + 5;
        float best = __int_as_float(0xff800000);  // minus infinity
        int kind = 0;
        for (int i = lane; i < classes; i += 32) {
            const float score = value(scores + i);
            if (score > best) { best = score; kind = i; }
        }
        for (int step = 16; step; step >>= 1) {
            const float other = __shfl_xor_sync(0xffffffffu, best, step);
            const int other_kind = __shfl_xor_sync(0xffffffffu, kind, step);
            if (other > best || (other == best && other_kind < kind)) {
                best = other;
                kind = other_kind;
            }
        }
        if (lane == turn) {
            const float confidence = objectness * sigmoid(best);
            if (confidence > threshold && allowed[kind]) {
                const int number = first_box + box;
                const int at = atomicAdd(counts + frame, 1);
                // Of equal confidence, the first box comes first.
                keys[(long long)frame * all_boxes + at] =
                    (unsigned long long)__float_as_uint(confidence) << 32 | (0xffffffffu - number);
                kinds[(long long)frame * all_boxes + number] = (short)kind;
            }
        }
    }
}

// One block a frame. `shapes` has a row a head: first box, boxes, width, anchors, pitch; `floats`
// has a row a head: cell width, cell height, scale; then half anchors, MAX_ANCHORS a head.
extern "C" __global__ void choose_candidates(
    const unsigned long long* __restrict__ keys, const short* __restrict__ kinds,
    const int* __restrict__ counts, const unsigned short* __restrict__ head_0,
    const unsigned short* __restrict__ head_1, const unsigned short* __restrict__ head_2,
    const unsigned short* __restrict__ head_3, const int* __restrict__ shapes,
    const float* __restrict__ floats, float4* __restrict__ out_boxes,
    float* __restrict__ out_confidence, long long* __restrict__ out_kinds,
    int heads, int classes, int all_boxes, int wanted)
{
    __shared__ unsigned long long chosen[MOST];
    __shared__ int histogram[256];
    __shared__ int filled;
    __shared__ unsigned long long prefix;
    __shared__ int rest;
    const int thread = threadIdx.x;
    const int frame = blockIdx.x;
    const unsigned long long* const own = keys + (long long)frame * all_boxes;
    const int count = counts[frame];

    unsigned long long least = 0;
    if (count > wanted) {
        // Keys differ, so the wanted-th largest, found digit by digit, parts them exactly.
        if (thread == 0) { prefix = 0; rest = wanted; }
        for (int shift = 56; shift >= 0; shift -= 8) {
            for (int i = thread; i < 256; i += blockDim.x) histogram[i] = 0;
            __syncthreads();
            const unsigned long long above = prefix;
            for (int i = thread; i < count; i += blockDim.x)
                if (shift == 56 || own[i] >> (shift + 8) == above >> (shift + 8))
                    atomicAdd(histogram + (int)(own[i] >> shift & 255), 1);
            __syncthreads();
            if (thread == 0) {
                int digit = 255;
                while (histogram[digit] < rest) rest -= histogram[digit--];
                prefix |= (unsigned long long)digit << shift;
            }
            __syncthreads();
        }
        least = prefix;
    }
    if (thread == 0) filled = 0;
    __syncthreads();
    for (int i = thread; i < count; i += blockDim.x)
        if (own[i] >= least) chosen[atomicAdd(&filled, 1)] = own[i];
    __syncthreads();
    const int present = filled;
    int size = 1;
    while (size < present) size <<= 1;
    for (int i = present + thread; i < size; i += blockDim.x) chosen[i] = 0;
    __syncthreads();
    for (int width = 2; width <= size; width <<= 1)
        for (int step = width >> 1; step; step >>= 1) {
            for (int i = thread; i < size; i += blockDim.x) {
                const int other = i ^ step;
                if (other > i) {
                    const unsigned long long a = chosen[i], b = chosen[other];
                    if ((a < b) == ((i & width) == 0)) { chosen[i] = b; chosen[other] = a; }
                }
            }
            __syncthreads();
        }
    const unsigned short* const bases[4] = {head_0, head_1, head_2, head_3};
    for (int i = thread; i < wanted; i += blockDim.x) {
        const long long at = (long long)frame * wanted + i;
        if (i >= present) {
            out_boxes[at] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            out_confidence[at] = 0.0f;
            out_kinds[at] = 0;
            continue;
        }
        const int number = (int)(0xffffffffu - (unsigned int)chosen[i]);
        int head = 0;
        while (head + 1 < heads && number >= shapes[(head + 1) * 5]) ++head;
        const int* const shape = shapes + head * 5;
        const int box = number - shape[0], anchors = shape[3];
        const int cell = box / anchors, anchor = box % anchors;
        const unsigned short* const raw =
            bases[head] + ((long long)frame * (shape[1] / anchors) + cell) * shape[4] +
            anchor * (5 + classes);
        const float* const scales = floats + head * 3;
        const float* const half = floats + heads * 3 + (head * MAX_ANCHORS + anchor) * 2;
        const float scale = scales[2];
        const float shift = (scale - 1.0f) / 2.0f;
        const float x = (sigmoid(value(raw)) * scale + (cell % shape[2] - shift)) * scales[0];
        const float y = (sigmoid(value(raw + 1)) * scale + (cell / shape[2] - shift)) * scales[1];
        const float half_width = expf(value(raw + 2)) * half[0];
        const float half_height = expf(value(raw + 3)) * half[1];
        out_boxes[at] =
            make_float4(x - half_width, y - half_height, x + half_width, y + half_height);
        out_confidence[at] = __uint_as_float((unsigned int)(chosen[i] >> 32));
        out_kinds[at] = kinds[(long long)frame * all_boxes + number];
    }
}
"""


@dataclass(frozen=True, slots=True)
class HeadShape:
    """What a detection head looks like.

    Parameters
    ----------
    height, width : int
        Cells.
    anchors : tuple of (float, float)
        Width and height in input pixels.
    cell_width, cell_height : float
        Of a cell in input pixels.
    scale : float
        Stretch of the centre about the cell's middle.
    """

    height: int
    width: int
    anchors: tuple[tuple[float, float], ...]
    cell_width: float
    cell_height: float
    scale: float


class HeadDecoder:
    """Decodes heads of given shapes for batches of one size.

    Parameters
    ----------
    shapes : sequence of HeadShape
        At most four.
    num_classes : int
        Classes of each.
    batch_size : int
        Frames of a batch.
    confidence_threshold : float
        Boxes of more confidence are candidates.
    allowed : torch.Tensor or None
        bool (num_classes,): classes to keep; None keeps all.
    max_candidates : int
        Most candidates of a frame; at most 1,024.
    dtype : torch.dtype
        Of what the heads read: float16 or bfloat16.
    device : torch.device
        A CUDA device with an index.

    Notes
    -----
    Calls run on torch's current stream and can be captured; the outputs are the same memory each
    time.
    """

    def __init__(
        self,
        shapes: list[HeadShape],
        *,
        num_classes: int,
        batch_size: int,
        confidence_threshold: float,
        allowed: torch.Tensor | None,
        max_candidates: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        if not 1 <= len(shapes) <= 4 or max_candidates > _MOST:
            raise ValueError(
                f"got {len(shapes)} heads and {max_candidates} candidates; expected 1 to 4 heads "
                f"and at most {_MOST} candidates"
            )
        self._shapes, self._num_classes = shapes, num_classes
        self._threshold, self._device = confidence_threshold, device
        self._boxes = [shape.height * shape.width * len(shape.anchors) for shape in shapes]
        self._all_boxes = sum(self._boxes)
        most_anchors = max(len(shape.anchors) for shape in shapes)
        half_anchors = torch.zeros(len(shapes), most_anchors, 2)
        for row, shape in zip(half_anchors, shapes, strict=True):
            row[: len(shape.anchors)] = torch.tensor(shape.anchors) / 2
        scales = torch.tensor([[s.cell_width, s.cell_height, s.scale] for s in shapes])
        self._floats = torch.cat((scales.flatten(), half_anchors.flatten())).to(device)
        if allowed is None:
            allowed = torch.ones(num_classes, dtype=torch.bool)
        self._allowed = allowed.to(device=device, dtype=torch.uint8)
        n, k = batch_size, max_candidates

        def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._keys = empty(n, self._all_boxes, dtype=torch.int64)
        self._kinds = empty(n, self._all_boxes, dtype=torch.int16)
        self._counts = empty(n, dtype=torch.int32)
        self._out = (
            empty(n, k, 4, dtype=torch.float32),
            empty(n, k, dtype=torch.float32),
            empty(n, k, dtype=torch.int64),
        )
        self._layout: torch.Tensor | None = None
        head = (
            f"#define BF16 {int(dtype == torch.bfloat16)}\n#define MOST {_MOST}\n"
            f"#define MAX_ANCHORS {most_anchors}\n"
        )
        self._find = CudaKernel(head + _SOURCE, "find_candidates")
        self._choose = CudaKernel(head + _SOURCE, "choose_candidates")
        self._find.compile(device)
        self._choose.compile(device)

    def bind(self, heads: list[torch.Tensor]) -> None:
        """Set what is decoded from now on: (n, channels, height, width), channels innermost."""
        rows = []
        first = 0
        for shape, boxes, head in zip(self._shapes, self._boxes, heads, strict=True):
            pitch = head.stride(3)
            if head.stride() != (shape.height * shape.width * pitch, 1, shape.width * pitch, pitch):
                raise ValueError(f"got strides {head.stride()}; expected channels innermost")
            rows.append((first, boxes, shape.width, len(shape.anchors), pitch))
            first += boxes
        self._heads, self._rows = heads, rows
        self._layout = torch.tensor(rows, dtype=torch.int32, device=self._device).flatten()

    def __call__(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Boxes (n, k, 4) float32, confidence (n, k) float32 falling, class (n, k) int64."""
        if self._layout is None:
            raise RuntimeError("bind() comes first")
        frames = self._counts.shape[0]
        self._counts.zero_()
        for head, (first, boxes, _, anchors, pitch) in zip(self._heads, self._rows, strict=True):
            self._find(
                (-(boxes // -_THREADS), frames),
                (_THREADS,),
                head,
                self._allowed,
                self._keys,
                self._kinds,
                self._counts,
                boxes,
                anchors,
                self._num_classes,
                pitch,
                first,
                self._all_boxes,
                self._threshold,
                device=self._device,
            )
        heads = [self._heads[min(i, len(self._heads) - 1)] for i in range(4)]
        self._choose(
            (frames,),
            (_THREADS,),
            self._keys,
            self._kinds,
            self._counts,
            *heads,
            self._layout,
            self._floats,
            *self._out,
            len(self._heads),
            self._num_classes,
            self._all_boxes,
            self._out[1].shape[1],
            device=self._device,
        )
        return self._out
