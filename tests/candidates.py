"""Random candidates for suppression: clusters of overlapping boxes, ordered by confidence."""

from __future__ import annotations

import numpy as np


def random_candidates(
    seed: int, *, frames: int, candidates: int, classes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes (n, k, 4) float32, confidence (n, k) float32 falling, class (n, k) int64."""
    rng = np.random.default_rng(seed)
    centres = rng.uniform(-20, 420, (frames, max(1, candidates // 6), 2))
    chosen = rng.integers(0, centres.shape[1], (frames, candidates))
    centre = np.take_along_axis(centres, chosen[..., None], axis=1)
    centre = centre + rng.normal(0, 6, centre.shape)
    half = rng.uniform(5, 40, centre.shape)
    boxes = np.concatenate((centre - half, centre + half), axis=-1).astype(np.float32)
    # No two equal: the order of ties is nobody's promise.
    confidence = rng.permuted(np.linspace(0.01, 0.99, frames * candidates))
    confidence = -np.sort(-confidence.reshape(frames, candidates), axis=1)
    class_id = rng.integers(0, classes, (frames, candidates))
    return boxes, confidence.astype(np.float32), class_id
