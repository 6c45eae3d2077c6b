"""Values cross the wire unchanged, and nothing but values does."""

from __future__ import annotations

import datetime
import decimal
import math

import numpy as np
import pyarrow as pa
import pytest

from daskshare._host_values import BytesRows, decode, encode
from daskshare.errors import HostError, InvalidInputError
from daskshare.models.spec import Detections


def through(value):
    """By the body of a message and by a segment: both must give the same."""
    encoded = encode(value)
    sent = b"".join(bytes(piece) for piece in encoded.body())
    memory = bytearray(encoded.num_bytes)
    encoded.write(memoryview(memory))
    assert memory[: len(sent)] == sent
    # What is sent ends with the last part; there is no padding after it.
    decode(encoded.tree, memoryview(sent))
    return decode(encoded.tree, memoryview(memory))


ARRAYS = [
    np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
    np.arange(12, dtype=np.float64).reshape(3, 4)[:, ::2],
    np.array(3.5, np.float32),
    np.empty((0, 5), np.int16),
    np.array(["a", "long text"]),
    np.array(["2026-01-02"], "datetime64[ns]"),
    np.array([True, False]),
    np.array([1 + 2j]),
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype}{array.shape}")
def test_arrays_keep_dtype_shape_and_numbers(array):
    got = through(array)
    assert got.dtype == array.dtype
    assert got.shape == array.shape
    assert np.array_equal(got, array)


@pytest.mark.parametrize(
    "values",
    [
        ["a", None, "ü"],
        [b"", b"\x00\xff"],
        [b"a", None, b""],
        [b"x" * 9000, None, b"", b"y" * 9000],
        [decimal.Decimal("1.50"), None],
        [datetime.date(2026, 1, 2)],
        [1, None],
    ],
)
def test_objects_keep_their_kind(values):
    array = np.empty(len(values), object)
    array[:] = values
    got = through(array)
    assert got.dtype == object
    assert got.tolist() == values


def test_a_missing_text_stays_the_nan_that_it_was():
    got = through(np.array(["a", math.nan], object))
    assert got[0] == "a"
    assert math.isnan(got[1])


def test_rows_of_bytes_are_written_from_where_they_are():
    rows = [bytes([i]) * 5000 for i in range(3)]
    parts = [part for _, part in encode(np.array(rows, object)).parts]
    assert all(any(part is row for part in parts) for row in rows)
    # Of small ones, the lengths and all rows together.
    assert len(encode(np.array([b"a", b"bc"] * 50, object)).parts) == 2


def test_rows_of_bytes_can_be_made_later_and_anew_each_time():
    rows = np.array([[b"ab", None], [b"", b"c" * 70]], object)
    encoded = encode([rows, np.arange(2)])
    memory = bytearray(encoded.num_bytes)
    encoded.write(memoryview(memory))
    late, numbers = decode(encoded.tree, memoryview(memory), late=True)
    assert isinstance(late, BytesRows)
    assert (late.shape, late.ndim, len(late), late.dtype) == ((2, 2), 2, 2, object)
    assert isinstance(numbers, np.ndarray)
    first = np.asarray(late)
    assert first.tolist() == rows.tolist()
    first[0, 0] = b"changed"
    assert np.concatenate([late, late]).tolist() == rows.tolist() * 2


@pytest.mark.parametrize("rows", [slice(0, 3), slice(1, 3), slice(2, 9), slice(0, 0), slice(1, 2)])
@pytest.mark.parametrize("shape", [(3,), (3, 2)])
def test_some_of_the_rows_of_bytes_stay_where_they_are(shape, rows):
    texts = np.array([b"ab", None, b"", b"c" * 70, b"d", b"efg"], object)
    whole = texts[: np.prod(shape)].reshape(shape)
    encoded = encode(whole)
    memory = bytearray(encoded.num_bytes)
    encoded.write(memoryview(memory))
    late = decode(encoded.tree, memoryview(memory), late=True)
    assert isinstance(late[rows], BytesRows)
    assert np.asarray(late[rows]).tolist() == whole[rows].tolist()
    assert np.asarray(late[rows][0:1]).tolist() == whole[rows][0:1].tolist()


def test_ragged_arrays_stay_arrays_in_an_object_array():
    ragged = np.empty(2, object)
    ragged[0], ragged[1] = np.arange(3.0), np.arange(2.0)
    got = through(ragged)
    assert [type(item) for item in got] == [np.ndarray, np.ndarray]
    assert [item.tolist() for item in got] == [[0.0, 1.0, 2.0], [0.0, 1.0]]


def test_structures_and_plain_values_stay_what_they_are():
    value = {"a": [1, 2.5, "x", None, True], "b": (np.float32(1.5), b"raw"), 3: {}}
    got = through(value)
    assert got == value
    assert type(got["b"]) is tuple
    assert type(got["b"][0]) is np.float32


@pytest.mark.parametrize("shape", [(), (2,), (2, 1)])
def test_rows_of_equal_arrays_come_back_as_rows(shape):
    rows = [{"x": np.full(shape, i)[()], "y": np.float64(i)} for i in range(5)]
    tree = encode(rows).tree
    assert "r" in tree
    got = through(rows)
    assert len(got) == 5
    for one, other in zip(got, rows, strict=True):
        assert list(one) == ["x", "y"]
        assert np.isscalar(one["y"])
        assert np.shape(one["x"]) == shape
        assert np.array_equal(one["x"], other["x"])


def test_rows_that_differ_in_shape_come_back_as_they_are():
    rows = [{"x": np.arange(2)}, {"x": np.arange(3)}]
    assert [row["x"].tolist() for row in through(rows)] == [[0, 1], [0, 1, 2]]


def test_detections_and_tables():
    names = ("car", "bus")
    frames = [
        Detections(
            np.arange(4 * n, dtype=np.float32).reshape(n, 4),
            np.full(n, 0.5, np.float32),
            np.zeros(n, np.int16),
            names,
        )
        for n in (2, 0, 1)
    ]
    got = through(frames)
    assert [len(one) for one in got] == [2, 0, 1]
    assert got[2].xyxy.tolist() == frames[2].xyxy.tolist()
    assert got[0].names() == ["car", "car"]
    assert len(through(frames[0])) == 2
    batch = pa.record_batch({"id": [1, 2], "name": ["a", None]})
    assert through(batch).equals(batch)


def test_frames_in_which_nothing_was_found():
    empty = Detections(
        np.empty((0, 4), np.float32), np.empty(0, np.float32), np.empty(0, np.int16), ("car",)
    )
    assert [len(one) for one in through([empty, empty, empty])] == [0, 0, 0]
    assert through({"a": np.arange(3), "b": np.empty(0)})["b"].shape == (0,)


def test_what_has_an_array_is_one():
    torch = pytest.importorskip("torch")
    assert through(torch.arange(3)).tolist() == [0, 1, 2]


@pytest.mark.parametrize("value", [object(), {1.5: 1}, np.zeros(2, "i4,f4"), {"f": print}])
def test_anything_else_is_refused(value):
    with pytest.raises(InvalidInputError):
        encode(value)


@pytest.mark.parametrize(
    "tree",
    [
        {"a": ["<f8", [2], 0, 999]},
        {"a": ["<f8", [2], -8, 16]},
        {"a": ["O", [1], 0, 8]},
        {"a": ["<f8", [3], 0, 16]},
        {"b": [0, -1]},
        {"nothing": 1},
        {"p": [0, 16]},
        {"y": [[1], ["<i8", [1], 0, 8], 8, 8]},
        {"y": [[2], ["<i8", [1], 0, 8], 0, 0]},
        {"y": [[1], ["<i8", [1], 0, 8], 8, 99]},
    ],
)
def test_a_tree_that_lies_is_refused(tree):
    with pytest.raises(HostError):
        decode(tree, memoryview(bytearray(16)))
