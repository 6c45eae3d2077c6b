"""The worker plugin without a cluster; tests/cluster has it in real workers."""

from __future__ import annotations

import asyncio
import gc
import pickle
import sys
import threading
from concurrent.futures import Future
from types import SimpleNamespace

import dask
import pytest
import torch
from distributed import Status

import daskshare.worker_plugin
from daskshare.errors import ConfigurationError, NotOnWorkerError
from daskshare.share import ModelShare
from daskshare.worker_plugin import (
    PLUGIN_NAME,
    DaskshareWorkerPlugin,
    _build_share,
    _ProcessShare,
    current_task,
    local_share,
    worker_report,
)

TIMEOUT = 20.0


class Share:
    def __init__(self):
        self.closed = threading.Event()

    def close(self):
        self.closed.set()

    def report(self):
        model = {"loads": 1, "frames": 10, "batches": 4, "model_bytes": 100}
        model["batch_size_counts"] = {"2": 2, "3": 2}
        return {
            "device": {"kind": "cpu"},
            "spent_seconds": {"busy": 1.0},
            "models": {"k1": model, "k2": {**model, "frames": 2}},
        }


@pytest.fixture
def built(monkeypatch):
    """The shares built in this process so far, and what building does next."""
    made = SimpleNamespace(shares=[], threads=[], failure=None, may_go_on=threading.Event())
    made.may_go_on.set()

    def build(task_threads, fresh_process):
        assert made.may_go_on.wait(TIMEOUT)
        if made.failure is not None:
            raise made.failure
        made.threads.append(task_threads)
        made.shares.append(Share())
        return made.shares[-1]

    monkeypatch.setattr(daskshare.worker_plugin, "_build_share", build)
    monkeypatch.setattr(daskshare.worker_plugin, "_process_share", _ProcessShare())
    return made


def process_share():
    return daskshare.worker_plugin._process_share


def test_a_misspelt_option_stops_the_building_of_a_share():
    with (
        dask.config.set({"daskshare.share.memory-limt": 0.5}),
        pytest.raises(ConfigurationError, match=r"Did you mean daskshare\.share\.memory-limit"),
    ):
        _build_share(1, fresh_process=False)


def test_owners_share_and_the_last_one_closes(built):
    one, two = object(), object()
    first = process_share().acquire(one, task_threads=3, fresh_process=True).result(TIMEOUT)
    assert process_share().acquire(two, task_threads=5, fresh_process=True).result(TIMEOUT) is first
    assert built.threads == [3]
    assert process_share().release(one) is None
    assert not first.closed.is_set()
    process_share().release(two).result(TIMEOUT)
    assert first.closed.is_set()
    assert process_share().release(two) is None
    again = process_share().acquire(one, task_threads=1, fresh_process=True).result(TIMEOUT)
    assert again is not first


def test_a_share_released_while_it_is_built_is_closed(built):
    built.may_go_on.clear()
    owner = object()
    process_share().acquire(owner, task_threads=1, fresh_process=True)
    closing = process_share().release(owner)
    built.may_go_on.set()
    closing.result(TIMEOUT)
    assert [share.closed.is_set() for share in built.shares] == [True]


def test_releasing_a_share_that_failed_is_no_error(built):
    built.failure = OSError("no such device")
    owner = object()
    process_share().acquire(owner, task_threads=1, fresh_process=True)
    process_share().release(owner).result(TIMEOUT)


def test_each_lookup_of_a_failed_share_says_why(built):
    built.failure = OSError("no such device")
    process_share().acquire(object(), task_threads=1, fresh_process=True)
    for _ in range(2):
        with pytest.raises(NotOnWorkerError, match="OSError: no such device") as caught:
            local_share()
        assert caught.value.reason == "OSError: no such device"
    assert worker_report()["state"] == "failed"
    assert worker_report()["reason"] == "OSError: no such device"


def test_a_lookup_waits_for_a_share_that_is_being_built(built):
    built.may_go_on.clear()
    process_share().acquire(object(), task_threads=1, fresh_process=True)
    assert worker_report()["state"] == "starting"
    found = []
    thread = threading.Thread(target=lambda: found.append(local_share()))
    thread.start()
    built.may_go_on.set()
    thread.join(TIMEOUT)
    assert found == built.shares


def test_there_is_no_share_and_no_task_outside_a_worker(built):
    with pytest.raises(NotOnWorkerError, match="outside a Dask worker"):
        local_share()
    assert current_task() is None
    assert worker_report()["state"] == "absent"


def test_a_report_adds_up_its_models(built):
    process_share().acquire(object(), task_threads=1, fresh_process=True).result(TIMEOUT)
    report = worker_report()
    assert {name: report[name] for name in ("loads", "frames", "batches", "model_bytes")} == {
        "loads": 2,
        "frames": 12,
        "batches": 8,
        "model_bytes": 200,
    }
    assert report["mean_batch_size"] == 12 / 8
    assert report["device"] == {"kind": "cpu"}
    assert "decoder_pyav" in report["chunks"]
    assert report["recent"]["frames_per_second"] == {}, "nothing ran since the first report"


def test_each_share_of_a_process_has_its_own_name(built):
    names = set()
    for _ in range(2):
        owner = object()
        process_share().acquire(owner, task_threads=1, fresh_process=True).result(TIMEOUT)
        process_share().acquire(object(), task_threads=1, fresh_process=True)
        names.add(worker_report()["share"])
        process_share()._owners = {owner}
        process_share().release(owner).result(TIMEOUT)
    assert len(names) == 2


def make_worker():
    return SimpleNamespace(
        metrics={},
        handlers={},
        state=SimpleNamespace(nthreads=2, tasks={}),
        nanny=None,
        status=None,
        loop=SimpleNamespace(add_callback=lambda *_: None),
    )


def test_a_heartbeat_waits_for_nothing_and_never_raises(built, monkeypatch):
    asked, answer = threading.Semaphore(0), threading.Semaphore(0)
    answers: list = [{"state": "ready"}, OSError("no more"), {"state": "ready", "frames": 3}]

    def slow_report():
        asked.release()
        assert answer.acquire(timeout=TIMEOUT)
        got = answers.pop(0) if answers else {}
        if isinstance(got, Exception):
            raise got
        return got

    monkeypatch.setattr(daskshare.worker_plugin, "worker_report", slow_report)
    worker, plugin = make_worker(), DaskshareWorkerPlugin()
    plugin.setup(worker)
    heartbeat = worker.metrics[PLUGIN_NAME]
    seen = []
    for _ in range(3):
        assert heartbeat(worker) == (seen[-1] if seen else {})
        assert asked.acquire(timeout=TIMEOUT)
        assert heartbeat(worker) == (seen[-1] if seen else {}), "the report is not there yet"
        pending: Future = plugin._refreshing
        answer.release()
        pending.exception(TIMEOUT)
        seen.append(heartbeat(worker))
    assert seen == [
        {"state": "ready"},
        {"state": "failed", "reason": "OSError: no more"},
        {"state": "ready", "frames": 3},
    ]
    answer.release()
    plugin._reporter.shutdown()
    process_share().release(plugin._owner).result(TIMEOUT)


def test_the_plugin_travels_small():
    text = pickle.dumps(DaskshareWorkerPlugin())
    assert len(text) < 200
    assert pickle.loads(text).name == PLUGIN_NAME  # noqa: S301


@pytest.mark.parametrize(
    ("kind", "option", "expected"),
    [("cpu", "8 MiB", [8 * 2**20]), ("cpu", None, []), ("cuda", "8 MiB", [])],
)
def test_freed_memory_is_retained_on_a_cpu_if_at_all(monkeypatch, kind, option, expected):
    retained = []
    plugin = daskshare.worker_plugin
    monkeypatch.setattr(plugin, "retain_freed", retained.append)
    monkeypatch.setattr(plugin, "_set_torch_threads", lambda threads: None)
    monkeypatch.setattr("daskshare.device.current_device", lambda: SimpleNamespace(kind=kind))
    # Not by its name in the package, which is a function.
    monkeypatch.setattr(
        sys.modules[ModelShare.__module__], "ModelShare", lambda device, **_: retained[:]
    )
    options = {"daskshare.worker.retain-memory": option, "daskshare.host.serve": False}
    with dask.config.set(options):
        # What there was when the share was made, before any model.
        assert _build_share(1, fresh_process=False) == expected


@pytest.mark.parametrize(
    ("fresh_process", "device", "option", "expected"),
    [
        (True, "cuda", True, ["kept"]),
        (False, "cuda", True, []),
        (True, "cpu", True, []),
        (True, "cuda", False, []),
    ],
)
def test_only_a_gpus_fresh_process_leaves_imports_out_of_searches_for_garbage(
    monkeypatch, fresh_process, device, option, expected
):
    kept = []
    plugin = daskshare.worker_plugin
    monkeypatch.setattr(plugin, "keep_imports", lambda: kept.append("kept"))
    gpu = SimpleNamespace(kind="cuda", torch_device=lambda: torch.device(device))
    monkeypatch.setattr("daskshare.device.current_device", lambda: gpu)
    monkeypatch.setattr(
        sys.modules[ModelShare.__module__],
        "ModelShare",
        lambda device, **_: SimpleNamespace(device=device),
    )
    options = {"daskshare.worker.freeze-imports": option, "daskshare.host.serve": False}
    with dask.config.set(options):
        _build_share(1, fresh_process=fresh_process)
    assert kept == expected


def test_a_gpus_worker_is_profiled_less_until_the_plugin_goes(monkeypatch):
    sampling = SimpleNamespace(callback_time=10)
    worker = make_worker()
    worker.periodic_callbacks = {"profile": sampling}
    worker.status = Status.closed
    worker.loop.add_callback = lambda function, *arguments: function(*arguments)
    device = SimpleNamespace(torch_device=lambda: torch.device("cuda"))
    monkeypatch.setattr(DaskshareWorkerPlugin, "_changed", lambda self, event: None)
    plugin = DaskshareWorkerPlugin()
    worker.plugins = {PLUGIN_NAME: plugin}
    share: Future = Future()
    share.set_result(SimpleNamespace(device=device))
    monkeypatch.setattr(_ProcessShare, "acquire", lambda self, owner, **_: share)
    plugin.setup(worker)
    assert sampling.callback_time == 100
    plugin.teardown(worker).close()
    assert sampling.callback_time == 10


@pytest.mark.parametrize(("nanny", "expected"), [("tcp://nanny", [gc.freeze]), (None, [])])
def test_a_workers_fresh_process_ends_without_looking_for_garbage(
    built, monkeypatch, nanny, expected
):
    registered = []
    monkeypatch.setattr(daskshare.worker_plugin.atexit, "register", registered.append)
    plugin = DaskshareWorkerPlugin()
    plugin._worker, plugin._owner = SimpleNamespace(nanny=nanny), object()
    process_share().acquire(plugin._owner, task_threads=1, fresh_process=True)
    asyncio.run(plugin._close())
    assert registered == expected
    assert built.shares[0].closed.is_set()
