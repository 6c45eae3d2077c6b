"""Pictures of a finished run: annotated videos, contact sheets and plots, one task a video."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daskshare.errors import OutputError
from daskshare.results.dispatch import Dispatcher
from daskshare.results.parquet import ChunkRecord, OutputFolder, read_parts, video_slug
from daskshare.results.plots import plot_counts
from daskshare.results.progress import ProgressBar

if TYPE_CHECKING:
    from distributed import Client, Future

__all__ = ["annotate_videos"]

_MANIFEST = ".manifest.json"
_SUFFIXES = (".mp4", "-contact-sheet.png", "-counts.png")


@dataclass(frozen=True, slots=True)
class Work:
    """One video to annotate: its chunks' records, in order, and the stem of the new files."""

    video: str
    records: tuple[ChunkRecord, ...]
    stem: str

    @property
    def digest(self) -> str:
        """Of all that decides the pictures: the part files' names hold their fingerprints."""
        text = json.dumps([r.file for r in self.records])
        return hashlib.sha256(text.encode()).hexdigest()

    def outputs(self, folder: Path) -> list[Path]:
        """Files that are made."""
        return [folder / f"{self.stem}{suffix}" for suffix in _SUFFIXES]

    @property
    def num_frames(self) -> int:
        """Frames to draw on."""
        return sum(r.num_frames for r in self.records)


def plan_annotation(records: Iterable[ChunkRecord]) -> list[Work]:
    """Videos that have results, each with a stem of its own."""
    videos: dict[str, list[ChunkRecord]] = {}
    for record in records:
        if record.file:
            videos.setdefault(record.video, []).append(record)
    slugs = Counter(video_slug(video).lower() for video in videos)
    works = []
    for video, rows in videos.items():
        stem = video_slug(video)
        if slugs[stem.lower()] > 1:
            stem += "-" + hashlib.sha256(video.encode("utf-8", "surrogateescape")).hexdigest()[:8]
        works.append(Work(video, tuple(rows), stem))
    return works


def annotate_videos(
    connect: Callable[[], Client],
    folder: OutputFolder,
    records: Iterable[ChunkRecord],
    *,
    progress: bool,
    overwrite: bool,
    storage_options: dict[str, Any] | None,
) -> list[Path]:
    """Make the pictures that are missing or show earlier results.

    Parameters
    ----------
    connect : callable
        Returns the client, called only when there is work. Each video is one task.
    folder : OutputFolder
        Holds the complete results; pictures go to its ``annotated`` folder.
    records : iterable of ChunkRecord
        Of the whole run.
    progress, overwrite, storage_options
        As for ``detect``.

    Returns
    -------
    list of Path
        All pictures of the run, those of earlier runs too.

    Raises
    ------
    DaskshareError
        When a video cannot be annotated; detections are complete all the same.

    Notes
    -----
    Runs in the caller's thread; pictures of videos that are no longer asked for are removed.
    """
    folder.annotated.mkdir(exist_ok=True)
    manifest = _read_manifest(folder.annotated)
    works = plan_annotation(records)
    stems = {work.stem for work in works}
    for stem in [stem for stem in manifest if stem not in stems]:
        del manifest[stem]
        for suffix in _SUFFIXES:
            (folder.annotated / f"{stem}{suffix}").unlink(missing_ok=True)
    todo = [
        work
        for work in works
        if overwrite
        or manifest.get(work.stem) != work.digest
        or not all(path.exists() for path in work.outputs(folder.annotated))
    ]
    if todo:
        client = connect()
        bar = ProgressBar(
            sum(work.num_frames for work in todo), enabled=progress, description="annotate"
        )
        dispatcher = Dispatcher(client, on_tick=lambda threads: bar.tick())
        run = uuid.uuid4().hex[:12]

        def submit(work: Work) -> Future[Any]:
            bar.start(work.stem)
            future: Future[Any] = client.submit(
                annotate_video,
                work,
                parts=str(folder.detections),
                output=str(folder.annotated),
                storage_options=storage_options,
                key=f"daskshare-annotate-{run}/{work.stem}",
                pure=False,
            )
            return future

        try:
            for work, future in dispatcher.completed(todo, submit):
                future.result()
                bar.end(work.stem, work.num_frames, work.num_frames)
                manifest[work.stem] = work.digest
                _write_manifest(folder.annotated, manifest)
        finally:
            dispatcher.cancel()
            bar.close()
    _write_manifest(folder.annotated, manifest)
    return [path for work in works for path in work.outputs(folder.annotated)]


def annotate_video(
    work: Work, *, parts: str, output: str, storage_options: dict[str, Any] | None
) -> None:
    """Draw one video's pictures, each whole or not at all. Runs in a task."""
    from daskshare.video.annotate import write_annotated, write_contact_sheet

    table = read_parts(Path(parts), [record.file for record in work.records])
    video_path, sheet_path, plot_path = work.outputs(Path(output))
    write_annotated(work.video, table, video_path, storage_options=storage_options)
    write_contact_sheet(work.video, table, sheet_path, storage_options=storage_options)
    start_seconds = min(r.start_seconds for r in work.records)
    plot_counts(
        table,
        plot_path,
        start_seconds=start_seconds,
        duration_seconds=max(r.end_seconds for r in work.records) - start_seconds,
        num_frames=work.num_frames,
        title=work.video.replace("\\", "/").rpartition("/")[2],
    )


def _read_manifest(folder: Path) -> dict[str, str]:
    try:
        manifest: dict[str, str] = json.loads((folder / _MANIFEST).read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise OutputError(
            f"{folder / _MANIFEST} is damaged: {error}. Remove it to annotate anew.",
            path=str(folder / _MANIFEST),
        ) from error
    return manifest


def _write_manifest(folder: Path, manifest: dict[str, str]) -> None:
    partial = folder / f"{_MANIFEST}.partial"
    try:
        partial.write_text(json.dumps(manifest, indent=1), "utf-8")
        os.replace(partial, folder / _MANIFEST)
    except OSError as error:
        raise OutputError(f"Cannot write {folder}: {error}.", path=str(folder)) from error
