"""Rows of a batch divided among threads."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch

from daskshare.models.lanes import RowLanes

TIMEOUT = 20.0


@pytest.fixture
def six_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(6)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("rows", "most", "lanes", "threads"),
    [
        (1, 8, 1, 6),
        (2, 8, 2, 3),
        (3, 8, 3, 2),
        (4, 8, 2, 3),
        (6, 6, 6, 1),
        (6, 5, 3, 2),
        (6, 1, 1, 6),
        (7, 8, 1, 6),
    ],
)
def test_as_many_threads_as_divide_rows_and_cores_evenly(six_threads, rows, most, lanes, threads):
    seen = []
    together = threading.Barrier(lanes)

    def double(part):
        # Passed only while all compute at once.
        together.wait(TIMEOUT)
        seen.append((threading.get_ident(), len(part), torch.get_num_threads()))
        return {"a": part * 2, "b": part.sum(dim=1)}

    batch = torch.arange(rows * 2.0).view(rows, 2)
    run = RowLanes(most).run
    for _ in range(2):
        outputs = run(double, batch)
        assert torch.equal(outputs["a"], batch * 2)
        assert torch.equal(outputs["b"], batch.sum(dim=1))
    assert len({ident for ident, _, _ in seen}) == lanes
    assert {(size, count) for _, size, count in seen} == {(rows // lanes, threads)}
    assert torch.get_num_threads() == 6


def test_an_error_comes_when_nobody_looks_at_the_batch_any_more(six_threads):
    looking, failed = threading.Event(), threading.Event()

    def fail(part):
        if part[0] == 0:
            assert looking.wait(TIMEOUT)
            failed.set()
            raise ValueError("no zeros")
        looking.set()
        assert failed.wait(TIMEOUT)
        looked.append(int(part[0]))
        return {"a": part}

    looked = []
    lanes = RowLanes(6)
    with pytest.raises(ValueError, match="no zeros"):
        lanes.run(fail, torch.arange(2))
    assert looked == [1]
    # The error's traceback holds them too.
    del lanes
    gc.collect()


def test_the_threads_end_with_their_owner(six_threads):
    threads = weakref.WeakSet()
    lanes = RowLanes(6)

    def note(part):
        threads.add(threading.current_thread())
        return {"a": part}

    lanes.run(note, torch.zeros(6))
    started = list(threads)
    assert started
    assert all(thread.is_alive() for thread in started)
    del lanes
    gc.collect()
    for thread in started:
        thread.join(TIMEOUT)
        assert not thread.is_alive()
