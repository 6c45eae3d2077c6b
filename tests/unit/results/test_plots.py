import numpy as np
import pyarrow as pa
import pytest

from daskshare.models.spec import Detections
from daskshare.results.plots import choose_bin_seconds, class_series, format_clock, plot_counts
from daskshare.results.schema import DETECTIONS_SCHEMA, detections_batch


def found(*rows):
    """Detections of one frame from (class_id, confidence, x_min, y_min, x_max, y_max)."""
    values = np.array(rows, dtype=np.float32).reshape(-1, 6)
    class_id = values[:, 0].astype(np.int16)
    return Detections(values[:, 2:], values[:, 1], class_id, ("person", "car", "bus"))


def table():
    cars = [found(*[(1, 0.9, 1, 2, 3, 4)] * n) for n in (2, 2, 0, 0)]
    people = [found((0, 0.9, 1, 2, 3, 4)) if i == 3 else found() for i in range(4)]
    pts = np.array([0.0, 0.5, 1.0, 1.5])
    return pa.Table.from_batches(
        [detections_batch("a", 0, pts, cars), detections_batch("a", 0, pts, people)]
    )


def test_series_are_means_per_frame_most_frequent_class_first():
    edges = np.array([0.0, 1.0, 2.0, 3.0])
    series = class_series(table(), edges_seconds=edges, frames=np.array([2.0, 2.0, 0.0]))
    assert list(series) == ["car", "person"]
    np.testing.assert_array_equal(series["car"], [2.0, 0.0, np.nan])
    np.testing.assert_array_equal(series["person"], [0.0, 0.5, np.nan])


def test_only_the_most_frequent_classes_are_kept():
    series = class_series(
        table(), edges_seconds=np.array([0.0, 2.0]), frames=np.array([4.0]), max_classes=1
    )
    assert list(series) == ["car"]


@pytest.mark.parametrize(
    ("duration_seconds", "num_frames", "width_seconds"),
    [(10, 250, 0.2), (600, 15_000, 5), (86_400, 2_160_000, 600), (100, 100, 5), (0.04, 1, 0.2)],
)
def test_bins_are_few_and_hold_a_few_frames(duration_seconds, num_frames, width_seconds):
    assert choose_bin_seconds(duration_seconds, num_frames) == width_seconds


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (75, "1:15"), (3599.9, "1:00:00"), (36_061, "10:01:01")]
)
def test_clock(seconds, text):
    assert format_clock(seconds) == text


@pytest.mark.parametrize("rows", [table(), DETECTIONS_SCHEMA.empty_table()])
@pytest.mark.parametrize("duration_seconds", [2.0, 7200.0])
def test_plot_is_a_png_and_leaves_no_other_file(tmp_path, rows, duration_seconds):
    path = plot_counts(
        rows, tmp_path / "p.png", duration_seconds=duration_seconds, num_frames=4, title="a"
    )
    assert path.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [path]
