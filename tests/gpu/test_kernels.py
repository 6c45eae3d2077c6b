"""The CuPy kernels against their twins in torch and OpenCV."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from daskshare.kernels.postprocess import greedy_nms, greedy_nms_cuda, greedy_nms_torch
from daskshare.kernels.preprocess import letterbox_cuda, letterbox_host, letterbox_torch
from daskshare.models.nms import greedy_nms_host
from tests.candidates import random_candidates

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((272, 640), (416, 416)),
        ((1080, 1920), (416, 416)),
        ((1080, 1920), (608, 608)),
        ((1000, 777), (416, 320)),
        ((33, 1000), (320, 256)),
        ((832, 832), (416, 416)),
        ((416, 416), (416, 416)),
        ((100, 37), (416, 416)),
        ((1, 1), (32, 64)),
        ((2, 2000), (64, 64)),
    ],
)
def test_letterbox(source, target):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (3, *source, 3), dtype=np.uint8)
    on_gpu = torch.from_numpy(frames).to(DEVICE)
    out = torch.full((3, *target, 3), 7, dtype=torch.uint8, device=DEVICE)
    letterbox_cuda(on_gpu, out)
    twin = torch.empty((3, *target, 3), dtype=torch.uint8)
    letterbox_torch(torch.from_numpy(frames), twin)
    got = out.cpu()
    # Rounding of the positions may differ by the last bit between the devices.
    assert (got.int() - twin.int()).abs().max() <= 1
    assert (got != twin).float().mean() < 0.001
    opencv = np.empty((3, *target, 3), dtype=np.uint8)
    for frame, one in zip(frames, opencv, strict=True):
        letterbox_host(frame, one)
    assert np.abs(got.numpy().astype(int) - opencv).max() <= 1


def test_letterbox_runs_on_the_current_stream():
    frames = torch.randint(0, 256, (2, 90, 160, 3), dtype=torch.uint8)
    expected = torch.empty((2, 64, 64, 3), dtype=torch.uint8)
    letterbox_torch(frames, expected)
    stream = torch.cuda.Stream(DEVICE)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        on_gpu = frames.to(DEVICE, non_blocking=True)
        out = torch.zeros((2, 64, 64, 3), dtype=torch.uint8, device=DEVICE)
        letterbox_cuda(on_gpu, out)
    # On another stream the kernel would have read, or been overwritten, before the sleep ended.
    stream.synchronize()
    assert (out.cpu().int() - expected.int()).abs().max() <= 1


def assert_kept_equal(got, expected):
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one.cpu(), other.cpu())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("candidates", "classes", "iou", "max_kept"),
    [
        (1024, 80, 0.45, 300),
        (1024, 1, 0.45, 300),
        (1000, 3, 0.3, 50),
        (257, 2, 0.7, 300),
        (1, 1, 0.5, 4),
    ],
)
def test_nms_equals_its_twin_and_opencv(seed, candidates, classes, iou, max_kept):
    boxes, confidence, class_id = random_candidates(
        seed, frames=5, candidates=candidates, classes=classes
    )
    counts = np.random.default_rng(seed).integers(0, candidates + 1, 5)
    counts[:2] = (0, candidates)
    for frame, count in enumerate(counts):
        confidence[frame, count:] = 0
    arguments = [torch.from_numpy(a) for a in (boxes, confidence, class_id)]
    got = greedy_nms(*(a.to(DEVICE) for a in arguments), iou_threshold=iou, max_kept=max_kept)
    assert_kept_equal(got, greedy_nms_torch(*arguments, iou_threshold=iou, max_kept=max_kept))
    for frame, count in enumerate(counts):
        kept = greedy_nms_host(
            boxes[frame, :count],
            confidence[frame, :count],
            class_id[frame, :count],
            iou_threshold=iou,
            max_kept=max_kept,
        )
        assert int(got[3][frame]) == len(kept)
        np.testing.assert_array_equal(got[0][frame, : len(kept)].cpu(), boxes[frame, kept])


def test_nms_keeps_all_of_1024_apart_and_one_of_1024_alike():
    apart = torch.arange(1024, dtype=torch.float32)[:, None] * 20 + torch.tensor([0.0, 0, 10, 10])
    alike = torch.tensor([0.0, 0, 10, 10]).expand(1024, 4)
    boxes = torch.stack((apart, alike)).to(DEVICE)
    confidence = torch.linspace(0.9, 0.1, 1024, device=DEVICE).expand(2, 1024)
    class_id = torch.zeros((2, 1024), dtype=torch.int64, device=DEVICE)
    _, _, _, count = greedy_nms(boxes, confidence, class_id, iou_threshold=0.45, max_kept=1024)
    assert count.tolist() == [1024, 1]


def test_nms_in_a_cuda_graph():
    greedy_nms_cuda.compile(DEVICE)
    static = [
        torch.from_numpy(a).to(DEVICE)
        for a in random_candidates(0, frames=4, candidates=512, classes=3)
    ]
    greedy_nms(*static, iou_threshold=0.45, max_kept=300)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = greedy_nms(*static, iou_threshold=0.45, max_kept=300)
    for seed in (1, 2):
        fresh = [
            torch.from_numpy(a)
            for a in random_candidates(seed, frames=4, candidates=512, classes=3)
        ]
        for target, source in zip(static, fresh, strict=True):
            target.copy_(source)
        graph.replay()
        torch.cuda.synchronize()
        assert_kept_equal(kept, greedy_nms_torch(*fresh, iou_threshold=0.45, max_kept=300))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("channels", "size"), [(16, (37, 52)), (32, (416, 416)), (128, (5, 3))])
def test_first_convolution(dtype, channels, size):
    from daskshare.kernels.first_convolution import convolve_frames, pack_weights

    rng = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (3, *size, 3), generator=rng, dtype=torch.uint8)
    weight = (torch.randn(channels, 3, 3, 3, generator=rng) / 255).to(dtype)
    bias = torch.randn(channels, generator=rng).to(dtype)
    exact = torch.nn.functional.conv2d(
        frames.permute(0, 3, 1, 2).double(), weight.double(), bias.double(), padding=1
    )
    twin = torch.nn.functional.leaky_relu(exact, 0.1)
    taps = pack_weights(weight).to(DEVICE)
    out = convolve_frames(frames.to(DEVICE), taps, bias.to(DEVICE), slope=0.1)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert out.dtype is dtype
    tolerance = {torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert (out.cpu().double() - twin).norm() / twin.norm() < tolerance
