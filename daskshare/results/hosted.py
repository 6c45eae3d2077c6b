"""What a host adds for detectors: images, frames and videos in, tables of detections out.

A host imports this module when it is asked for one of these operations
(``daskshare.host.extensions``); clients name them and never import it.
"""

from __future__ import annotations

import base64
import dataclasses
import itertools
from fractions import Fraction
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pyarrow as pa

from daskshare.config import VideoOptions
from daskshare.errors import DaskshareError, InferenceError
from daskshare.host import Call, operation
from daskshare.results.schema import DETECTIONS_SCHEMA, detections_batch
from daskshare.streaming import stream
from daskshare.video.chunk import VideoChunk
from daskshare.video.probe import probe_video

__all__ = ["detect_chunk", "detect_frames", "detect_images", "probe"]

# Hadoop's names of stores that fsspec knows by another.
_SCHEMES = {"s3a": "s3", "s3n": "s3", "wasb": "abfs", "wasbs": "abfss", "gs": "gcs"}


@operation("detect-frames")
def detect_frames(call: Call) -> pa.RecordBatch:
    """Find objects in frames.

    Parameters
    ----------
    call : Call
        Of a detector; ``value`` is uint8 (n, height, width, 3), RGB.

    Returns
    -------
    pyarrow.RecordBatch
        Columns of DETECTIONS_SCHEMA; ``frame`` is the index into ``value``.

    Raises
    ------
    InvalidInputError
        When the frames are none.
    """
    results = call.lease.infer(call.value, task=call.task)
    return detections_batch("", 0, np.zeros(len(call.value)), results)


@operation("detect-images")
def detect_images(call: Call) -> dict[str, Any]:
    """Find objects in encoded images: JPEG, PNG and whatever else OpenCV reads.

    Parameters
    ----------
    call : Call
        Of a detector; ``value`` has ``data`` (uint8, all images one after the other) and
        ``offsets`` (int64, n + 1).

    Returns
    -------
    dict
        ``rows``: a record batch with ``frame`` as index of the image; ``failed``: pairs of index
        and reason, for images that cannot be decoded. The others' results do not suffer.
    """
    data, offsets = call.value["data"], call.value["offsets"].tolist()
    frames, indices, failed = [], [], []
    for index, (start, stop) in enumerate(itertools.pairwise(offsets)):
        image = _decode(data[start:stop])
        if image is None:
            failed.append([index, f"{stop - start} bytes that are no image OpenCV can decode"])
        else:
            frames.append(image)
            indices.append(index)
    if not frames:
        return {"rows": _no_rows(), "failed": failed}
    results = call.lease.infer(frames, task=call.task)
    rows = detections_batch("", 0, np.zeros(len(frames)), results)
    places = pa.array(np.asarray(indices, np.int64)).take(rows.column("frame"))
    return {"rows": rows.set_column(1, rows.schema.field("frame"), places), "failed": failed}


def _no_rows() -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([], DETECTIONS_SCHEMA)


def _decode(data: np.ndarray) -> np.ndarray | None:
    import cv2

    if not len(data):
        return None
    image = cv2.imdecode(data, cv2.IMREAD_COLOR)
    return None if image is None else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


@operation("probe")
def probe(call: Call) -> list[Any]:
    """Index a video and cut it into chunks.

    Parameters
    ----------
    call : Call
        ``arguments`` has ``path`` (also as Hadoop writes URLs) and ``chunk_seconds`` (or None).

    Returns
    -------
    list of dict
        Chunks for ``detect-chunk``, one or more; as JSON, opaque to the client but for ``error``.
        Where packets lie is left out of very long videos, as the answer must fit into a message.
    """
    seconds = call.arguments.get("chunk_seconds") or VideoOptions.from_config().chunk_seconds
    path = _path(call.arguments["path"])
    chunks = probe_video(path, chunk_seconds=seconds)
    if sum(len(chunk.packed_packets) for chunk in chunks) > _MOST_TABLE_BYTES:
        chunks = [dataclasses.replace(chunk, packed_packets=b"") for chunk in chunks]
    return [_as_json(chunk) for chunk in chunks]


def _path(name: str) -> str:
    scheme = urlsplit(name).scheme
    if scheme == "file":
        # Hadoop writes file:/a/b, which few others take.
        return unquote(urlsplit(name).path)
    if scheme == "dbfs":
        return "/dbfs" + unquote(urlsplit(name).path)
    return _SCHEMES.get(scheme, scheme) + name[len(scheme) :]


_PACKED = ("packed_pts", "packed_packets")
_MOST_TABLE_BYTES = 4 << 20


def _as_json(chunk: VideoChunk) -> dict[str, Any]:
    values = {field.name: getattr(chunk, field.name) for field in dataclasses.fields(chunk)}
    values = {k: v.item() if isinstance(v, np.generic) else v for k, v in values.items()}
    values["time_base"] = str(chunk.time_base)
    for name in _PACKED:
        values[name] = base64.b64encode(values[name]).decode()
    return values


def _from_json(values: dict[str, Any]) -> VideoChunk:
    packed = {name: base64.b64decode(values[name]) for name in _PACKED}
    return VideoChunk(**{**values, "time_base": Fraction(values["time_base"]), **packed})


@operation("detect-chunk")
def detect_chunk(call: Call) -> dict[str, Any]:
    """Decode a chunk of video and find objects in its frames.

    Parameters
    ----------
    call : Call
        Of a detector; ``arguments`` has the ``chunk``.

    Returns
    -------
    dict
        ``rows``: a record batch; ``problem``: why frames are missing, or ""; ``num_frames``.

    Raises
    ------
    InferenceError
        When nobody waits for the answer any more.
    """
    chunk = _from_json(call.arguments["chunk"])
    parts = []
    with stream(call.lease, chunk, task=call.task) as batches:
        for frames, results in batches:
            if call.cancelled.is_set():
                raise InferenceError(f"{chunk.video}: stopped, the caller is gone.")
            parts.append(
                detections_batch(chunk.video, frames.first_frame, frames.pts_seconds, results)
            )
    if not batches.problem and batches.num_frames == 0:
        raise DaskshareError(f"{chunk.video}: no frame came out of chunk {chunk.index}.")
    rows = pa.Table.from_batches(parts, DETECTIONS_SCHEMA).combine_chunks().to_batches()
    return {
        "rows": rows[0] if rows else _no_rows(),
        "problem": batches.problem,
        "num_frames": batches.num_frames,
    }
