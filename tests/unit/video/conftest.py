"""Clips made with PyAV, and what decoding them from the start must give."""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np
import pytest

from daskshare.kernels.colour import to_eight_bits, yuv420_to_rgb, yuv_conversion


def picture(number, width, height):
    """A picture that is unlike every other number's, with detail for the encoder to predict."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    image = np.empty((height, width, 3), np.uint8)
    image[..., 0] = (x * 3 + number * 4) % 256
    image[..., 1] = (y * 5 + number * 7) % 256
    image[..., 2] = number * 11 % 256
    image[number % height] = 255
    return image


def write_clip(
    path,
    codec="libx264",
    *,
    frames=60,
    width=64,
    height=48,
    pixel_format="yuv420p",
    rate=25,
    options=None,
    gop=None,
    pts=None,
    time_base=None,
    rotation=0,
    b_frames=None,
    container_options=None,
):
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        if gop:
            stream.gop_size = gop
        if b_frames is not None:
            stream.codec_context.max_b_frames = b_frames
        if time_base:
            stream.time_base = stream.codec_context.time_base = time_base
        if rotation:
            stream.set_display_rotation(rotation)
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(number, width, height), format="rgb24")
            frame = frame.reformat(format=pixel_format)
            frame.pts = number if pts is None else pts[number]
            frame.time_base = time_base or Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return str(path)


def planes(frame):
    """Planar samples of a frame, without padding."""
    wide = 2 if "10" in frame.format.name else 1
    result = []
    for number, plane in enumerate(frame.planes):
        rows = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)
        height = -(-frame.height // 2) if number else frame.height
        width = -(-frame.width // 2) if number else frame.width
        samples = rows.view("<u2") if wide == 2 else rows
        result.append(samples[:height, :width].copy())
    return result


def reference(path, *, matrix=2, full_range=False, rotation=0):
    """(pts seconds, RGB) of every frame, decoded from the start and converted by the formula."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        result = []
        for frame in container.decode(stream):
            if "420p" in frame.format.name:
                samples = planes(frame)
                if samples[0].dtype == np.uint16:
                    samples = [to_eight_bits(plane, 10) for plane in samples]
                conversion = yuv_conversion(
                    matrix, full_range=full_range, width=frame.width, height=frame.height
                )
                rgb = yuv420_to_rgb(*samples, conversion)
            else:
                rgb = frame.to_ndarray(
                    format="rgb24",
                    src_colorspace=5,
                    dst_colorspace=5,
                    src_color_range=2 if full_range else 1,
                    dst_color_range=2,
                )
            seconds = float("nan") if frame.pts is None else float(frame.pts * frame.time_base)
            result.append((seconds, np.rot90(rgb, rotation // 90)))
    return result


def decode_chunks(chunks, batch_frames=7):
    """Frames of all chunks as {number: (seconds, RGB)}, and the problems."""
    frames, problems = {}, []
    for chunk in chunks:
        with chunk.open_frames(batch_frames=batch_frames) as stream:
            for batch in stream:
                assert 0 < len(batch.frames) <= batch_frames
                for offset, rgb in enumerate(batch.frames):
                    number = batch.first_frame + offset
                    assert number not in frames
                    assert number == max(frames, default=-1) + 1 or stream.decoder == "pyav"
                    frames[number] = (batch.pts_seconds[offset], rgb)
        problems.append(stream.problem)
    return frames, problems


def assert_same_frames(got, expected):
    assert sorted(got) == list(range(len(expected)))
    for number, (seconds, rgb) in enumerate(expected):
        assert got[number][0] == pytest.approx(seconds, abs=1e-9)
        np.testing.assert_array_equal(got[number][1], rgb)


class Clips:
    """The functions above, as tests in other folders cannot import this file."""

    write = staticmethod(write_clip)
    reference = staticmethod(reference)
    decode = staticmethod(decode_chunks)
    assert_same = staticmethod(assert_same_frames)
    planes = staticmethod(planes)
    picture = staticmethod(picture)


@pytest.fixture(scope="session")
def clips():
    return Clips
