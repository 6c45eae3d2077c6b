"""A caller's request on its way through the engine, and how its outputs come together again."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np
import torch

from daskshare._engine_staging import Cells

__all__ = ["Group", "HostOutputs", "Piece", "Request", "Segment", "flatten", "host_dtype", "split"]

#: Times its own size that a request's outputs may keep in memory.
_MOST_KEPT = 8


class Group(NamedTuple):
    """What the items of one batch have in common."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def item_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class HostOutputs(NamedTuple):
    """A batch's outputs in host memory: their nesting, and one array (rows, ...) a tensor.

    ``owned``: nothing else writes the arrays, so that requests may keep parts of them.
    """

    structure: Any
    arrays: list[np.ndarray]
    owned: bool = False


class Request:
    """One call: its future, and its result as far as it has come.

    Notes
    -----
    ``finished``, ``running`` and ``pieces`` are guarded by the engine's lock. :meth:`fill` is
    called by one thread at a time.
    """

    __slots__ = (
        "finished",
        "future",
        "num_items",
        "outputs",
        "pieces",
        "remaining",
        "running",
        "task",
    )

    def __init__(self, num_items: int, task: Hashable = None) -> None:
        self.future: Future[Any] = Future()
        self.num_items = num_items
        self.task = task
        self.remaining = num_items
        self.outputs: HostOutputs | None = None
        self.pieces: list[Piece] = []
        self.running = False
        self.finished = False

    def fill(self, first_item: int, num_items: int, batch: HostOutputs, row: int) -> bool:
        """Copy rows of a batch to where they belong; True when the request is complete.

        Raises
        ------
        ValueError
            When the model's outputs changed their form from one batch to the next.
        """
        if self.outputs is None:
            if batch.owned and num_items == self.num_items and _may_keep(batch, num_items):
                rows = slice(row, row + num_items)
                self.outputs = HostOutputs(batch.structure, [a[rows] for a in batch.arrays])
                self.remaining = 0
                return True
            self.outputs = HostOutputs(
                batch.structure,
                [np.empty((self.num_items, *a.shape[1:]), a.dtype) for a in batch.arrays],
            )
        mine = self.outputs
        if batch.structure != mine.structure or any(
            a.shape[1:] != b.shape[1:] for a, b in zip(mine.arrays, batch.arrays, strict=True)
        ):
            raise ValueError(
                f"outputs of one request differ between batches: got {_describe(batch)} after "
                f"{_describe(mine)}; a model's outputs must have equal shapes but for the first "
                "axis"
            )
        for target, source in zip(mine.arrays, batch.arrays, strict=True):
            target[first_item : first_item + num_items] = source[row : row + num_items]
        self.remaining -= num_items
        return self.remaining == 0

    def result(self) -> Any:
        """Outputs of all items, structured as the model returns them."""
        assert self.outputs is not None
        return unflatten(self.outputs)


class Piece:
    """Items of a request that were queued together.

    Parameters
    ----------
    request : Request
        Whose items.
    offset : int
        Index of the first in the request.
    items : torch.Tensor, shape (n, *item_shape)
        Page-locked host memory, the caller's own host memory (CPU engine) or the device's.
    cells : Cells or None
        Staging memory to give back when all items are done.
    ready : torch.cuda.Event or None
        After which device items may be read.
    """

    __slots__ = (
        "cells",
        "items",
        "num_items",
        "offset",
        "piece_id",
        "ready",
        "remaining",
        "request",
    )

    def __init__(
        self,
        piece_id: int,
        request: Request,
        offset: int,
        items: torch.Tensor,
        cells: Cells | None,
        ready: torch.cuda.Event | None,
    ) -> None:
        self.piece_id = piece_id
        self.request = request
        self.offset = offset
        self.items = items
        self.num_items = int(items.shape[0])
        self.remaining = self.num_items
        self.cells = cells
        self.ready = ready


class Segment(NamedTuple):
    """Items ``start`` to ``stop`` (exclusive) of a piece: successive rows of a batch."""

    piece: Piece
    start: int
    stop: int

    @property
    def num_items(self) -> int:
        return self.stop - self.start

    @property
    def items(self) -> torch.Tensor:
        return self.piece.items[self.start : self.stop]


def split(segments: Sequence[Segment], num_items: int) -> tuple[list[Segment], list[Segment]]:
    """Part segments into the first ``num_items`` items and the others."""
    head: list[Segment] = []
    tail: list[Segment] = []
    for segment in segments:
        count = min(segment.num_items, num_items)
        if count:
            head.append(segment._replace(stop=segment.start + count))
        if count < segment.num_items:
            tail.append(segment._replace(start=segment.start + count))
        num_items -= count
    return head, tail


def flatten(outputs: Any, rows: int) -> tuple[Any, list[torch.Tensor]]:
    """Part a model's outputs into their nesting and their tensors.

    Raises
    ------
    TypeError
        When something else than tensors, tuples, lists and dicts is in it.
    ValueError
        When a tensor's first axis is not ``rows``.
    """
    leaves: list[torch.Tensor] = []
    structure = _structure(outputs, rows, leaves)
    return structure, leaves


def _structure(value: Any, rows: int, leaves: list[torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        if value.ndim == 0 or value.shape[0] != rows:
            raise ValueError(
                f"the model returned a tensor of shape {tuple(value.shape)} for a batch of "
                f"{rows}; expected {rows} as its first axis"
            )
        leaves.append(value)
        return None
    if isinstance(value, dict):
        inner = tuple(_structure(v, rows, leaves) for v in value.values())
        return (dict, tuple(value), inner)
    if isinstance(value, (tuple, list)):
        return (type(value), None, tuple(_structure(v, rows, leaves) for v in value))
    raise TypeError(
        f"the model returned {type(value).__name__}; expected a tensor, or a tuple, list or dict "
        "of tensors"
    )


def unflatten(outputs: HostOutputs) -> Any:
    """Put arrays into the nesting that :func:`flatten` found."""
    return _nest(outputs.structure, iter(outputs.arrays))


def _nest(structure: Any, arrays: Iterator[np.ndarray]) -> Any:
    if structure is None:
        return next(arrays)
    kind, keys, inner = structure
    values = [_nest(s, arrays) for s in inner]
    if kind is dict:
        return dict(zip(keys, values, strict=True))
    # A named tuple takes its fields one by one.
    return kind(*values) if hasattr(kind, "_fields") else kind(values)


_NUMPY_DTYPES = {
    torch.float32,
    torch.float64,
    torch.float16,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.complex64,
    torch.complex128,
}


def host_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that outputs have in host memory: float32 for those NumPy lacks."""
    return dtype if dtype in _NUMPY_DTYPES else torch.float32


def _may_keep(batch: HostOutputs, num_items: int) -> bool:
    # A part keeps the whole batch's memory.
    return bool(batch.arrays) and num_items * _MOST_KEPT >= batch.arrays[0].shape[0]


def _describe(outputs: HostOutputs) -> str:
    return ", ".join(f"{a.dtype}{list(a.shape[1:])}" for a in outputs.arrays)
