"""Detections of another implementation of YOLO-v3 on every tenth frame of the traffic clip.

Its rules, found by experiment: RGB; letterbox to 416x416 with sides rounded to the nearest pixel
and the smaller half of the fill first; one class a box, the best, whose probability times
objectness is the confidence; suppression class by class; boxes mapped back by one scale for both
axes and not clipped.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np

from daskshare.models.spec import Detections
from tests.clip import traffic_clip

_FILE = Path(__file__).parent / "data" / "expected-yolov3-tiny-bikes.json"

#: Reference detections of at least this confidence must be found ...
MUST_FIND = 0.30
#: ... and any of ours above this one must be in the reference.
MUST_BE_KNOWN = 0.32


@functools.cache
def expected_detections() -> dict[int, list[dict]]:
    """By frame number: dicts of class_id, confidence, xyxy."""
    content = json.loads(_FILE.read_text("utf-8"))
    return {int(number): found for number, found in content["frames"].items()}


@functools.cache
def reference_frames() -> np.ndarray:
    """The frames of the reference, uint8 RGB (25, 272, 640, 3)."""
    with av.open(str(traffic_clip())) as container:
        frames = [
            frame.to_ndarray(format="rgb24")
            for number, frame in enumerate(container.decode(video=0))
            if number in expected_detections()
        ]
    return np.stack(frames)


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two boxes xyxy."""
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    common = float(np.prod(np.clip(sides, 0, None)))
    return common / (float(np.prod(a[2:] - a[:2])) + float(np.prod(b[2:] - b[:2])) - common)


def disagreements(
    results: Sequence[Detections], *, min_iou: float, max_confidence_error: float
) -> list[str]:
    """What differs between ``results`` (of :func:`reference_frames`) and the reference."""
    expected = expected_detections()
    assert len(results) == len(expected) == 25
    problems = []
    for (number, references), got in zip(expected.items(), results, strict=True):
        unused = set(range(len(got)))
        for reference in sorted(references, key=lambda r: -r["confidence"]):
            matches = [
                i
                for i in unused
                if got.class_id[i] == reference["class_id"]
                and overlap(got.xyxy[i], np.array(reference["xyxy"])) >= min_iou
                and abs(got.confidence[i] - reference["confidence"]) <= max_confidence_error
            ]
            if matches:
                unused.remove(matches[0])
            elif reference["confidence"] >= MUST_FIND:
                problems.append(f"frame {number}: not found: {reference}")
        problems += [
            f"frame {number}: extra: class {got.class_id[i]}, {got.confidence[i]}, {got.xyxy[i]}"
            for i in unused
            if got.confidence[i] > MUST_BE_KNOWN
        ]
    return problems
