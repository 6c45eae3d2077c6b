"""Which device holds which model and which task runs where: events in, decisions out.

Pure: no clock, no threads, no torch, no Dask. docs/placement.md explains the policy.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Iterable, Mapping
from typing import Any

from daskshare._placement_books import (
    UNRESTRICTED,
    Device,
    Model,
    Replica,
    Signature,
    Task,
    Worker,
)
from daskshare._placement_check import explain, problems, snapshot
from daskshare._placement_dispatch import Dispatcher
from daskshare._placement_plan import Planner
from daskshare._placement_room import Rooms
from daskshare._placement_types import (
    Decision,
    Dispatch,
    Fail,
    Load,
    PlacementOptions,
    Unload,
)
from daskshare.errors import InvalidInputError, PlacementError

__all__ = ["Decision", "Dispatch", "Fail", "GpuPool", "Load", "PlacementOptions", "Unload"]

#: Devices without workers whose speeds and failures are remembered for their return.
MAX_PAST_DEVICES = 4096


class GpuPool:
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

    def __init__(self, options: PlacementOptions | None = None) -> None:
        self.options = options or PlacementOptions()
        self._books = Dispatcher(self.options)
        self._rooms = Rooms(self._books)
        self._planner = Planner(self._books, self._rooms)
        self._past_devices: dict[str, Device] = {}
        self._num_workers = 0
        self._now_seconds = -math.inf

    def __contains__(self, key: Hashable) -> bool:
        return key in self._books.tasks

    def __len__(self) -> int:
        return len(self._books.tasks)

    def _at(self, now_seconds: float) -> float:
        self._planner.unsettled = True
        if now_seconds > self._now_seconds:
            self._now_seconds = now_seconds
        return self._now_seconds

    # -- workers --

    def add_worker(
        self,
        address: str,
        *,
        device_uuid: str,
        budget_bytes: int,
        slots: int,
        is_gpu: bool = True,
        accepts_models: bool = True,
        resources: Mapping[str, float] | None = None,
        process: str | None = None,
        now_seconds: float,
    ) -> None:
        """Take in a worker.

        Parameters
        ----------
        address : str
            Its address; not known yet.
        device_uuid : str
            Of its GPU or MIG slice, or a name of its machine's CPU. Workers with one uuid share
            the device and its budget.
        budget_bytes : int
            What models may take on the device; the largest value given for it counts.
        slots : int
            Tasks that run there at once: its threads.
        is_gpu : bool
            False for a worker without a GPU; it gets only models that do not need one.
        accepts_models : bool
            False for a worker that must never hold a model.
        resources : mapping of str to float, optional
            Dask's abstract resources that it offers.
        process : str, optional
            Workers with equal names run in one process and share one copy of each model there.
        now_seconds : float
            The time.

        Raises
        ------
        InvalidInputError
            When the address is known or a number is out of range.
        """
        books = self._books
        if address in books.workers or slots < 1 or budget_bytes < 0:
            raise InvalidInputError(
                f"Got worker {address!r} with slots={slots}, budget_bytes={budget_bytes}; expected "
                "an address that is not known yet, slots >= 1 and a budget >= 0. Remove the "
                "worker first when it comes back."
            )
        self._at(now_seconds)
        device = books.devices.get(device_uuid)
        if device is None:
            device = self._past_devices.pop(device_uuid, None) or Device(device_uuid, is_gpu=is_gpu)
            books.devices[device_uuid] = device
        device.budget_bytes = max(device.budget_bytes, budget_bytes)
        surplus = max(1, math.ceil(slots * self.options.surplus_fraction))
        worker = Worker(
            address,
            device,
            index=self._num_workers,
            slots=slots,
            limit=slots + surplus,
            is_gpu=is_gpu,
        )
        worker.usable = accepts_models
        worker.resources = dict(resources or {})
        self._num_workers += 1
        for sibling in device.workers.values():
            if process is not None and sibling.process == process:
                worker.peers = sibling.peers
        worker.peers[address] = worker
        worker.process = process
        books.workers[address] = device.workers[address] = worker
        self._planner.urgent = True

    def remove_worker(self, address: str, *, now_seconds: float) -> list[Hashable]:
        """Forget a worker; what was in flight there waits again.

        Parameters
        ----------
        address : str
            Its address; one that is unknown is no error.
        now_seconds : float
            The time.

        Returns
        -------
        list of hashable
            Keys of the tasks that were in flight there.
        """
        books = self._books
        now = self._at(now_seconds)
        worker = books.workers.pop(address, None)
        if worker is None:
            return []
        worker.accepting = False
        worker.held_for = None
        tasks = list(worker.in_flight.values())
        for task in tasks:
            books.release(task, now)
        for replica in list(worker.replicas.values()):
            self._rooms.remove(replica)
        for task in tasks:
            self._requeue(task)
        device = worker.device
        del worker.peers[address]
        del device.workers[address]
        if not device.workers:
            del books.devices[device.uuid]
            device.reported_free_bytes = None
            device.budget_bytes = 0
            self._past_devices[device.uuid] = device
            while len(self._past_devices) > MAX_PAST_DEVICES:
                oldest = next(iter(self._past_devices))
                books.speeds.forget(self._past_devices.pop(oldest))
        self._planner.urgent = True
        return [task.key for task in tasks]

    def set_worker_accepting(self, address: str, accepting: bool, *, now_seconds: float) -> None:
        """Start or stop giving tasks and models to a worker (paused, retiring).

        Parameters
        ----------
        address : str
            Its address; one that is unknown is no error.
        accepting : bool
            Whether it takes more; what it has stays there either way.
        now_seconds : float
            The time.
        """
        self._at(now_seconds)
        worker = self._books.workers.get(address)
        if worker is None or worker.accepting == accepting:
            return
        worker.accepting = accepting
        if accepting:
            self._books.open(worker)
        for replica in worker.replicas.values():
            if replica.state != "ready":
                continue
            if accepting:
                self._books.make_available(replica)
            else:
                self._books.make_unavailable(replica)
        self._planner.urgent = True

    def report_worker(
        self,
        address: str,
        *,
        resident: Mapping[str, int],
        frames_per_second: Mapping[str, float] | None = None,
        free_bytes: int | None = None,
        now_seconds: float,
    ) -> None:
        """Take in what a worker's heartbeat says.

        Parameters
        ----------
        address : str
            Its address; one that is unknown is no error.
        resident : mapping of str to int
            Bytes of each model that is ready there, by model key. Models that the pool did not
            load are taken over; one that it counts on but that is missing twice is struck out,
            unless tasks use it.
        frames_per_second : mapping of str to float, optional
            Measured while busy, by model key; 0 is not measured.
        free_bytes : int, optional
            Free memory of the device itself, whoever took the rest.
        now_seconds : float
            The time.
        """
        books, rooms = self._books, self._rooms
        worker = books.workers.get(address)
        if worker is None:
            return
        now = self._at(now_seconds)
        worker.device.reported_free_bytes = free_bytes
        for model_key, num_bytes in resident.items():
            model = books.models.get(model_key)
            if model is None:
                continue
            replica = worker.replicas.get(model_key)
            if replica is None:
                self._adopt(worker, model, num_bytes, now)
            elif replica.state == "loading":
                self.load_finished(address, model_key, model_bytes=num_bytes, now_seconds=now)
            else:
                rooms.resize(replica, num_bytes)
                replica.missing_reports = 0
        for replica in list(worker.replicas.values()):
            if replica.state != "ready" or replica.model.key in resident:
                continue
            replica.missing_reports += 1
            if replica.missing_reports > 1 and not replica.in_flight:
                rooms.remove(replica)
        measured = False
        for model_key, rate in (frames_per_second or {}).items():
            model = books.models.get(model_key)
            if model is not None and rate and 0 < rate < math.inf:
                books.speeds.report(worker.device, model, rate)
                measured = True
        if measured:
            for sibling in worker.device.workers.values():
                for replica in sibling.ready.copy():
                    books.update_rate(replica)

    def _adopt(self, worker: Worker, model: Model, num_bytes: int, now: float) -> None:
        copy = worker.copy_of(model.key)
        if copy is not None and copy.state in ("draining", "unloading"):
            return
        replica = Replica(worker, model, 0, now)
        replica.state = "ready"
        worker.replicas[model.key] = replica
        model.replicas[worker] = replica
        self._rooms.resize(replica, num_bytes)
        self._rooms.make_ready(replica, now)

    # -- models --

    def add_model(
        self,
        model_key: str,
        *,
        name: str,
        estimated_bytes: int,
        needs_gpu: bool = True,
        weight: float = 1.0,
        now_seconds: float,
    ) -> None:
        """Register a model, or say anew what is known about it.

        Parameters
        ----------
        model_key : str
            Its key; equal keys are one model.
        name : str
            For people.
        estimated_bytes : int
            What it takes on a device, before a load says it exactly.
        needs_gpu : bool
            False when workers without a GPU may run it too.
        weight : float
            Its share of a worker's time against other models with work there; above 0.
        now_seconds : float
            The time.

        Raises
        ------
        InvalidInputError
            When a number is out of range.
        """
        if estimated_bytes < 0 or not 0 < weight < math.inf:
            raise InvalidInputError(
                f"Got model {name!r} with estimated_bytes={estimated_bytes}, weight={weight}; "
                "expected bytes >= 0 and a weight > 0."
            )
        self._at(now_seconds)
        model = self._books.models.get(model_key)
        if model is None:
            model = self._books.models[model_key] = Model(model_key)
        if model.load_seconds is None:
            # Once it was loaded its true size is known.
            model.estimated_bytes = estimated_bytes
        model.name = name
        model.needs_gpu = needs_gpu
        model.weight = weight

    def _model(self, model_key: str) -> Model:
        model = self._books.models.get(model_key)
        if model is None:
            raise InvalidInputError(
                f"Got model key {model_key!r}, which is not registered. Call add_model first."
            )
        return model

    def _replica(self, address: str, model_key: str) -> Replica | None:
        worker = self._books.workers.get(address)
        return worker.replicas.get(model_key) if worker is not None else None

    def load_finished(
        self,
        address: str,
        model_key: str,
        *,
        model_bytes: int | None = None,
        now_seconds: float,
    ) -> None:
        """Say that a model is ready on a worker.

        Parameters
        ----------
        address, model_key : str
            Where and what; a worker that has gone is no error.
        model_bytes : int, optional
            What it really takes on the device.
        now_seconds : float
            The time.
        """
        now = self._at(now_seconds)
        replica = self._replica(address, model_key)
        if replica is None:
            worker = self._books.workers.get(address)
            if worker is not None and model_key in self._books.models:
                model = self._books.models[model_key]
                size = model.estimated_bytes if model_bytes is None else model_bytes
                self._adopt(worker, model, size, now)
            return
        model = replica.model
        if model_bytes is not None:
            self._rooms.resize(replica, model_bytes)
            model.estimated_bytes = model_bytes
        if replica.state != "loading":
            return
        took = now - replica.since_seconds
        old = model.load_seconds
        model.load_seconds = took if old is None else old + 0.3 * (took - old)
        model.failures_in_row = 0
        model.num_loaded += 1
        model.failed_until_seconds = -math.inf
        replica.worker.device.failures.pop(model_key, None)
        reason, condemned = replica.reason, replica.condemned
        self._rooms.make_ready(replica, now)
        if condemned:
            self._rooms.drain(replica, reason)
        if model.predecessor is not None:
            self._planner.urgent = True

    def load_failed(self, address: str, model_key: str, *, reason: str, now_seconds: float) -> None:
        """Say that a load failed; the device does not try this model again for a while.

        Parameters
        ----------
        address, model_key : str
            Where and what; a worker that has gone is no error.
        reason : str
            The cause, for people.
        now_seconds : float
            The time.
        """
        now = self._at(now_seconds)
        replica = self._replica(address, model_key)
        if replica is None or replica.state != "loading":
            return
        self._rooms.record_failure(replica, reason, now)
        self._rooms.remove(replica)
        if replica.model.num_waiting and not replica.model.replicas:
            self._planner.urgent = True

    def unload_finished(self, address: str, model_key: str, *, now_seconds: float) -> None:
        """Say that a worker has unloaded a model.

        Parameters
        ----------
        address, model_key : str
            Where and what; a worker that has gone is no error.
        now_seconds : float
            The time.
        """
        self._at(now_seconds)
        replica = self._replica(address, model_key)
        if replica is not None and replica.state == "unloading":
            self._rooms.remove(replica)
            if replica.model.num_waiting and not replica.model.replicas:
                self._planner.urgent = True

    def unload_failed(
        self, address: str, model_key: str, *, reason: str, now_seconds: float
    ) -> None:
        """Say that a worker still holds a model that it should unload; it is in service again.

        Parameters
        ----------
        address, model_key : str
            Where and what; a worker that has gone is no error.
        reason : str
            The cause, for people.
        now_seconds : float
            The time.
        """
        now = self._at(now_seconds)
        replica = self._replica(address, model_key)
        if replica is None or replica.state != "unloading":
            return
        replica.worker.intent = None
        replica.condemned = False
        self._rooms.make_ready(replica, now)
        replica.reason = f"could not be unloaded: {reason}"

    def pin_model(self, model_key: str, device_uuids: Iterable[str], *, now_seconds: float) -> None:
        """Keep a model on some devices and nowhere else; it is loaded there at once.

        Parameters
        ----------
        model_key : str
            A registered model.
        device_uuids : iterable of str
            The devices, present or to come; none lifts the pin.
        now_seconds : float
            The time.

        Raises
        ------
        InvalidInputError
            When the model is not registered.
        """
        model = self._model(model_key)
        self._at(now_seconds)
        model.pinned = frozenset(device_uuids)
        self._planner.urgent = True

    def request_replicas(self, model_key: str, replicas: int | None, *, now_seconds: float) -> None:
        """Keep a model loaded on so many workers, whether it has tasks or not.

        Parameters
        ----------
        model_key : str
            A registered model.
        replicas : int or None
            At least 1; None leaves the number to the mode again.
        now_seconds : float
            The time.

        Raises
        ------
        InvalidInputError
            When the model is not registered or the number is below 1.
        """
        model = self._model(model_key)
        if replicas is not None and replicas < 1:
            raise InvalidInputError(
                f"Got replicas={replicas} of model {model.name!r}; expected at least 1. "
                "Unload the model instead."
            )
        self._at(now_seconds)
        model.wanted_replicas = replicas
        self._planner.urgent = True

    def unload_model(self, model_key: str, *, now_seconds: float) -> None:
        """Unload a model everywhere after the tasks that use it; tasks that wait load it again.

        Parameters
        ----------
        model_key : str
            A registered model; its pin and number of replicas are lifted.
        now_seconds : float
            The time.

        Raises
        ------
        InvalidInputError
            When the model is not registered.
        """
        model = self._model(model_key)
        self._at(now_seconds)
        model.pinned = frozenset()
        model.wanted_replicas = None
        for worker in self._books.workers.values():
            if worker.intent is model:
                worker.intent = None
        for replica in list(model.replicas.values()):
            self._rooms.drain(replica, "asked for by the user")
        self._planner.urgent = True

    def supersede_model(
        self,
        old_key: str,
        new_key: str,
        *,
        redirect_waiting: bool = False,
        now_seconds: float,
    ) -> None:
        """Bring a new version of a model into service beside the old one, then let that leave.

        Parameters
        ----------
        old_key, new_key : str
            Registered models. The old one's pin and number of replicas go over to the new one.
        redirect_waiting : bool
            Whether tasks of the old one that were not dispatched before the switch run with the
            new one.
        now_seconds : float
            The time.

        Raises
        ------
        InvalidInputError
            When a model is not registered or both are the same.
        """
        old, new = self._model(old_key), self._model(new_key)
        if old is new:
            raise InvalidInputError(f"Got {old_key!r} as old and new version; expected two models.")
        self._at(now_seconds)
        if new.successor is not None:
            # Back to the version before.
            new.successor.predecessor = None
            new.successor = None
        new.switched = new.redirect = False
        if old.successor is not None:
            old.successor.predecessor = None
        old.successor, new.predecessor = new, old
        old.switched, old.redirect = False, redirect_waiting
        new.pinned = new.pinned or old.pinned
        if new.wanted_replicas is None:
            new.wanted_replicas = old.wanted_replicas
        self._planner.urgent = True

    # -- tasks --

    def add_task(
        self,
        key: Hashable,
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
        key : hashable
            Its key; not among the tasks that wait or are in flight.
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
        books = self._books
        if key in books.tasks or (frames is not None and not 0 <= frames < math.inf):
            raise InvalidInputError(
                f"Got task {key!r} of {frames} frames; expected a key that is not in the pool "
                "and a number of frames >= 0 or None. Forget or lose the task first."
            )
        model = self._resolve(self._model(model_key))
        self._at(now_seconds)
        if frames is not None:
            frames = max(1.0, float(frames))
            model.frames_count = min(model.frames_count + 1, 1000)
            model.frames_mean += (frames - model.frames_mean) / model.frames_count
        task = Task(key, model, priority, frames)
        if dependency_bytes:
            task.dependencies = dict(dependency_bytes)
        signature = UNRESTRICTED
        if workers or resources or alone:
            signature = Signature(
                frozenset(workers) if workers else None,
                tuple(sorted(resources.items())) if resources else (),
                alone,
            )
        books.tasks[key] = task
        books.enqueue(task, signature)
        if now_seconds < model.failed_until_seconds:
            self._planner.failing[model] = None
        elif not model.replicas and model.num_waiting == 1:
            self._planner.urgent = True

    def _resolve(self, model: Model) -> Model:
        while model.redirect and model.switched and model.successor is not None:
            model = model.successor
        return model

    def _requeue(self, task: Task) -> None:
        task.model = self._resolve(task.model)
        self._books.enqueue(task, task.queue.signature, again=True)

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
        task = self._books.tasks.get(key)
        if ok and task is not None and task.replica is not None:
            self._books.observe(task, self._at(now_seconds))
        return self.forget_task(key, now_seconds=now_seconds)

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
        task = self._books.tasks.pop(key, None)
        if task is None:
            return False
        now = self._at(now_seconds)
        if task.replica is None:
            self._books.dequeue(task)
        else:
            self._books.release(task, now)
        return True

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
