from __future__ import annotations

from fractions import Fraction

import av
import cv2
import numpy as np
import pyarrow as pa
import pytest

from daskshare.errors import OutputError, UnreadableVideoError
from daskshare.video.annotate import write_annotated, write_contact_sheet
from daskshare.video.draw import class_colour, draw_boxes

TIMES = np.cumsum([0, *[33, 40, 7, 120, 50] * 8])[:40].tolist()


def table(video, frames):
    """One box of class 2 in each of ``frames`` (repeats: several)."""
    rows = [
        {
            "video": video,
            "frame": frame,
            "pts_seconds": 0.0,
            "class_id": 2,
            "class_name": "car",
            "confidence": 0.5,
            "x_min": 40.0,
            "y_min": 60.0,
            "x_max": 120.0,
            "y_max": 110.0,
        }
        for frame in frames
    ]
    names = ("video", "frame", "class_id", "class_name", "confidence")
    schema = pa.schema(
        [
            ("video", pa.string()),
            ("frame", pa.int64()),
            ("pts_seconds", pa.float64()),
            ("class_id", pa.int16()),
            ("class_name", pa.dictionary(pa.int16(), pa.string())),
            ("confidence", pa.float32()),
            *((c, pa.float32()) for c in ("x_min", "y_min", "x_max", "y_max")),
        ]
    )
    assert set(names) <= set(schema.names)
    return pa.Table.from_pylist(rows, schema=schema)


@pytest.fixture
def source(clips, tmp_path):
    return clips.write(
        tmp_path / "source.mp4",
        frames=40,
        width=320,
        height=180,
        pts=TIMES,
        time_base=Fraction(1, 1000),
        options={"crf": "10"},
    )


def read(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        facts = (context.name, context.pix_fmt, context.width, context.height)
        frames = [(f.time, f.to_ndarray(format="rgb24")) for f in container.decode(stream)]
        length = float(stream.duration * stream.time_base)
    return facts, frames, length


def test_annotated_video(source, tmp_path):
    output = tmp_path / "deep" / "annotated.mp4"
    count = write_annotated(source, table(source, [10, 11]), output, crf=10)
    assert count == 40
    facts, frames, length = read(output)
    _, originals, _ = read(source)
    assert facts == ("h264", "yuv420p", 320, 180)
    np.testing.assert_allclose(
        [t for t, _ in frames], [t for t, _ in originals], rtol=0, atol=0.002
    )
    assert length == pytest.approx(TIMES[-1] / 1000 + (TIMES[-1] - TIMES[-2]) / 1000, abs=0.01)
    for number, (_, frame) in enumerate(frames):
        # The box's left edge, away from its label.
        drawn = np.abs(frame[70:105, 40].astype(int) - originals[number][1][70:105, 40]).mean()
        assert bool(drawn > 20) is (number in (10, 11))
    assert [p.name for p in output.parent.iterdir()] == ["annotated.mp4"]


def test_index_lies_at_the_front(source, tmp_path):
    output = tmp_path / "annotated.mp4"
    write_annotated(source, table(source, []), output)
    data = output.read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")


def test_colours_survive(source, tmp_path):
    output = tmp_path / "annotated.mp4"
    write_annotated(source, table(source, []), output, crf=4)
    (with_objects,) = (read(output)[1][20][1],)
    original = read(source)[1][20][1]
    # Nearest chroma and 4:2:0 blur single pixels, not areas.
    difference = np.abs(with_objects.astype(float) - original).mean(axis=(0, 1))
    assert difference.max() < 6


def test_rows_of_other_videos_are_left_out(source, tmp_path):
    write_annotated(source, table("other.mp4", [0]), tmp_path / "a.mp4", crf=10)
    write_annotated(source, table(source, []), tmp_path / "b.mp4", crf=10)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_odd_sizes_become_even(clips, tmp_path):
    path = clips.write(tmp_path / "odd.mkv", "ffv1", frames=5, width=65, height=47)
    write_annotated(path, table(path, []), tmp_path / "even.mp4")
    facts, frames, _ = read(tmp_path / "even.mp4")
    assert facts == ("h264", "yuv420p", 66, 48)
    assert len(frames) == 5


def test_failures_leave_nothing_behind(source, tmp_path):
    (tmp_path / "bad.mp4").write_text("no video")
    output = tmp_path / "out" / "annotated.mp4"
    with pytest.raises(UnreadableVideoError, match=r"bad\.mp4"):
        write_annotated(tmp_path / "bad.mp4", table("", []), output)
    assert list(output.parent.iterdir()) == []
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="could not be written"):
        write_annotated(source, table(source, []), tmp_path / "file" / "annotated.mp4")


def test_contact_sheet(source, tmp_path):
    output = tmp_path / "sheet.png"
    shown = write_contact_sheet(
        source, table(source, [3, 12, 12, 13, 38]), output, columns=2, rows=2, tile_width=320
    )
    # The busiest frame of each quarter; where nothing was found, the middle one.
    assert shown == [3, 12, 24, 38]
    sheet = cv2.cvtColor(cv2.imread(str(output)), cv2.COLOR_BGR2RGB)
    assert sheet.shape[1] == 2 * 320 + 3 * 8
    tile = sheet[8 : 8 + 180, 8 : 8 + 320]
    expected = read(source)[1][3][1]
    assert np.abs(tile[:30, 200:].astype(int) - expected[:30, 200:]).mean() < 8
    edge = tile[70:105, 40].astype(int)
    assert np.abs(edge - class_colour(2)).max() == 0


def test_contact_sheet_of_fewer_frames_than_tiles(clips, tmp_path):
    path = clips.write(tmp_path / "short.mp4", frames=3)
    assert write_contact_sheet(path, table(path, []), tmp_path / "sheet.png") == [0, 1, 2]


def test_colours_are_stable_and_differ():
    colours = [class_colour(n) for n in range(20)]
    assert colours == [class_colour(n) for n in range(20)]
    assert len(set(colours)) == 20
    assert np.abs(np.diff(np.array(colours), axis=0)).sum(axis=1).min() > 90


@pytest.mark.parametrize("size", [(8, 8), (48, 64), (272, 640), (2160, 3840)])
def test_boxes_beyond_the_frame_are_drawn_at_its_edge(size):
    frame = np.zeros((*size, 3), np.uint8)
    boxes = np.array([[-50.0, -50.0, 1e6, 1e6], [np.nan, 0, 5, 5], [3, 3, 3, 3]])
    draw_boxes(frame, boxes, ["person 0.99"] * 3, np.array([0, 1, 2]))
    assert frame.any()
