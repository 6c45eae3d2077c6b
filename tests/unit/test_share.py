from __future__ import annotations

import gc
import json
import pickle
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from daskshare.config import EngineOptions, ShareOptions
from daskshare.device import Device
from daskshare.errors import (
    EngineClosedError,
    EngineDiedError,
    ModelError,
    ModelLoadError,
    ModelTooLargeError,
)
from daskshare.models.spec import Prepared
from daskshare.share import ModelShare

TIMEOUT = 20.0
DEVICE = Device("cpu", 0, "cpu-test", "test", 1000)


class FakeProgram:
    item_shape = (1,)
    max_batch_size = 8
    batch_sizes = ()
    graph_capturable = False

    def __init__(self, model_bytes):
        self.model_bytes = model_bytes
        self.poison = False

    def prepare(self, inputs):
        return Prepared(np.asarray(inputs, np.float32)[:, None])

    def forward(self, batch):
        if self.poison:
            raise SystemExit("poisoned")
        return batch + 1

    def compile(self, batch_size):
        return None

    def finish(self, outputs, context):
        return outputs[:, 0].tolist()


@dataclass
class FakeSpec:
    name: str = "a"
    model_bytes: int = 100
    estimate: int | None = None
    errors: list = field(default_factory=list)
    gate: threading.Event | None = None
    loads: int = 0
    loading: threading.Event = field(default_factory=threading.Event)
    programs: list = field(default_factory=list)

    @property
    def key(self):
        return "key-" + self.name

    def estimated_bytes(self):
        return self.model_bytes if self.estimate is None else self.estimate

    def load(self, device):
        self.loads += 1
        self.loading.set()
        if self.gate is not None:
            assert self.gate.wait(TIMEOUT)
        if self.errors:
            raise self.errors.pop(0)
        program = FakeProgram(self.model_bytes)
        self.programs.append(weakref.ref(program))
        return program


@pytest.fixture
def make():
    shares = []

    def make(**options):
        options = {
            "memory_limit": 1000,
            "lease_timeout_seconds": TIMEOUT,
            "close_timeout_seconds": TIMEOUT,
        } | options
        share = ModelShare(
            DEVICE,
            options=ShareOptions(**options),
            engine_options=EngineOptions(max_wait_seconds=0.0),
        )
        shares.append(share)
        return share

    yield make
    for share in shares:
        share.close()


def test_lease_and_infer(make):
    share = make()
    spec = FakeSpec()
    with share.lease(spec) as lease:
        assert lease.spec is spec
        assert lease.infer([1, 2]) == [2.0, 3.0]
        assert lease.program is spec.programs[0]()
        prepared = lease.program.prepare([4])
        np.testing.assert_array_equal(lease.submit(prepared).result(TIMEOUT), [[5.0]])
        assert share.stats()[spec.key].leases == 1
    assert share.stats()[spec.key].leases == 0
    for use in (lambda: lease.infer([1]), lambda: lease.program, lambda: lease.engine):
        with pytest.raises(EngineClosedError, match="lease"):
            use()
    lease.release()
    assert share.stats()[spec.key].leases == 0


def test_64_threads_load_once(make):
    share = make()
    spec = FakeSpec(gate=threading.Event())

    def task(i):
        with share.lease(spec) as lease:
            return lease.infer([i])

    with ThreadPoolExecutor(64) as pool:
        futures = [pool.submit(task, i) for i in range(64)]
        assert spec.loading.wait(TIMEOUT)
        spec.gate.set()
        assert [f.result(TIMEOUT) for f in futures] == [[i + 1.0] for i in range(64)]
    assert spec.loads == 1
    stats = share.stats()[spec.key]
    assert (stats.loads, stats.frames, stats.leases, stats.state) == (1, 64, 0, "ready")


def test_64_threads_all_get_the_error_and_the_next_call_tries_again(make):
    share = make()
    cause = RuntimeError("no such weights")
    spec = FakeSpec(gate=threading.Event(), errors=[cause])
    started = threading.Barrier(65)

    def task():
        started.wait(TIMEOUT)
        share.lease(spec)

    with ThreadPoolExecutor(64) as pool:
        futures = [pool.submit(task) for _ in range(64)]
        started.wait(TIMEOUT)
        assert spec.loading.wait(TIMEOUT)
        # All others wait for that one attempt before it may fail.
        while waiters(share) < 63:
            assert not any(f.done() for f in futures)
        spec.gate.set()
        errors = [f.exception(TIMEOUT) for f in futures]
    assert all(type(e) is ModelLoadError for e in errors)
    assert all(e.reason == "RuntimeError: no such weights" for e in errors)
    assert all(e.__cause__ is cause for e in errors)
    assert len({id(e) for e in errors}) == 64
    assert spec.loads == 1
    assert pickle.loads(pickle.dumps(errors[0])).device == "cpu-test"  # noqa: S301
    with share.lease(spec) as lease:
        assert lease.infer([1]) == [2.0]
    assert spec.loads == 2


def waiters(share):
    with share._changed:
        return len(share._changed._waiters)


def test_load_keeps_the_model_without_a_lease(make):
    share = make()
    spec = FakeSpec()
    share.load(spec)
    share.load(spec)
    stats = share.stats()[spec.key]
    assert (spec.loads, stats.leases, stats.state, stats.model_bytes) == (1, 0, "ready", 100)


def test_equal_keys_share_one_copy(make):
    share = make()
    first, second = FakeSpec(), FakeSpec()
    share.load(first)
    share.load(second)
    assert (first.loads, second.loads) == (1, 0)


@pytest.mark.parametrize("estimate", [2000, 0])
def test_a_model_larger_than_the_budget_is_refused_with_both_figures(make, estimate):
    share = make()
    spec = FakeSpec(model_bytes=2000, estimate=estimate)
    with pytest.raises(ModelTooLargeError, match="needs 2000 bytes") as caught:
        share.lease(spec)
    assert (caught.value.needed_bytes, caught.value.budget_bytes) == (2000, 1000)
    assert spec.loads == (0 if estimate else 1)
    assert share.stats()[spec.key].state == "unloaded"
    assert all(ref() is None for ref in spec.programs)


@pytest.mark.parametrize("known", [True, False])
def test_the_least_recently_used_idle_model_makes_room(make, known):
    share = make()
    a, b, c, d = (FakeSpec(name, 300, None if known else 0) for name in "abcd")
    share.load(a)
    held = share.lease(b)
    share.load(c)
    share.load(a)
    share.load(d)
    states = {s.name: s.state for s in share.stats().values()}
    assert states == {"a": "ready", "b": "ready", "c": "unloaded", "d": "ready"}
    assert c.programs[0]() is None
    held.release()
    share.load(c)
    states = {s.name: s.state for s in share.stats().values()}
    assert states == {"a": "unloaded", "b": "ready", "c": "ready", "d": "ready"}
    assert c.loads == 2
    assert share.report()["used_bytes"] == 900


def test_models_in_use_are_never_evicted(make):
    share = make(lease_timeout_seconds=0.0)
    with share.lease(FakeSpec("a", 600)) as lease:
        with pytest.raises(ModelLoadError, match="models in use hold 600 of 1000") as caught:
            share.lease(FakeSpec("b", 500))
        assert (caught.value.needed_bytes, caught.value.used_bytes) == (500, 600)
        assert lease.infer([1]) == [2.0]
    share.load(FakeSpec("b", 500))
    assert {s.name: s.state for s in share.stats().values()} == {"a": "unloaded", "b": "ready"}


def test_a_load_waits_for_a_lease_to_end(make):
    share = make()
    held = share.lease(FakeSpec("a", 600))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(share.load, FakeSpec("b", 500))
        while not waiters(share):
            assert not waiting.done()
        held.release()
        waiting.result(TIMEOUT)
    assert share.stats()["key-a"].state == "unloaded"


def test_memory_that_ran_out_while_loading_evicts_idle_models(make):
    share = make()
    share.load(FakeSpec("a"))
    b = FakeSpec("b", errors=[torch.OutOfMemoryError("CUDA out of memory")])
    share.load(b)
    assert b.loads == 2
    assert share.stats()["key-a"].state == "unloaded"
    c = FakeSpec("c", errors=[torch.OutOfMemoryError("CUDA out of memory")] * 2)
    with pytest.raises(ModelLoadError, match="out of memory"):
        share.load(c)


def test_unload(make):
    share = make()
    spec = FakeSpec()
    assert share.unload(spec.key) is False
    with share.lease(spec) as lease:
        lease.infer([1, 2])
        with pytest.raises(ModelError, match="1 leases"):
            share.unload(spec.key, timeout_seconds=0.0)
        engine = weakref.ref(lease.engine)
    assert share.unload(spec.key) is True
    assert spec.programs[0]() is None
    gc.collect()
    assert engine() is None
    stats = share.stats()[spec.key]
    assert (stats.state, stats.frames, stats.batches, stats.model_bytes) == ("unloaded", 2, 1, 0)
    with share.lease(spec) as lease:
        lease.infer([1])
    stats = share.stats()[spec.key]
    assert (stats.loads, stats.frames, stats.mean_batch_size) == (2, 3, 1.5)


def test_unload_waits_for_the_lease(make):
    share = make()
    spec = FakeSpec()
    held = share.lease(spec)
    with ThreadPoolExecutor(1) as pool:
        unloading = pool.submit(share.unload, spec.key)
        while not waiters(share):
            assert not unloading.done()
        held.release()
        assert unloading.result(TIMEOUT) is True


def test_a_forgotten_lease_ends(make):
    share = make()
    spec = FakeSpec()
    lease = share.lease(spec)
    lease.infer([1])
    del lease
    gc.collect()
    assert share.stats()[spec.key].leases == 0


def test_a_dead_engine_is_rebuilt_on_the_next_call(make):
    share = make()
    spec = FakeSpec()
    with share.lease(spec) as lease:
        lease.infer([1])
        lease.program.poison = True
        with pytest.raises(EngineDiedError, match="poisoned"):
            lease.infer([1])
        lease.program.poison = False
        with ThreadPoolExecutor(16) as pool:
            assert list(pool.map(lambda i: lease.infer([i]), range(16))) == [
                [i + 1.0] for i in range(16)
            ]
    stats = share.stats()[spec.key]
    assert (stats.rebuilds, stats.loads, stats.frames) == (1, 1, 17)


def test_an_interrupted_load_frees_the_waiters(make):
    share = make()
    spec = FakeSpec(errors=[KeyboardInterrupt()])
    with pytest.raises(KeyboardInterrupt):
        share.lease(spec)
    share.load(spec)


def test_load_threads_bound_loading(make):
    share = make(load_threads=1)
    inside = []
    most = []

    class CountedSpec(FakeSpec):
        def load(self, device):
            inside.append(self)
            most.append(len(inside))
            program = super().load(device)
            inside.remove(self)
            return program

    gate = threading.Event()
    specs = [CountedSpec(name, gate=gate) for name in "abcd"]
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(share.load, spec) for spec in specs]
        while sum(s.state == "loading" for s in share.stats().values()) < 4:
            assert not any(f.done() for f in futures)
        gate.set()
        for future in futures:
            future.result(TIMEOUT)
    assert most == [1, 1, 1, 1]


def test_report_is_plain(make):
    share = make()
    with share.lease(FakeSpec()) as lease:
        lease.infer([1, 2])
        report = share.report()
    assert json.loads(json.dumps(report)) == report
    assert report["device"]["uuid"] == "cpu-test"
    assert report["budget_bytes"] == 1000
    model = report["models"]["key-a"]
    assert model["name"] == "a"
    assert (model["loads"], model["frames"], model["batches"]) == (1, 2, 1)
    assert model["engine"]["batch_size_counts"] == {"2": 1}


def test_budget_as_a_fraction():
    share = ModelShare(
        DEVICE, options=ShareOptions(memory_limit=0.25), engine_options=EngineOptions()
    )
    assert share.budget_bytes == 250


def test_close(make):
    share = make()
    spec = FakeSpec()
    lease = share.lease(spec)
    engine = lease.engine
    share.close()
    share.close()
    assert not engine.alive
    with pytest.raises(EngineClosedError):
        lease.infer([1])
    with pytest.raises(EngineClosedError, match="worker ends"):
        share.lease(spec)
    assert share.stats()[spec.key].state == "unloaded"
    lease.release()


def test_close_during_a_load_discards_it(make):
    share = make(close_timeout_seconds=0.0)
    spec = FakeSpec(gate=threading.Event())
    with ThreadPoolExecutor(2) as pool:
        loading = pool.submit(share.lease, spec)
        assert spec.loading.wait(TIMEOUT)
        share.close()
        spec.gate.set()
        with pytest.raises(EngineClosedError):
            loading.result(TIMEOUT)
    gc.collect()
    assert spec.programs[0]() is None


def test_import_needs_no_torch():
    code = "import sys, daskshare.share; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# -- what the device's time goes to, and what is kept --


def test_counts_outlive_the_engine(make):
    share = make()
    spec = FakeSpec()
    for _ in range(2):
        with share.lease(spec) as lease:
            lease.infer([1, 2, 3])
            lease.infer([4])
        share.unload(spec.key)
    stats = share.stats()[spec.key]
    assert stats.engine is None
    assert (stats.frames, stats.batches, stats.loads) == (8, 4, 2)
    assert stats.batch_size_counts == {1: 2, 3: 2}
    assert stats.busy_seconds > 0
    assert stats.mean_batch_size == 2.0


def test_failed_requests_are_counted_after_unloading_too(make):
    share = make()
    spec = FakeSpec()
    with share.lease(spec) as lease:
        lease.infer([1])
        spec.programs[-1]().poison = True
        with pytest.raises(EngineDiedError):
            lease.infer([2])
    assert share.stats()[spec.key].errors == 1
    share.unload(spec.key)
    assert share.stats()[spec.key].errors == 1


def test_the_most_users_at_once_are_remembered(make):
    share = make()
    spec = FakeSpec()
    leases = [share.lease(spec) for _ in range(3)]
    for lease in leases:
        lease.release()
    share.lease(spec).release()
    stats = share.stats()[spec.key]
    assert (stats.leases, stats.peak_leases) == (0, 3)


def test_why_a_model_is_not_there_is_kept_until_it_is(make):
    share = make()
    spec = FakeSpec(errors=[OSError("no such file")])
    with pytest.raises(ModelLoadError):
        share.lease(spec)
    assert "no such file" in share.stats()[spec.key].load_error
    share.lease(spec).release()
    assert share.stats()[spec.key].load_error == ""


def test_a_lease_a_load_and_a_batch_are_told_to_the_device(make):
    share = make()
    log = []
    share.activity.begin, share.activity.end = (
        (lambda name, sign=sign: log.append(sign + name)) for sign in "+-"
    )
    spec = FakeSpec(gate=threading.Event())
    spec.gate.set()
    with share.lease(spec) as lease:
        assert log == ["+loading", "+input", "-loading"]
        lease.infer([1])
        assert log[3] == "+busy"
    share.unload(spec.key)
    assert sorted(log[3:]) == ["+busy", "-busy", "-input"]
    assert share.report()["spent_seconds"].keys() == {
        *("busy", "loading", "decoding", "input", "scheduler")
    }
