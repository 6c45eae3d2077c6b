"""What a detect run came to, for programs and for people."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from daskshare.results.parquet import ChunkRecord

__all__ = ["DetectSummary"]


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"


@dataclass(frozen=True, slots=True, repr=False)
class DetectSummary:
    """Figures of one run of ``detect``, and where its results lie.

    Parameters
    ----------
    output : Path
        The folder; ``detections/*.parquet`` and ``chunks.parquet`` are in it.
    videos, chunks, frames, num_detections : int
        What the results in ``output`` cover, whichever run made them.
    counts_by_class : dict of str to int
        Detections (one a frame and object, not distinct objects), most frequent class first.
    new_chunks, new_frames : int
        Of those, what this run did; the rest was there already.
    seconds : float
        Time from the call to the complete folder, without annotating.
    frames_per_second : float
        ``new_frames`` by the seconds from the first task's submission to the last one's end.
    failed, truncated : tuple of ChunkRecord
        Chunks without results, to be tried again by the next run; chunks that end early.
    decoders : dict of str to int
        Frames by decoder.
    model : str
        Name of the model.
    model_loads : int
        Times that the workers in use loaded it since they started.
    model_copies : int
        Copies that they hold: one each.
    model_bytes : int
        Of one copy.
    concurrent_tasks : int
        Most tasks that used those copies at once, summed over workers.
    annotated : tuple of Path
        Videos, contact sheets and plots that were made.
    """

    output: Path
    videos: int
    chunks: int
    frames: int
    num_detections: int
    counts_by_class: dict[str, int]
    new_chunks: int
    new_frames: int
    seconds: float
    frames_per_second: float
    failed: tuple[ChunkRecord, ...]
    truncated: tuple[ChunkRecord, ...]
    decoders: dict[str, int]
    model: str
    model_loads: int
    model_copies: int
    model_bytes: int
    concurrent_tasks: int
    annotated: tuple[Path, ...] = ()

    @property
    def detections_path(self) -> Path:
        """Folder of the part files."""
        return self.output / "detections"

    @property
    def chunks_path(self) -> Path:
        """Table of the chunks."""
        return self.output / "chunks.parquet"

    @property
    def memory_saved_bytes(self) -> int:
        """Weights that a copy in each concurrent task would have held beyond the shared ones."""
        return max(0, self.concurrent_tasks - self.model_copies) * self.model_bytes

    def sharing(self) -> str:
        """One sentence on what sharing did in this run ("" when nothing ran)."""
        if not self.concurrent_tasks:
            return ""
        copies = "One copy" if self.model_copies == 1 else f"{self.model_copies} copies"
        text = (
            f"{copies} of {self.model} ({_megabytes(self.model_bytes)} of weights"
            f"{'' if self.model_copies == 1 else ' each'}, "
            f"{_plural(self.model_loads, 'load')}) served up to "
            f"{_plural(self.concurrent_tasks, 'task')} at once"
        )
        if self.memory_saved_bytes:
            text += (
                f"; a copy in each would have taken {_megabytes(self.memory_saved_bytes)} more "
                "for weights alone"
            )
        return text + "."

    def _repr_html_(self) -> str:
        """Show the figures as a table, in notebooks."""
        from daskshare.html_repr import properties

        found = ", ".join(f"{name} {count:,}" for name, count in self.counts_by_class.items())
        kept = self.chunks - self.new_chunks - len(self.failed)
        return properties(
            f"{_plural(self.num_detections, 'detection')} in {_plural(self.frames, 'frame')} of "
            f"{_plural(self.videos, 'video')}",
            [
                ("output", self.output),
                ("found", found),
                ("this run", _plural(self.new_frames, "frame") if self.new_chunks else None),
                ("seconds", round(self.seconds, 1) if self.new_chunks else None),
                ("frames/s", round(self.frames_per_second, 1) if self.new_chunks else None),
                ("kept of an earlier run", _plural(kept, "chunk") if kept > 0 else None),
                ("model", self.model),
                ("sharing", self.sharing()),
                ("decoded by", [f"{name}: {count:,}" for name, count in self.decoders.items()]),
                ("truncated", [describe(record) for record in self.truncated[:5]] or None),
                ("failed", [describe(record) for record in self.failed[:5]] or None),
                ("annotated", [path.name for path in self.annotated] or None),
            ],
        )

    def __repr__(self) -> str:
        lines = [
            f"{_plural(self.frames, 'frame')} of {_plural(self.videos, 'video')}, "
            f"{_plural(self.num_detections, 'detection')} in {self.output}"
        ]
        if self.new_chunks:
            speed = f"this run did {_plural(self.new_frames, 'frame')} in {self.seconds:,.1f} s"
            lines.append(f"{speed} ({self.frames_per_second:,.1f} frames/s while working)")
        kept = self.chunks - self.new_chunks - len(self.failed)
        if kept > 0:
            lines.append(f"kept {kept:,} of {_plural(self.chunks, 'chunk')} from an earlier run")
        if self.counts_by_class:
            top = list(self.counts_by_class.items())
            text = ", ".join(f"{name} {count:,}" for name, count in top[:8])
            more = len(top) - 8
            lines.append("found " + text + (f" and {more} more classes" if more > 0 else ""))
        if self.sharing():
            lines.append(self.sharing())
        lines += [f"truncated: {describe(r)}" for r in self.truncated[:5]]
        if len(self.truncated) > 5:
            lines.append(f"... and {len(self.truncated) - 5:,} more truncated chunks")
        lines += [f"FAILED: {describe(r)}" for r in self.failed[:5]]
        if len(self.failed) > 5:
            lines.append(f"... and {len(self.failed) - 5:,} more failed chunks")
        return "\n  ".join(lines)


def describe(record: ChunkRecord) -> str:
    """One line on a chunk that has no, or not all, results."""
    where = f"{record.video}, " if record.video not in record.error else ""
    return f"{where}chunk {record.chunk} (from frame {record.first_frame}): {record.error}"
