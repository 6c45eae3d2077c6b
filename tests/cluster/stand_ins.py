"""Dask workers that pass for workers with GPUs, each its own, while they compute on the CPU."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from distributed import WorkerPlugin, get_worker

import daskshare
from daskshare.client import SharedModel
from daskshare.testing import FakeDevice, FakeSpec
from daskshare.worker_plugin import PLUGIN_NAME

GIB = 2**30


@dataclass(frozen=True, slots=True)
class StandInGpu(FakeDevice):
    """Called a GPU, computes on the CPU."""

    kind: str = "cuda"

    @property
    def is_cuda(self) -> bool:
        return False


class StandIns(WorkerPlugin):
    """Gives workers devices by their names; register it before daskshare is installed.

    Parameters
    ----------
    devices : dict
        Of a worker's name: the device's uuid; workers without one have no GPU.
    total_bytes : int
        Of each device.
    """

    name = "stand-ins"

    def __init__(self, devices: dict[Any, str], *, total_bytes: int = 10 * GIB) -> None:
        self.devices = {str(name): uuid for name, uuid in devices.items()}
        self.total_bytes = total_bytes

    def setup(self, worker: Any) -> None:
        import daskshare.device

        uuid = self.devices.get(str(worker.name))
        device = (
            FakeDevice(uuid=f"cpu-{worker.name}", total_bytes=self.total_bytes)
            if uuid is None
            else StandInGpu(uuid=uuid, total_bytes=self.total_bytes)
        )
        daskshare.device.current_device = lambda: device


@dataclass(frozen=True, slots=True)
class PickySpec(FakeSpec):
    """Fails to load on one device."""

    bad_device: str = ""

    def load(self, device: Any) -> Any:
        if device.uuid == self.bad_device:
            raise RuntimeError(f"no luck on {device.uuid}")
        return FakeSpec.load(self, device)


def fake(name: str, **options: Any) -> SharedModel:
    return SharedModel(FakeSpec(name=name, **options))


def frames(value: float, n: int = 1) -> np.ndarray:
    return np.full((n, 2), value, np.float32)


def where(model: SharedModel, value: float = 1.0) -> str:
    """Run the model and tell on which worker."""
    assert model(frames(value))[0, 0] == value * model.spec.factor
    return str(get_worker().address)


def double(model: SharedModel, value: float) -> float:
    return float(model(frames(value))[0, 0])


def double_slowly(model: SharedModel, value: float) -> float:
    """Take long enough that a worker's death finds something."""
    time.sleep(0.02)
    return double(model, value)


def die(model: SharedModel, value: float) -> None:
    """What a poisonous input does: it takes the process with it."""
    os._exit(1)


_GATES: dict[str, threading.Event] = {}


def wait_at_gate(model: SharedModel, gate: str, timeout: float = 60) -> str:
    """Run the model after ``open_gate`` was called in this process."""
    assert _GATES.setdefault(gate, threading.Event()).wait(timeout)
    return where(model)


def open_gate(gate: str) -> None:
    _GATES.setdefault(gate, threading.Event()).set()


def books(client: Any) -> dict[str, Any]:
    """Check the allocator's books and tell what is in them."""

    async def look(dask_scheduler: Any) -> dict[str, Any]:
        allocator = dask_scheduler.plugins[PLUGIN_NAME].allocator
        allocator.settle()
        allocator.pool.validate()
        snapshot = allocator.pool.snapshot()
        return {
            "held": len(allocator._held),
            "in_pool": len(allocator.pool),
            "deaths": len(allocator._deaths),
            "models": snapshot["models"],
            "devices": snapshot["devices"],
            "workers": snapshot["workers"],
        }

    return client.run_on_scheduler(look)


def decisions(client: Any, model: SharedModel, kind: str = "dispatch") -> list[dict[str, Any]]:
    """What was decided about a model so far."""
    found = []
    for _, event in client.get_events(PLUGIN_NAME):
        if not isinstance(event, dict) or event.get("action") != "decided":
            continue
        found += [d for d in event["decisions"] if d["kind"] == kind]
        if kind == "dispatch":
            names = event["dispatch_fields"]
            for row in event["dispatches"]:
                dispatch = dict(zip(names, row, strict=True))
                found.append(
                    {
                        **dispatch,
                        "kind": kind,
                        "model": dispatch["model_key"],
                        "reason": dispatch["cause"],
                    }
                )
    return [decision for decision in found if decision["model"] == model.key]


def start_stand_ins(client: Any, devices: dict[Any, str], **options: Any) -> None:
    """Install stand-ins and daskshare on a cluster that has neither."""
    client.register_plugin(StandIns(devices, **options))
    daskshare.install(client)


def until(condition: Callable[[], bool], client: Any, *, steps: int = 1200) -> None:
    """Wait, step by step of the scheduler, until a condition holds; a bound, not a duration."""
    for _ in range(steps):
        if condition():
            return
        client.run_on_scheduler(_breathe)
    raise AssertionError("still not so")


async def _breathe() -> None:
    await asyncio.sleep(0.05)


def set_status(client: Any, address: str, status: str) -> None:
    """Pause a worker or let it go on, and wait until the scheduler knows."""

    def change(dask_worker: Any) -> None:
        from distributed import Status

        dask_worker.status = Status[status]

    async def known(dask_scheduler: Any) -> bool:
        ws = dask_scheduler.workers.get(address)
        return ws is None or ws.status.name == status

    client.run(change, workers=[address])
    until(lambda: client.run_on_scheduler(known), client)


@contextmanager
def no_hook_fails() -> Iterator[None]:
    """Fail when a hook of a plugin raised in this process's scheduler: Dask only logs it."""
    failures: list[logging.LogRecord] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "Plugin failed" in record.getMessage() or record.exc_info:
                failures.append(record)

    keep = Keep(logging.INFO)
    loggers = [logging.getLogger(f"distributed.{name}") for name in ("scheduler", "broker")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(keep)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(keep)
            logger.setLevel(level)
    assert not failures, logging.Formatter().format(failures[0])
