"""Columns of the two tables that a detect run writes, and how rows are built from results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from daskshare.errors import ConfigurationError
from daskshare.models.spec import DETECTION_COLUMNS, Detections

__all__ = [
    "CHUNKS_SCHEMA",
    "DETECTIONS_SCHEMA",
    "SCHEMA_VERSION",
    "check_results",
    "detections_batch",
]

#: Raised when the columns or their meaning change, so that older files are not reused.
SCHEMA_VERSION = 1

#: One row an object. ``frame`` is 0-based in presentation order; boxes are in source pixels.
DETECTIONS_SCHEMA = pa.schema(
    [
        ("video", pa.string()),
        ("frame", pa.int64()),
        ("pts_seconds", pa.float64()),
        ("class_id", pa.int16()),
        ("class_name", pa.dictionary(pa.int32(), pa.string())),
        ("confidence", pa.float32()),
        ("x_min", pa.float32()),
        ("y_min", pa.float32()),
        ("x_max", pa.float32()),
        ("y_max", pa.float32()),
    ]
)

#: One row a chunk, so that a frame without any detection is accounted for all the same.
#: ``num_frames`` are the frames that were decoded and looked at; ``status`` is "ok", "truncated"
#: or "error"; ``file`` is the chunk's part under ``detections/`` ("" when there is none).
CHUNKS_SCHEMA = pa.schema(
    [
        ("video", pa.string()),
        ("first_frame", pa.int64()),
        ("num_frames", pa.int64()),
        ("num_detections", pa.int64()),
        ("status", pa.string()),
        ("error", pa.string()),
        ("chunk", pa.int32()),
        ("start_seconds", pa.float64()),
        ("end_seconds", pa.float64()),
        ("decoder", pa.string()),
        ("file", pa.string()),
    ]
)

if tuple(DETECTIONS_SCHEMA.names) != DETECTION_COLUMNS:
    raise AssertionError("DETECTIONS_SCHEMA and DETECTION_COLUMNS differ")


def detections_batch(
    video: str, first_frame: int, pts_seconds: np.ndarray, results: Sequence[Any]
) -> pa.RecordBatch:
    """Turn the detections of consecutive frames into rows.

    Parameters
    ----------
    video : str
        Path or URL as the user gave it.
    first_frame : int
        0-based index of the first frame in presentation order.
    pts_seconds : numpy.ndarray, shape (n,), float64
        Presentation time of each frame.
    results : sequence of Detections, length n
        One entry a frame.

    Returns
    -------
    pyarrow.RecordBatch
        Columns of DETECTIONS_SCHEMA, ordered by frame, then as in each ``Detections`` (falling
        confidence). The dictionary of ``class_name`` holds all classes of the model, so that it
        is the same in every file of a run.

    Raises
    ------
    ConfigurationError
        When the model does not return one ``Detections`` a frame.
    """
    check_results(video, len(pts_seconds), results)
    counts = np.fromiter((len(r) for r in results), dtype=np.int64, count=len(results))
    total = int(counts.sum())
    names = results[0].class_names if results else ()
    frame = np.repeat(np.arange(first_frame, first_frame + len(results), dtype=np.int64), counts)
    pts = np.repeat(np.asarray(pts_seconds, dtype=np.float64), counts)
    if total:
        class_id = np.concatenate([r.class_id for r in results]).astype(np.int16, copy=False)
        confidence = np.concatenate([r.confidence for r in results]).astype(np.float32, copy=False)
        xyxy = np.concatenate([r.xyxy for r in results]).astype(np.float32, copy=False)
    else:
        class_id = np.empty(0, np.int16)
        confidence = np.empty(0, np.float32)
        xyxy = np.empty((0, 4), np.float32)
    class_name = pa.DictionaryArray.from_arrays(
        pa.array(class_id.astype(np.int32)), pa.array(names, pa.string())
    )
    columns = [
        pa.array([video], pa.string()).take(pa.array(np.zeros(total, np.int64))),
        pa.array(frame),
        pa.array(pts),
        pa.array(class_id),
        class_name,
        pa.array(confidence),
        *(pa.array(np.ascontiguousarray(xyxy[:, i])) for i in range(4)),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=DETECTIONS_SCHEMA)


def check_results(video: str, num_frames: int, results: Sequence[Any]) -> None:
    """Raise ConfigurationError unless ``results`` holds one ``Detections`` a frame."""
    if len(results) != num_frames or not all(isinstance(r, Detections) for r in results):
        got = sorted({type(r).__name__ for r in results})
        raise ConfigurationError(
            f"The model returned {len(results)} results of type {', '.join(got) or 'nothing'} for "
            f"{num_frames} frames of {video}; detect expects one Detections a frame. Use a "
            "detector such as daskshare.yolov3(), or call another model in tasks of your own.",
            model_results=got,
        )
