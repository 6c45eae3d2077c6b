"""The twin of the suppression kernel, and what the kernel's caller checks."""

from __future__ import annotations

import pytest
import torch

from daskshare.kernels.postprocess import greedy_nms, greedy_nms_torch


def test_frames_are_independent_and_padded_with_zeros():
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [50, 0, 60, 10]]).expand(3, 3, 4)
    confidence = torch.tensor([[0.9, 0.8, 0.7], [0.9, 0.0, 0.0], [0.0, 0.0, 0.0]])
    class_id = torch.tensor([[2, 2, 2], [1, 1, 1], [0, 0, 0]])
    kept_boxes, kept_confidence, kept_class, count = greedy_nms_torch(
        boxes, confidence, class_id, iou_threshold=0.45, max_kept=2
    )
    assert count.tolist() == [2, 1, 0]
    assert kept_boxes.tolist() == [
        [[0, 0, 10, 10], [50, 0, 60, 10]],
        [[0, 0, 10, 10], [0, 0, 0, 0]],
        [[0, 0, 0, 0], [0, 0, 0, 0]],
    ]
    torch.testing.assert_close(kept_confidence, torch.tensor([[0.9, 0.7], [0.9, 0.0], [0.0, 0.0]]))
    assert kept_class.tolist() == [[2, 2], [1, 0], [0, 0]]
    assert kept_class.dtype == count.dtype == torch.int32


def test_too_many_candidates_are_refused():
    with pytest.raises(ValueError, match="1025 candidates a frame, expected at most 1024"):
        greedy_nms(
            torch.zeros(1, 1025, 4),
            torch.zeros(1, 1025),
            torch.zeros(1, 1025, dtype=torch.int64),
            iou_threshold=0.5,
            max_kept=1,
        )
