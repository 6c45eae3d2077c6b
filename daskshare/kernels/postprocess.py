"""Greedy non-maximum suppression on the GPU, and its twin in torch.

Both take candidates ordered by falling confidence and drop each box whose overlap with a kept box
of its own class exceeds the threshold: the same rule, and the same order, as OpenCV's.
"""

from __future__ import annotations

import torch

from daskshare.kernels.cupy_kernel import CudaKernel

__all__ = ["greedy_nms", "greedy_nms_cuda", "greedy_nms_torch"]

#: Boxes (n, m, 4) float32, confidence (n, m) float32, class (n, m) int32, count (n,) int32; zero
#: from each frame's count on.
Kept = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

_THREADS = 256
#: Candidates that fit the kernel's shared memory.
_MAX_CANDIDATES = 1024

# One block a frame. Greedy suppression is sequential in the kept boxes, of which there are few;
# the test of all others against one kept box is what the threads share. Products are rounded one
# by one (no fused multiply-add), so that overlaps equal the twin's bit by bit.
_SOURCE = (
    r"""
extern "C" __global__ void greedy_nms(
    const float4* __restrict__ boxes, const float* __restrict__ confidence,
    const long long* __restrict__ class_id, float4* __restrict__ kept_boxes,
    float* __restrict__ kept_confidence, int* __restrict__ kept_class_id,
    int* __restrict__ kept_count, int candidates, int max_kept, float iou_threshold)
{
    __shared__ float4 box[MAX_CANDIDATES];
    __shared__ int kind[MAX_CANDIDATES];
    __shared__ bool dropped[MAX_CANDIDATES];

    const long long first = (long long)blockIdx.x * candidates;
    const long long out = (long long)blockIdx.x * max_kept;
    int valid = 0;
    for (int start = 0; start < candidates; start += blockDim.x) {
        const int i = start + threadIdx.x;
        const bool present = i < candidates && confidence[first + i] > 0.0f;
        if (present) {
            box[i] = boxes[first + i];
            kind[i] = (int)class_id[first + i];
            dropped[i] = false;
        }
        // Candidates are ordered, so the first chunk that is not full ends them.
        const int here = __syncthreads_count(present);
        valid += here;
        if (here < blockDim.x) break;
    }
    int kept = 0;
    for (int i = 0; i < valid && kept < max_kept; ++i) {
        if (dropped[i]) continue;  // the same for all threads: nobody wrote since the last barrier
        const float4 a = box[i];
        const float area = __fmul_rn(a.z - a.x, a.w - a.y);
        if (threadIdx.x == 0) {
            kept_boxes[out + kept] = a;
            kept_confidence[out + kept] = confidence[first + i];
            kept_class_id[out + kept] = kind[i];
        }
        ++kept;
        for (int j = i + 1 + threadIdx.x; j < valid; j += blockDim.x) {
            if (kind[j] != kind[i]) continue;
            const float4 b = box[j];
            const float width = fmaxf(fminf(a.z, b.z) - fmaxf(a.x, b.x), 0.0f);
            const float height = fmaxf(fminf(a.w, b.w) - fmaxf(a.y, b.y), 0.0f);
            const float common = __fmul_rn(width, height);
            const float all = area + __fmul_rn(b.z - b.x, b.w - b.y) - common;
            if (common > __fmul_rn(iou_threshold, all)) dropped[j] = true;
        }
        __syncthreads();
    }
    for (int i = kept + threadIdx.x; i < max_kept; i += blockDim.x) {
        kept_boxes[out + i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        kept_confidence[out + i] = 0.0f;
        kept_class_id[out + i] = 0;
    }
    if (threadIdx.x == 0) kept_count[blockIdx.x] = kept;
}
"""
).replace("MAX_CANDIDATES", str(_MAX_CANDIDATES))

#: The compiled kernel; ``compile(device)`` it before capturing a graph.
greedy_nms_cuda = CudaKernel(_SOURCE, "greedy_nms")


def greedy_nms(
    boxes: torch.Tensor,
    confidence: torch.Tensor,
    class_id: torch.Tensor,
    *,
    iou_threshold: float,
    max_kept: int,
) -> Kept:
    """Suppress overlapping boxes of the same class, frame by frame, on the GPU.

    Parameters
    ----------
    boxes : torch.Tensor, shape (n, k, 4), float32, CUDA
        Corners xyxy; k is at most 1,024.
    confidence : torch.Tensor, shape (n, k), float32
        Falling along k; 0 from the end of a frame's candidates on.
    class_id : torch.Tensor, shape (n, k), int64
        Only boxes of equal class suppress each other.
    iou_threshold : float
        A box is dropped when its intersection over union with a kept one exceeds this.
    max_kept : int
        Most boxes kept in a frame.

    Returns
    -------
    tuple of torch.Tensor
        Boxes (n, max_kept, 4) float32, confidence (n, max_kept) float32, class (n, max_kept)
        int32 and count (n,) int32; zero from each frame's count on.

    Notes
    -----
    Runs in the engine's thread on its current stream; capturable in a CUDA graph.
    """
    frames, candidates = confidence.shape
    if candidates > _MAX_CANDIDATES:
        raise ValueError(f"got {candidates} candidates a frame, expected at most {_MAX_CANDIDATES}")
    inputs = (boxes.contiguous(), confidence.contiguous(), class_id.contiguous())
    kept = (
        boxes.new_empty((frames, max_kept, 4)),
        boxes.new_empty((frames, max_kept)),
        boxes.new_empty((frames, max_kept), dtype=torch.int32),
        boxes.new_empty((frames,), dtype=torch.int32),
    )
    greedy_nms_cuda(
        (frames,),
        (_THREADS,),
        *inputs,
        *kept,
        candidates,
        max_kept,
        float(iou_threshold),
        device=boxes.device,
    )
    return kept


def greedy_nms_torch(
    boxes: torch.Tensor,
    confidence: torch.Tensor,
    class_id: torch.Tensor,
    *,
    iou_threshold: float,
    max_kept: int,
) -> Kept:
    """The kernel's twin, for comparison: arguments and results of :func:`greedy_nms`.

    Notes
    -----
    Works on any device, but visits the host for each box kept.
    """
    frames = len(boxes)
    kept_boxes = boxes.new_zeros((frames, max_kept, 4))
    kept_confidence = boxes.new_zeros((frames, max_kept))
    kept_class = torch.zeros((frames, max_kept), dtype=torch.int32, device=boxes.device)
    count = torch.zeros(frames, dtype=torch.int32, device=boxes.device)
    size = boxes[..., 2:] - boxes[..., :2]
    area = size[..., 0] * size[..., 1]
    threshold = torch.tensor(iou_threshold, dtype=torch.float32, device=boxes.device)
    for frame in range(frames):
        alive = confidence[frame] > 0
        kept = 0
        for i in range(confidence.shape[1]):
            if kept == max_kept:
                break
            if not alive[i]:
                continue
            a, b = boxes[frame, i], boxes[frame]
            common = torch.minimum(a[2:], b[:, 2:]) - torch.maximum(a[:2], b[:, :2])
            overlap = common.clamp_min(0).prod(dim=1)
            union = area[frame, i] + area[frame] - overlap
            alive &= ~((overlap > threshold * union) & (class_id[frame] == class_id[frame, i]))
            kept_boxes[frame, kept] = a
            kept_confidence[frame, kept] = confidence[frame, i]
            kept_class[frame, kept] = class_id[frame, i].int()
            kept += 1
        count[frame] = kept
    return kept_boxes, kept_confidence, kept_class, count
