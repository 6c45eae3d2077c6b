"""Which workers can run models: what each last reported, and what the pool was told of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

from distributed import Status

from daskshare._allocator_reports import SpeedMeter, WorkerFacts

if TYPE_CHECKING:
    from distributed.scheduler import WorkerState

    from daskshare.placement import GpuPool

__all__ = ["News", "WorkerBook"]


class News(Enum):
    """What a report told."""

    NOTHING = auto()
    #: Of models or speeds.
    MODELS = auto()
    #: A worker can run models from now on, or no longer.
    WORKERS = auto()


class _Known:
    __slots__ = (
        "budget_bytes",
        "device",
        "failure",
        "heartbeat",
        "in_pool",
        "joined_seconds",
        "meter",
        "resident",
    )

    def __init__(self) -> None:
        self.joined_seconds = time.monotonic()
        self.meter = SpeedMeter()
        self.heartbeat: Any = None
        self.in_pool = False
        self.device = ""
        self.budget_bytes = 0
        self.failure = ""
        self.resident: dict[str, int] = {}


class WorkerBook:
    """Turns workers' reports into events of the pool.

    Parameters
    ----------
    pool : GpuPool
        Gets the events.
    start_timeout_seconds : float
        After which a worker that has reported no device counts as failed.

    Attributes
    ----------
    seen_gpu : bool
        Whether any worker so far had a GPU.

    Notes
    -----
    Runs on the scheduler's event loop. A worker is in the pool from its first report on: a late
    joiner is known to Dask before it has a plugin, and long before its device is known.
    """

    def __init__(self, pool: GpuPool, *, start_timeout_seconds: float) -> None:
        self._pool = pool
        self._start_timeout_seconds = start_timeout_seconds
        self._known: dict[str, _Known] = {}
        self._num_failed = 0
        self.seen_gpu = False

    def add(self, ws: WorkerState) -> None:
        """Take in a worker that joined."""
        self._known[ws.address] = _Known()

    def remove(self, address: str) -> None:
        """Take in that a worker left."""
        known = self._known.pop(address, None)
        if known is None:
            return
        if known.failure:
            self._num_failed -= 1
        if known.in_pool:
            self._pool.remove_worker(address, now_seconds=time.monotonic())

    @property
    def any_failed(self) -> bool:
        """Whether some worker cannot run models."""
        return self._num_failed > 0

    def heartbeat(self, ws: WorkerState, report: Any) -> News:
        """Take in what the last heartbeat brought, unless that is known."""
        known = self._known.get(ws.address)
        if known is None or report is known.heartbeat or not report:
            return News.NOTHING
        known.heartbeat = report
        return self.report(ws, report)

    def report(self, ws: WorkerState, report: dict[str, Any]) -> News:
        """Take in a report."""
        known = self._known.get(ws.address)
        if known is None:
            return News.NOTHING
        facts = WorkerFacts.from_report(report)
        now_seconds = time.monotonic()
        if facts.state == "starting":
            return News.NOTHING
        news = News.MODELS
        if facts.state != "ready":
            if not known.failure:
                news = News.WORKERS
                self._num_failed += 1
            known.failure = facts.reason or "it has no daskshare plugin"
            if known.in_pool:
                known.in_pool, known.resident = False, {}
                for key in self._pool.remove_worker(ws.address, now_seconds=now_seconds):
                    # They still run there, or fail there; the pool need not place them.
                    self._pool.forget_task(key, now_seconds=now_seconds)
            return news
        if known.failure:
            known.failure = ""
            self._num_failed -= 1
        if not known.in_pool:
            news = News.WORKERS
            known.in_pool = True
            known.device = facts.device_uuid
            known.budget_bytes = facts.budget_bytes
            self.seen_gpu = self.seen_gpu or facts.is_gpu
            self._pool.add_worker(
                ws.address,
                device_uuid=facts.device_uuid,
                budget_bytes=facts.budget_bytes,
                slots=ws.nthreads,
                is_gpu=facts.is_gpu,
                resources=dict(ws.resources),
                process=facts.process or None,
                now_seconds=now_seconds,
            )
            self.set_status(ws)
        known.resident = facts.resident
        self._pool.report_worker(
            ws.address,
            resident=facts.resident,
            frames_per_second=known.meter.measure(report),
            free_bytes=facts.free_bytes,
            now_seconds=now_seconds,
        )
        return news

    def set_status(self, ws: WorkerState) -> None:
        """Tell the pool whether a worker takes tasks now."""
        self._pool.set_worker_accepting(
            ws.address, ws.status == Status.running, now_seconds=time.monotonic()
        )

    def expire(self, now_seconds: float) -> bool:
        """Give up workers that have not reported in time; True when there are new ones."""
        late = [
            known
            for known in self._known.values()
            if not known.in_pool
            and not known.failure
            and now_seconds - known.joined_seconds > self._start_timeout_seconds
        ]
        for known in late:
            known.failure = f"it reported no device within {self._start_timeout_seconds:g} s"
            self._num_failed += 1
        return bool(late)

    def failure(self, address: str) -> str:
        """Return why a worker cannot run models; "" when it can, or when that is not known yet."""
        known = self._known.get(address)
        return known.failure if known is not None else ""

    def failed(self, addresses: set[str] | None) -> bool:
        """Whether all of these workers (None: all there are) are there and cannot run models."""
        if addresses is None:
            return bool(self._known) and all(k.failure for k in self._known.values())
        return bool(addresses) and all(self.failure(a) for a in addresses)

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def with_model(self, key: str) -> list[str]:
        """Return the addresses of workers that reported a model as ready."""
        return [address for address, known in self._known.items() if key in known.resident]

    def device(self, address: str) -> str:
        """Return the uuid of a worker's device; "" when the worker or its device is unknown."""
        known = self._known.get(address)
        return known.device if known is not None else ""

    def find_device(self, name: str) -> str:
        """Return the uuid of the device with that uuid or of the worker at that address, or ""."""
        if any(known.device == name for known in self._known.values()):
            return name
        return self.device(name)

    def all_reported(self) -> bool:
        """Whether each worker's device, or why it has none, is known."""
        return all(known.in_pool or known.failure for known in self._known.values())

    def devices(self) -> list[str]:
        """Return the uuids of all devices, each once."""
        return sorted({known.device for known in self._known.values()} - {""})

    def largest_budget_bytes(self) -> int | None:
        """Return what one device can give to models at most; None when none is known."""
        return max((k.budget_bytes for k in self._known.values() if k.in_pool), default=None)
