from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest

from daskshare._worker_pauses import keep_imports, profile_less


def worker(**callbacks):
    return SimpleNamespace(periodic_callbacks=callbacks)


@pytest.mark.parametrize(("before", "during"), [(10, 100), (1000, 1000)])
def test_dasks_profiler_looks_less_often_until_that_is_undone(before, during):
    sampling = SimpleNamespace(callback_time=before)
    undo = profile_less(worker(profile=sampling), 0.1)
    assert sampling.callback_time == during
    undo()
    assert sampling.callback_time == before


def test_a_profiler_that_is_switched_off_stays_off():
    heartbeat = SimpleNamespace(callback_time=500)
    profile_less(worker(heartbeat=heartbeat), 0.1)()
    assert heartbeat.callback_time == 500


def test_what_is_imported_is_left_out_of_searches_for_garbage():
    before = gc.get_freeze_count()
    try:
        keep_imports()
        assert gc.get_freeze_count() > before + 1000
    finally:
        gc.unfreeze()
