"""Loading and unloading a model on a worker: room, eviction, draining, backoff."""

from __future__ import annotations

from collections.abc import Iterable

from daskshare._placement_books import Failure, Model, Replica, Worker
from daskshare._placement_dispatch import Dispatcher
from daskshare._placement_types import Decision, Load, Unload

__all__ = ["Rooms"]

#: A worker loads this many models at once, as its share does by default.
LOADS_AT_ONCE = 2


class Rooms:
    """Carries replicas through their states and keeps every device within its budget.

    Parameters
    ----------
    books : Dispatcher
        The pool's books.
    """

    def __init__(self, books: Dispatcher) -> None:
        self.books = books
        self.options = books.options
        self.decisions: list[Decision] = []
        # Workers where something left, so that what room was made for may come.
        self.freed: dict[Worker, None] = {}
        self.num_loads = 0
        self.num_unloads = 0

    # -- questions --

    def may_load(self, model: Model, worker: Worker, now_seconds: float) -> bool:
        """Whether a load could start here but for the room."""
        if not worker.accepting or model.key in worker.replicas or not model.may_live_on(worker):
            return False
        if worker.intent is not None and worker.intent is not model:
            return False
        copy = worker.copy_of(model.key)
        if copy is not None and copy.state in ("draining", "unloading"):
            return False
        failure = worker.device.failures.get(model.key)
        if failure is not None and failure.retry_seconds > now_seconds:
            return False
        return worker.num_loading < LOADS_AT_ONCE

    def fits(self, model: Model, worker: Worker) -> bool:
        """Whether there is room beside everything that is there."""
        if worker.copy_of(model.key) is not None:
            return True
        return model.estimated_bytes <= worker.device.free_bytes

    def is_protected(self, replica: Replica) -> bool:
        """Whether the user wants it there."""
        model = replica.model
        if replica.worker.device.uuid in model.pinned:
            return True
        wanted = model.wanted_replicas
        return wanted is not None and len(model.replicas) <= wanted

    def has_stayed(self, replica: Replica, newcomer: Model, now_seconds: float) -> bool:
        """Whether it was there long enough for its own load and the newcomer's to be worth it."""
        stay_seconds = max(
            self.options.min_residency_seconds,
            self.options.load_amortisation * newcomer.expected_load_seconds(),
        )
        return now_seconds >= replica.since_seconds + stay_seconds

    def victims(
        self, model: Model, worker: Worker, now_seconds: float, *, busy: bool
    ) -> list[Replica] | None:
        """What would have to go so that the model fits, least recently used first; None: nothing.

        Parameters
        ----------
        model : Model
            The newcomer.
        worker : Worker
            Where; all workers on its device give room.
        now_seconds : float
            The time.
        busy : bool
            Whether models that have work may be drained too.
        """
        device = worker.device
        leaving = sum(
            r.num_bytes
            for w in device.workers.values()
            for r in w.replicas.values()
            if r.state in ("draining", "unloading")
        )
        needed = model.estimated_bytes - device.free_bytes - leaving
        chosen: list[Replica] = []
        if needed <= 0:
            return chosen
        candidates = [
            replica
            for sibling in device.workers.values()
            for replica in sibling.replicas.values()
            if replica.state == "ready"
            and not self.is_protected(replica)
            and self.has_stayed(replica, model, now_seconds)
            and (busy or not (replica.in_flight or replica.model.num_waiting))
        ]
        # Idle ones first; of the busy ones, those whose model has other replicas.
        candidates.sort(
            key=lambda r: (
                bool(r.in_flight or r.model.num_waiting),
                -min(len(r.model.replicas), 2),
                r.last_used_seconds,
                r.worker.index,
                r.model.key,
            )
        )
        for replica in candidates:
            chosen.append(replica)
            needed -= replica.num_bytes
            if needed <= 0:
                return chosen
        return None

    # -- acts --

    def load(self, model: Model, worker: Worker, now_seconds: float, reason: str) -> Replica:
        """Decide to load a model that fits."""
        num_bytes = 0 if worker.copy_of(model.key) else model.estimated_bytes
        replica = Replica(worker, model, num_bytes, now_seconds)
        replica.rate = self.books.speeds.estimate(worker.device, model)
        worker.replicas[model.key] = replica
        worker.num_loading += 1
        model.replicas[worker] = replica
        worker.device.book(replica.num_bytes)
        if worker.intent is model:
            worker.intent = None
        self.num_loads += 1
        self.decisions.append(Load(worker.address, model.key, reason))
        return replica

    def make_room(
        self,
        model: Model,
        worker: Worker,
        victims: Iterable[Replica],
        now_seconds: float,
        reason: str,
    ) -> None:
        """Load a model as soon as its victims are gone; at once when there are none."""
        worker.intent = model
        for victim in victims:
            self.drain(victim, reason, for_good=False)
        self.freed[worker] = None

    def drain(self, replica: Replica, reason: str, *, for_good: bool = True) -> None:
        """Hand a model in a process no more tasks, and unload it after those that it has."""
        for peer in replica.worker.peers.values():
            if replica.model.key in peer.replicas:
                self._drain(peer.replicas[replica.model.key], reason, for_good)

    def _drain(self, replica: Replica, reason: str, for_good: bool) -> None:
        replica.condemned = for_good or replica.state == "loading"
        if replica.state == "loading":
            replica.reason = reason
        elif replica.state == "ready":
            self.books.make_unavailable(replica)
            replica.state = "draining"
            replica.reason = reason
            if not replica.in_flight:
                self.books.drained.append(replica)

    def settle(self, now_seconds: float) -> None:
        """Unload what has drained, and load what the room was made for."""
        drained, self.books.drained = self.books.drained, []
        for replica in drained:
            if replica.worker.replicas.get(replica.model.key) is not replica:
                continue
            copies = [
                copy
                for peer in replica.worker.peers.values()
                if (copy := peer.replicas.get(replica.model.key)) is not None
            ]
            if any(copy.in_flight or copy.state == "loading" for copy in copies):
                if replica.state == "draining":
                    self.books.drained.append(replica)
                continue
            for copy in copies:
                if copy.state == "draining":
                    copy.state = "unloading"
                    self.num_unloads += 1
                    address = copy.worker.address
                    self.decisions.append(Unload(address, copy.model.key, copy.reason))
        freed, self.freed = self.freed, {}
        for worker in freed:
            self._use_room(worker, now_seconds)

    def _use_room(self, worker: Worker, now_seconds: float) -> None:
        model = worker.intent
        if model is None or self.books.workers.get(worker.address) is not worker:
            return
        if self.may_load(model, worker, now_seconds) and self.fits(model, worker):
            self.load(model, worker, now_seconds, "room was made for it")
            return
        leaving = any(
            r.state in ("draining", "unloading")
            for w in worker.device.workers.values()
            for r in w.replicas.values()
        )
        if not leaving or not self.may_load(model, worker, now_seconds):
            worker.intent = None

    def drop_intent(self, worker: Worker, now_seconds: float) -> None:
        """Keep what was draining for a model that nobody wants any more."""
        worker.intent = None
        for sibling in worker.device.workers.values():
            for replica in sibling.replicas.values():
                if replica.state == "draining" and not replica.condemned:
                    self.make_ready(replica, now_seconds)

    def make_ready(self, replica: Replica, now_seconds: float) -> None:
        """Put a loaded replica into service."""
        replica.worker.num_loading -= replica.state == "loading"
        replica.state = "ready"
        replica.condemned = False
        replica.reason = ""
        replica.since_seconds = now_seconds
        replica.last_used_seconds = now_seconds
        if replica.worker.accepting:
            self.books.make_available(replica)

    def remove(self, replica: Replica) -> None:
        """Strike a replica out of the books."""
        self.books.make_unavailable(replica)
        worker = replica.worker
        worker.num_loading -= replica.state == "loading"
        del worker.replicas[replica.model.key]
        del replica.model.replicas[worker]
        copy = worker.copy_of(replica.model.key)
        if copy is not None and not copy.num_bytes:
            # The process still holds what this worker was counted for.
            copy.num_bytes = replica.num_bytes
        else:
            worker.device.book(-replica.num_bytes)
        for sibling in worker.device.workers.values():
            self.freed[sibling] = None

    def resize(self, replica: Replica, num_bytes: int) -> None:
        """Take over what a loaded model really takes."""
        device = replica.worker.device
        copy = replica.worker.copy_of(replica.model.key)
        if copy is not None and copy.num_bytes:
            num_bytes = 0
        device.book(num_bytes - replica.num_bytes)
        replica.num_bytes = num_bytes
        if device.used_bytes > device.budget_bytes:
            device.exceeded = True

    def record_failure(self, replica: Replica, reason: str, now_seconds: float) -> None:
        """Note that a load failed, and keep the device from trying again soon."""
        model, device = replica.model, replica.worker.device
        failure = device.failures.setdefault(model.key, Failure())
        wait_seconds = min(
            self.options.load_backoff_seconds * 2.0 ** min(failure.count, 32),
            self.options.max_load_backoff_seconds,
        )
        failure.count += 1
        failure.retry_seconds = now_seconds + wait_seconds
        failure.reason = reason
        failure.after_loads = model.num_loaded
        model.failures_in_row += 1
        model.failed_reason = f"{reason} (on {device.uuid})"
