"""Video through a leased model: decode in the caller's thread while the engine works."""

from __future__ import annotations

import concurrent.futures
import logging
import threading
from collections import Counter, deque
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

from daskshare.config import VideoOptions
from daskshare.models.spec import FrameBatch, FrameSource, FrameStream

if TYPE_CHECKING:
    from concurrent.futures import Future

    from daskshare._engine_activity import Switch
    from daskshare.share import Lease

__all__ = ["InferenceStream", "stream", "stream_counts"]

logger = logging.getLogger("daskshare.streaming")

_counts_lock = threading.Lock()
_counts: Counter[str] = Counter()


def stream_counts() -> dict[str, int]:
    """Count the streams that ended in this process.

    Returns
    -------
    dict of str to int
        ``chunks`` read to their end, ``frames`` of them, ``chunks_failed`` (nothing could be
        read), ``chunks_incomplete`` (frames are missing), ``chunks_aborted`` (an exception, or the
        caller stopped early), ``decoder_nvdec`` and ``decoder_pyav``.

    Notes
    -----
    Any thread may call it; it takes one short lock.
    """
    names = ("chunks", "frames", "chunks_failed", "chunks_incomplete", "chunks_aborted")
    with _counts_lock:
        return dict.fromkeys((*names, "decoder_nvdec", "decoder_pyav"), 0) | dict(_counts)


def stream(
    lease: Lease,
    source: FrameSource,
    *,
    options: VideoOptions | None = None,
    task: str | None = None,
) -> InferenceStream:
    """Decode ``source`` and run its frames through the leased model.

    Parameters
    ----------
    lease : Lease
        Of the model; it must outlive the stream.
    source : FrameSource
        A video chunk, for example. A true ``error`` attribute says that it cannot be read: then
        nothing is opened and no frames come.
    options : VideoOptions, optional
        Default: Dask's configuration.
    task : str, optional
        Whose frames these are; the engine lets tasks take turns.

    Returns
    -------
    InferenceStream
        A context manager and iterator of ``(FrameBatch, results)``.

    Examples
    --------
    >>> with stream(lease, chunk) as batches:                      # doctest: +SKIP
    ...     for batch, detections in batches:
    ...         save(batch.first_frame, batch.pts_seconds, detections)
    >>> batches.problem, batches.decoder                           # doctest: +SKIP
    ('', 'pyav')
    """
    return InferenceStream(lease, source, options or VideoOptions.from_config(), task)


class InferenceStream:
    """Pairs of frames and what the model made of them, in the video's order.

    Attributes
    ----------
    problem : str
        Why frames are missing; "" when none are. Set once the iteration has ended.
    decoder : str
        "nvdec" or "pyav"; "" when nothing was decoded. Set once the iteration has ended.
    num_frames : int
        Frames whose results have come out.

    Notes
    -----
    One thread uses it, the task's. That thread decodes, and hands each batch of frames to the
    engine without waiting for its results until ``requests_in_flight`` of them wait; so decoding
    overlaps with inference, and at most ``requests_in_flight + 1`` batches are in memory. The
    decoder is closed when the iteration ends, fails, or the ``with`` block is left, and only
    after the engine has stopped reading its frames.
    """

    def __init__(
        self, lease: Lease, source: FrameSource, options: VideoOptions, task: str | None
    ) -> None:
        self._lease = lease
        self._source = source
        self._options = options
        self._task = task
        self._pairs: Generator[tuple[FrameBatch, Any], None, None] | None = None
        self.problem = ""
        self.decoder = ""
        self.num_frames = 0

    def __enter__(self) -> InferenceStream:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the decoder. Idempotent."""
        if self._pairs is not None:
            self._pairs.close()

    def __iter__(self) -> Iterator[tuple[FrameBatch, Any]]:
        if self._pairs is None:
            self._pairs = self._run()
        return self._pairs

    def _run(self) -> Generator[tuple[FrameBatch, Any], None, None]:
        error = getattr(self._source, "error", "")
        if error:
            self._end(error, "", failed=True)
            return
        options = self._options
        # The decoder's own choice would be NVDEC wherever it is told a CUDA device.
        device = None if options.decoder == "pyav" else self._lease.engine.device
        wanted: dict[str, Any] = {"device": device, "batch_frames": options.frames_per_request}
        letterbox_size = getattr(self._lease.program, "letterbox_size", None)
        if letterbox_size is not None and device is not None and device.is_cuda:
            wanted["input_size"] = letterbox_size
        ended = False
        # Opening a file and its decoder is part of what the device waits for.
        decoding = self._lease.decoding()
        decoding.set(True)
        try:
            with self._source.open_frames(**wanted) as frames:
                yield from self._infer(frames, decoding)
                problem, decoder = frames.problem, frames.decoder
            ended = True
        finally:
            decoding.set(False)
            if not ended:
                with _counts_lock:
                    _counts["chunks_aborted"] += 1
        self._end(problem, decoder, failed=False)

    def _infer(self, frames: FrameStream, decoding: Switch) -> Iterator[tuple[FrameBatch, Any]]:
        program = self._lease.program
        waiting: deque[tuple[FrameBatch, Any, Future[Any]]] = deque()
        try:
            for batch in frames:
                decoding.set(False)
                while len(waiting) >= self._options.requests_in_flight:
                    yield self._next(waiting)
                if batch.source_size is None:
                    prepared = program.prepare(batch.frames)
                else:
                    prepared = program.prepare_letterboxed(  # type: ignore[attr-defined]
                        batch.frames, batch.source_size
                    )
                future = self._lease.submit(prepared, task=self._task)
                waiting.append((batch, prepared.context, future))
                del batch, prepared
                decoding.set(True)
            decoding.set(False)
            while waiting:
                yield self._next(waiting)
        finally:
            # The engine may still be reading frames that live in the decoder's own surfaces.
            concurrent.futures.wait([f for _, _, f in waiting if not f.cancel()])

    def _next(self, waiting: deque[tuple[FrameBatch, Any, Future[Any]]]) -> tuple[FrameBatch, Any]:
        batch, context, future = waiting[0]
        results = self._lease.program.finish(future.result(), context)
        waiting.popleft()
        self.num_frames += len(batch.pts_seconds)
        return batch, results

    def _end(self, problem: str, decoder: str, *, failed: bool) -> None:
        self.problem = problem
        self.decoder = decoder
        with _counts_lock:
            _counts["chunks"] += 1
            _counts["frames"] += self.num_frames
            if decoder:
                _counts[f"decoder_{decoder}"] += 1
            if failed:
                _counts["chunks_failed"] += 1
            elif problem:
                _counts["chunks_incomplete"] += 1
        if problem:
            logger.warning("%s: %s", self._source.video, problem)
