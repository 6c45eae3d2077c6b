"""Where the rows of a batch come from, and where its outputs go, on a CUDA device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from daskshare._engine_request import Group, HostOutputs, Segment, host_dtype
from daskshare._engine_staging import Arena, aligned, byte_view
from daskshare.kernels.transfer import copy_async

__all__ = ["Buffers", "runs"]


class Buffers:
    """Where a slot's outputs go: device memory in one block, and its page-locked copy.

    Parameters
    ----------
    structure : object
        How the model nests its outputs; see :func:`daskshare._engine_request.flatten`.
    leaves : sequence of torch.Tensor
        Outputs of such a batch.
    device : torch.device
        The engine's.
    """

    def __init__(
        self, structure: Any, leaves: Sequence[torch.Tensor], device: torch.device
    ) -> None:
        self.structure = structure
        self.form = _form(leaves)
        self._places: list[tuple[int, int, tuple[int, ...], np.dtype[Any]]] = []
        dtypes = [host_dtype(leaf.dtype) for leaf in leaves]
        size = 0
        for leaf, dtype in zip(leaves, dtypes, strict=True):
            num_bytes = leaf.numel() * dtype.itemsize
            kind = torch.empty(0, dtype=dtype).numpy().dtype
            self._places.append((size, size + num_bytes, tuple(leaf.shape), kind))
            size += aligned(num_bytes)
        self._device_block = torch.empty(size, dtype=torch.uint8, device=device)
        self._host_block = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        self._host_array: np.ndarray = self._host_block.numpy()
        self._addresses = self._host_block.data_ptr(), self._device_block.data_ptr()
        self.device = [
            byte_view(self._device_block, start, leaf.shape[0], leaf.shape[1:], dtype)
            for (start, *_), leaf, dtype in zip(self._places, leaves, dtypes, strict=True)
        ]

    def fits(self, structure: Any, leaves: Sequence[torch.Tensor]) -> bool:
        """Whether outputs have the form of those that it was made for."""
        return self.structure == structure and self.form == _form(leaves)

    def store(self, leaves: Sequence[torch.Tensor]) -> None:
        """Queue copies of the outputs into the block, on the current stream."""
        for target, leaf in zip(self.device, leaves, strict=True):
            target.copy_(leaf, non_blocking=True)

    def fetch(self, stream: torch.cuda.Stream) -> None:
        """Queue the transfer into page-locked memory."""
        copy_async(*self._addresses, self._host_array.nbytes, stream.cuda_stream)

    def take(self) -> HostOutputs:
        """What was transferred, as arrays of its own."""
        return HostOutputs(
            self.structure,
            # One by one: who keeps a part of a small output must not keep a large one with it.
            [
                self._host_array[start:stop].copy().view(dtype).reshape(shape)
                for start, stop, shape, dtype in self._places
            ],
            owned=True,
        )


def runs(segments: Sequence[Segment], group: Group) -> list[tuple[int, int, Segment | None]]:
    """Where a batch's rows lie.

    Parameters
    ----------
    segments : sequence of Segment
        In the order of the rows.
    group : Group
        Of the batch.

    Returns
    -------
    list of (int, int, Segment or None)
        Address, or 0 for what cannot be copied as it lies; number of rows; segment. Neighbours in
        staging memory become one, without a segment.
    """
    found: list[tuple[int, int, Segment | None]] = []
    arena: Arena | None = None
    first = last = 0

    def flush() -> None:
        if arena is not None:
            rows = (last - first) // max(1, group.item_bytes)
            found.append((arena.address + first, rows, None))

    for segment in segments:
        cells = segment.piece.cells
        if cells is None:
            flush()
            arena = None
            items = segment.piece.items
            # Conjugates and negatives may be marked as such, and computed when they are read.
            plain = items.is_contiguous() and not (items.is_conj() or items.is_neg())
            address = items.data_ptr() if plain else 0
            if address:
                address += segment.start * group.item_bytes
            found.append((address, segment.num_items, segment))
            continue
        start, stop = cells.range(segment.start, segment.stop)
        if cells.arena is not arena or start != last:
            flush()
            arena, first = cells.arena, start
        last = stop
    flush()
    return found


def _form(leaves: Sequence[torch.Tensor]) -> list[tuple[torch.Size, torch.dtype]]:
    return [(leaf.shape, leaf.dtype) for leaf in leaves]
