"""The main job: videos in, one table of detections out; resumable, on any Dask cluster."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from daskshare.config import VideoOptions
from daskshare.errors import (
    ConfigurationError,
    DaskshareError,
    ModelError,
    NotOnWorkerError,
    OutputError,
)
from daskshare.results.annotated import annotate_videos
from daskshare.results.connect import local_client
from daskshare.results.dispatch import Dispatcher
from daskshare.results.parquet import ChunkRecord, OutputFolder
from daskshare.results.progress import ProgressBar, subscribe
from daskshare.results.resume import Job, Plan, plan_run
from daskshare.results.summary import DetectSummary
from daskshare.results.task import Outcome, detect_chunk, stop_run

if TYPE_CHECKING:
    from distributed import Client, Future

    from daskshare.client import SharedModel
    from daskshare.video.chunk import VideoChunk

__all__ = ["detect", "detect_on"]

logger = logging.getLogger(__name__)

# Every further chunk would fail in the same way: stop instead of failing a million times.
_FATAL = (ConfigurationError, ModelError, NotOnWorkerError, OutputError)


def detect(
    paths: str | os.PathLike[str] | Sequence[Any],
    model: SharedModel,
    output: str | os.PathLike[str],
    *,
    client: Client | None = None,
    chunk_seconds: float | None = None,
    annotate: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    storage_options: dict[str, Any] | None = None,
) -> DetectSummary:
    """Find objects in videos with one shared model, and write them as Parquet.

    ``output/detections/*.parquet`` gets one row a detection (``DETECTIONS_SCHEMA``), and
    ``output/chunks.parquet`` one row a chunk of video (``CHUNKS_SCHEMA``), so that frames without
    detections are accounted for. The latter is there only while the folder is complete.

    Calling it again after a kill, a failure or an interrupt does only what is missing. A changed
    model, option or source file is worked on again, and when the call returns, the folder holds
    exactly what this call asked for: parts of other settings or videos are removed then, files
    of others never. So videos of one folder belong in one call, and each call into a folder of its
    own.

    Parameters
    ----------
    paths : str, path, or sequence
        Files, folders, globs or fsspec URLs of videos; or chunks from ``probe_videos``.
    model : SharedModel
        A detector, such as ``daskshare.yolov3("yolov3-tiny")``.
    output : str or os.PathLike
        Folder on a file system that this process and all workers share.
    client : distributed.Client or None
        The cluster to use, with ``daskshare.install`` applied by this function. ``None`` takes
        the current client, or else a local cluster for the length of the call.
    chunk_seconds : float or None
        Aim for a chunk's length; ``None`` takes ``daskshare.video.chunk-duration``.
    annotate : bool
        Also write ``output/annotated``: for each video an H.264 copy with boxes, a contact
        sheet, and a plot of objects in view over time.
    overwrite : bool
        Work on all chunks again, even those that are there.
    progress : bool
        Draw a bar on stderr, or in the notebook.
    storage_options : dict or None
        For fsspec, when paths are URLs.

    Returns
    -------
    DetectSummary
        Its ``failed`` lists chunks without results; everything else is in the folder.

    Raises
    ------
    ConfigurationError
        When an argument is wrong, or the model is no detector.
    OutputError
        When the folder cannot be used, holds foreign Parquet files, or another run writes to it;
        when it holds earlier results and no video can be read that would replace them.
    ModelError
        When the model cannot be loaded.
    DaskshareError
        When the cluster is lost.

    Notes
    -----
    Runs in the caller's thread. Detections never come here: each chunk is one task that decodes,
    infers and writes its own part file on a worker. The table's order is: videos as given, then
    chunk, frame, and falling confidence (``read_detections`` reads it so).
    """
    with contextlib.ExitStack() as stack:

        def connect() -> Client:
            return _current_or_local_client(stack) if client is None else client

        return detect_on(
            connect,
            paths,
            model,
            output,
            chunk_seconds=chunk_seconds,
            annotate=annotate,
            overwrite=overwrite,
            progress=progress,
            storage_options=storage_options,
        )


def _current_or_local_client(stack: contextlib.ExitStack) -> Client:
    from distributed import Client

    try:
        client: Client = Client.current()
    except ValueError:  # there is none
        return local_client(stack)
    return client


def detect_on(
    connect: Callable[[], Client],
    paths: str | os.PathLike[str] | Sequence[Any],
    model: SharedModel,
    output: str | os.PathLike[str],
    *,
    chunk_seconds: float | None = None,
    annotate: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    storage_options: dict[str, Any] | None = None,
) -> DetectSummary:
    """As :func:`detect`, on the client that ``connect()`` makes while the videos are probed."""
    from daskshare.client import SharedModel, install

    begin_seconds = time.perf_counter()
    if not isinstance(model, SharedModel):
        raise ConfigurationError(
            f"model is {model!r}; expected a SharedModel such as daskshare.yolov3('yolov3-tiny').",
            option="model",
        )
    folder = OutputFolder(output)
    options = VideoOptions.from_config()

    @functools.cache
    def connected() -> Client:
        client = connect()
        if client.asynchronous:
            raise ConfigurationError(
                "The client is asynchronous; expected a synchronous one. Call detect outside of "
                "the event loop, with a Client of its own.",
                option="client",
            )
        install(client)
        return client

    with folder.lock():
        existing = folder.scan()
        if overwrite:
            existing = {}
        with ThreadPoolExecutor(1, thread_name_prefix="daskshare-probe") as pool:
            probing = pool.submit(_probe, paths, chunk_seconds, storage_options)
            if not existing:
                # There is work for sure: start the cluster while the files are looked at.
                connected()
            chunks = probing.result()
        plan = plan_run(chunks, existing, model_key=model.spec.key, decoder=options.decoder)
        if existing and plan.unreadable and not plan.todo and not plan.keep:
            # A mistyped path, perhaps: results that are there must not go for nothing.
            raise _nothing_to_replace_with(folder, list(plan.unreadable.values()), len(existing))
        folder.begin(plan.keep, work_left=bool(plan.todo))
        logger.info(
            "%s: %d chunks to do, %d kept of an earlier run, %d that cannot be read",
            folder.path,
            len(plan.todo),
            len(plan.keep),
            len(plan.unreadable),
        )
        run = _Run(model, folder, options, plan)
        if plan.todo:
            run.work(connected(), progress=progress)
        records = [run.records[name] for name in plan.order]
        folder.complete(records)
        seconds = time.perf_counter() - begin_seconds
        annotated = (
            annotate_videos(
                connected,
                folder,
                records,
                progress=progress,
                overwrite=overwrite,
                storage_options=storage_options,
            )
            if annotate
            else ()
        )
        return run.summary(records, seconds, tuple(annotated))


def _probe(
    paths: Any, chunk_seconds: float | None, storage_options: dict[str, Any] | None
) -> list[VideoChunk]:
    from daskshare.video.chunk import VideoChunk
    from daskshare.video.probe import probe_videos

    if not isinstance(paths, (str, os.PathLike)):
        given = list(paths)
        if given and all(isinstance(p, VideoChunk) for p in given):
            return given
    return probe_videos(paths, chunk_seconds=chunk_seconds, storage_options=storage_options)


def _nothing_to_replace_with(
    folder: OutputFolder, unreadable: list[ChunkRecord], num_parts: int
) -> OutputError:
    first = unreadable[0]
    return OutputError(
        f"None of {len(unreadable)} videos can be read ({first.video}: {first.error}), and "
        f"{folder.path} holds {num_parts} parts of earlier results, which were left alone; "
        "expected a video that can be read. Correct the paths, or use another output folder.",
        path=str(folder.path),
        parts=num_parts,
    )


class _Run:
    """One run's tasks and what came of them; in the caller's thread."""

    def __init__(
        self,
        model: SharedModel,
        folder: OutputFolder,
        options: VideoOptions,
        plan: Plan[VideoChunk],
    ) -> None:
        self._model = model
        self._folder = folder
        self._options = options
        self._plan = plan
        self._id = uuid.uuid4().hex[:12]
        self._concurrent_tasks: dict[str, int] = {}
        self._workers: dict[str, str] = {}
        self._work_seconds = 0.0
        self._loads = 0
        self._model_bytes = 0
        self.records: dict[str, ChunkRecord] = {**plan.unreadable, **plan.keep}

    def work(self, client: Client, *, progress: bool) -> None:
        """Do what the plan left to do."""
        kept_frames = sum(r.num_frames for r in self._plan.keep.values())
        bar = ProgressBar(
            kept_frames + sum(job.chunk.num_frames for job in self._plan.todo),
            initial_frames=kept_frames,
            enabled=progress,
        )
        dispatcher = Dispatcher(
            client,
            on_message=lambda message: bar.advance(message["task"], message["frames"]),
            on_tick=lambda threads: bar.tick("" if threads else "waiting for workers"),
        )

        def submit(job: Job[VideoChunk]) -> Future[Any]:
            bar.start(job.file)
            future: Future[Any] = client.submit(
                detect_chunk,
                job,
                self._model,
                folder=str(self._folder.detections),
                run=self._id,
                options=self._options,
                key=f"daskshare-detect-{self._id}/{job.file}",
                # A dead engine is rebuilt on the next call; other errors come twice at worst.
                retries=1,
                pure=False,
            )
            return future

        begin_seconds = time.perf_counter()
        try:
            with subscribe(client, self._id, dispatcher.post):
                for job, future in dispatcher.completed(self._plan.todo, submit):
                    record = self._record(job, future)
                    self.records[job.file] = record
                    bar.end(job.file, record.num_frames, job.chunk.num_frames)
                self._sharing(client)
        except BaseException as error:
            dispatcher.cancel()
            if client.status == "running":
                client.run(stop_run, self._id)
            if isinstance(error, KeyboardInterrupt):
                done = sum(1 for r in self.records.values() if r.file)
                error.add_note(
                    f"{done} of {len(self._plan.order)} chunks are in {self._folder.path}; "
                    "the same call does the rest."
                )
            raise
        finally:
            self._work_seconds = time.perf_counter() - begin_seconds
            bar.close()

    def _record(self, job: Job[VideoChunk], future: Future[Any]) -> ChunkRecord:
        if future.status == "error":
            error = future.exception()
            if isinstance(error, _FATAL):
                raise error
            text = str(error) if isinstance(error, DaskshareError) else repr(error)
            return job.failed(text)
        outcome: Outcome = future.result()
        self._workers[outcome.process] = outcome.worker
        self._concurrent_tasks[outcome.process] = max(
            outcome.concurrent_tasks, self._concurrent_tasks.get(outcome.process, 0)
        )
        return outcome.record

    def summary(
        self, records: list[ChunkRecord], seconds: float, annotated: tuple[Any, ...]
    ) -> DetectSummary:
        """Add up what there is now."""
        new = [self.records[job.file] for job in self._plan.todo]
        new_frames = sum(r.num_frames for r in new)
        return DetectSummary(
            output=self._folder.path,
            videos=len({r.video for r in records}),
            chunks=len(records),
            frames=sum(r.num_frames for r in records),
            num_detections=sum(r.num_detections for r in records),
            counts_by_class=_add_counts(r.class_counts for r in records),
            new_chunks=sum(1 for r in new if r.file),
            new_frames=new_frames,
            seconds=seconds,
            frames_per_second=new_frames / self._work_seconds if new_frames else 0.0,
            failed=tuple(r for r in records if r.status == "error"),
            truncated=tuple(r for r in records if r.status == "truncated"),
            decoders=_add_counts({r.decoder: r.num_frames} for r in records if r.decoder),
            model=self._model.spec.name,
            model_loads=self._loads,
            model_copies=len(self._concurrent_tasks),
            model_bytes=self._model_bytes,
            concurrent_tasks=sum(self._concurrent_tasks.values()),
            annotated=annotated,
        )

    def _sharing(self, client: Client) -> None:
        """Ask the workers that were in use how often they loaded the model, and its size."""
        from daskshare.client import stats

        # Of a process's workers each reports the process's one copy: one of them counts.
        in_use = set(self._workers.values())
        for worker, report in stats(client).items():
            if worker in in_use:
                model = report["models"].get(self._model.spec.key, {})
                self._loads += model.get("loads", 0)
                self._model_bytes = max(self._model_bytes, model.get("model_bytes", 0))


def _add_counts(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for each in counts:
        for name, count in each.items():
            total[name] = total.get(name, 0) + count
    return dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))
