"""The road of packets and frames around NVDEC, with a stand-in that decodes on the CPU."""

from __future__ import annotations

import struct
import sys
import weakref
from pathlib import Path
from types import ModuleType, SimpleNamespace

import av
import dask
import numpy as np
import pytest
import torch

from daskshare.errors import VideoError
from daskshare.kernels.colour import yuv420_to_rgb
from daskshare.kernels.preprocess import letterbox_host, letterbox_torch
from daskshare.video import nvdec
from daskshare.video.nvdec_session import session_limit
from daskshare.video.probe import probe_videos
from daskshare.video.sessions import SessionPool

X264 = "keyint=12:min-keyint=12:scenecut=0:bframes=3:b-adapt=0"
DEVICE = SimpleNamespace(kind="cuda", index=0, torch_device=lambda: torch.device("cpu"))


class StandInSession:
    """Decodes start-code streams without any container's help, as NVDEC's parser does."""

    def __init__(self, key, planes, drop=(), fail_at=None):
        self.key, self.drop, self.fail_at, self.planes = key, set(drop), fail_at, planes
        self.stream = SimpleNamespace(synchronize=lambda: None)
        self.context = av.CodecContext.create(key.codec, "r")
        self.parser = av.CodecContext.create(key.codec, "r")
        self.pieces = []
        self.numbers = {}
        self.packets = self.shown = 0
        self.last = -1

    def decode(self, data, piece):
        packets = self.parser.parse(data) + self.parser.parse() if data else [None]
        self.pieces.append(len(packets))
        if len(self.pieces) == self.fail_at:
            raise RuntimeError("the session broke")
        frames = []
        for place, packet in enumerate(packets):
            if packet is not None:
                self.packets += 1
                packet.pts = self.packets
                # Only the first packet's time is known to the parser.
                if place == 0:
                    self.numbers[packet.pts] = piece
            frames += self.context.decode(packet)
        return list(self.numbered(frames))

    def numbered(self, frames):
        for frame in frames:
            self.shown += 1
            if self.shown - 1 in self.drop:
                continue
            number = self.numbers.get(frame.pts, self.last)
            # NVDEC's parser would hand them out in ascending order whatever was given.
            assert number >= self.last
            self.last = number
            # Otherwise it is the rest of a chunk before.
            if number >= 0:
                yield SimpleNamespace(frame=frame), number

    def empty_frames(self, count, height, width):
        return torch.empty((count, height, width, 3), dtype=torch.uint8)

    def turned(self, frames, quarter_turns):
        return torch.rot90(frames, quarter_turns, dims=(1, 2)).contiguous()

    def converter(self, surface, conversion, input_size):
        def convert(surfaces, batch, position):
            for out, surface in zip(batch[position:], surfaces, strict=False):
                frame = torch.from_numpy(yuv420_to_rgb(*self.planes(surface.frame), conversion))
                if input_size is None:
                    out.copy_(frame)
                else:
                    letterbox_torch(frame[None], out[None])

        return convert

    def mark(self):
        return lambda: None

    def drain(self):
        self.context.flush_buffers()
        self.last = -1

    def close(self):
        self.context = None


@pytest.fixture
def library(monkeypatch):
    """A stand-in for PyNvVideoCodec that can be asked for its capabilities."""
    module = ModuleType("PyNvVideoCodec")
    module.PyNvVCException = type("PyNvVCException", (Exception,), {})
    module.cudaVideoCodec = SimpleNamespace(AV1=1, H264=2, HEVC=3, VP8=4, VP9=5)
    module.cudaVideoChromaFormat = SimpleNamespace(**{"420": 1})
    module.caps = {
        "num_decoder_engines": 1,
        "width_min": 48,
        "width_max": 4096,
        "height_min": 16,
        "height_max": 4096,
    }
    module.GetDecoderCaps = lambda **asked: module.caps
    monkeypatch.setitem(sys.modules, "PyNvVideoCodec", module)
    nvdec.capabilities.cache_clear()
    yield module
    nvdec.capabilities.cache_clear()


@pytest.fixture
def sessions(monkeypatch, clips, library):
    """Replaces the sessions; returns how they shall misbehave, and those that were made."""
    plan = SimpleNamespace(options={}, made=[])

    def make(key):
        plan.made.append(StandInSession(key, clips.planes, **plan.options))
        return plan.made[-1]

    pool = SessionPool(make, idle_seconds=1000.0)
    monkeypatch.setattr(nvdec, "_sessions", pool)
    yield plan
    nvdec.close_idle_sessions()


def test_as_many_sessions_as_keep_the_engines_busy(clips, library, tmp_path):
    (chunk,) = probe_videos(clips.write(tmp_path / "a.mp4", frames=5))
    key = nvdec._key(chunk, DEVICE)
    library.caps["num_decoder_engines"] = 7
    assert session_limit(key) == (DEVICE.index, 8)
    with dask.config.set({"daskshare.video.decoder-sessions": 3}):
        assert session_limit(key) == (DEVICE.index, 3)


def frames_of(chunks, decoder="auto"):
    frames, streams = {}, []
    for chunk in chunks:
        with chunk.open_frames(device=DEVICE, batch_frames=7, decoder=decoder) as stream:
            for batch in stream:
                for offset, rgb in enumerate(np.asarray(batch.frames)):
                    number = batch.first_frame + offset
                    assert number not in frames
                    frames[number] = (batch.pts_seconds[offset], rgb)
        streams.append(stream)
    return frames, streams


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
@pytest.mark.parametrize("open_gop", [0, 1])
def test_h264(name, open_gop, clips, sessions, tmp_path):
    path = clips.write(tmp_path / name, options={"x264-params": f"{X264}:open-gop={open_gop}"})
    chunks = probe_videos(path, chunk_seconds=0.5)
    frames, streams = frames_of(chunks)
    clips.assert_same(frames, clips.reference(path))
    assert {(s.decoder, s.decoder_note, s.problem) for s in streams} == {("nvdec", "", "")}
    assert len(chunks) > 1
    assert len(sessions.made) == 1, "chunks one after the other use one session"


def test_frames_come_letterboxed_where_that_is_asked_for(clips, sessions, tmp_path):
    path = clips.write(tmp_path / "a.mp4", frames=9, width=66, height=48)
    (chunk,) = probe_videos(path)
    with chunk.open_frames(
        device=DEVICE, batch_frames=4, decoder="nvdec", input_size=(64, 96)
    ) as stream:
        batches = list(stream)
    assert [len(batch.frames) for batch in batches] == [4, 4, 1]
    assert {batch.source_size for batch in batches} == {(48, 66)}
    frames = np.concatenate([np.asarray(batch.frames) for batch in batches])
    for got, (_, rgb) in zip(frames, clips.reference(path), strict=True):
        expected = np.empty((64, 96, 3), np.uint8)
        letterbox_host(rgb, expected)
        assert np.abs(got.astype(int) - expected).max() <= 1


def test_rotated_frames_come_in_their_own_size(clips, sessions, tmp_path):
    path = clips.write(tmp_path / "a.mp4", frames=3, rotation=90)
    (chunk,) = probe_videos(path)
    with chunk.open_frames(device=DEVICE, decoder="nvdec", input_size=(64, 96)) as stream:
        (batch,) = stream
    assert batch.source_size is None
    assert batch.frames.shape[1:3] == (chunk.height, chunk.width)


@pytest.mark.parametrize("open_gop", [0, 1])
def test_hevc(open_gop, clips, sessions, tmp_path):
    options = {"x265-params": f"{X264}:log-level=0:open-gop={open_gop}"}
    path = clips.write(tmp_path / "a.mp4", "libx265", options=options)
    frames, streams = frames_of(probe_videos(path, chunk_seconds=0.5))
    clips.assert_same(frames, clips.reference(path))
    assert {s.decoder for s in streams} == {"nvdec"}


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_rotation(rotation, clips, sessions, tmp_path):
    path = clips.write(tmp_path / "a.mp4", frames=5, rotation=rotation)
    frames, streams = frames_of(probe_videos(path))
    assert streams[0].decoder == "nvdec"
    clips.assert_same(frames, clips.reference(path, rotation=rotation % 360))


@pytest.mark.parametrize("fail_at", [1, 2, 8, 16])
def test_pyav_goes_on_where_a_session_breaks(fail_at, clips, sessions, tmp_path):
    path = clips.write(tmp_path / "a.mp4", options={"x264-params": X264})
    sessions.options = {"fail_at": fail_at}
    frames, (stream,) = frames_of(probe_videos(path, chunk_seconds=100))
    clips.assert_same(frames, clips.reference(path))
    assert stream.decoder == "pyav"
    assert "the session broke" in stream.decoder_note
    assert stream.problem == ""


@pytest.mark.parametrize("open_gop", [0, 1])
def test_pyav_goes_on_wherever_a_frame_is_left_out(open_gop, clips, sessions, tmp_path):
    options = {"x264-params": f"{X264}:open-gop={open_gop}"}
    path = clips.write(tmp_path / "a.mp4", options=options, frames=30)
    (chunk,) = probe_videos(path, chunk_seconds=100)
    reference = clips.reference(path)
    for lost in range(30):
        sessions.options = {"drop": [lost]}
        frames, (stream,) = frames_of([chunk])
        # No frame has come under another's number before that was noticed.
        clips.assert_same(frames, reference)
        assert stream.decoder == "pyav"
        assert " came where " in stream.decoder_note or "did not come" in stream.decoder_note


@pytest.mark.parametrize(("name", "listed"), [("a.mp4", True), ("a.mkv", False)])
def test_packets_come_several_at_a_time(name, listed, clips, sessions, tmp_path, monkeypatch):
    path = clips.write(tmp_path / name, options={"x264-params": X264}, frames=30)
    (chunk,) = probe_videos(path, chunk_seconds=100)
    assert bool(chunk.packed_packets) == listed
    demultiplexed = []
    chunk_packets = nvdec.decode.chunk_packets
    monkeypatch.setattr(
        nvdec.decode, "chunk_packets", lambda *a: demultiplexed.append(a) or chunk_packets(*a)
    )
    frames_of([chunk])
    assert sessions.made[0].pieces == [4] * 7 + [2, 1]
    assert bool(demultiplexed) != listed


def test_a_file_that_changed_is_read_by_the_demultiplexer(clips, sessions, tmp_path):
    path = clips.write(tmp_path / "a.mp4", options={"x264-params": X264}, frames=30)
    (chunk,) = probe_videos(path, chunk_seconds=100)
    options = {"x264-params": X264, "crf": "1"}
    clips.write(tmp_path / "a.mp4", options=options, frames=30)
    frames, (stream,) = frames_of([chunk])
    clips.assert_same(frames, clips.reference(path))
    assert stream.decoder == "nvdec"


def test_a_file_that_is_deleted_while_it_is_open(clips, sessions, tmp_path):
    path = clips.write(tmp_path / "a.mp4", options={"x264-params": X264}, frames=30)
    (chunk,) = probe_videos(path, chunk_seconds=100)
    reference = clips.reference(path)
    with chunk.open_frames(device=DEVICE, batch_frames=7, decoder="nvdec") as stream:
        Path(path).unlink()
        frames = np.concatenate([np.asarray(batch.frames) for batch in stream])
    assert len(frames) == len(reference)


def test_at_most_two_batches_are_in_memory(clips, sessions, tmp_path, monkeypatch):
    path = clips.write(tmp_path / "a.mp4", options={"x264-params": X264}, frames=30)
    (chunk,) = probe_videos(path, chunk_seconds=100)
    alive, most = weakref.WeakSet(), 0
    empty_frames = StandInSession.empty_frames

    def count(self, *shape):
        nonlocal most
        frames = empty_frames(self, *shape)
        alive.add(frames)
        most = max(most, len(alive))
        return frames

    monkeypatch.setattr(StandInSession, "empty_frames", count)
    with chunk.open_frames(device=DEVICE, batch_frames=7, decoder="nvdec") as stream:
        for batch in stream:
            del batch
    assert most == 2


def with_edit_list(path, entries):
    """Rewrite an MP4's edit list: (length in ms, first tick) each."""
    data = Path(path).read_bytes()

    def boxes(data, begin):
        while begin < len(data):
            size, kind = struct.unpack_from(">I4s", data, begin)
            yield kind, begin, data[begin : begin + size]
            begin += size

    def box(kind, *content):
        content = b"".join(content)
        return struct.pack(">I4s", 8 + len(content), kind) + content

    begin, moov = next((begin, found) for kind, begin, found in boxes(data, 0) if kind == b"moov")
    assert begin + len(moov) == len(data)
    rows = b"".join(struct.pack(">IiI", length, tick, 1 << 16) for length, tick in entries)
    edits = box(b"edts", box(b"elst", struct.pack(">II", 0, len(entries)), rows))
    parts = []
    for kind, _, part in boxes(moov, 8):
        if kind == b"trak":
            inner = [found for name, _, found in boxes(part, 8) if name != b"edts"]
            part = box(b"trak", inner[0], edits, *inner[1:])
        parts.append(part)
    Path(path).write_bytes(data[:begin] + box(b"moov", *parts))


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
@pytest.mark.parametrize("open_gop", [0, 1])
@pytest.mark.parametrize("seconds", [100, 0.5])
@pytest.mark.parametrize(
    ("edits", "trusted"),
    [
        ([(1500, 17)], True),
        ([(500, 2), (1000, 29)], False),
        ([(600, 2), (600, 19), (600, 35)], False),
    ],
)
def test_edit_lists(codec, open_gop, seconds, edits, trusted, clips, sessions, tmp_path):
    name = codec.removeprefix("lib") + "-params"
    options = {name: f"{X264}:open-gop={open_gop}" + ":log-level=0" * (codec == "libx265")}
    path = clips.write(tmp_path / "a.mp4", codec, options=options)
    with av.open(str(path)) as container:
        video = container.streams.video[0]
        tick = int(1 / video.average_rate / video.time_base)
    with_edit_list(path, [(length, frame * tick) for length, frame in edits])
    chunks = probe_videos(path, chunk_seconds=seconds)
    assert {chunk.exact for chunk in chunks} == {trusted}
    frames, streams = frames_of(chunks)
    clips.assert_same(frames, clips.reference(path))
    assert {stream.decoder for stream in streams} == {"nvdec" if trusted else "pyav"}


def test_nvdec_alone_does_not_fall_back(clips, sessions, tmp_path):
    (chunk,) = probe_videos(clips.write(tmp_path / "a.mp4"), chunk_seconds=100)
    sessions.options = {"fail_at": 5}
    with pytest.raises(VideoError, match="the session broke"):
        frames_of([chunk], decoder="nvdec")


def test_truncated_file_says_what_is_missing(clips, sessions, tmp_path):
    whole = clips.write(
        tmp_path / "a.mp4",
        options={"x264-params": X264},
        container_options={"movflags": "+faststart"},
    )
    cut = tmp_path / "cut.mp4"
    with open(whole, "rb") as file:
        data = file.read()
    cut.write_bytes(data[: len(data) * 2 // 3])
    frames, (stream,) = frames_of(probe_videos(cut, chunk_seconds=100))
    assert 20 < len(frames) < 60
    assert f"got {len(frames)} of 60 frames" in stream.problem


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ({"codec": "ffv1", "frames": 5}, "codec ffv1"),
        ({"pixel_format": "yuv444p", "frames": 5}, "yuv444p"),
        ({"codec": "libvpx-vp9", "width": 65, "height": 49, "frames": 3}, "odd"),
        ({"width": 32, "height": 32, "frames": 3}, "width 32"),
    ],
)
def test_refusal(written, reason, clips, sessions, tmp_path):
    path = clips.write(tmp_path / "a.mkv", **written)
    frames, (stream,) = frames_of(probe_videos(path))
    assert stream.decoder == "pyav"
    assert reason in stream.decoder_note
    clips.assert_same(frames, clips.reference(path))
    assert sessions.made == []


def test_refusal_without_an_engine_or_a_library(clips, library, tmp_path, monkeypatch):
    (chunk,) = probe_videos(clips.write(tmp_path / "a.mp4", frames=5))
    assert nvdec.refusal(chunk, DEVICE) == ""
    nvdec.capabilities.cache_clear()
    library.caps = {"num_decoder_engines": 0}
    assert "does not decode h264" in nvdec.refusal(chunk, DEVICE)
    monkeypatch.setitem(sys.modules, "PyNvVideoCodec", None)
    assert "PyNvVideoCodec cannot be imported" in nvdec.refusal(chunk, DEVICE)
