"""NVDEC gives the CPU's frames within one grey level, or PyAV takes over and says so."""

from __future__ import annotations

import threading
from fractions import Fraction

import av
import numpy as np
import pytest

from daskshare.errors import VideoError
from daskshare.video import nvdec
from daskshare.video.probe import probe_videos

pytestmark = pytest.mark.gpu

X264 = "keyint=12:min-keyint=12:scenecut=0:bframes=3:b-adapt=0"
X265 = "keyint=12:min-keyint=12:scenecut=0:bframes=3:b-adapt=0:log-level=0"
CASES = {
    "h264.mp4": ("libx264", "yuv420p", {"x264-params": X264}),
    "h264.mkv": ("libx264", "yuv420p", {"x264-params": X264}),
    "h264.ts": ("libx264", "yuv420p", {"x264-params": X264}),
    "h264-open.mp4": ("libx264", "yuv420p", {"x264-params": X264 + ":open-gop=1"}),
    "h264-full.mp4": ("libx264", "yuvj420p", {"x264-params": X264}),
    "hevc.mp4": ("libx265", "yuv420p", {"x265-params": X265}),
    "hevc-open.mp4": ("libx265", "yuv420p", {"x265-params": X265 + ":open-gop=1"}),
    "hevc-ten-bit.mkv": ("libx265", "yuv420p10le", {"x265-params": X265}),
    "vp9.webm": ("libvpx-vp9", "yuv420p", {"g": "12", "cpu-used": "8", "deadline": "realtime"}),
    "av1.mp4": ("libsvtav1", "yuv420p", {"preset": "12", "g": "12"}),
}


@pytest.fixture(scope="module")
def device():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    # From here on a missing package is a failure.
    import cupy  # noqa: F401
    import PyNvVideoCodec  # noqa: F401

    from daskshare.device import current_device

    return current_device()


def can_decode(name, device):
    """Whether the chip has a decoder; only AV1's is missing on some."""
    return name != "av1.mp4" or nvdec.capabilities(device.index, "av1", 8)["num_decoder_engines"]


def write_clip(path, codec, pixel_format, options, *, frames=60, width=320, height=240, turn=0):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        if turn:
            stream.set_display_rotation(turn)
        x, y = np.meshgrid(np.arange(width), np.arange(height))
        for number in range(frames):
            image = np.stack([x * 2 + number * 4, y * 3 + number * 7, x + y], -1).astype(np.uint8)
            image[number % height] = 255
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=pixel_format)
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return str(path)


def frames_of(chunks, **options):
    result, decoders, notes = {}, set(), set()
    for chunk in chunks:
        with chunk.open_frames(batch_frames=7, **options) as stream:
            for batch in stream:
                if stream.decoder == "nvdec":
                    assert batch.frames.is_cuda
                    pixels = batch.frames.cpu().numpy()
                else:
                    pixels = np.asarray(batch.frames)
                assert pixels.dtype == np.uint8
                for offset, rgb in enumerate(pixels):
                    assert batch.first_frame + offset not in result
                    result[batch.first_frame + offset] = (batch.pts_seconds[offset], rgb)
        assert stream.problem == ""
        decoders.add(stream.decoder)
        notes.add(stream.decoder_note)
    return result, decoders, notes


def assert_within_one_level(got, expected):
    assert sorted(got) == sorted(expected)
    for number, (seconds, rgb) in expected.items():
        assert got[number][0] == pytest.approx(seconds, abs=1e-9)
        assert rgb.shape == got[number][1].shape
        difference = np.abs(rgb.astype(int) - got[number][1])
        assert difference.max() <= 1, f"frame {number} differs by {difference.max()}"


@pytest.mark.parametrize("name", CASES)
def test_same_frames_as_on_the_cpu(name, device, tmp_path):
    codec, pixel_format, options = CASES[name]
    path = write_clip(tmp_path / name, codec, pixel_format, options)
    chunks = probe_videos(path, chunk_seconds=0.5)
    assert len(chunks) > 1
    expected, decoders, _ = frames_of(chunks, decoder="pyav")
    assert decoders == {"pyav"}
    got, decoders, notes = frames_of(chunks, device=device, decoder="auto")
    if can_decode(name, device):
        assert decoders == {"nvdec"}, notes
    else:
        assert decoders == {"pyav"}
        assert all("the GPU does not decode" in note for note in notes)
    assert_within_one_level(got, expected)


@pytest.mark.parametrize("name", ["h264-open.mp4", "hevc-ten-bit.mkv", "vp9.webm"])
def test_letterboxed_on_the_way_equals_letterboxed_afterwards(name, device, tmp_path):
    import torch

    from daskshare.kernels.preprocess import letterbox_cuda

    codec, pixel_format, options = CASES[name]
    path = write_clip(tmp_path / name, codec, pixel_format, options)
    for chunk in probe_videos(path, chunk_seconds=0.5):
        with chunk.open_frames(device=device, decoder="nvdec", input_size=(96, 416)) as stream:
            batches = list(stream)
        with chunk.open_frames(device=device, decoder="nvdec") as stream:
            whole = list(stream)
        assert len(batches) == len(whole)
        for batch, expected in zip(batches, whole, strict=True):
            assert batch.source_size == (240, 320)
            target = torch.empty_like(batch.frames)
            letterbox_cuda(expected.frames, target)
            assert torch.equal(batch.frames, target)
            assert (batch.pts_seconds == expected.pts_seconds).all()


def test_chunks_in_turn_use_one_session(device, tmp_path):
    path = write_clip(tmp_path / "clip.mp4", *CASES["h264.mp4"])
    chunks = probe_videos(path, chunk_seconds=0.5)
    opened = nvdec._sessions.opened
    # Out of order and each twice: what one chunk leaves must not reach the next.
    for chunk in [*chunks[::-1], *chunks]:
        with chunk.open_frames(device=device, batch_frames=3, decoder="nvdec") as stream:
            assert sum(len(batch.frames) for batch in stream) == chunk.num_frames
    assert nvdec._sessions.opened == opened + 1


def test_frames_that_the_current_stream_still_reads_are_not_overwritten(device, tmp_path):
    import torch

    path = write_clip(tmp_path / "clip.mp4", *CASES["h264.mp4"])
    (chunk,) = probe_videos(path, chunk_seconds=100)
    expected, _, _ = frames_of([chunk], device=device, decoder="nvdec")
    got = []
    with chunk.open_frames(device=device, batch_frames=3, decoder="nvdec") as stream:
        for batch in stream:
            torch.cuda._sleep(20_000_000)
            got.append(batch.frames.clone())
            # Its memory is free for the next batch.
            del batch
    frames = torch.cat(got).cpu().numpy()
    assert len(frames) == chunk.num_frames
    for number, frame in enumerate(frames):
        np.testing.assert_array_equal(frame, expected[number][1])


@pytest.mark.parametrize("turn", [90, 180, -90])
def test_rotated(turn, device, tmp_path):
    path = write_clip(tmp_path / "turned.mp4", *CASES["h264.mp4"], frames=10, turn=turn)
    chunks = probe_videos(path)
    expected, _, _ = frames_of(chunks, decoder="pyav")
    got, decoders, notes = frames_of(chunks, device=device, decoder="nvdec")
    assert decoders == {"nvdec"}, notes
    assert_within_one_level(got, expected)


def test_what_nvdec_cannot_do_goes_to_pyav_with_a_note(device, tmp_path):
    path = write_clip(tmp_path / "chroma.mp4", "libx264", "yuv444p", {}, frames=10)
    chunks = probe_videos(path)
    got, decoders, notes = frames_of(chunks, device=device, decoder="auto")
    assert decoders == {"pyav"}
    assert any("yuv444p" in note for note in notes)
    assert len(got) == 10
    with (
        pytest.raises(VideoError, match="cannot be decoded by NVDEC"),
        chunks[0].open_frames(device=device, decoder="nvdec"),
    ):
        pass


def test_failure_half_way_goes_on_with_pyav(device, tmp_path, monkeypatch):
    path = write_clip(tmp_path / "clip.mp4", *CASES["h264.mp4"])
    (chunk,) = probe_videos(path, chunk_seconds=100)
    expected, _, _ = frames_of([chunk], decoder="pyav")
    decode = nvdec.NvdecSession.decode
    calls = []

    def fail_after_8(self, data, piece):
        calls.append(piece)
        if len(calls) > 8:
            raise RuntimeError("the session broke")
        return decode(self, data, piece)

    monkeypatch.setattr(nvdec.NvdecSession, "decode", fail_after_8)
    got, decoders, notes = frames_of([chunk], device=device, decoder="auto")
    assert decoders == {"pyav"}
    assert any("the session broke" in note for note in notes)
    assert_within_one_level(got, expected)


def test_sixteen_chunks_at_once(device, tmp_path):
    path = write_clip(tmp_path / "clip.mp4", *CASES["h264.mp4"], frames=192)
    chunks = probe_videos(path, chunk_seconds=0)
    assert len(chunks) == 16
    expected, _, _ = frames_of(chunks, decoder="pyav")
    got, failures = {}, []

    def work(chunk):
        try:
            got.update(frames_of([chunk], device=device, decoder="nvdec")[0])
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(chunk,)) for chunk in chunks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert failures == []
    assert_within_one_level(got, expected)


def test_memory_goes_back(device, tmp_path):
    import torch

    path = write_clip(tmp_path / "clip.mp4", *CASES["h264.mp4"], width=640, height=480)
    chunks = probe_videos(path, chunk_seconds=0.5)
    frames_of(chunks, device=device, decoder="nvdec")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
    for _ in range(5):
        frames_of(chunks, device=device, decoder="nvdec")
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before[0]
    # 25 sessions of a leaking decoder would take several hundred megabytes.
    assert before[1] - torch.cuda.mem_get_info()[0] < 64 << 20
