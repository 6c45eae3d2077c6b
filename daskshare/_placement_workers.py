"""Events of workers: come, gone, paused, and what their heartbeats say."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping

from daskshare._placement_books import Device, Worker
from daskshare._placement_models import ModelEvents
from daskshare.errors import InvalidInputError

__all__ = ["WorkerEvents"]

#: Devices without workers whose speeds and failures are remembered for their return.
MAX_PAST_DEVICES = 4096


class WorkerEvents(ModelEvents):
    """The part of a pool that hears of workers."""

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
        # First, because what is taken over is judged by it.
        measured = False
        for model_key, rate in (frames_per_second or {}).items():
            model = books.models.get(model_key)
            if model is not None and rate and 0 < rate < math.inf:
                books.speeds.report(worker.device, model, rate)
                measured = True
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
        if measured:
            for sibling in worker.device.workers.values():
                for replica in sibling.ready.copy():
                    books.update_rate(replica)
