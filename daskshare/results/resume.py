"""What a run has to do, given what is there already. Pure: no files, no Dask, no clock."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from daskshare.results.parquet import ChunkRecord, part_name
from daskshare.results.schema import SCHEMA_VERSION

__all__ = ["Job", "Plan", "chunk_fingerprint", "plan_run"]


class Chunk(Protocol):
    """What the plan reads of a ``VideoChunk``."""

    @property
    def video(self) -> str: ...
    @property
    def index(self) -> int: ...
    @property
    def first_frame(self) -> int: ...
    @property
    def num_frames(self) -> int: ...
    @property
    def start_seconds(self) -> float: ...
    @property
    def end_seconds(self) -> float: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def error(self) -> str: ...


ChunkT = TypeVar("ChunkT", bound=Chunk)


def chunk_fingerprint(chunk: Chunk, *, model_key: str, decoder: str) -> str:
    """Digest of all that decides the content of a chunk's part file.

    Parameters
    ----------
    chunk : VideoChunk
        Its source's version and its bounds count.
    model_key : str
        ``ModelSpec.key``: network, weights, input size, precision, thresholds, classes.
    decoder : str
        The configured decoder; decoders may differ by one grey level.

    Returns
    -------
    str
        Hexadecimal digits. Batch sizes, threads and the cluster's shape do not count: they
        decide how fast a result comes, not which.
    """
    decides = [
        SCHEMA_VERSION,
        model_key,
        decoder,
        chunk.video,
        chunk.fingerprint,
        int(chunk.index),
        int(chunk.first_frame),
        int(chunk.num_frames),
        # repr of NumPy's floats would name their type.
        repr(float(chunk.start_seconds)),
        repr(float(chunk.end_seconds)),
    ]
    return hashlib.sha256(json.dumps(decides).encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True, slots=True)
class Job(Generic[ChunkT]):
    """A chunk, and the name and fingerprint of the part file that it becomes."""

    chunk: ChunkT
    fingerprint: str
    file: str

    @property
    def num_frames(self) -> int:
        """Frames of the chunk; by this, the scheduler knows how much work it is."""
        return int(self.chunk.num_frames)

    def record(self, status: str, **fields: Any) -> ChunkRecord:
        """Record of the chunk with ``status`` and what became of it."""
        chunk = self.chunk
        return ChunkRecord(
            video=chunk.video,
            chunk=int(chunk.index),
            first_frame=int(chunk.first_frame),
            start_seconds=float(chunk.start_seconds),
            end_seconds=float(chunk.end_seconds),
            status=status,
            fingerprint=self.fingerprint,
            **fields,
        )

    def failed(self, error: str) -> ChunkRecord:
        """Record of the chunk when it yields no frames at all."""
        return self.record("error", num_frames=0, num_detections=0, error=error)


@dataclass(frozen=True, slots=True)
class Plan(Generic[ChunkT]):
    """What to do and what to keep.

    Parameters
    ----------
    order : list of str
        Part names of all chunks, in the order of the result.
    todo : list of Job
        Chunks to work on.
    keep : dict of str to ChunkRecord
        Parts that are right as they are.
    unreadable : dict of str to ChunkRecord
        Records of chunks that probing found unreadable; there is nothing to work on.
    """

    order: list[str]
    todo: list[Job[ChunkT]]
    keep: dict[str, ChunkRecord]
    unreadable: dict[str, ChunkRecord]


def plan_run(
    chunks: Iterable[ChunkT],
    existing: Mapping[str, ChunkRecord],
    *,
    model_key: str,
    decoder: str,
) -> Plan[ChunkT]:
    """Compare the chunks asked for with the parts that exist.

    Parameters
    ----------
    chunks : iterable of VideoChunk
        A chunk that comes twice counts once.
    existing : mapping of str to ChunkRecord
        Whole parts by file name.
    model_key, decoder : str
        See :func:`chunk_fingerprint`.
    """
    plan: Plan[ChunkT] = Plan([], [], {}, {})
    seen = set()
    for chunk in chunks:
        fingerprint = chunk_fingerprint(chunk, model_key=model_key, decoder=decoder)
        name = part_name(chunk.video, chunk.index, fingerprint)
        if name in seen:
            continue
        seen.add(name)
        plan.order.append(name)
        job = Job(chunk, fingerprint, name)
        found = existing.get(name)
        if chunk.error:
            plan.unreadable[name] = job.failed(chunk.error)
        elif found is not None and found.fingerprint == fingerprint:
            plan.keep[name] = found
        else:
            plan.todo.append(job)
    return plan
