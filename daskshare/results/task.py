"""What one task of a detect run does on its worker: frames in, one part file out."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daskshare.errors import VideoError
from daskshare.results.collect import FrameCollector
from daskshare.results.parquet import ChunkRecord, PartWriter
from daskshare.results.progress import TOPIC, FrameReporter
from daskshare.results.resume import Job

if TYPE_CHECKING:
    from daskshare.client import SharedModel
    from daskshare.config import VideoOptions

__all__ = ["Outcome", "detect_chunk", "stop_run"]

_lock = threading.Lock()
_running = 0
_stopped_runs: set[str] = set()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a task hands back: a few hundred bytes, never detections.

    Parameters
    ----------
    record : ChunkRecord
        The chunk's row; already in the part's footer, if there is a part.
    worker : str
        Address of the worker.
    process : str
        Its host and process: workers of one process share one copy of a model.
    concurrent_tasks : int
        Detect tasks that ran in this process when this one began, itself included.
    """

    record: ChunkRecord
    worker: str
    process: str
    concurrent_tasks: int


def stop_run(run: str) -> None:
    """Let the tasks of ``run`` in this process end after the frames they have in hand.

    Dask cancels waiting tasks, but cannot interrupt a thread that works.
    """
    _stopped_runs.add(run)


@contextmanager
def _counted() -> Iterator[int]:
    global _running
    with _lock:
        _running += 1
        count = _running
    try:
        yield count
    finally:
        with _lock:
            _running -= 1


def detect_chunk(
    job: Job[Any], model: SharedModel, *, folder: str, run: str, options: VideoOptions
) -> Outcome:
    """Decode a chunk, run its frames through the worker's shared model, write the part file.

    Parameters
    ----------
    job : Job
        The chunk and its part's name.
    model : SharedModel
        A detector.
    folder : str
        Absolute path of ``detections/``, as the workers see it.
    run : str
        Which run this is, for progress and for :func:`stop_run`.
    options : VideoOptions
        The client's, so that workers with another configuration give the same result.

    Returns
    -------
    Outcome
        A video that cannot be read is an outcome (status "error"), so that others go on.

    Raises
    ------
    DaskshareError
        When the model, the engine or the output fails.

    Notes
    -----
    Runs in one of a worker's task threads, many at once.
    """
    from distributed import get_worker

    worker = get_worker()

    def send(message: dict[str, Any]) -> None:
        worker.log_event(TOPIC, message)

    reporter = FrameReporter(send, run, job.file)
    with _counted() as concurrent_tasks:
        try:
            record = _detect(job, model, Path(folder), run, options, reporter)
        except VideoError as error:
            record = job.failed(str(error))
    process = f"{socket.gethostname()}:{os.getpid()}"
    return Outcome(record, worker.address, process, concurrent_tasks)


def _detect(
    job: Job[Any],
    model: SharedModel,
    folder: Path,
    run: str,
    options: VideoOptions,
    reporter: FrameReporter,
) -> ChunkRecord:
    from daskshare.streaming import stream
    from daskshare.worker_plugin import local_share

    chunk = job.chunk
    with local_share().lease(model.spec) as lease, PartWriter(folder / job.file) as part:
        rows = FrameCollector(chunk.video, part.write)
        with stream(lease, chunk, options=options, task=job.file) as results:
            for frames, detections in results:
                if run in _stopped_runs:
                    return job.failed("stopped")
                rows.add(frames.first_frame, frames.pts_seconds, detections)
                reporter.advance(len(detections))
        rows.flush()
        record = job.record(
            "truncated" if results.problem else "ok",
            error=results.problem,
            num_frames=reporter.frames,
            num_detections=part.num_rows,
            decoder=results.decoder,
            file=job.file,
            class_counts=part.class_counts,
        )
        part.finish(record)
    return record
