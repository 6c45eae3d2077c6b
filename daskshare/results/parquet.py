"""The output folder of a detect run: part files, their footers, the lock, and cleaning up.

::

    DIR/detections/<video>-<digest>-<chunk>-<fingerprint>.parquet   one file a chunk
    DIR/chunks.parquet      one row a chunk; there only while DIR is complete
    DIR/.superseded/        parts of earlier settings, until the new run is complete
    DIR/.daskshare.lock     held by the run that writes

A part file appears under its name only when it is whole (written beside it under a hidden name,
flushed to disk, renamed), and its Parquet footer says which model, source version and chunk it is
the result of. Nothing else needs to be remembered, so a kill at any instant loses at most the
chunks that were being worked on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import pyarrow as pa
import pyarrow.parquet as pq

from daskshare.errors import OutputError
from daskshare.results.schema import CHUNKS_SCHEMA, DETECTIONS_SCHEMA

__all__ = ["ChunkRecord", "OutputFolder", "PartWriter", "part_name", "read_detections"]

_RECORD_KEY = b"daskshare.chunk"
_PART = re.compile(r"[\w.+-]*-[0-9a-f]{8}-[0-9]{6,}-[0-9a-f]{10}\.parquet")
_PARTIAL = re.compile(r"\..*\.parquet\.[0-9a-f]{32}\.partial")
_ROWS_PER_GROUP = 131_072


@dataclass(frozen=True, slots=True)
class ChunkRecord:
    """What became of one chunk: a row of ``chunks.parquet``, and the footer of its part file.

    Parameters
    ----------
    video, chunk, first_frame, num_frames, num_detections, status, error, start_seconds, \
end_seconds, decoder, file
        As in CHUNKS_SCHEMA.
    class_counts : dict of str to int
        Detections of each class that occurs.
    fingerprint : str
        Digest of all that decides the part's content; see ``daskshare.results.resume``.
    """

    video: str
    chunk: int
    first_frame: int
    num_frames: int
    num_detections: int
    status: str
    error: str = ""
    start_seconds: float = 0.0
    end_seconds: float = 0.0
    decoder: str = ""
    file: str = ""
    class_counts: dict[str, int] = field(default_factory=dict)
    fingerprint: str = ""

    def to_json(self) -> str:
        """Text for a Parquet footer."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Inverse of ``to_json``; raises ValueError, TypeError or KeyError for anything else."""
        return cls(**json.loads(text))


def video_slug(video: str) -> str:
    """Readable part of a file name for ``video``: its stem, without characters that need care."""
    stem = re.split(r"[/\\]", video.rstrip("/\\"))[-1].rpartition(".")
    return re.sub(r"[^\w+-]+", "_", stem[0] or stem[2], flags=re.ASCII)[:60] or "video"


def part_name(video: str, chunk: int, fingerprint: str) -> str:
    """File name of a chunk's part: sorts by video, then chunk; differs for each fingerprint."""
    digest = hashlib.sha256(video.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return f"{video_slug(video)}-{digest}-{chunk:06d}-{fingerprint[:10]}.parquet"


class PartWriter:
    """Write one part file: rows as they come, the record into the footer at the end.

    Parameters
    ----------
    path : Path
        Final path. Until :meth:`finish` only a hidden file beside it exists, and leaving the
        ``with`` block without it removes that file.

    Notes
    -----
    Runs in the task's thread on a worker. Not thread-safe. Rows wait in memory until a row group
    is full (a few MB), whatever the length of the chunk.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_rows = 0
        self.class_counts: dict[str, int] = {}
        self._partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
        self._writer: pq.ParquetWriter | None = None
        self._waiting: list[pa.RecordBatch] = []
        self._waiting_rows = 0

    def __enter__(self) -> Self:
        try:
            # Arrow's own file: through one of Python's, each page would wait for the interpreter.
            self._writer = pq.ParquetWriter(
                str(self._partial), DETECTIONS_SCHEMA, compression="zstd"
            )
        except OSError as error:
            raise OutputError(
                f"Cannot write {self.path}: {error}. The output folder must be on a file system "
                "that this client and all workers share, and be writable to them.",
                path=str(self.path),
            ) from error
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close()
        self._partial.unlink(missing_ok=True)

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def write(self, batch: pa.RecordBatch) -> None:
        """Add rows; they belong behind those already written."""
        if batch.num_rows == 0:
            return
        self.num_rows += batch.num_rows
        names = batch.column("class_name")
        for entry in names.value_counts().to_pylist():
            name = entry["values"]
            self.class_counts[name] = self.class_counts.get(name, 0) + entry["counts"]
        self._waiting.append(batch)
        self._waiting_rows += batch.num_rows
        if self._waiting_rows >= _ROWS_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._waiting and self._writer is not None:
            self._writer.write_table(pa.Table.from_batches(self._waiting))
        self._waiting = []
        self._waiting_rows = 0

    def finish(self, record: ChunkRecord) -> None:
        """Write the footer and let the file appear under its name.

        Raises
        ------
        OutputError
            When the disk is full or the folder is gone.
        """
        try:
            self._flush()
            if self._writer is not None:
                self._writer.add_key_value_metadata({_RECORD_KEY: record.to_json().encode()})
                self._writer.close()
                self._writer = None
            # Without this a power cut may leave the new name with old (no) content.
            descriptor = os.open(self._partial, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(self._partial, self.path)
        except OSError as error:
            raise OutputError(
                f"Cannot write {self.path}: {error}. Free space or choose another output folder, "
                "then run the same command again: finished chunks are kept.",
                path=str(self.path),
            ) from error


def read_record(path: Path) -> ChunkRecord | None:
    """Record in the footer of a part file; ``None`` when it is not a whole file of ours."""
    try:
        metadata = pq.read_metadata(path).metadata or {}
        return ChunkRecord.from_json(metadata[_RECORD_KEY])
    except (OSError, pa.ArrowInvalid, ValueError, TypeError, KeyError):
        return None


def write_table(table: pa.Table, path: Path) -> None:
    """Write a Parquet file that appears whole or not at all."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with partial.open("wb") as file:
            pq.write_table(table, file, compression="zstd")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise OutputError(f"Cannot write {path}: {error}.", path=str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


class OutputFolder:
    """The folder that a detect run writes; on the client's machine and thread.

    Parameters
    ----------
    path : str or os.PathLike
        Local (or mounted, shared) folder; it is made when it does not exist.

    Raises
    ------
    OutputError
        When the path is a URL or no folder, or cannot be made.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        text = os.fspath(path)
        if "://" in text and not text.startswith("file://"):
            raise OutputError(
                f"The output is {text!r}; expected a folder on a file system that all workers "
                "mount. Write to a folder and copy it to the remote store afterwards.",
                path=text,
            )
        self.path = Path(text.removeprefix("file://")).expanduser().absolute()
        self.detections = self.path / "detections"
        self.chunks = self.path / "chunks.parquet"
        self.annotated = self.path / "annotated"
        self._superseded = self.path / ".superseded"
        try:
            self.detections.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"Cannot make the output folder {self.detections}: {error}.", path=str(self.path)
            ) from error

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for one run.

        The kernel drops the lock with the process that holds it, so a kill leaves none behind.

        Raises
        ------
        OutputError
            When another run holds it.
        """
        import fcntl

        path = self.path / ".daskshare.lock"
        with path.open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "unknown"
                raise OutputError(
                    f"Another run writes to {self.path} (process {holder}). Wait for it to end, or "
                    "choose another output folder.",
                    path=str(self.path),
                    holder=holder,
                ) from None
            file.truncate(0)
            file.write(f"{os.getpid()} on {os.uname().nodename}")
            file.flush()
            yield

    def scan(self) -> dict[str, ChunkRecord]:
        """Whole part files by name, superseded ones too; removes what a kill left half-written.

        Raises
        ------
        OutputError
            When ``detections`` holds Parquet files that daskshare did not write.
        """
        self._drop_partials()
        names = [path.name for path in self.detections.glob("[!.]*.parquet")]
        foreign = [name for name in names if not _PART.fullmatch(name)]
        if foreign:
            raise OutputError(
                f"{self.detections} holds {len(foreign)} Parquet file(s) that daskshare did not "
                f"write (such as {sorted(foreign)[0]}), which would mix with the results. Move "
                "them away or choose another output folder.",
                path=str(self.path),
            )
        # Superseded first: of two parts of one name the one in place counts.
        paths = [
            path
            for folder in (self._superseded, self.detections)
            if folder.is_dir()
            for path in sorted(folder.glob("[!.]*.parquet"))
        ]
        found = {}
        with ThreadPoolExecutor(8, thread_name_prefix="daskshare-scan") as pool:
            for path, record in zip(paths, pool.map(read_record, paths), strict=True):
                if record is not None and record.file == path.name:
                    found[path.name] = record
                elif _PART.fullmatch(path.name):
                    path.unlink(missing_ok=True)
        return found

    def _drop_partials(self) -> None:
        for path in [*self.path.iterdir(), *self.detections.iterdir()]:
            if _PARTIAL.fullmatch(path.name):
                path.unlink(missing_ok=True)

    def begin(self, keep: Iterable[str], *, work_left: bool) -> None:
        """Make ``detections`` hold exactly the parts ``keep``; mark it incomplete if it is.

        Others move aside: a run that is stopped early, because an option was mistyped, say, has
        not yet cost the earlier results, and the earlier command finds them again.
        """
        wanted = set(keep)
        present = {p.name for p in self.detections.iterdir() if _PART.fullmatch(p.name)}
        if work_left or present != wanted:
            self.chunks.unlink(missing_ok=True)
        for name in present - wanted:
            self._superseded.mkdir(exist_ok=True)
            os.replace(self.detections / name, self._superseded / name)
        for name in wanted - present:
            os.replace(self._superseded / name, self.detections / name)

    def complete(self, records: list[ChunkRecord]) -> None:
        """Check the parts, write ``chunks.parquet`` and drop what earlier settings left.

        Raises
        ------
        OutputError
            When a part that a worker wrote is not here: the workers see another file system.
        """
        present = {p.name for p in self.detections.iterdir() if _PART.fullmatch(p.name)}
        missing = [r.file for r in records if r.file and r.file not in present]
        if missing:
            raise OutputError(
                f"Workers wrote {len(missing)} file(s) such as {missing[0]} to {self.detections}, "
                "but they are not there on this machine. The output folder must be on a file "
                "system that this client and all workers share.",
                path=str(self.path),
                missing=len(missing),
            )
        # Workers that were killed in this run left some.
        self._drop_partials()
        rows = [{name: getattr(r, name) for name in CHUNKS_SCHEMA.names} for r in records]
        write_table(pa.Table.from_pylist(rows, schema=CHUNKS_SCHEMA), self.chunks)
        if self._superseded.is_dir():
            for path in self._superseded.iterdir():
                if _PART.fullmatch(path.name):
                    path.unlink()
            with contextlib.suppress(OSError):  # someone else's file in there stays
                self._superseded.rmdir()


def read_detections(output: str | os.PathLike[str], *, video: str | None = None) -> pa.Table:
    """Read a run's detections in its defined order: video as asked, chunk, frame, confidence.

    Parameters
    ----------
    output : str or os.PathLike
        Folder that ``detect`` wrote.
    video : str or None
        Only this video's rows, named as in the ``video`` column.

    Returns
    -------
    pyarrow.Table
        Columns of ``DETECTIONS_SCHEMA``.

    Raises
    ------
    OutputError
        When the folder holds no complete run.
    """
    folder = Path(output)
    try:
        chunks = pq.read_table(folder / "chunks.parquet", schema=CHUNKS_SCHEMA).to_pylist()
    except FileNotFoundError:
        raise OutputError(
            f"{folder} holds no chunks.parquet: no run completed there. Run daskshare detect with "
            "this output folder (again).",
            path=str(folder),
        ) from None
    names = [c["file"] for c in chunks if c["file"] and video in (None, c["video"])]
    return read_parts(folder / "detections", names)


def read_parts(folder: Path, names: Iterable[str]) -> pa.Table:
    """Rows of the part files ``names``, in that order."""
    tables = [pq.read_table(folder / name, schema=DETECTIONS_SCHEMA) for name in names]
    if not tables:
        return DETECTIONS_SCHEMA.empty_table()
    return pa.concat_tables(tables).unify_dictionaries()
