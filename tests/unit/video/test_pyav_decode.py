"""All chunks together give every frame once, in order, as decoding from the start does."""

from __future__ import annotations

import threading
import tracemalloc
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from daskshare.errors import VideoError
from daskshare.models.spec import FrameSource
from daskshare.video.probe import probe_videos

X264 = "keyint=12:min-keyint=12:scenecut=0:bframes=3:b-adapt=0"
X265 = "keyint=12:min-keyint=12:scenecut=0:bframes=3:b-adapt=0:log-level=0"
VARIABLE = np.cumsum(np.tile([33, 40, 7, 120, 33], 12)).tolist()

# name: (write_clip's arguments, reference's arguments, whether the file can be cut)
CASES = {
    "b-frames.mp4": ({"options": {"x264-params": X264}}, {}, True),
    "b-frames.mkv": ({"options": {"x264-params": X264}}, {}, True),
    "b-frames.ts": ({"options": {"x264-params": X264}}, {}, True),
    "open-gop.mp4": ({"options": {"x264-params": X264 + ":open-gop=1"}}, {}, True),
    "open-gop.mkv": ({"options": {"x264-params": X264 + ":open-gop=1"}}, {}, True),
    "open-gop.ts": ({"options": {"x264-params": X264 + ":open-gop=1"}}, {}, True),
    "open-gop-hevc.mp4": (
        {"codec": "libx265", "options": {"x265-params": X265 + ":open-gop=1"}},
        {},
        True,
    ),
    "open-gop-hevc.ts": (
        {"codec": "libx265", "options": {"x265-params": X265 + ":open-gop=1"}},
        {},
        True,
    ),
    "variable-rate.mp4": (
        {
            "options": {"x264-params": X264},
            "pts": VARIABLE,
            "time_base": Fraction(1, 1000),
        },
        {},
        True,
    ),
    "odd-size.mkv": ({"codec": "ffv1", "width": 65, "height": 47}, {}, True),
    "odd-height.webm": (
        {"codec": "libvpx-vp9", "width": 64, "height": 47, "gop": 12, "frames": 30},
        {},
        True,
    ),
    "av1.mp4": (
        {"codec": "libsvtav1", "options": {"preset": "12", "g": "12"}},
        {},
        True,
    ),
    "hidden-frames.webm": (
        {
            "codec": "libvpx",
            "gop": 20,
            "options": {"auto-alt-ref": "1", "lag-in-frames": "16"},
        },
        {},
        True,
    ),
    "one-keyframe.mp4": ({"options": {"x264-params": "keyint=infinite:scenecut=0"}}, {}, False),
    "rotated-90.mp4": ({"options": {"x264-params": X264}, "rotation": 90}, {"rotation": 90}, True),
    "rotated-180.mp4": (
        {"options": {"x264-params": X264}, "rotation": 180},
        {"rotation": 180},
        True,
    ),
    "rotated-270.mp4": (
        {"options": {"x264-params": X264}, "rotation": -90},
        {"rotation": 270},
        True,
    ),
    "ten-bit.mp4": (
        {"options": {"x264-params": X264}, "pixel_format": "yuv420p10le"},
        {},
        True,
    ),
    "ten-bit-hevc.mkv": (
        {
            "codec": "libx265",
            "options": {"x265-params": X265},
            "pixel_format": "yuv420p10le",
            "width": 66,
        },
        {},
        True,
    ),
    "mpeg4.avi": ({"codec": "mpeg4", "gop": 12, "b_frames": 0}, {}, True),
    "mpeg4-b-frames.avi": ({"codec": "mpeg4", "gop": 12, "b_frames": 2}, {}, False),
    "mpeg4-b-frames.mp4": ({"codec": "mpeg4", "gop": 12, "b_frames": 2}, {}, True),
    "mjpeg.avi": ({"codec": "mjpeg", "pixel_format": "yuvj420p"}, {"full_range": True}, True),
    "mpeg2.ts": ({"codec": "mpeg2video", "gop": 12, "b_frames": 2}, {}, True),
    "full-chroma.mp4": (
        {"options": {"x264-params": X264}, "pixel_format": "yuv444p"},
        {},
        True,
    ),
    "elementary.h264": ({"options": {"x264-params": X264}}, {}, False),
    "intra-refresh.ts": (
        {"options": {"x264-params": "keyint=12:scenecut=0:intra-refresh=1:bframes=0"}},
        {},
        False,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_chunks_equal_decoding_from_the_start(name, clips, tmp_path):
    made, expected, cuttable = CASES[name]
    path = clips.write(tmp_path / name, **made)
    chunks = probe_videos(path, chunk_seconds=0.5)
    assert (len(chunks) > 1) is cuttable
    frames, problems = clips.decode(chunks)
    reference = clips.reference(path, **expected)
    if name == "elementary.h264":
        # This file holds no times: only order and content can be compared.
        reference = [(frames[n][0], rgb) for n, (_, rgb) in enumerate(reference)]
    clips.assert_same(frames, reference)
    assert problems == [""] * len(chunks)
    assert sum(c.num_frames for c in chunks) == len(frames) == made.get("frames", 60)


@pytest.mark.parametrize("name", ["open-gop.mp4", "open-gop-hevc.mp4", "b-frames.ts"])
def test_every_chunk_alone_in_any_order(name, clips, tmp_path):
    path = clips.write(tmp_path / name, **CASES[name][0])
    reference = clips.reference(path)
    for chunk in reversed(probe_videos(path, chunk_seconds=0)):
        frames, problems = clips.decode([chunk])
        assert problems == [""]
        assert sorted(frames) == list(
            range(chunk.first_frame, chunk.first_frame + chunk.num_frames)
        )
        for number, (_, rgb) in frames.items():
            np.testing.assert_array_equal(rgb, reference[number][1])


def test_open_gops_really_have_leading_pictures(clips, tmp_path):
    path = clips.write(tmp_path / "open.mp4", **CASES["open-gop.mp4"][0])
    chunks = probe_videos(path, chunk_seconds=0)
    # A chunk that decodes past the next keyframe needs more packets than it has frames.
    assert any(c.num_packets > c.num_frames for c in chunks)


def test_times_are_the_files(clips, tmp_path):
    path = clips.write(tmp_path / "variable.mp4", **CASES["variable-rate.mp4"][0])
    frames, _ = clips.decode(probe_videos(path, chunk_seconds=0.5))
    got = [frames[n][0] for n in sorted(frames)]
    np.testing.assert_allclose(np.diff(got), np.diff(VARIABLE) / 1000, atol=1e-3)


def test_edit_list_that_skips_the_beginning(clips, tmp_path):
    # Remuxing from the middle with kept pictures before it makes an edit list that hides them.
    whole = clips.write(tmp_path / "whole.mp4", options={"x264-params": X264})
    cut = str(tmp_path / "edited.mp4")
    with av.open(whole) as source, av.open(cut, "w") as target:
        stream = source.streams.video[0]
        out = target.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.dts is None:
                continue
            packet.pts -= 5 * 512
            packet.dts -= 5 * 512
            packet.stream = out
            target.mux(packet)
    reference = clips.reference(cut)
    chunks = probe_videos(cut, chunk_seconds=0.5)
    frames, problems = clips.decode(chunks)
    assert problems == [""] * len(chunks)
    clips.assert_same(frames, reference)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_truncated_file(suffix, clips, tmp_path):
    whole = clips.write(
        tmp_path / f"whole.{suffix}",
        options={"x264-params": X264},
        frames=100,
        container_options={"movflags": "+faststart"} if suffix == "mp4" else {},
    )
    data = Path(whole).read_bytes()
    cut = tmp_path / f"cut.{suffix}"
    cut.write_bytes(data[: len(data) * 2 // 3 // 188 * 188 + 100])
    chunks = probe_videos(cut, chunk_seconds=0.5)
    frames, problems = clips.decode(chunks)
    reference = clips.reference(whole)
    assert 40 < len(frames) < 100
    assert problems[:-1] == [""] * (len(chunks) - 1)
    assert "frames" in problems[-1]
    if suffix != "ts":
        # The header still promises 100 frames.
        assert f"got {len(frames) - chunks[-1].first_frame} of " in problems[-1]
        assert sum(c.num_frames for c in chunks) == 100
    for number, (_, rgb) in frames.items():
        np.testing.assert_array_equal(rgb, reference[number][1])


def test_damaged_packets_leave_the_other_frames_their_numbers(clips, tmp_path):
    path = clips.write(tmp_path / "damaged.avi", "mjpeg", pixel_format="yuvj420p")
    reference = clips.reference(path, full_range=True)
    with av.open(path) as container:
        spans = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    data = bytearray(Path(path).read_bytes())
    for number in (20, 21):
        position, size = spans[number]
        data[position : position + size] = bytes(size)
    Path(path).write_bytes(data)
    chunks = probe_videos(path, chunk_seconds=10)
    frames, problems = clips.decode(chunks)
    assert sorted(frames) == [n for n in range(60) if n not in (20, 21)]
    assert "got 58 of 60 frames" in problems[0]
    assert "2 packets could not be decoded" in problems[0]
    np.testing.assert_array_equal(frames[22][1], reference[22][1])


def test_file_that_changed_since_it_was_indexed(clips, tmp_path):
    path = clips.write(tmp_path / "clip.mp4", options={"x264-params": X264})
    chunk = probe_videos(path, chunk_seconds=0.5)[1]
    clips.write(tmp_path / "clip.mp4", options={"x264-params": "keyint=infinite"})
    with chunk.open_frames() as stream, pytest.raises(VideoError, match="Index it again"):
        list(stream)


def test_chunk_is_a_frame_source_and_reports_its_decoder(clips, tmp_path):
    path = clips.write(tmp_path / "clip.mp4")
    (chunk,) = probe_videos(path)
    assert isinstance(chunk, FrameSource)
    with chunk.open_frames(batch_frames=60) as stream:
        (batch,) = stream
    assert (stream.decoder, stream.problem) == ("pyav", "")
    assert batch.frames.shape == (60, 48, 64, 3)
    assert batch.frames.dtype == np.uint8
    assert batch.pts_seconds.dtype == np.float64


def test_nvdec_on_demand_without_a_gpu_is_an_error(clips, tmp_path):
    (chunk,) = probe_videos(clips.write(tmp_path / "clip.mp4"))
    with (
        pytest.raises(VideoError, match="cannot be decoded by NVDEC"),
        chunk.open_frames(decoder="nvdec"),
    ):
        pass


def test_decoding_streams(clips, tmp_path):
    path = clips.write(
        tmp_path / "long.mp4", frames=400, width=160, height=120, options={"preset": "ultrafast"}
    )
    (chunk,) = probe_videos(path, chunk_seconds=float("inf"))
    frame_bytes = 160 * 120 * 3
    tracemalloc.start()
    try:
        with chunk.open_frames(batch_frames=8) as stream:
            count = sum(len(batch.frames) for batch in stream)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 400
    assert peak < 60 * frame_bytes


def test_leaving_early_closes_the_file(clips, tmp_path):
    (chunk,) = probe_videos(clips.write(tmp_path / "clip.mp4"))
    with chunk.open_frames(batch_frames=4) as stream:
        assert next(iter(stream)).first_frame == 0


def test_several_chunks_at_once(clips, tmp_path):
    path = clips.write(tmp_path / "clip.mp4", options={"x264-params": X264})
    chunks = probe_videos(path, chunk_seconds=0)
    reference = clips.reference(path)
    together: dict[int, tuple] = {}

    def work(chunk):
        together.update(clips.decode([chunk])[0])

    threads = [threading.Thread(target=work, args=(chunk,)) for chunk in chunks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    clips.assert_same(together, reference)
