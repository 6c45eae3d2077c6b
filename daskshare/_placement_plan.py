"""Which model belongs on which device: looked at now and then, never for each task."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence

from daskshare._placement_books import ANYWHERE, UNRESTRICTED, Model, Queue, Replica, Task, Worker
from daskshare._placement_dispatch import Dispatcher
from daskshare._placement_room import Rooms
from daskshare._placement_types import Fail

__all__ = ["Planner"]

#: A worker gets a further model when that one's backlog lasts longer than what the worker has by
#: this factor, plus so many times the load itself.
GROW = 1.5
#: The same for draining models that have work: it costs two loads and their tasks' locality.
CONVERT = 4.0
#: Packing waits this many load times before it opens a further replica.
PACK_LOADS = 10.0
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
        self._relieve(now_seconds)
        hungry = [m for m in books.models.values() if m.num_waiting]
        for model in hungry:
            # Also what was kept back for a faster worker is looked at again.
            books.wake(model)
            self._give_up(model, workers, now_seconds)
        hungry = [m for m in hungry if m.num_waiting]
        for model in hungry:
            self._first_replicas(model, workers, now_seconds)
        if self.options.mode == "spread":
            self._spread(workers, now_seconds)
        if hungry:
            self._grow(hungry, workers, now_seconds)
        self._shrink(now_seconds)

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
            for task in sorted(queue.tasks(), key=lambda t: (t.priority, t.sequence)):
                signature = queue.signature
                self.books.dequeue(task)
                task.model = new
                self.books.enqueue(task, signature)

    # -- failures --

    def _give_up(self, model: Model, workers: Sequence[Worker], now_seconds: float) -> None:
        if any(r.state in ("loading", "ready", "draining") for r in model.replicas.values()):
            queues = [q for s, q in model.queues.items() if s != UNRESTRICTED]
        else:
            queues = list(model.queues.values())
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
                if queue.signature == UNRESTRICTED:
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
            self.rooms.decisions.append(
                Fail(task.key, "load" if kind == "load" else "too_large", reason, model.key)
            )

    # -- the backlog --

    def _first_replicas(self, model: Model, workers: Sequence[Worker], now_seconds: float) -> None:
        """Make sure that each queue has at least one worker that holds or will hold its model."""
        for queue in model.queues.values():
            if not queue.num_waiting:
                continue
            able = workers if queue.signature == UNRESTRICTED else self._able(queue, workers)
            if queue.signature == UNRESTRICTED:
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

    def _spread(self, workers: Sequence[Worker], now_seconds: float) -> None:
        models = [
            m
            for m in self.books.models.values()
            if (m.num_waiting or m.in_flight) and self._is_free(m, now_seconds)
        ]
        for worker in workers:
            for model in sorted(models, key=lambda m: len(m.replicas)):
                fits = self.rooms.fits(model, worker)
                if fits and self.rooms.may_load(model, worker, now_seconds):
                    self.rooms.load(model, worker, now_seconds, "spread to wherever it fits")

    def _is_free(self, model: Model, now_seconds: float) -> bool:
        """Whether the number of its replicas is for the pool to choose."""
        return (
            model.wanted_replicas is None
            and not model.pinned
            and model.successor is None
            and now_seconds >= model.failed_until_seconds
        )

    def _grow(self, hungry: list[Model], workers: Sequence[Worker], now_seconds: float) -> None:
        """Give workers that will run dry first a share of the backlogs that last longest."""
        active: dict[str, int] = {}
        serving: list[tuple[Worker, list[Replica]]] = []
        for worker in workers:
            rates = worker.device.rates
            here = [r for r in worker.ready if r.model.num_waiting]
            for replica in here:
                if replica.model.key not in rates:
                    # What is measured elsewhere says more every time.
                    self.books.update_rate(replica)
            if worker.num_loading:
                here += [
                    r
                    for r in worker.replicas.values()
                    if r.state == "loading" and r.model.num_waiting
                ]
            serving.append((worker, here))
            uuid = worker.device.uuid
            active[uuid] = active.get(uuid, 0) + len(here) + (worker.intent is not None)
        supply = dict.fromkeys(hungry, 0.0)
        coming = dict.fromkeys(hungry, 0)
        for worker, here in serving:
            for replica in here:
                supply[replica.model] += replica.rate / active[worker.device.uuid]
                coming[replica.model] += replica.state == "loading"
            if worker.intent in supply:
                coming[worker.intent] += 1
                rate = self.books.speeds.estimate(worker.device, worker.intent)
                supply[worker.intent] += rate / active[worker.device.uuid]
        lasting = {m: m.queued_frames / s if s else math.inf for m, s in supply.items()}
        order = [
            (-lasting[m], m.key, m)
            for m in hungry
            if lasting[m] < math.inf and self._is_free(m, now_seconds)
        ]
        heapq.heapify(order)
        pack = self.options.mode == "pack"
        needed_loads = PACK_LOADS if pack else GROW
        # A worker whose own backlog lasts longer than this gains from no further model.
        most_seconds = max(
            (-seconds - needed_loads * m.expected_load_seconds() for seconds, _, m in order),
            default=0.0,
        )
        candidates = []
        for worker, here in serving:
            if worker.intent is None and not worker.num_loading:
                here_seconds = max([lasting[r.model] for r in here], default=0.0)
                if GROW * here_seconds < most_seconds:
                    used_bytes = worker.device.used_bytes if pack else 0
                    candidates.append((here_seconds, -used_bytes, worker.index, worker))
        candidates.sort()
        conversions = max(1, len(workers) // 20)
        for here_seconds, _, _, worker in candidates:
            if not order:
                break
            tried = []
            while order and len(tried) < 4:
                seconds, _, model = order[0]
                load_seconds = model.expected_load_seconds()
                gain = -seconds - GROW * here_seconds
                if gain <= needed_loads * load_seconds:
                    break
                tried.append(heapq.heappop(order))
                if (
                    coming[model] >= model.num_waiting
                    or not self._could_use(model, worker)
                    or not self.rooms.may_load(model, worker, now_seconds)
                ):
                    continue
                victims: list[Replica] | None = []
                if not self.rooms.fits(model, worker):
                    victims = self.rooms.victims(model, worker, now_seconds, busy=False)
                    if (
                        victims is None
                        and conversions
                        and -seconds > CONVERT * (here_seconds + load_seconds)
                    ):
                        victims = self._convertible(model, worker, now_seconds)
                        conversions -= victims is not None
                if victims is None:
                    continue
                why = f"its backlog lasts {-seconds:.0f} s, what is here {here_seconds:.0f} s"
                if victims or not self.rooms.fits(model, worker):
                    self.rooms.make_room(model, worker, victims, now_seconds, why)
                else:
                    self.rooms.load(model, worker, now_seconds, why)
                uuid = worker.device.uuid
                active[uuid] += 1
                coming[model] += 1
                rate = self.books.speeds.estimate(worker.device, model)
                supply[model] += rate / active[uuid]
                tried[-1] = (-model.queued_frames / supply[model], model.key, model)
                break
            for entry in tried:
                heapq.heappush(order, entry)
            if not tried:
                # Neither this worker nor any that has longer to do gains from the longest backlog.
                break

    def _could_use(self, model: Model, worker: Worker) -> bool:
        """Whether tasks that wait may run there; those that run alone need no further replica."""
        queue = model.queues.get(UNRESTRICTED)
        if queue is not None and queue.num_waiting:
            return True
        queues = model.queues_by_worker
        here = (*queues.get(worker.address, ()), *queues.get(ANYWHERE, ()))
        return any(q.num_waiting and worker.offers(q.signature.resources) for q in here)

    def _convertible(
        self, model: Model, worker: Worker, now_seconds: float
    ) -> list[Replica] | None:
        victims = self.rooms.victims(model, worker, now_seconds, busy=True)
        if victims is None or any(len(v.model.replicas) < 2 for v in victims):
            return None
        return victims

    def _relieve(self, now_seconds: float) -> None:
        """Unload idle models where models turned out larger than the budget."""
        for device in self.books.devices.values():
            excess = device.used_bytes - device.budget_bytes
            if excess <= 0:
                continue
            replicas = [r for w in device.workers.values() for r in w.replicas.values()]
            excess -= sum(r.num_bytes for r in replicas if r.state in ("draining", "unloading"))
            for replica in sorted(replicas, key=lambda r: (r.last_used_seconds, r.model.key)):
                idle = replica.state == "ready" and not replica.in_flight
                if excess > 0 and idle and not self.rooms.is_protected(replica):
                    self.rooms.drain(replica, "models here take more than the device's budget")
                    excess -= replica.num_bytes

    def _shrink(self, now_seconds: float) -> None:
        """Unload replicas that were not used for long, all but the last used of a model."""
        for model in self.books.models.values():
            if (
                model.num_waiting
                or len(model.replicas) < 2
                or not self._is_free(model, now_seconds)
            ):
                continue
            idle = [
                r
                for r in model.replicas.values()
                if r.state == "ready"
                and not r.in_flight
                and r.last_used_seconds + self.options.idle_unload_seconds <= now_seconds
            ]
            idle.sort(key=lambda r: (r.last_used_seconds, -r.worker.index))
            staying = sum(r.state in ("loading", "ready") for r in model.replicas.values())
            for replica in idle[: staying - 1]:
                self.rooms.drain(replica, "not used for long, and others hold it")
