"""Which device holds which model and which task runs where: events in, decisions out.

Pure: no clock, no threads, no torch, no Dask. docs/placement.md explains the policy.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any

from daskshare._placement_check import explain, problems, snapshot
from daskshare._placement_tasks import UNRESTRICTED, Signature, Task
from daskshare._placement_types import (
    Decision,
    Dispatch,
    Fail,
    Load,
    PlacementOptions,
    Unload,
)
from daskshare._placement_workers import WorkerEvents
from daskshare.errors import InvalidInputError, PlacementError

__all__ = ["Decision", "Dispatch", "Fail", "GpuPool", "Load", "PlacementOptions", "Unload"]

#: The durations of so many tasks of a replica all say how fast it is, later one in so many.
_OBSERVED_FIRST = 32
_OBSERVED_ONE_IN = 8


class GpuPool(WorkerEvents):
    """All devices of a cluster, the models on them and the tasks that want them.

    Tell it what happens through its methods, then call :meth:`decide` and carry out what it
    returns, in order. A task that needs a model goes to the device that will finish it first,
    counting what is in flight there and how fast the device runs that model. Each worker holds a
    bounded number of tasks; the rest waits here, so that every decision is made with what is
    known when a slot opens. Models take turns on a worker. Which model belongs on which device
    is looked at now and then, and follows the backlog.

    Parameters
    ----------
    options : PlacementOptions, optional
        How models are placed; the defaults when left out.

    Notes
    -----
    Not thread-safe. In a Dask cluster everything here runs on the scheduler's event loop.
    Deterministic: equal calls give equal decisions. ``now_seconds`` is any clock that does not
    go backwards; an earlier time counts as the latest one seen.
    """

    def __contains__(self, key: Hashable) -> bool:
        return key in self._books.tasks

    def __len__(self) -> int:
        return len(self._books.tasks)

    def waiting_tasks(self) -> dict[str, int]:
        """Count, by model key, the tasks that wait to be dispatched; 0 is left out."""
        models = self._books.models
        return {key: model.num_waiting for key, model in models.items() if model.num_waiting}

    # -- tasks --

    def add_task(
        self,
        key: Hashable | Task,
        model_key: str,
        *,
        priority: Any = (0,),
        frames: float | None = None,
        workers: Collection[str] | None = None,
        resources: Mapping[str, float] | None = None,
        dependency_bytes: Mapping[str, int] | None = None,
        alone: bool = False,
        now_seconds: float,
    ) -> None:
        """Take in a task that is ready to run.

        Parameters
        ----------
        key : hashable or Task
            Its key; not among the tasks that wait or are in flight. Or an object that its owner
            keeps, of a class that may say more: the pool writes on it until the task is finished
            or forgotten; afterwards it may come again.
        model_key : str
            The registered model that it needs.
        priority : tuple
            Orders the tasks of a model, the smallest first; Dask's own tuple.
        frames : float, optional
            Its work; the mean of the model's tasks when unknown.
        workers : collection of str, optional
            Addresses that it may run on, connected or not; None or empty: any.
        resources : mapping of str to float, optional
            What it reserves of a worker's resources while in flight.
        dependency_bytes : mapping of str to int, optional
            By worker address: bytes of its input that lie there.
        alone : bool
            Whether nothing else may be in flight on its worker: for a task that is suspected of
            killing workers. A worker is emptied for it when all are busy.
        now_seconds : float
            The time.

        Raises
        ------
        InvalidInputError
            When the key is known, the model is not, or ``frames`` is no number >= 0.
        """
        task = key if isinstance(key, Task) else Task(key)
        task.priority = priority
        task.frames = frames
        task.dependencies = dict(dependency_bytes) if dependency_bytes else None
        signature = UNRESTRICTED
        if workers or resources or alone:
            signature = Signature(
                frozenset(workers) if workers else None,
                tuple(sorted(resources.items())) if resources else (),
                alone,
            )
        self._take_in((task,), model_key, signature, now_seconds)

    def add_tasks(self, tasks: Sequence[Task], model_key: str, *, now_seconds: float) -> None:
        """Take in many tasks at once that are ready to run anywhere, in their order.

        Parameters
        ----------
        tasks : sequence of Task
            Each with its own priority, frames and dependencies, as :meth:`add_task` has them.
        model_key : str
            The registered model that all of them need.
        now_seconds : float
            The time.

        Raises
        ------
        InvalidInputError
            As :meth:`add_task`; then none is taken in.
        """
        self._take_in(tasks, model_key, UNRESTRICTED, now_seconds)

    def _take_in(
        self, tasks: Sequence[Task], model_key: str, signature: Signature, now_seconds: float
    ) -> None:
        model = self._resolve(self._model(model_key))
        known = self._books.tasks
        sized = False
        for number, task in enumerate(tasks):
            frames = task.frames
            if task.key in known or (frames is not None and not 0 <= frames < math.inf):
                for other in tasks[:number]:
                    del known[other.key]
                raise InvalidInputError(
                    f"Got task {task.key!r} of {frames} frames; expected a key that is not in the "
                    "pool and a number of frames >= 0 or None. Forget or lose the task first."
                )
            known[task.key] = task
            sized = sized or frames is not None
        self._at(now_seconds)
        if sized:
            for task in tasks:
                if task.frames is not None:
                    task.frames = frames = max(1.0, float(task.frames))
                    model.frames_count = min(model.frames_count + 1, 1000)
                    model.frames_mean += (frames - model.frames_mean) / model.frames_count
        idle = not model.num_waiting
        self._books.enqueue(tasks, model, signature)
        if now_seconds < model.failed_until_seconds and not model.replicas:
            self._planner.failing[model] = None
        elif not model.replicas and idle:
            self._planner.urgent = True

    def finish_task(self, key: Hashable, *, ok: bool = True, now_seconds: float) -> bool:
        """Say that a task is done, well or badly.

        Parameters
        ----------
        key : hashable
            The task.
        ok : bool
            Whether it succeeded; only then its duration says how fast the device is.
        now_seconds : float
            The time.

        Returns
        -------
        bool
            False when the pool does not know it.
        """
        return self.finish_tasks((key,), ok=ok, now_seconds=now_seconds) > 0

    def finish_tasks(self, keys: Iterable[Hashable], *, ok: bool = True, now_seconds: float) -> int:
        """Say that many tasks are done, in the order in which they ended.

        Parameters
        ----------
        keys : iterable of hashable
            The tasks.
        ok : bool
            Whether they succeeded; only then their durations say how fast the device is.
        now_seconds : float
            The time.

        Returns
        -------
        int
            How many of them the pool knew.
        """
        books = self._books
        pop = books.tasks.pop
        num_known, now = 0, now_seconds
        for key in keys:
            task = pop(key, None)
            if task is None:
                continue
            if not num_known:
                now = self._at(now_seconds)
            num_known += 1
            replica = task.replica
            if replica is None:
                books.dequeue(task)
            else:
                if ok:
                    replica.finished = number = replica.finished + 1
                    if number <= _OBSERVED_FIRST or not number % _OBSERVED_ONE_IN:
                        books.observe(task, now)
                books.release(task, now)
            task.dependencies = None
        return num_known

    def forget_task(self, key: Hashable, *, now_seconds: float) -> bool:
        """Take a task out, wherever it is: cancelled, released.

        Parameters
        ----------
        key : hashable
            The task.
        now_seconds : float
            The time.

        Returns
        -------
        bool
            False when the pool does not know it.
        """
        return self.finish_task(key, ok=False, now_seconds=now_seconds)

    def lose_task(self, key: Hashable, *, now_seconds: float) -> bool:
        """Let a task that was in flight wait again; it goes before others of its priority.

        Parameters
        ----------
        key : hashable
            The task; one that waits already stays as it is.
        now_seconds : float
            The time.

        Returns
        -------
        bool
            False when the pool does not know it.
        """
        task = self._books.tasks.get(key)
        if task is None:
            return False
        now = self._at(now_seconds)
        if task.replica is not None:
            self._books.release(task, now)
            self._requeue(task)
        return True

    # -- decisions --

    def decide(self, now_seconds: float) -> list[Decision]:
        """Return what to do now, in order; the books count it as begun.

        Parameters
        ----------
        now_seconds : float
            The time.
        """
        unsettled = self._planner.unsettled
        now = self._at(now_seconds)
        self._planner.unsettled = unsettled
        out: list[Decision] = list(self._books.dispatch(now))
        self._planner.plan(now)
        if self._rooms.decisions:
            out += self._rooms.decisions
            self._rooms.decisions.clear()
        out += self._books.dispatch(now)
        return out

    def next_wake_seconds(self) -> float | None:
        """Time at which to call :meth:`decide` though nothing happens; None: no need."""
        return self._planner.wake_seconds()

    # -- looking --

    def busy_workers(self) -> set[str]:
        """Addresses of workers with tasks in flight or a model on its way."""
        return {
            address
            for address, worker in self._books.workers.items()
            if worker.in_flight or any(r.state == "loading" for r in worker.replicas.values())
        }

    def why(self, key: Hashable) -> str:
        """Say in one sentence why a task waits, or where it runs and why there.

        Parameters
        ----------
        key : hashable
            The task.
        """
        return explain(self._books, key, self._now_seconds)

    def validate(self) -> None:
        """Check every invariant of the books, in time proportional to all tasks.

        Raises
        ------
        PlacementError
            With a sentence for each contradiction in ``problems``.
        """
        found = problems(self._books)
        if found:
            raise PlacementError(
                f"The allocator's books are wrong in {len(found)} ways: {'; '.join(found[:5])}. "
                "Expected none: this is a bug in daskshare.placement; report it with the events "
                "before.",
                problems=found,
            )

    def snapshot(self) -> dict[str, Any]:
        """Return models, devices, workers and counts as plain values that JSON can hold."""
        counts = {
            "dispatched": self._books.num_dispatched,
            "loads": self._rooms.num_loads,
            "unloads": self._rooms.num_unloads,
            "looks": self._planner.num_looks,
        }
        return snapshot(self._books, counts)
