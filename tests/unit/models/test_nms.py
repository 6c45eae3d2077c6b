"""OpenCV's suppression on the host, against the rule written out and against the kernel's twin."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from daskshare.kernels.postprocess import greedy_nms_torch
from daskshare.models.nms import greedy_nms_host
from tests.candidates import random_candidates


def keep(boxes, confidence, class_id, *, iou=0.45, max_kept=300):
    return greedy_nms_host(
        np.array(boxes, dtype=np.float32).reshape(-1, 4),
        np.array(confidence, dtype=np.float32),
        np.array(class_id),
        iou_threshold=iou,
        max_kept=max_kept,
    ).tolist()


def test_overlapping_boxes_of_a_class_leave_the_best():
    boxes = [[0, 0, 10, 10], [1, 0, 11, 10], [20, 0, 30, 10], [0, 0, 10, 9]]
    assert keep(boxes, [0.9, 0.8, 0.7, 0.6], [1, 1, 1, 1]) == [0, 2]


def test_other_classes_do_not_suppress_even_beyond_the_frame():
    boxes = [[-50, -50, 10, 10], [-50, -50, 10, 10], [-40, -50, 20, 10]]
    assert keep(boxes, [0.9, 0.8, 0.7], [1, 0, 2]) == [0, 1, 2]


def test_a_dropped_box_suppresses_nothing():
    boxes = [[0, 0, 10, 10], [4, 0, 14, 10], [8, 0, 18, 10]]
    assert keep(boxes, [0.9, 0.8, 0.7], [0, 0, 0], iou=0.4) == [0, 2]


def test_an_overlap_of_exactly_the_threshold_stays():
    assert keep([[0, 0, 4, 4], [0, 0, 4, 2]], [0.9, 0.8], [0, 0], iou=0.5) == [0, 1]
    assert keep([[0, 0, 4, 4], [0, 0, 4, 2]], [0.9, 0.8], [0, 0], iou=0.49) == [0]


def test_no_box_and_too_many():
    assert keep([], [], []) == []
    boxes = [[20 * i, 0, 20 * i + 10, 10] for i in range(9)]
    assert keep(boxes, np.linspace(0.9, 0.5, 9), [i % 2 for i in range(9)], max_kept=5) == [
        0,
        1,
        2,
        3,
        4,
    ]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(0, 60),
    classes=st.integers(1, 4),
    iou=st.sampled_from([0.2, 0.45, 0.7]),
    max_kept=st.sampled_from([3, 300]),
)
def test_agrees_with_the_twin_of_the_gpu_kernel(seed, count, classes, iou, max_kept):
    boxes, confidence, class_id = random_candidates(seed, frames=1, candidates=60, classes=classes)
    confidence[:, count:] = 0
    kept_boxes, kept_confidence, kept_class, kept_count = greedy_nms_torch(
        *map(torch.from_numpy, (boxes, confidence, class_id)), iou_threshold=iou, max_kept=max_kept
    )
    kept = greedy_nms_host(
        boxes[0, :count],
        confidence[0, :count],
        class_id[0, :count],
        iou_threshold=iou,
        max_kept=max_kept,
    )
    assert kept_count.tolist() == [len(kept)]
    np.testing.assert_array_equal(kept_boxes[0, : len(kept)], boxes[0, kept])
    np.testing.assert_array_equal(kept_confidence[0, : len(kept)], confidence[0, kept])
    np.testing.assert_array_equal(kept_class[0, : len(kept)], class_id[0, kept])
    assert not kept_boxes[0, len(kept) :].any()
    assert not kept_confidence[0, len(kept) :].any()
