"""Letterboxing: geometry, OpenCV on the host, and the kernel's twin."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from daskshare.kernels.preprocess import FILL, Letterbox, letterbox_host, letterbox_torch

SIZES = [
    ((272, 640), (416, 416)),
    ((1080, 1920), (416, 416)),
    ((720, 1280), (608, 608)),
    ((1000, 777), (416, 320)),
    ((33, 1000), (320, 256)),
    ((832, 832), (416, 416)),
    ((416, 416), (416, 416)),
    ((100, 37), (416, 416)),
    ((1, 1), (32, 64)),
    ((2, 2000), (64, 64)),
]


def frame(size, *, seed=0, count=None):
    rng = np.random.default_rng(seed)
    shape = (*size, 3) if count is None else (count, *size, 3)
    return rng.integers(0, 256, shape, dtype=np.uint8)


def test_geometry_of_the_traffic_clip():
    box = Letterbox(272, 640, 416, 416)
    assert (box.inner_height, box.inner_width, box.top, box.left) == (177, 416, 119, 0)
    assert box.scale == 0.65


def test_boxes_return_to_source_pixels_unclipped():
    box = Letterbox(100, 200, 416, 416)
    got = box.to_source(np.array([[0, 104, 416, 312], [-20.8, 104, 208, 416]], dtype=np.float32))
    np.testing.assert_allclose(got, [[0, 0, 200, 100], [-10, 0, 100, 150]], atol=1e-4)
    assert got.dtype == np.float32
    assert box.to_source(np.empty((0, 4), np.float32)).shape == (0, 4)


@pytest.mark.parametrize(("source", "target"), SIZES)
def test_host_fills_around_the_centred_image(source, target):
    box = Letterbox(*source, *target)
    out = np.full((*target, 3), 7, dtype=np.uint8)
    letterbox_host(np.full((*source, 3), 200, dtype=np.uint8), out)
    inner = np.zeros(target, dtype=bool)
    inner[box.top : box.top + box.inner_height, box.left : box.left + box.inner_width] = True
    assert (out[inner] == 200).all()
    assert (out[~inner] == FILL).all()
    assert box.inner_height == target[0] or box.inner_width == target[1]
    assert box.inner_height <= target[0]
    assert box.inner_width <= target[1]
    assert abs(box.top * 2 + box.inner_height - target[0]) <= 1
    assert abs(box.left * 2 + box.inner_width - target[1]) <= 1


def test_host_writes_into_a_batch_in_place():
    batch = np.zeros((3, 64, 48, 3), dtype=np.uint8)
    letterbox_host(frame((30, 30)), batch[1])
    assert not batch[0].any()
    assert not batch[2].any()
    assert (batch[1] != 0).any(axis=-1).all()


def test_host_takes_any_strides():
    source = frame((60, 80))
    outs = [np.empty((64, 64, 3), dtype=np.uint8) for _ in range(2)]
    letterbox_host(source[::-1, ::2, ::-1], outs[0])
    letterbox_host(np.ascontiguousarray(source[::-1, ::2, ::-1]), outs[1])
    np.testing.assert_array_equal(*outs)


def test_an_image_of_the_right_size_is_unchanged():
    source = frame((64, 48))
    out = np.empty_like(source)
    letterbox_host(source, out)
    np.testing.assert_array_equal(out, source)


@pytest.mark.parametrize(("source", "target"), SIZES)
def test_twin_is_within_one_grey_level_of_opencv(source, target):
    frames = frame(source, count=2)
    expected = np.empty((2, *target, 3), dtype=np.uint8)
    for one, out in zip(frames, expected, strict=True):
        letterbox_host(one, out)
    got = torch.empty((2, *target, 3), dtype=torch.uint8)
    letterbox_torch(torch.from_numpy(frames), got)
    difference = np.abs(got.numpy().astype(int) - expected)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.02
