from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from daskshare._engine_buffers import runs
from daskshare._engine_request import Group, Piece, Request, Segment
from daskshare._engine_staging import Arena, Staging


def staging(max_items=16, batch_items=4):
    return Staging(max_items=max_items, batch_items=batch_items, pin=False)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 3000)), max_size=200))
@settings(deadline=None)
def test_ranges_never_overlap_and_all_memory_comes_back(steps):
    arena = Arena(8192, pin=False)
    held: list[tuple[int, int]] = []
    for take, number in steps:
        if take:
            start = arena.allocate(number)
            if start is not None:
                assert start % 256 == 0
                assert start + number <= 8192
                assert all(start + number <= s or s + n <= start for s, n in held)
                held.append((start, number))
        elif held:
            arena.release(*held.pop(number % len(held)))
        taken = sum(-(-n // 256) * 256 for _, n in held)
        assert arena.free_bytes == 8192 - taken
    for start, number in held:
        arena.release(start, number)
    assert arena.allocate(8192) is not None


def test_requests_in_order_lie_side_by_side():
    arena = Arena(4096, pin=False)
    assert [arena.allocate(512) for _ in range(4)] == [0, 512, 1024, 1536]
    arena.release(0, 512)
    # The ring goes on before it comes round.
    assert arena.allocate(512) == 2048
    assert arena.allocate(2048) is None
    assert arena.allocate(1536) == 2560
    assert arena.allocate(512) == 0


@pytest.mark.parametrize(
    "items",
    [
        np.arange(12, dtype=np.float32).reshape(2, 3, 2),
        np.arange(12, dtype=np.int16).reshape(2, 3, 2),
        np.arange(24, dtype=np.uint8).reshape(4, 3, 2)[::2],
        torch.arange(12.0).reshape(2, 3, 2),
        torch.arange(12).reshape(2, 2, 3).transpose(1, 2),
        torch.arange(12).reshape(2, 3, 2).bfloat16(),
        torch.ones(2, 3, 2, dtype=torch.bool),
    ],
)
def test_cells_hold_what_was_copied(items):
    tensor = torch.as_tensor(items)
    cells = staging().take(2, 1, 6 * tensor.dtype.itemsize)
    assert cells is not None
    cells.fill(items)
    assert torch.equal(cells.tensor((3, 2), tensor.dtype), tensor)


def test_fewer_items_rather_than_waiting_but_not_too_few():
    s = staging(max_items=8, batch_items=4)
    first = s.take(6, 1, 256)
    second = s.take(8, 1, 256)
    assert first is not None
    assert second is not None
    assert (first.num_items, second.num_items) == (6, 2)
    assert s.take(4, 1, 256) is None
    second.release()
    assert s.take(4, 3, 256) is None
    third = s.take(4, 2, 256)
    assert third is not None
    assert third.num_items == 2


def test_larger_items_get_a_larger_arena_and_old_cells_stay():
    s = staging()
    small = s.take(2, 1, 4)
    assert small is not None
    small.fill(np.array([[7], [8]], np.float32))
    large = s.take(4, 4, 10**6)
    assert large is not None
    assert large.arena is not small.arena
    assert small.tensor((1,), torch.float32).tolist() == [[7.0], [8.0]]
    small.release()


def test_neighbours_are_moved_by_one_transfer():
    group = Group((64,), torch.float32)
    s = staging(max_items=32)
    pieces = []
    for value, count in ((1, 2), (2, 3), (3, 1)):
        cells = s.take(count, count, group.item_bytes)
        assert cells is not None
        cells.fill(np.full((count, 64), value, np.float32))
        items = cells.tensor(group.shape, group.dtype)
        pieces.append(Piece(value, Request(count), 0, items, cells, None))
    device = Piece(4, Request(2), 0, torch.full((2, 64), 4.0), None, None)
    order = [
        Segment(pieces[0], 0, 2),
        Segment(pieces[1], 0, 2),
        Segment(device, 1, 2),
        Segment(pieces[1], 2, 3),
        Segment(pieces[2], 0, 1),
        Segment(pieces[0], 1, 2),
    ]
    strided = Piece(5, Request(2), 0, torch.zeros(64, 2).t(), None, None)
    order.append(Segment(strided, 0, 2))
    found = runs(order, group)
    assert [rows for _, rows, _ in found] == [4, 1, 2, 1, 2]
    assert [segment for _, _, segment in found] == [None, order[2], None, None, order[6]]
    *addresses, none = [address for address, _, _ in found]
    assert none == 0
    values = [ctypes.c_float.from_address(address).value for address in addresses]
    assert values == [1, 4, 2, 1]
    assert addresses[1] == device.items.data_ptr() + group.item_bytes


def test_conjugates_and_negatives_are_not_copied_as_they_lie():
    group = Group((2,), torch.complex64)
    items = torch.zeros((1, 2), dtype=torch.complex64)
    order = [
        Segment(Piece(0, Request(1), 0, x, None, None), 0, 1)
        for x in (items, items.conj(), items._neg_view())
    ]
    assert [bool(address) for address, _, _ in runs(order, group)] == [True, False, False]
