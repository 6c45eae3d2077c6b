"""Events of models: registered, loaded, unloaded, and what the user wants of them."""

from __future__ import annotations

import math
from collections.abc import Iterable

from daskshare._placement_books import Device, Model, Replica, Worker
from daskshare._placement_dispatch import Dispatcher
from daskshare._placement_plan import Planner
from daskshare._placement_room import Rooms
from daskshare._placement_tasks import Task
from daskshare._placement_types import PlacementOptions
from daskshare.errors import InvalidInputError

__all__ = ["ModelEvents"]


class ModelEvents:
    """The part of a pool that hears of models.

    Parameters
    ----------
    options : PlacementOptions, optional
        Of the pool.
    """

    def __init__(self, options: PlacementOptions | None = None) -> None:
        self.options = options or PlacementOptions()
        self._books = Dispatcher(self.options)
        self._rooms = Rooms(self._books)
        self._planner = Planner(self._books, self._rooms)
        self._past_devices: dict[str, Device] = {}
        self._num_workers = 0
        self._now_seconds = -math.inf

    def _at(self, now_seconds: float) -> float:
        self._planner.unsettled = True
        if now_seconds > self._now_seconds:
            self._now_seconds = now_seconds
        return self._now_seconds

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

    def _resolve(self, model: Model) -> Model:
        while model.redirect and model.switched and model.successor is not None:
            model = model.successor
        return model

    def _requeue(self, task: Task) -> None:
        model = self._resolve(task.model)
        self._books.enqueue((task,), model, task.queue.signature, again=True)
