"""Values in messages: a JSON tree whose leaves point into memory. No pickle."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from daskshare.errors import HostError, InvalidInputError
from daskshare.models.spec import Detections

__all__ = ["BytesRows", "Encoded", "decode", "encode"]

# Of a cache line, so that every array starts aligned for any instruction.
_ALIGNMENT = 64
# Shorter rows of bytes are joined: a piece for each would cost more than the copy.
_PIECE_BYTES = 4096


@dataclass(slots=True)
class Encoded:
    """A value in a form that can be sent.

    Parameters
    ----------
    tree : object
        Plain JSON.
    parts : list of (int, object)
        Offset and bytes-like of what the tree points to.
    num_bytes : int
        All of it with padding.
    """

    tree: Any = None
    parts: list[tuple[int, Any]] = field(default_factory=list)
    num_bytes: int = 0

    def write(self, memory: memoryview) -> None:
        """Put the bytes where the tree says."""
        for offset, part in self.parts:
            view = memoryview(part).cast("B")
            memory[offset : offset + len(view)] = view

    def body(self) -> list[Any]:
        """The bytes as pieces to send one after the other, padding included."""
        pieces: list[Any] = []
        at = 0
        for offset, part in self.parts:
            view = memoryview(part).cast("B")
            if offset > at:
                pieces.append(bytes(offset - at))
            pieces.append(view)
            at = offset + len(view)
        return pieces

    def put(self, part: Any) -> list[int]:
        """Book room for bytes; returns offset and length."""
        length = memoryview(part).nbytes
        if not length:
            # Nowhere: the end of what comes before may lie beyond what is sent.
            return [0, 0]
        offset = self.num_bytes
        self.parts.append((offset, part))
        self.num_bytes = _aligned(offset + length)
        return [offset, length]

    def put_rows(self, rows: Sequence[bytes]) -> list[int]:
        """Book room for rows of bytes, one after the other; returns offset and length of all."""
        length = sum(map(len, rows))
        if length < _PIECE_BYTES * len(rows):
            return self.put(b"".join(rows))
        offset = at = self.num_bytes
        for row in rows:
            if row:
                self.parts.append((at, row))
                at += len(row)
        self.num_bytes = _aligned(at)
        return [offset, length]


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT


class BytesRows:
    """An array of bytes whose rows are still in the memory that they came in.

    Parameters
    ----------
    shape : tuple of int
        Of the array.
    lengths : numpy.ndarray
        Bytes of each row; -1: the row is None.
    memory : memoryview
        The rows, one after the other.

    Notes
    -----
    Each ``numpy.asarray`` makes an array of new bytes objects.
    """

    dtype = np.dtype(object)

    def __init__(self, shape: tuple[int, ...], lengths: np.ndarray, memory: memoryview) -> None:
        if lengths.size != math.prod(shape) or (lengths < -1).any():
            raise ValueError(f"{lengths.size} rows of bytes for an array of shape {shape}")
        self.shape = shape
        self.ndim = len(shape)
        self._lengths = lengths
        self._stops = np.cumsum(np.maximum(lengths, 0)).tolist()
        if len(memory) != (self._stops[-1] if self._stops else 0):
            raise ValueError(f"rows of {self._stops[-1:]} bytes in {len(memory)}")
        self._memory = memory

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> BytesRows:
        """Rows that follow each other, still in the same memory."""
        start, stop, _ = rows.indices(len(self))
        width = math.prod(self.shape[1:])
        ends = [0, *self._stops]
        return BytesRows(
            (stop - start, *self.shape[1:]),
            self._lengths[start * width : stop * width],
            self._memory[ends[start * width] : ends[stop * width]],
        )

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        starts = [0, *self._stops[:-1]]
        rows = zip(starts, self._stops, self._lengths.tolist(), strict=False)
        return _as_objects(
            [None if length < 0 else bytes(self._memory[a:b]) for a, b, length in rows]
        ).reshape(self.shape)


def encode(value: Any) -> Encoded:
    """Describe a value; arrays are not copied.

    Parameters
    ----------
    value : object
        None, numbers, texts, bytes, NumPy arrays and scalars, Arrow record batches,
        :class:`Detections`, and lists, tuples and dicts of them. Anything else that offers
        ``__array__`` counts as an array.

    Raises
    ------
    InvalidInputError
        For anything else.
    """
    encoded = Encoded()
    encoded.tree = _encode(value, encoded)
    return encoded


def _encode(value: Any, out: Encoded) -> Any:
    if value is None or isinstance(value, (bool, str)) or type(value) in (int, float):
        return value
    if isinstance(value, np.generic) and value.dtype != object:
        return {"s": _array(np.asarray(value), out)}
    if isinstance(value, np.ndarray):
        return _objects(value, out) if value.dtype == object else {"a": _array(value, out)}
    if isinstance(value, (bytes, bytearray, memoryview)):
        return {"b": out.put(value)}
    if isinstance(value, dict):
        return {"d": [[_key(name), _encode(part, out)] for name, part in value.items()]}
    if isinstance(value, tuple):
        return {"t": [_encode(part, out) for part in value]}
    if isinstance(value, list):
        return _list(value, out)
    if isinstance(value, pa.RecordBatch):
        return {"p": out.put(_ipc(value))}
    if isinstance(value, Detections):
        return {"l": [], "x": _detections([value], out), "one": True}
    if hasattr(value, "__array__"):
        return _encode(np.asarray(value), out)
    raise _refused(value)


def _refused(value: Any) -> InvalidInputError:
    return InvalidInputError(
        f"Got a value of type {type(value).__name__}; expected numbers, texts, bytes, NumPy "
        "arrays, or lists, tuples and dicts of them. Convert it to a NumPy array.",
        type=type(value).__name__,
    )


def _key(name: Any) -> Any:
    if isinstance(name, (str, int)) and not isinstance(name, bool):
        return name
    raise InvalidInputError(
        f"Got a dict with a key of type {type(name).__name__}; expected texts or whole numbers."
    )


def _array(array: np.ndarray, out: Encoded) -> list[Any]:
    if array.dtype.hasobject or array.dtype.names is not None:
        raise InvalidInputError(
            f"Got an array of dtype {array.dtype}; expected numbers, times, texts or objects that "
            "Arrow knows. Hand over its fields as arrays of their own."
        )
    # Not ascontiguousarray, which turns a scalar into an array of one.
    flat = array if array.flags.c_contiguous else array.copy()
    # Times and texts have no buffer that Python's own protocol knows.
    raw = flat.reshape(-1).view(np.uint8) if flat.size else b""
    return [array.dtype.str, list(array.shape), *out.put(raw)]


def _objects(array: np.ndarray, out: Encoded) -> Any:
    """Bytes as they are; texts, decimals and nested arrays through Arrow's types."""
    flat = array.reshape(-1).tolist()
    if _are_bytes(flat):
        return {"y": [list(array.shape), *_bytes_rows(flat, out)]}
    # pandas marks missing texts by NaN, Spark's older ones by None: give back what was got.
    as_nan = any(isinstance(item, float) and math.isnan(item) for item in flat)
    try:
        column = pa.array(flat, from_pandas=as_nan)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        raise InvalidInputError(
            f"Got an array of Python objects that Arrow does not take ({error}); expected texts, "
            "bytes, numbers or arrays, all of one kind. Convert the column first."
        ) from error
    arrays = pa.types.is_list(column.type)
    batch = pa.record_batch([column], names=["objects"])
    return {"o": [list(array.shape), as_nan, arrays, *out.put(_ipc(batch))]}


def _are_bytes(values: list[Any]) -> bool:
    return all(value is None or type(value) is bytes for value in values) and any(
        value is not None for value in values
    )


def _bytes_rows(values: list[Any], out: Encoded) -> list[Any]:
    lengths = [-1 if value is None else len(value) for value in values]
    rows = [value or b"" for value in values]
    return [_array(np.array(lengths, np.int64), out), *out.put_rows(rows)]


def _ipc(batch: pa.RecordBatch) -> Any:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue()


def _list(values: list[Any], out: Encoded) -> Any:
    if values and all(isinstance(value, Detections) for value in values):
        return {"l": [], "x": _detections(values, out)}
    if values and all(type(value) is bytes for value in values):
        return {"y": [[len(values)], *_bytes_rows(values, out)], "list": True}
    rows = _rows(values, out)
    return {"l": [_encode(value, out) for value in values]} if rows is None else rows


def _as_objects(values: Sequence[Any]) -> np.ndarray:
    array = np.empty(len(values), object)
    array[:] = values
    return array


def _rows(values: list[Any], out: Encoded) -> Any:
    """Dicts with the same keys and arrays of equal shape, as columns: one leaf instead of many."""
    if len(values) < 2 or not all(isinstance(value, dict) for value in values):
        return None
    names = list(values[0])
    if any(list(value) != names for value in values):
        return None
    columns = []
    for name in names:
        parts = [value[name] for value in values]
        first = parts[0]
        if not isinstance(first, (np.ndarray, np.generic)) or first.dtype.hasobject:
            return None
        if any(
            type(part) is not type(first) or part.dtype != first.dtype or part.shape != first.shape
            for part in parts
        ):
            return None
        columns.append(np.stack(parts))
    return {
        "r": [len(values), [[_key(n), _array(c, out)] for n, c in zip(names, columns, strict=True)]]
    }


def _detections(values: Sequence[Detections], out: Encoded) -> Any:
    return [
        list(values[0].class_names),
        _array(np.array([len(value) for value in values], np.int64), out),
        _array(np.concatenate([value.xyxy for value in values]), out),
        _array(np.concatenate([value.confidence for value in values]), out),
        _array(np.concatenate([value.class_id for value in values]), out),
    ]


def decode(tree: Any, memory: memoryview, *, late: bool = False) -> Any:
    """Undo :func:`encode`.

    Parameters
    ----------
    tree : object
        From :attr:`Encoded.tree`.
    memory : memoryview
        What it points into.
    late : bool
        Whether arrays of bytes come as :class:`BytesRows`, for who needs them later.

    Returns
    -------
    object
        Arrays are views of ``memory``.

    Raises
    ------
    HostError
        When the tree points outside the memory or makes no sense.
    """
    try:
        return _decode(tree, memory, late)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, pa.ArrowInvalid) as error:
        raise HostError(
            f"A message makes no sense ({type(error).__name__}: {error}). Both processes must run "
            "the same version of daskshare."
        ) from error


def _decode(tree: Any, memory: memoryview, late: bool) -> Any:
    if not isinstance(tree, dict):
        return tree
    if "a" in tree:
        return _view(tree["a"], memory)
    if "s" in tree:
        return _view(tree["s"], memory)[()]
    if "d" in tree:
        return {name: _decode(part, memory, late) for name, part in tree["d"]}
    if "t" in tree:
        return tuple(_decode(part, memory, late) for part in tree["t"])
    if "x" in tree:
        found = _decode_detections(tree["x"], memory)
        return found[0] if "one" in tree else found
    if "l" in tree:
        return [_decode(part, memory, late) for part in tree["l"]]
    if "b" in tree:
        return bytes(_slice(memory, *tree["b"]))
    if "r" in tree:
        count, columns = tree["r"]
        arrays = [(name, _view(column, memory)) for name, column in columns]
        return [{name: array[i] for name, array in arrays} for i in range(count)]
    if "y" in tree:
        shape, lengths, offset, length = tree["y"]
        rows = BytesRows(tuple(shape), _view(lengths, memory), _slice(memory, offset, length))
        if "list" in tree:
            return np.asarray(rows).tolist()
        return rows if late else np.asarray(rows)
    if "o" in tree:
        return _decode_objects(tree["o"], memory)
    return _table(memory, *tree["p"])


def _slice(memory: memoryview, offset: int, length: int) -> memoryview:
    if not 0 <= offset <= offset + length <= len(memory):
        raise ValueError(f"bytes {offset} to {offset + length} of {len(memory)}")
    return memory[offset : offset + length]


def _view(array: list[Any], memory: memoryview) -> np.ndarray:
    name, shape, offset, length = array
    dtype = np.dtype(name)
    if dtype.hasobject:
        raise ValueError(f"dtype {dtype}")
    raw = np.frombuffer(_slice(memory, offset, length), np.uint8)
    return (raw.view(dtype) if length else np.empty(0, dtype)).reshape(shape)


def _table(memory: memoryview, offset: int, length: int) -> pa.RecordBatch:
    # Copied: an Arrow table may outlive the segment that it came in.
    with pa.ipc.open_stream(pa.py_buffer(bytes(_slice(memory, offset, length)))) as reader:
        return reader.read_next_batch()


def _decode_objects(leaf: list[Any], memory: memoryview) -> np.ndarray:
    shape, as_nan, arrays, offset, length = leaf
    column = _table(memory, offset, length).column(0)
    if arrays:
        values: list[Any] = list(column.to_numpy(zero_copy_only=False))
    else:
        values = column.to_pylist()
    if as_nan:
        values = [math.nan if value is None else value for value in values]
    return _as_objects(values).reshape(shape)


def _decode_detections(leaf: list[Any], memory: memoryview) -> list[Detections]:
    names = tuple(leaf[0])
    counts, xyxy, confidence, class_id = (_view(part, memory) for part in leaf[1:])
    stops = np.cumsum(counts).tolist()
    starts = [0, *stops[:-1]]
    return [
        Detections(xyxy[a:b], confidence[a:b], class_id[a:b], names)
        for a, b in zip(starts, stops, strict=True)
    ]
