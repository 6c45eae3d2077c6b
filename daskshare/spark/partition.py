"""What one Spark task of detect does: rows to its device's host, detections back."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from daskshare.errors import InvalidInputError, TruncatedVideoError, UnreadableVideoError
from daskshare.host import HostClient, HostedModel
from daskshare.models.spec import ModelSpec
from daskshare.spark.columns import INPUT, Columns
from daskshare.spark.connection import task_device

__all__ = ["Partition", "binary_values"]

#: A request under way, and what makes output of its answer.
_Waiting = tuple[int, Callable[[Any], Iterator[pa.RecordBatch]]]


class Partition:
    """A function for ``mapInArrow``: small, picklable, stateless.

    Parameters
    ----------
    spec : ModelSpec or str
        The detector.
    columns : Columns
        The layout.
    input_shape, chunk_seconds, rows_per_request, requests_in_flight, allow_code, scheduler
        As for :func:`daskshare.spark.detect`.

    Notes
    -----
    Runs in a Python worker's one thread. It has a connection of its own, so that ending the task,
    whatever the reason, ends its requests in the host within a batch. At most
    ``requests_in_flight`` requests wait; while they do, Spark's next rows are not read.
    """

    def __init__(
        self,
        spec: ModelSpec | str,
        columns: Columns,
        *,
        input_shape: tuple[int, int, int] | None,
        chunk_seconds: float | None,
        rows_per_request: int,
        requests_in_flight: int,
        allow_code: bool,
        scheduler: str | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._spec = spec
        self._columns = columns
        self._input_shape = input_shape
        self._chunk_seconds = chunk_seconds
        self._rows_per_request = rows_per_request
        self._requests_in_flight = requests_in_flight
        self._allow_code = allow_code

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Turn input batches into batches of detections, in order."""
        first = next(batches, None)
        if first is None:
            return
        with self._connect() as client:
            model = client.open(self._spec)
            yield from self._windowed(client, self._requests(client, model, first, batches))

    def _connect(self) -> HostClient:
        if self._scheduler is None:
            return HostClient(task_device(), allow_code=self._allow_code)
        from daskshare.spark.cluster import connect_cluster

        return connect_cluster(self._scheduler, model=self._spec, allow_code=self._allow_code)

    def _windowed(
        self, client: HostClient, requests: Iterator[_Waiting]
    ) -> Iterator[pa.RecordBatch]:
        waiting: deque[_Waiting] = deque()
        for request in requests:
            waiting.append(request)
            if len(waiting) >= self._requests_in_flight:
                yield from _finish(client, waiting)
        while waiting:
            yield from _finish(client, waiting)

    def _requests(
        self,
        client: HostClient,
        model: HostedModel,
        first: pa.RecordBatch,
        batches: Iterator[pa.RecordBatch],
    ) -> Iterator[_Waiting]:
        send = {"videos": self._videos, "images": self._images, "frames": self._frames}
        batch: pa.RecordBatch | None = first
        while batch is not None:
            values = batch.column(batch.schema.get_field_index(INPUT))
            keys = batch.select(list(self._columns.keys))
            yield from send[self._columns.kind](client, model, keys, values)
            batch = next(batches, None)

    # -- videos --

    def _videos(
        self, client: HostClient, model: HostedModel, keys: pa.RecordBatch, paths: pa.Array
    ) -> Iterator[_Waiting]:
        for place, path in enumerate(paths.to_pylist()):
            if path is None:
                yield self._refuse(client, keys, place, "the path is null", None)
                continue
            asked = {"path": path, "chunk_seconds": self._chunk_seconds}
            for chunk in client.call("probe", asked):
                finish = self._finish_chunk(keys, place, path, bool(chunk["error"]))
                yield client.submit("detect-chunk", {"chunk": chunk}, model=model), finish

    def _finish_chunk(
        self, keys: pa.RecordBatch, place: int, path: str, unreadable: bool
    ) -> Callable[[Any], Iterator[pa.RecordBatch]]:
        def finish(answer: Any) -> Iterator[pa.RecordBatch]:
            rows = answer["rows"]
            if len(rows):
                places = pa.array(np.full(len(rows), place))
                yield self._columns.assemble(keys, places, rows, path)
            if answer["problem"]:
                if self._columns.error is None:
                    raise (UnreadableVideoError if unreadable else TruncatedVideoError)(
                        f"{answer['problem']}. Give error_col to get a row in its place.",
                        video=path,
                    )
                yield self._columns.failure(keys, place, answer["problem"], path)

        return finish

    # -- images and frames --

    def _images(
        self, client: HostClient, model: HostedModel, keys: pa.RecordBatch, values: pa.Array
    ) -> Iterator[_Waiting]:
        for start in range(0, len(values), self._rows_per_request):
            part = values.slice(start, self._rows_per_request)
            some = keys.slice(start, self._rows_per_request)
            request = client.submit("detect-images", value=_bytes_of(part), model=model)
            yield request, self._finish_images(some)

    def _finish_images(self, keys: pa.RecordBatch) -> Callable[[Any], Iterator[pa.RecordBatch]]:
        def finish(answer: Any) -> Iterator[pa.RecordBatch]:
            rows = answer["rows"]
            if len(rows):
                yield self._columns.assemble(keys, rows.column("frame"), rows, None)
            for place, reason in answer["failed"]:
                yield self._failed(keys, place, reason)

        return finish

    def _frames(
        self, client: HostClient, model: HostedModel, keys: pa.RecordBatch, values: pa.Array
    ) -> Iterator[_Waiting]:
        shape = self._input_shape
        assert shape is not None
        for start in range(0, len(values), self._rows_per_request):
            part = values.slice(start, self._rows_per_request)
            some = keys.slice(start, self._rows_per_request)
            data, lengths = binary_values(part)
            wrong = np.flatnonzero(lengths != np.prod(shape))
            if len(wrong):
                reason = (
                    f"{lengths[wrong[0]]} bytes; expected {np.prod(shape)} for a frame of "
                    f"shape {shape}"
                )
                for place in range(len(part)):
                    # One by one: the good ones among them are looked at all the same.
                    if place in wrong:
                        yield self._refuse(client, some, place, reason, None)
                    else:
                        one, _ = binary_values(part.slice(place, 1))
                        yield self._frame_request(client, model, some.slice(place, 1), one)
                continue
            yield self._frame_request(client, model, some, data)

    def _frame_request(
        self, client: HostClient, model: HostedModel, keys: pa.RecordBatch, data: np.ndarray
    ) -> _Waiting:
        def finish(rows: Any) -> Iterator[pa.RecordBatch]:
            if len(rows):
                yield self._columns.assemble(keys, rows.column("frame"), rows, None)

        frames = data.reshape(-1, *(self._input_shape or ()))
        return client.submit("detect-frames", value=frames, model=model), finish

    # -- what cannot be read --

    def _failed(self, keys: pa.RecordBatch, place: int, reason: str) -> pa.RecordBatch:
        if self._columns.error is None:
            named = keys.slice(place, 1).to_pylist()[0]
            raise InvalidInputError(
                f"The input of row {named} is {reason}. Give error_col to get a row in its place.",
                row={name: str(value) for name, value in named.items()},
            )
        return self._columns.failure(keys, place, reason, None)

    def _refuse(
        self, client: HostClient, keys: pa.RecordBatch, place: int, reason: str, video: str | None
    ) -> _Waiting:
        # Answered in its turn, so that rows come out in the order of the input.
        def finish(answer: Any) -> Iterator[pa.RecordBatch]:
            yield self._failed(keys, place, reason)

        return 0, finish


def _finish(client: HostClient, waiting: deque[_Waiting]) -> Iterator[pa.RecordBatch]:
    request, finish = waiting.popleft()
    yield from finish(client.result(request) if request else None)


def _bytes_of(values: pa.Array) -> dict[str, np.ndarray]:
    """A binary column's memory as it is: no image is copied one by one."""
    data, lengths = binary_values(values)
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return {"data": data, "offsets": offsets}


def binary_values(values: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of a column one after the other, uint8, and how many each row has; null rows: none."""
    if values.null_count:
        empty = b"" if pa.types.is_binary(values.type) or _is_large(values.type) else []
        values = pa.array([empty if v is None else v for v in values.to_pylist()], values.type)
    if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        offsets = values.offsets.to_numpy()
        inner = values.values.slice(int(offsets[0]), int(offsets[-1] - offsets[0]))
        # Negative bytes are the upper half of unsigned ones.
        return inner.to_numpy(zero_copy_only=False).astype(np.uint8), np.diff(offsets)
    dtype = np.int64 if _is_large(values.type) else np.int32
    _, raw_offsets, raw = values.buffers()
    offsets = np.frombuffer(raw_offsets, dtype)[values.offset : values.offset + len(values) + 1]
    data = np.frombuffer(raw or b"", np.uint8)[offsets[0] : offsets[-1]]
    return data, np.diff(offsets)


def _is_large(kind: pa.DataType) -> bool:
    return bool(pa.types.is_large_binary(kind))
