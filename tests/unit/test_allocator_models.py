"""Loading on workers that are played."""

from __future__ import annotations

import asyncio
import pickle
from types import SimpleNamespace

import pytest
from distributed.comm import CommClosedError
from distributed.protocol.pickle import dumps

import daskshare._allocator_models
from daskshare._allocator_models import KnownModel, ModelLoader
from daskshare.client import SharedModel
from daskshare.errors import ModelLoadError, ModelTooLargeError
from daskshare.placement import Fail, Load, Unload
from daskshare.testing import FakeSpec

MODEL = SharedModel(FakeSpec(name="m", model_bytes=300))
WORKER = "tcp://a:1"


class Pool:
    """Keeps the events it is told."""

    def __init__(self):
        self.events = []

    def __getattr__(self, name):
        return lambda *args, now_seconds, **kw: self.events.append((name, args, kw))


def run(answer, *, leaves=False, decision=None, timeout_seconds=60.0):
    """Let a loader carry out a decision; the worker gives ``answer``."""

    async def main():
        scheduler = SimpleNamespace(workers={WORKER: object()})
        asked, pool, kicks = [], Pool(), []

        async def call(**arguments):
            asked.append(arguments)
            if leaves:
                del scheduler.workers[WORKER]
            if isinstance(answer, Exception):
                raise answer
            return await answer() if callable(answer) else answer

        scheduler.rpc = lambda worker: SimpleNamespace(daskshare_load=call, daskshare_unload=call)
        loader = ModelLoader(
            scheduler, pool, lambda: kicks.append(1), load_timeout_seconds=timeout_seconds
        )
        loader.models[MODEL.key] = KnownModel(MODEL.key, MODEL)
        changed = asyncio.create_task(loader.changed())
        await asyncio.sleep(0)
        loader.carry_out(decision or Load(WORKER, MODEL.key, "why not"))
        await asyncio.wait_for(changed, 20)
        assert not loader.is_loading(MODEL.key)
        assert kicks
        return loader, pool.events, asked

    return asyncio.run(main())


def test_a_load_is_told_with_its_bytes():
    _, events, [asked] = run({"status": "OK", "model_bytes": 321})
    assert events == [("load_finished", (WORKER, MODEL.key), {"model_bytes": 321})]
    assert pickle.loads(asked["spec"]) == MODEL.spec  # noqa: S301


def test_a_failed_load_keeps_the_workers_error_for_its_tasks():
    error = ModelLoadError("no such file", model="m", reason="OSError: no such file")
    loader, events, _ = run({"status": "error", "reason": "OSError", "exception": dumps(error)})
    assert events == [("load_failed", (WORKER, MODEL.key), {"reason": "OSError"})]
    told = loader.error(Fail("task", "load", "on no device", MODEL.key))
    assert (type(told), str(told), told.reason) == (ModelLoadError, str(error), error.reason)


def test_tasks_of_a_model_that_is_too_large_hear_so():
    loader, _, _ = run({"status": "OK", "model_bytes": 1})
    told = loader.error(Fail("task", "too_large", "it takes 3 bytes", MODEL.key))
    assert isinstance(told, ModelTooLargeError)
    assert "it takes 3 bytes" in str(told)


def test_a_load_that_does_not_end_fails():
    _, events, _ = run(asyncio.Event().wait, timeout_seconds=0.01)
    assert events == [("load_failed", (WORKER, MODEL.key), {"reason": "no answer within 0.01 s"})]


@pytest.mark.parametrize(
    "answer", [CommClosedError("gone"), {"status": "leaving", "reason": "it ends"}]
)
def test_a_worker_that_leaves_is_no_failure_of_the_model(answer):
    _, events, _ = run(answer, leaves=True)
    assert events == []


def test_a_worker_that_breaks_off_and_stays_is_one(monkeypatch):
    monkeypatch.setattr(daskshare._allocator_models, "_GRACE_SECONDS", 0.05)
    _, [(name, _, told)], _ = run(CommClosedError("gone"))
    assert name == "load_failed"
    assert told == {"reason": "CommClosedError: gone"}


def test_unloads_are_told():
    decision = Unload(WORKER, MODEL.key, "idle")
    _, events, [asked] = run({"status": "OK"}, decision=decision)
    assert (events, asked) == (
        [("unload_finished", (WORKER, MODEL.key), {})],
        {"key": MODEL.key},
    )
    _, events, _ = run({"status": "error", "reason": "in use"}, decision=decision)
    assert events == [("unload_failed", (WORKER, MODEL.key), {"reason": "in use"})]


def test_a_model_of_which_only_the_key_is_known_is_loaded_by_its_tasks():
    async def main():
        pool, kicks = Pool(), []
        loader = ModelLoader(
            SimpleNamespace(workers={}), pool, lambda: kicks.append(1), load_timeout_seconds=1
        )
        loader.models["k"] = KnownModel("k", None)
        changed = asyncio.create_task(loader.changed())
        await asyncio.sleep(0)
        loader.carry_out(Load(WORKER, "k", "why not"))
        await asyncio.wait_for(changed, 20)
        return pool.events

    assert asyncio.run(main()) == [("load_finished", (WORKER, "k"), {})]


def test_a_spec_that_cannot_tell_its_size_counts_as_nothing(caplog):
    class Odd:
        name = "odd"

        def estimated_bytes(self):
            raise OSError("no file")

    assert daskshare._allocator_models._estimated_bytes(Odd()) == 0
    assert "Cannot estimate the size of model odd" in caplog.text
