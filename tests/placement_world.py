"""A pool in simulated time, for tests of the placement policy."""

from __future__ import annotations

import heapq
import itertools
import math

from daskshare.placement import Dispatch, GpuPool, Load, PlacementOptions, Unload


class World:
    """A pool with a clock; loads and unloads end when the test says so, or at once."""

    def __init__(self, *, instant: bool = True, **options) -> None:
        self.pool = GpuPool(PlacementOptions(**options))
        self.now = 0.0
        self.instant = instant
        self.log: list = []
        self.at: dict = {}
        self._events: list = []
        self._number = itertools.count()

    def gpu(self, address, *, uuid=None, budget_bytes=100, slots=1, **options):
        self.pool.add_worker(
            address,
            device_uuid=uuid or f"GPU-{address}",
            budget_bytes=budget_bytes,
            slots=slots,
            now_seconds=self.now,
            **options,
        )

    def model(self, key, num_bytes=10, **options):
        self.pool.add_model(
            key, name=key, estimated_bytes=num_bytes, now_seconds=self.now, **options
        )

    def task(self, key, model="m", **options):
        self.pool.add_task(key, model, now_seconds=self.now, **options)

    def step(self, seconds: float = 0.0) -> list:
        """Let time pass, decide, and carry out what takes no time."""
        self.now += seconds
        new: list = []
        while True:
            decisions = self.pool.decide(self.now)
            self.pool.validate()
            new += decisions
            for decision in decisions:
                if isinstance(decision, Dispatch):
                    self.at[decision.task] = decision.worker
                elif isinstance(decision, Load) and self.instant:
                    self.loaded(decision.worker, decision.model_key)
                elif isinstance(decision, Unload) and self.instant:
                    self.pool.unload_finished(
                        decision.worker, decision.model_key, now_seconds=self.now
                    )
            if not self.instant or not any(isinstance(d, (Load, Unload)) for d in decisions):
                self.log += new
                return new

    def serve(self, until_seconds, *, task_seconds=1.0, load_seconds=1.0, refill=None) -> dict:
        """Let loads and tasks take their time until then; returns when each task began."""
        began = {}
        while True:
            decisions = self.pool.decide(self.now)
            self.pool.validate()
            self.log += decisions
            for decision in decisions:
                match decision:
                    case Dispatch(task=key, worker=worker):
                        began[key] = self.now
                        self.at[key] = worker
                        self._later(task_seconds, "finish", key, worker)
                    case Load(worker=worker, model_key=key):
                        self._later(load_seconds, "load", key, worker)
                    case Unload(worker=worker, model_key=key):
                        self._later(0.1, "unload", key, worker)
            next_seconds = self._events[0][0] if self._events else math.inf
            wake = self.pool.next_wake_seconds()
            if wake is not None and wake < min(next_seconds, until_seconds):
                self.now = max(self.now, wake)
                continue
            if next_seconds > until_seconds:
                self.now = until_seconds
                return began
            self.now, _, event = heapq.heappop(self._events)
            match event:
                case ("finish", key, _):
                    self.finish(key)
                    if refill is not None:
                        refill(key)
                case ("load", key, worker):
                    self.loaded(worker, key)
                case ("unload", key, worker):
                    self.pool.unload_finished(worker, key, now_seconds=self.now)

    def _later(self, seconds, *event) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._number), event))

    def loaded(self, worker, model="m", num_bytes=None):
        self.pool.load_finished(worker, model, model_bytes=num_bytes, now_seconds=self.now)

    def finish(self, *keys):
        for key in keys:
            assert self.pool.finish_task(key, now_seconds=self.now)
            del self.at[key]

    def models_on(self, worker):
        return self.pool.snapshot()["workers"][worker]["models"]


def kinds(decisions, kind):
    return [d for d in decisions if isinstance(d, kind)]


def tasks_of(decisions):
    return [d.task for d in decisions if isinstance(d, Dispatch)]
