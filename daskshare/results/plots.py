"""Pictures of a table of detections."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from daskshare.errors import OutputError

__all__ = ["choose_bin_seconds", "class_series", "format_clock", "plot_counts"]

# Okabe and Ito's palette: told apart by people who see colours differently; its yellow is left
# out because it vanishes on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_BINS_SECONDS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600)


def format_clock(seconds: float) -> str:
    """``m:ss``, or ``h:mm:ss`` from an hour on."""
    whole = round(seconds)
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def choose_bin_seconds(duration_seconds: float, num_frames: int) -> float:
    """Width of a time bin: at most 150 bins, and a few frames in each."""
    per_frame_seconds = duration_seconds / max(num_frames, 1)
    least_seconds = max(duration_seconds / 150, 4 * per_frame_seconds)
    for width in _BINS_SECONDS:
        if width >= least_seconds:
            return float(width)
    return 3600.0 * math.ceil(least_seconds / 3600)


def class_series(
    table: pa.Table,
    *,
    edges_seconds: np.ndarray,
    frames: np.ndarray,
    max_classes: int = 7,
) -> dict[str, np.ndarray]:
    """Mean number of objects in a frame, by class and time bin.

    Parameters
    ----------
    table : pyarrow.Table
        Detections of one video, or of several that share a time axis.
    edges_seconds : numpy.ndarray, shape (n + 1,), float64
        Edges of the bins.
    frames : numpy.ndarray, shape (n,), float64
        Frames in each bin.
    max_classes : int
        Keep this many classes, those with most detections.

    Returns
    -------
    dict of str to numpy.ndarray, shape (n,), float64
        Most frequent class first; NaN in bins without frames.
    """
    names = pc.cast(table["class_name"], pa.string())
    totals = sorted(
        ((entry["counts"], entry["values"]) for entry in names.value_counts().to_pylist()),
        key=lambda total: (-total[0], total[1]),
    )
    seconds = table["pts_seconds"].to_numpy()
    series = {}
    for _, name in totals[:max_classes]:
        chosen = seconds[pc.equal(names, name).to_numpy(zero_copy_only=False)]
        counts = np.histogram(chosen, bins=edges_seconds)[0].astype(np.float64)
        series[name] = np.divide(counts, frames, out=np.full(len(frames), np.nan), where=frames > 0)
    return series


def plot_counts(
    table: pa.Table,
    output: str | os.PathLike[str],
    *,
    duration_seconds: float,
    num_frames: int,
    start_seconds: float = 0.0,
    title: str = "",
    bin_seconds: float | None = None,
    max_classes: int = 7,
) -> Path:
    """Draw how many objects of each class are in view over time, as a PNG.

    Parameters
    ----------
    table : pyarrow.Table
        Detections of one video; columns of DETECTIONS_SCHEMA.
    output : str or os.PathLike
        The PNG; written whole or not at all.
    duration_seconds, start_seconds : float
        Time that the video spans.
    num_frames : int
        Frames in that time, those without detections too: the plot shows means per frame.
    title : str
        Above the plot.
    bin_seconds : float or None
        Width of a time bin; ``None`` chooses one.
    max_classes : int
        Lines to draw; the plot says how many classes it leaves out.

    Returns
    -------
    Path
        ``output``.

    Raises
    ------
    OutputError
        When the file cannot be written.

    Notes
    -----
    Uses no global state of matplotlib, so that several threads may draw.
    """
    width_seconds = bin_seconds or choose_bin_seconds(duration_seconds, num_frames)
    num_bins = max(1, math.ceil(duration_seconds / width_seconds - 1e-9))
    edges = start_seconds + width_seconds * np.arange(num_bins + 1)
    inside = np.clip(duration_seconds - width_seconds * np.arange(num_bins), 0, width_seconds)
    frames = num_frames * inside / max(duration_seconds, 1e-9)
    series = class_series(table, edges_seconds=edges, frames=frames, max_classes=max_classes)
    classes = len(pc.unique(table["class_id"]))
    return _draw(
        Path(output),
        edges,
        series,
        title=title,
        note=f"mean over {width_seconds:g} s"
        + (f"; {classes - len(series)} rarer classes left out" if classes > len(series) else ""),
        end_seconds=start_seconds + duration_seconds,
    )


def _draw(
    output: Path,
    edges: np.ndarray,
    series: dict[str, np.ndarray],
    *,
    title: str,
    note: str,
    end_seconds: float,
) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator

    figure = Figure(figsize=(10, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot()
    for i, (name, values) in enumerate(series.items()):
        axes.stairs(
            values,
            edges,
            baseline=None,
            color=_COLOURS[i % len(_COLOURS)],
            linewidth=2.0,
            label=name,
            # Lines that lie on each other, at zero above all, stay visible.
            zorder=10 - i,
        )
    axes.set_xlim(edges[0], end_seconds)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("objects in view")
    span = end_seconds - edges[0]
    if span >= 60:
        axes.xaxis.set_major_locator(MultipleLocator(_tick_seconds(span)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: format_clock(x)))
        axes.set_xlabel("time (h:mm:ss)" if end_seconds >= 3600 else "time (m:ss)")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(11))
        axes.set_xlabel("time (s)")
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
    axes.set_title(note, loc="right", fontsize=9, color="#666666")
    if series:
        axes.legend(loc="upper left", bbox_to_anchor=(1.005, 1.0), frameon=False)
    else:
        axes.text(0.5, 0.5, "no detections", transform=axes.transAxes, ha="center", va="center")
    partial = output.with_name(f".{output.name}.partial")
    try:
        figure.savefig(partial, format="png")
        os.replace(partial, output)
    except OSError as error:
        raise OutputError(f"Cannot write {output}: {error}.", path=str(output)) from error
    finally:
        partial.unlink(missing_ok=True)
    return output


def _tick_seconds(span_seconds: float, wanted: int = 10) -> float:
    choices: Sequence[float] = (5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400)
    for choice in choices:
        if span_seconds / choice <= wanted:
            return choice
    return 86400 * math.ceil(span_seconds / wanted / 86400)
