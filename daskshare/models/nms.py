"""Non-maximum suppression on the host, by OpenCV."""

from __future__ import annotations

import cv2
import numpy as np

__all__ = ["greedy_nms_host"]


def greedy_nms_host(
    boxes: np.ndarray,
    confidence: np.ndarray,
    class_id: np.ndarray,
    *,
    iou_threshold: float,
    max_kept: int,
) -> np.ndarray:
    """Suppress overlapping boxes of the same class in one frame.

    Parameters
    ----------
    boxes : numpy.ndarray, shape (k, 4), float32
        Corners xyxy.
    confidence : numpy.ndarray, shape (k,), float32
        Above 0, falling.
    class_id : numpy.ndarray, shape (k,), integer
        Only boxes of equal class suppress each other.
    iou_threshold : float
        A box is dropped when its intersection over union with a kept one exceeds this.
    max_kept : int
        Most boxes kept.

    Returns
    -------
    numpy.ndarray, shape (m,), int64
        Indices of the boxes kept, ascending, that is by falling confidence.

    Notes
    -----
    Runs in the caller's thread; OpenCV releases the interpreter lock.
    """
    # One call a class: OpenCV's batched call tells classes apart by shifting boxes, which goes
    # wrong for boxes that reach beyond the frame.
    kept = []
    for class_ in np.unique(class_id):
        members = np.flatnonzero(class_id == class_)
        if len(members) > 1:
            xywh = boxes[members].astype(np.float64)
            xywh[:, 2:] -= xywh[:, :2]
            scores = confidence[members]
            # OpenCV's annotations know only lists; it takes arrays, without a copy for each number.
            chosen = cv2.dnn.NMSBoxes(xywh, scores, 0.0, iou_threshold)  # type: ignore[arg-type]
            members = members[np.asarray(chosen, dtype=np.int64)]
        kept.append(members)
    if not kept:
        return np.empty(0, dtype=np.int64)
    return np.sort(np.concatenate(kept))[:max_kept]
