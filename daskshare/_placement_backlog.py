"""How many replicas each model has, by how long its backlog lasts."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

from daskshare._placement_books import Model, Replica, Worker
from daskshare._placement_dispatch import Dispatcher
from daskshare._placement_room import Rooms
from daskshare._placement_tasks import ANYWHERE

__all__ = ["Backlog"]

#: A worker gets a further model when that one's backlog lasts longer than what the worker has by
#: this factor, plus so many times the load itself.
GROW = 1.5
#: The same for draining models that have work: it costs two loads and their tasks' locality.
CONVERT = 4.0
#: Packing waits this many load times before it opens a further replica.
PACK_LOADS = 10.0


class Backlog:
    """Grows and shrinks the models that the pool may place as it likes.

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

    def spread(self, workers: Sequence[Worker], now_seconds: float) -> None:
        models = [
            m
            for m in self.books.models.values()
            if (m.num_waiting or m.in_flight) and self.is_free(m, now_seconds)
        ]
        for worker in workers:
            for model in sorted(models, key=lambda m: len(m.replicas)):
                fits = self.rooms.fits(model, worker)
                if fits and self.rooms.may_load(model, worker, now_seconds):
                    self.rooms.load(model, worker, now_seconds, "spread to wherever it fits")

    def is_free(self, model: Model, now_seconds: float) -> bool:
        """Whether the number of its replicas is for the pool to choose."""
        return (
            model.wanted_replicas is None
            and not model.pinned
            and model.successor is None
            and now_seconds >= model.failed_until_seconds
        )

    def grow(self, hungry: list[Model], workers: Sequence[Worker], now_seconds: float) -> None:
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
            if lasting[m] < math.inf and self.is_free(m, now_seconds)
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
            tried: list[tuple[float, str, Model]] = []
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
        if model.unrestricted.num_waiting:
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

    def relieve(self, now_seconds: float) -> None:
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

    def shrink(self, now_seconds: float) -> None:
        """Unload replicas that were not used for long, all but the last used of a model."""
        for model in self.books.models.values():
            if model.num_waiting or len(model.replicas) < 2 or not self.is_free(model, now_seconds):
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
