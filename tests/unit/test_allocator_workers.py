"""From reports to the pool's events."""

from __future__ import annotations

import time
from types import SimpleNamespace

from distributed import Status

from daskshare._allocator_workers import News, WorkerBook
from daskshare.placement import GpuPool


def worker(address="tcp://a:1", status="running"):
    return SimpleNamespace(address=address, status=Status[status], nthreads=4, resources={"x": 2.0})


def report(state="ready", uuid="GPU-0", kind="cuda", **resident):
    return {
        "state": state,
        "reason": "no driver" if state == "failed" else "",
        "share": "h:1",
        "device": {"uuid": uuid, "kind": kind},
        "budget_bytes": 1000,
        "free_bytes": 900,
        "models": {key: {"state": "ready", "model_bytes": n} for key, n in resident.items()},
    }


def make_book():
    pool = GpuPool()
    return WorkerBook(pool, start_timeout_seconds=60), pool


def test_a_worker_is_in_the_pool_from_its_first_report_on():
    book, pool = make_book()
    ws = worker()
    book.add(ws)
    assert pool.snapshot()["workers"] == {}
    assert not book.all_reported()
    assert book.report(ws, report("starting")) is News.NOTHING
    assert book.report(ws, report(m=100)) is News.WORKERS
    assert book.report(ws, report(m=100)) is News.MODELS
    assert pool.snapshot()["workers"]["tcp://a:1"]["slots"] == 4
    assert book.seen_gpu
    assert book.with_model("m") == ["tcp://a:1"]
    assert book.devices() == ["GPU-0"]
    assert book.find_device("tcp://a:1") == book.find_device("GPU-0") == "GPU-0"
    assert book.find_device("GPU-9") == ""
    assert book.largest_budget_bytes() == 1000
    book.remove("tcp://a:1")
    assert pool.snapshot()["workers"] == {}
    assert book.all_reported()


def test_a_heartbeat_is_read_once():
    book, _ = make_book()
    ws, first = worker(), report()
    book.add(ws)
    assert book.heartbeat(ws, first) is News.WORKERS
    assert book.heartbeat(ws, first) is News.NOTHING
    assert book.heartbeat(ws, {}) is News.NOTHING
    assert book.heartbeat(worker("tcp://stranger:1"), report()) is News.NOTHING


def test_a_worker_that_fails_leaves_the_pool_and_may_come_back():
    book, pool = make_book()
    ws = worker()
    book.add(ws)
    book.report(ws, report())
    assert book.report(ws, report("failed")) is News.WORKERS
    assert book.failure("tcp://a:1") == "no driver"
    assert book.failed(None)
    assert book.failed({"tcp://a:1"})
    assert not book.failed({"tcp://b:1"})
    assert pool.snapshot()["workers"] == {}
    assert book.report(ws, report()) is News.WORKERS
    assert not book.any_failed
    book.report(ws, report("absent"))
    assert "no daskshare plugin" in book.failure("tcp://a:1")


def test_a_worker_that_never_reports_counts_as_failed():
    book, _ = make_book()
    book.add(worker())
    assert not book.expire(time.monotonic() + 59)
    assert book.expire(time.monotonic() + 61)
    assert not book.expire(time.monotonic() + 62), "said once"
    assert "within 60 s" in book.failure("tcp://a:1")
    book.remove("tcp://a:1")
    assert not book.any_failed


def test_a_paused_worker_is_not_accepting():
    book, pool = make_book()
    ws = worker(status="paused")
    book.add(ws)
    book.report(ws, report())
    assert not pool.snapshot()["workers"]["tcp://a:1"]["accepting"]
    ws.status = Status.running
    book.set_status(ws)
    assert pool.snapshot()["workers"]["tcp://a:1"]["accepting"]
