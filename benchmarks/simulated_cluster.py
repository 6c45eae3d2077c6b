"""A cluster of GPUs in simulated time: workers with slots, models that load and are evicted.

A GPU computes for all tasks in its slots at once, each at an equal share of its speed. A task
that finds its model missing makes the worker load it, as a ModelShare does: after the least
recently used idle models have gone, and waiting while all that are there are in use.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["Cluster", "Gpu", "ModelKind", "TaskSpec", "Worker"]

LOADS_AT_ONCE = 2


@dataclass(frozen=True, slots=True)
class ModelKind:
    """A model: its size, its load time, and frames/s on a GPU of speed 1."""

    key: str
    num_bytes: int
    load_seconds: float
    rate: float


@dataclass(slots=True)
class TaskSpec:
    """A task: its number, model and frames."""

    key: int
    model: ModelKind
    frames: float


@dataclass(slots=True)
class Gpu:
    """A GPU: its name, speed (frames/s in those of speed 1) and bytes for models."""

    uuid: str
    speed: float
    budget_bytes: int


@dataclass(slots=True)
class Worker:
    """A worker process on a GPU."""

    address: str
    gpu: Gpu
    slots: int
    alive: bool = True
    #: Seconds that each running task has had of the whole GPU so far, and since when it counts.
    served: float = 0.0
    at_seconds: float = 0.0
    running: list[tuple[float, int, TaskSpec]] = field(default_factory=list)
    blocked: dict[str, list[TaskSpec]] = field(default_factory=dict)
    num_blocked: int = 0
    waiting: deque[TaskSpec] = field(default_factory=deque)
    ready: dict[str, ModelKind] = field(default_factory=dict)
    loading: dict[str, ModelKind] = field(default_factory=dict)
    to_load: deque[ModelKind] = field(default_factory=deque)
    in_use: Counter[str] = field(default_factory=Counter)
    used_bytes: int = 0
    event: int = 0
    measured: set[str] = field(default_factory=set)

    @property
    def num_tasks(self) -> int:
        """Tasks in slots or waiting for one."""
        return len(self.running) + self.num_blocked + len(self.waiting)


class Cluster:
    """Simulated time, workers, and the events between them.

    Parameters
    ----------
    policy : object
        Has ``on_task_done(worker, task)``, ``on_loaded(worker, model, ok)``,
        ``on_worker_lost(worker, tasks)``, ``on_worker_joined(worker)`` and
        ``on_tick()``; calls :meth:`send`, :meth:`load` and :meth:`unload`.
    load_failure_rate : float
        Fraction of loads that fail.
    seed : int
        Of the failures.
    """

    def __init__(self, policy: object, *, load_failure_rate: float, seed: int) -> None:
        self.policy = policy
        self.now = 0.0
        self.workers: dict[str, Worker] = {}
        self.random = random.Random(seed)
        self.load_failure_rate = load_failure_rate
        self.num_done = 0
        self.num_loads = 0
        self.num_failed_loads = 0
        self.lost_seconds = 0.0
        self._events: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._count = 0
        self._touched: dict[str, Worker] = {}
        self.speed = 0.0
        # (seconds, total speed) at each change, for the lower bound.
        self.speeds: list[tuple[float, float]] = []

    # -- time --

    def at(self, seconds: float, call: Callable[..., None], *arguments: object) -> None:
        """Call something at a time."""
        self._count += 1
        heapq.heappush(self._events, (seconds, self._count, call, arguments))

    def run(self, num_tasks: int, *, limit_seconds: float = 1e7) -> None:
        """Let time pass until so many tasks are done."""
        self._reschedule()
        events = self._events
        while self.num_done < num_tasks:
            if not events or self.now > limit_seconds:
                raise RuntimeError(f"{self.num_done} of {num_tasks} tasks at {self.now:.0f} s")
            self.now, _, call, arguments = heapq.heappop(events)
            call(*arguments)
            if self._touched:
                self._reschedule()

    # -- workers --

    def join(self, address: str, gpu: Gpu, slots: int) -> None:
        """Add a worker."""
        worker = self.workers[address] = Worker(address, gpu, slots, at_seconds=self.now)
        self.speed += gpu.speed
        self.speeds.append((self.now, self.speed))
        self.policy.on_worker_joined(worker)

    def kill(self, address: str) -> None:
        """Lose a worker with all that it was doing."""
        worker = self.workers.pop(address)
        self._advance(worker)
        worker.alive = False
        tasks = [t for _, _, t in worker.running]
        tasks += [t for blocked in worker.blocked.values() for t in blocked]
        tasks += worker.waiting
        self.speed -= worker.gpu.speed
        self.speeds.append((self.now, self.speed))
        self.policy.on_worker_lost(worker, tasks)

    def replace(self, address: str, new_address: str, after_seconds: float) -> None:
        """Lose a worker, and have its GPU back under another address later."""
        gpu, slots = self.workers[address].gpu, self.workers[address].slots
        self.kill(address)
        self.at(self.now + after_seconds, self.join, new_address, gpu, slots)

    # -- tasks --

    def send(self, worker: Worker, task: TaskSpec) -> None:
        """Hand a task to a worker."""
        if len(worker.running) + worker.num_blocked < worker.slots:
            self._start(worker, task)
        else:
            worker.waiting.append(task)

    def _start(self, worker: Worker, task: TaskSpec) -> None:
        key = task.model.key
        if key in worker.ready:
            self._advance(worker)
            need = task.frames / (task.model.rate * worker.gpu.speed)
            heapq.heappush(worker.running, (worker.served + need, task.key, task))
            worker.in_use[key] += 1
            worker.ready[key] = worker.ready.pop(key)
            worker.measured.add(key)
            self._touched[worker.address] = worker
            return
        worker.blocked.setdefault(key, []).append(task)
        worker.num_blocked += 1
        if key not in worker.loading and task.model not in worker.to_load:
            worker.to_load.append(task.model)
            self._load_next(worker)

    def _advance(self, worker: Worker) -> None:
        """Account for the time since the last change in what runs."""
        if worker.running:
            worker.served += (self.now - worker.at_seconds) / len(worker.running)
        worker.at_seconds = self.now

    def _reschedule(self) -> None:
        for worker in self._touched.values():
            worker.event += 1
            if worker.running and worker.alive:
                left = max(0.0, worker.running[0][0] - worker.served) * len(worker.running)
                self.at(worker.at_seconds + left, self._done, worker, worker.event)
        self._touched.clear()

    def _done(self, worker: Worker, event: int) -> None:
        if event != worker.event or not worker.alive:
            return
        self._advance(worker)
        finish, _, task = heapq.heappop(worker.running)
        worker.served = max(worker.served, finish)
        worker.in_use[task.model.key] -= 1
        self._touched[worker.address] = worker
        self.num_done += 1
        if worker.waiting:
            self._start(worker, worker.waiting.popleft())
        if worker.to_load:
            self._load_next(worker)
        self.policy.on_task_done(worker, task)

    # -- models --

    def load(self, worker: Worker, model: ModelKind) -> None:
        """Start to load a model that fits."""
        self._begin_load(worker, model)

    def unload(self, worker: Worker, model_key: str) -> None:
        """Unload a model that nothing uses."""
        if worker.in_use[model_key]:
            raise RuntimeError(f"{model_key} on {worker.address} is in use")
        worker.used_bytes -= worker.ready.pop(model_key).num_bytes

    def _load_next(self, worker: Worker) -> None:
        """Begin loads that tasks wait for, as room and loading threads allow."""
        while worker.to_load and len(worker.loading) < LOADS_AT_ONCE:
            model = worker.to_load[0]
            idle = [key for key in worker.ready if not worker.in_use[key]]
            free = worker.gpu.budget_bytes - worker.used_bytes
            if free + sum(worker.ready[key].num_bytes for key in idle) < model.num_bytes:
                return
            for key in idle:
                if worker.gpu.budget_bytes - worker.used_bytes >= model.num_bytes:
                    break
                self.unload(worker, key)
            worker.to_load.popleft()
            self._begin_load(worker, model)

    def _begin_load(self, worker: Worker, model: ModelKind) -> None:
        worker.used_bytes += model.num_bytes
        if worker.used_bytes > worker.gpu.budget_bytes or model.key in worker.ready:
            raise RuntimeError(f"{worker.address} has no room for {model.key}, or has it")
        worker.loading[model.key] = model
        self.num_loads += 1
        ok = self.random.random() >= self.load_failure_rate
        self.at(self.now + model.load_seconds, self._loaded, worker, model, ok)

    def _loaded(self, worker: Worker, model: ModelKind, ok: bool) -> None:
        if not worker.alive:
            return
        del worker.loading[model.key]
        tasks = worker.blocked.pop(model.key, [])
        worker.num_blocked -= len(tasks)
        if ok:
            worker.ready[model.key] = model
        else:
            self.num_failed_loads += 1
            worker.used_bytes -= model.num_bytes
        # After a failure a task that waited tries again.
        for task in tasks:
            self._start(worker, task)
        self._load_next(worker)
        self.policy.on_loaded(worker, model, ok)

    # -- figures --

    def busy_speed(self) -> float:
        """Speed of the GPUs that compute now."""
        return sum(w.gpu.speed for w in self.workers.values() if w.running)

    def lower_bound_seconds(self, work: float) -> float:
        """Time in which all GPUs that were there could do the work without a moment's pause.

        Parameters
        ----------
        work : float
            Seconds of a GPU of speed 1.
        """
        for (start, speed), (end, _) in zip(self.speeds, self.speeds[1:], strict=False):
            if speed * (end - start) >= work:
                return start + work / speed
            work -= speed * (end - start)
        start, speed = self.speeds[-1]
        return start + work / speed
