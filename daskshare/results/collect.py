"""Detections of many frames made into rows at once: a table's columns cost more than its rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from daskshare.results.schema import check_results, detections_batch

__all__ = ["FrameCollector"]


class FrameCollector:
    """Keeps what comes for consecutive frames, and writes it as one batch of rows.

    Parameters
    ----------
    video : str
        Path or URL as the user gave it.
    write : callable
        Takes a ``pyarrow.RecordBatch`` of DETECTIONS_SCHEMA.
    max_frames : int
        Write at the latest when so many frames have come.

    Notes
    -----
    Used by one thread, the task's.
    """

    def __init__(
        self, video: str, write: Callable[[pa.RecordBatch], None], *, max_frames: int = 512
    ) -> None:
        self._video = video
        self._write = write
        self._max_frames = max_frames
        self._first_frame = 0
        self._pts: list[np.ndarray] = []
        self._results: list[Any] = []

    def add(self, first_frame: int, pts_seconds: np.ndarray, results: Sequence[Any]) -> None:
        """Take consecutive frames; see :func:`daskshare.results.schema.detections_batch`.

        Raises
        ------
        ConfigurationError
            When the model does not return one ``Detections`` a frame.
        """
        check_results(self._video, len(pts_seconds), results)
        if self._results and first_frame != self._first_frame + len(self._results):
            self.flush()
        if not self._results:
            self._first_frame = first_frame
        self._pts.append(np.asarray(pts_seconds, np.float64))
        self._results.extend(results)
        if len(self._results) >= self._max_frames:
            self.flush()

    def flush(self) -> None:
        """Write what is left."""
        if self._results:
            pts = np.concatenate(self._pts)
            rows = detections_batch(self._video, self._first_frame, pts, self._results)
            self._pts, self._results = [], []
            self._write(rows)
