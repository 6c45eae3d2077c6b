"""Which model belongs on which device: looked at now and then, never for each task."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from daskshare._placement_backlog import Backlog
from daskshare._placement_books import Model, Worker
from daskshare._placement_dispatch import Dispatcher
from daskshare._placement_room import Rooms
from daskshare._placement_tasks import Queue, Task
from daskshare._placement_types import Fail

__all__ = ["Planner"]

#: A look costs about a microsecond a replica; with many workers it comes less often.
SECONDS_PER_WORKER = 0.002


class Planner:
    """Puts models on devices so that the backlogs of all models last about equally long.

    Parameters
    ----------
    books : Dispatcher
        The pool's books.
    rooms : Rooms
        Carries out loads and unloads.
    """

    def __init__(self, books: Dispatcher, rooms: Rooms) -> None:
        self.books = books
        self.rooms = rooms
        self.options = books.options
        self.backlog = Backlog(books, rooms)
        self.urgent = True
        self.unsettled = True
        self.next_seconds = -math.inf
        # Models whose tasks fail without a further attempt.
        self.failing: dict[Model, None] = {}
        self.num_looks = 0

    def plan(self, now_seconds: float) -> None:
        """Decide loads, unloads and failures where it is time to."""
        rooms = self.rooms
        rooms.settle(now_seconds)
        for model in self.failing:
            self._fail_waiting(model, model.queues.values(), "load", model.failed_reason)
        self.failing.clear()
        if not (self.urgent or (self.unsettled and now_seconds >= self.next_seconds)):
            return
        self.urgent = False
        self.num_looks += 1
        self._look(now_seconds)
        interval_seconds = max(
            self.options.placement_interval_seconds, SECONDS_PER_WORKER * len(self.books.workers)
        )
        self.next_seconds = now_seconds + interval_seconds
        rooms.settle(now_seconds)
        self._schedule(now_seconds)

    def wake_seconds(self) -> float | None:
        """When to look again though nothing happens."""
        return self.next_seconds if self.unsettled else None

    def _schedule(self, now_seconds: float) -> None:
        books = self.books
        self.unsettled = any(
            m.num_waiting or m.pinned or m.wanted_replicas or m.successor
            for m in books.models.values()
        ) or any(w.intent for w in books.workers.values())
        if self.unsettled:
            return
        idle = [
            replica.last_used_seconds + self.options.idle_unload_seconds
            for model in books.models.values()
            if len(model.replicas) > 1
            for replica in model.replicas.values()
            if replica.state == "ready"
        ]
        if idle:
            self.unsettled = True
            self.next_seconds = max(self.next_seconds, min(idle))

    # -- one look --

    def _look(self, now_seconds: float) -> None:
        books = self.books
        workers = [w for w in books.workers.values() if w.accepting and w.usable]
        for worker in workers:
            intent = worker.intent
            if intent is not None and not self._is_wanted(intent):
                self.rooms.drop_intent(worker, now_seconds)
        for model in books.models.values():
            if model.pinned or model.wanted_replicas is not None:
                self._keep_wanted(model, workers, now_seconds)
            if model.successor is not None:
                self._supersede(model, model.successor, workers, now_seconds)
        self.backlog.relieve(now_seconds)
        hungry = [m for m in books.models.values() if m.num_waiting]
        for model in hungry:
            # Also what was kept back for a faster worker is looked at again.
            books.wake(model)
            # A paused worker may yet load what the others could not.
            self._give_up(model, [w for w in books.workers.values() if w.usable], now_seconds)
        hungry = [m for m in hungry if m.num_waiting]
        for model in hungry:
            self._first_replicas(model, workers, now_seconds)
        if self.options.mode == "spread":
            self.backlog.spread(workers, now_seconds)
        if hungry:
            self.backlog.grow(hungry, workers, now_seconds)
        self.backlog.shrink(now_seconds)

    def _is_wanted(self, model: Model) -> bool:
        return bool(
            model.num_waiting
            or model.pinned
            or model.wanted_replicas
            or (model.predecessor is not None and not model.predecessor.switched)
        )

    # -- the user's wishes --

    def _keep_wanted(self, model: Model, workers: Sequence[Worker], now_seconds: float) -> None:
        staying = [r for r in model.replicas.values() if r.state in ("loading", "ready")]
        if model.pinned:
            for replica in staying:
                if replica.worker.device.uuid not in model.pinned:
                    self.rooms.drain(replica, "the model is pinned to other devices")
            there = {w.device for w in model.replicas} | {
                w.device for w in workers if w.intent is model
            }
            for device in {w.device.uuid: w.device for w in workers}.values():
                if device.uuid in model.pinned and device not in there:
                    at = [w for w in workers if w.device is device]
                    self._place(model, at, now_seconds, "the model is pinned here", busy=True)
            return
        wanted = model.wanted_replicas
        assert wanted is not None
        coming = sum(w.intent is model for w in workers)
        for _ in range(wanted - len(staying) - coming):
            if not self._place(model, workers, now_seconds, f"{wanted} replicas were asked for"):
                break
        if len(staying) > wanted:
            staying.sort(key=lambda r: (r.state == "ready", r.in_flight, r.rate, -r.worker.index))
            for replica in staying[: len(staying) - wanted]:
                self.rooms.drain(replica, f"only {wanted} replicas were asked for")

    def _supersede(
        self, old: Model, new: Model, workers: Sequence[Worker], now_seconds: float
    ) -> None:
        if not old.switched:
            loading = any(r.state == "loading" for r in new.replicas.values())
            at = [w for w, r in old.replicas.items() if r.state == "ready" and w.accepting]
            for worker in at:
                if self.rooms.may_load(new, worker, now_seconds) and self.rooms.fits(new, worker):
                    self.rooms.load(new, worker, now_seconds, f"new version of {old.name}")
                    loading = True
            ready = sum(r.state == "ready" for r in new.replicas.values())
            coming = loading or any(w.intent is new for w in workers)
            if at and not ready and not coming:
                coming = self._place(
                    new, workers, now_seconds, f"new version of {old.name}", busy=True
                )
            if at and (not ready or (coming and ready < len(at))):
                return
            self._switch(old, new)
        if not old.num_waiting:
            for replica in list(old.replicas.values()):
                self.rooms.drain(replica, f"replaced by {new.name}")
        if not old.num_waiting and not old.replicas and not old.redirect:
            old.successor = None
            new.predecessor = None

    def _switch(self, old: Model, new: Model) -> None:
        old.switched = True
        old.pinned = frozenset()
        old.wanted_replicas = None
        if not old.redirect:
            return
        for queue in list(old.queues.values()):
            tasks = sorted(queue.tasks(), key=lambda t: (t.priority, t.sequence))
            for task in tasks:
                self.books.dequeue(task)
            if tasks:
                self.books.enqueue(tasks, new, queue.signature)

    # -- failures --

    def _give_up(self, model: Model, workers: Sequence[Worker], now_seconds: float) -> None:
        if any(r.state in ("loading", "ready", "draining") for r in model.replicas.values()):
            queues = [q for q in model.queues.values() if q is not model.unrestricted]
        else:
            queues = [q for q in model.queues.values() if q.num_waiting]
            if model.failures_in_row >= self.options.max_load_attempts:
                self._fail_model(model, now_seconds)
                return
        tries = self.options.load_tries_per_device
        for queue in queues:
            able = self._able(queue, workers)
            if not able or any(w in model.replicas for w in able):
                continue
            budget = max(w.device.budget_bytes for w in able)
            if model.estimated_bytes > budget:
                reason = f"it takes {model.estimated_bytes} bytes; the largest budget is {budget}"
                self._fail_waiting(model, [queue], "too_large", reason)
                continue
            failures = [w.device.failures.get(model.key) for w in able]
            if all(
                f is not None and f.count >= tries and f.after_loads == model.num_loaded
                for f in failures
            ):
                if queue is model.unrestricted:
                    self._fail_model(model, now_seconds)
                    return
                self._fail_waiting(model, [queue], "load", model.failed_reason)

    def _able(self, queue: Queue, workers: Sequence[Worker]) -> list[Worker]:
        """Workers that a queue's tasks may run on."""
        addresses, resources, _ = queue.signature
        return [
            w
            for w in workers
            if queue.model.may_live_on(w)
            and (addresses is None or w.address in addresses)
            and w.offers(resources)
        ]

    def _fail_model(self, model: Model, now_seconds: float) -> None:
        model.failed_until_seconds = now_seconds + self.options.retry_failed_seconds
        model.failures_in_row = 0
        for device in self.books.devices.values():
            if model.key in device.failures:
                device.failures[model.key].count = 0
        old = model.predecessor
        if old is not None and not old.switched:
            old.successor = None
            model.predecessor = None
        self._fail_waiting(model, list(model.queues.values()), "load", model.failed_reason)

    def _fail_waiting(self, model: Model, queues: Iterable[Queue], kind: str, reason: str) -> None:
        tasks: list[Task] = [task for queue in queues for task in queue.tasks()]
        for task in sorted(tasks, key=lambda t: (t.priority, t.sequence)):
            self.books.dequeue(task)
            del self.books.tasks[task.key]
            task.dependencies = None
            self.rooms.decisions.append(
                Fail(task.key, "load" if kind == "load" else "too_large", reason, model.key)
            )

    # -- the backlog --

    def _first_replicas(self, model: Model, workers: Sequence[Worker], now_seconds: float) -> None:
        """Make sure that each queue has at least one worker that holds or will hold its model."""
        for queue in model.queues.values():
            if not queue.num_waiting:
                continue
            able = workers if queue is model.unrestricted else self._able(queue, workers)
            if queue is model.unrestricted:
                served = any(
                    r.state in ("loading", "ready") and w.accepting
                    for w, r in model.replicas.items()
                ) or any(w.intent is model for w in workers)
            else:
                served = any(
                    w.intent is model
                    or (w in model.replicas and model.replicas[w].state in ("loading", "ready"))
                    for w in able
                )
            if not served:
                self._place(model, able, now_seconds, "its tasks wait", busy=True)

    def _place(
        self,
        model: Model,
        workers: Sequence[Worker],
        now_seconds: float,
        reason: str,
        *,
        busy: bool = False,
    ) -> bool:
        """Load a model on the best of some workers, evicting if it must; False: nowhere now."""
        able = [w for w in workers if self.rooms.may_load(model, w, now_seconds)]
        fitting = [w for w in able if self.rooms.fits(model, w)]
        if fitting:
            self.rooms.load(
                model, min(fitting, key=lambda w: self._cost(model, w)), now_seconds, reason
            )
            return True
        for drain in (False, True) if busy else (False,):
            for worker in sorted(able, key=lambda w: self._cost(model, w)):
                victims = self.rooms.victims(model, worker, now_seconds, busy=drain)
                if victims is not None:
                    self.rooms.make_room(
                        model, worker, victims, now_seconds, f"makes room for {model.name}"
                    )
                    return True
        return False

    def _cost(self, model: Model, worker: Worker) -> tuple[float, ...]:
        """What orders the places for a replica; the least is the best."""
        device = worker.device
        siblings = sum(model.key in w.replicas for w in device.workers.values())
        if self.options.mode == "pack":
            return (siblings, -device.used_bytes, worker.index)
        rate = self.books.speeds.estimate(device, model)
        work_seconds = model.frames_mean * worker.slots / rate
        busy_seconds = device.outstanding_seconds + work_seconds
        return (siblings, busy_seconds, -device.free_bytes, worker.index)
