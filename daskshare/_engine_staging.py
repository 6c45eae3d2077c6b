"""Page-locked memory into which callers copy their own frames: the engine's bounded queue.

Callers copy in their own threads with the interpreter lock released; the engine's thread then only
enqueues transfers. What is full makes callers wait, so memory stays bounded.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence

import numpy as np
import torch

__all__ = ["Arena", "Cells", "Staging", "aligned", "byte_view"]

# Starts of cells are aligned for every dtype and for the copy engines.
_ALIGNMENT_BYTES = 256
_MAX_ARENA_BYTES = 256 * 2**20


class Arena:
    """One block of memory handed out in ranges, in ring order where it can.

    Parameters
    ----------
    num_bytes : int
        Its size.
    pin : bool
        Whether to page-lock it, so that transfers to the GPU are asynchronous.

    Notes
    -----
    Not thread-safe: the engine calls it under its lock.
    """

    def __init__(self, num_bytes: int, *, pin: bool) -> None:
        self.num_bytes = num_bytes
        self.tensor = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pin)
        self.array: np.ndarray = self.tensor.numpy()
        self.address = self.tensor.data_ptr()
        self._free: list[tuple[int, int]] = [(0, num_bytes)]
        self._cursor = 0

    @property
    def free_bytes(self) -> int:
        """Bytes not handed out."""
        return sum(stop - start for start, stop in self._free)

    def allocate(self, num_bytes: int) -> int | None:
        """Take ``num_bytes`` in one piece; their start, or None when there is no such piece."""
        size = aligned(num_bytes)
        # Next fit: requests that follow one another lie side by side, so that one transfer
        # can move several.
        first = bisect.bisect_left(self._free, (self._cursor, 0))
        order: list[int] = [*range(first, len(self._free)), *range(first)]
        for i in order:
            start, stop = self._free[i]
            if stop - start >= size:
                if stop - start == size:
                    del self._free[i]
                else:
                    self._free[i] = (start + size, stop)
                self._cursor = start + size
                return start
        return None

    def release(self, start: int, num_bytes: int) -> None:
        """Give a range back that :meth:`allocate` handed out."""
        stop = start + aligned(num_bytes)
        i = bisect.bisect_left(self._free, (start, stop))
        if i < len(self._free) and self._free[i][0] == stop:
            stop = self._free.pop(i)[1]
        if i and self._free[i - 1][1] == start:
            i -= 1
            start = self._free.pop(i)[0]
        self._free.insert(i, (start, stop))


class Cells:
    """Memory of ``num_items`` items in an arena."""

    __slots__ = ("arena", "item_bytes", "num_items", "start")

    def __init__(self, arena: Arena, start: int, num_items: int, item_bytes: int) -> None:
        self.arena = arena
        self.start = start
        self.num_items = num_items
        self.item_bytes = item_bytes

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """View them as a tensor (num_items, *shape)."""
        return byte_view(self.arena.tensor, self.start, self.num_items, shape, dtype)

    def range(self, first: int, last: int) -> tuple[int, int]:
        """Bytes of the arena that hold items ``first`` to ``last`` (exclusive)."""
        return self.start + first * self.item_bytes, self.start + last * self.item_bytes

    def fill(self, items: np.ndarray | torch.Tensor) -> None:
        """Copy items in. Runs in the caller's thread with the interpreter lock released."""
        if isinstance(items, torch.Tensor):
            if items.is_contiguous():
                # NumPy copies with one thread; torch would start a thread pool for each caller.
                items = items.view(-1).view(torch.uint8).numpy()
            else:
                self.tensor(items.shape[1:], items.dtype).copy_(items)
                return
        target = self.arena.array[self.start : self.start + items.nbytes]
        np.copyto(target.view(items.dtype).reshape(items.shape), items)

    def release(self) -> None:
        """Give the memory back; under the engine's lock."""
        self.arena.release(self.start, self.num_items * self.item_bytes)


class Staging:
    """Arena that is made for the first items seen, and made anew for much larger ones.

    Parameters
    ----------
    max_items : int
        Items that it shall hold, as long as they take no more than 256 MiB.
    batch_items : int
        Items that it holds in any case twice.
    pin : bool
        Whether to page-lock.
    """

    def __init__(self, *, max_items: int, batch_items: int, pin: bool) -> None:
        self._max_items = max_items
        self._batch_items = batch_items
        self._pin = pin
        self._arena: Arena | None = None

    def take(self, want: int, minimum: int, item_bytes: int) -> Cells | None:
        """Take cells for ``want`` items, or fewer but ``minimum``; None when that many must wait.

        Notes
        -----
        Under the engine's lock.
        """
        if self._arena is None or self._arena.num_bytes < aligned(item_bytes * self._batch_items):
            # Cells of an old arena keep it until their requests are done.
            self._arena = Arena(self._size(item_bytes), pin=self._pin)
        num_items = want
        while True:
            start = self._arena.allocate(num_items * item_bytes)
            if start is not None:
                return Cells(self._arena, start, num_items, item_bytes)
            if num_items <= minimum:
                return None
            num_items = max(minimum, num_items // 2)

    def _size(self, item_bytes: int) -> int:
        # Each item of its own request may lose up to the alignment.
        padded = aligned(item_bytes)
        least = 2 * self._batch_items * padded
        return max(least, min(self._max_items * padded, _MAX_ARENA_BYTES))


def byte_view(
    block: torch.Tensor, start: int, num_items: int, shape: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    """View bytes of a block as (num_items, *shape)."""
    size = num_items * math.prod(shape) * dtype.itemsize
    return block[start : start + size].view(dtype).view(num_items, *shape)


def aligned(num_bytes: int) -> int:
    return max(1, -(-num_bytes // _ALIGNMENT_BYTES)) * _ALIGNMENT_BYTES
