"""The formula equals swscale's quick road bit for bit; the decoder relies on it."""

from __future__ import annotations

import av
import numpy as np
import pytest

from daskshare.kernels.colour import (
    semiplanar_to_rgb,
    to_eight_bits,
    yuv420_to_rgb,
    yuv_conversion,
)
from daskshare.video.decode import RgbConverter

MATRICES = {"bt709": 1, "fcc": 4, "bt470bg": 5, "smpte170m": 6, "smpte240m": 7, "bt2020": 9}
SIZES = [(64, 48), (66, 50), (2, 2), (642, 362), (65, 48), (64, 47), (63, 47), (1, 1)]


def random_frame(pixel_format, width, height, seed=0):
    """A frame of noise over the whole range of codes, and its planes."""
    rng = np.random.default_rng(seed)
    frame = av.VideoFrame(width, height, pixel_format)
    dtype, top = (np.dtype("<u2"), 1024) if "10" in pixel_format else (np.dtype("u1"), 256)
    samples = []
    for number, plane in enumerate(frame.planes):
        w = -(-width // 2) if number else width
        h = -(-height // 2) if number else height
        rows = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)
        rows.view(dtype)[:h, :w] = rng.integers(0, top, (h, w))
        samples.append(rows.view(dtype)[:h, :w].copy())
    return frame, samples


class FakeStream:
    """As much of a stream as the converter reads."""

    def __init__(self, frame, matrix, full_range):
        self.codec_context = self
        self.colorspace, self.color_range = matrix, 2 if full_range else 1
        self.pix_fmt, self.width, self.height = frame.format.name, frame.width, frame.height


@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES)
@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv420p10le"])
def test_decoder_equals_the_formula(pixel_format, width, height, full_range, matrix):
    frame, samples = random_frame(pixel_format, width, height)
    got = RgbConverter(FakeStream(frame, matrix, full_range), 0)(frame)
    if "10" in pixel_format:
        samples = [to_eight_bits(plane, 10) for plane in samples]
    conversion = yuv_conversion(matrix, full_range=full_range)
    np.testing.assert_array_equal(got, yuv420_to_rgb(*samples, conversion))


def test_jpeg_format_means_the_full_range():
    frame, samples = random_frame("yuvj420p", 64, 48)
    got = RgbConverter(FakeStream(frame, 5, False), 0)(frame)
    np.testing.assert_array_equal(got, yuv420_to_rgb(*samples, yuv_conversion(5, full_range=True)))


@pytest.mark.parametrize("matrix", [1, 5, 9])
@pytest.mark.parametrize("full_range", [False, True])
def test_formula_is_near_the_textbooks(matrix, full_range):
    _, (y, u, v) = random_frame("yuv420p", 128, 128)
    red, blue = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 9: (0.2627, 0.0593)}[matrix]
    green = 1 - red - blue
    luma = y / 1.0 if full_range else (y - 16.0) * 255 / 219
    scale = 1.0 if full_range else 255 / 224
    cb, cr = ((c.repeat(2, 0).repeat(2, 1) - 128.0) * scale for c in (u, v))
    r = luma + 2 * (1 - red) * cr
    b = luma + 2 * (1 - blue) * cb
    g = (luma - red * r - blue * b) / green
    exact = np.clip(np.stack([r, g, b], -1), 0, 255)
    got = yuv420_to_rgb(y, u, v, yuv_conversion(matrix, full_range=full_range))
    error = exact - got
    # High halves of products are rounded down, so that the result is a little dark.
    assert error.min() > -1
    assert error.max() < 4
    assert error.mean() < 1


def test_known_colours():
    conversion = yuv_conversion(1, full_range=False)
    y, u, v = (np.array([[c]], np.uint8) for c in (16, 128, 128))
    assert yuv420_to_rgb(y, u, v, conversion).tolist() == [[[0, 0, 0]]]
    y[:] = 235
    assert (yuv420_to_rgb(y, u, v, conversion) >= 254).all()
    y[:], u[:], v[:] = 63, 102, 240
    red, green, blue = yuv420_to_rgb(y, u, v, conversion)[0, 0].tolist()
    assert red > 245
    assert max(green, blue) < 10


def test_unspecified_matrix_follows_the_size():
    assert yuv_conversion(2, full_range=False, width=640, height=480).sws_colorspace == 5
    assert yuv_conversion(2, full_range=False, width=1280, height=720).sws_colorspace == 1
    assert yuv_conversion(5, full_range=False, width=1280, height=720).sws_colorspace == 5


def test_semiplanar_equals_planar():
    _, (y, u, v) = random_frame("yuv420p", 65, 47)
    conversion = yuv_conversion(1, full_range=False)
    got = semiplanar_to_rgb(y, np.stack([u, v], -1), conversion)
    np.testing.assert_array_equal(got, yuv420_to_rgb(y, u, v, conversion))


def test_high_bits_in_high_or_low_position_give_the_same():
    _, (y, u, v) = random_frame("yuv420p10le", 64, 48)
    conversion = yuv_conversion(9, full_range=False)
    p016 = (y << 6), np.stack([u, v], -1) << 6
    planar = [to_eight_bits(plane, 10) for plane in (y, u, v)]
    np.testing.assert_array_equal(
        semiplanar_to_rgb(*p016, conversion), yuv420_to_rgb(*planar, conversion)
    )


@pytest.mark.parametrize("bit_depth", [9, 10, 12, 14, 16])
def test_to_eight_bits_rounds_and_saturates(bit_depth):
    values = np.arange(1 << bit_depth, dtype=np.uint16)
    expected = np.minimum(np.floor(values / 2.0 ** (bit_depth - 8) + 0.5), 255)
    np.testing.assert_array_equal(to_eight_bits(values, bit_depth), expected)
