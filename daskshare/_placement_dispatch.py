"""Which waiting task goes to which worker that holds its model; no look at all tasks or devices."""

from __future__ import annotations

import heapq
from functools import partial

from daskshare._placement_books import Model, Replica, Worker
from daskshare._placement_queues import Books
from daskshare._placement_tasks import ANYWHERE, UNRESTRICTED, Task
from daskshare._placement_types import Dispatch

__all__ = ["Dispatcher"]

_SLOT_CAME_FREE = "a slot came free there"

# One is made for each task; a named tuple's own constructor takes more than twice as long.
_make_dispatch = partial(tuple.__new__, Dispatch)


class Dispatcher(Books):
    """The turns that models take on open workers.

    A slot that comes free is filled at once with the model, among those on that worker, whose
    turn is nearest. Models whose tasks found no slot wait aside until one opens, so a full
    cluster costs nothing. Tasks that come while workers are open go to the one that finishes
    first: the best of each speed class's least loaded worker.
    """

    # -- decisions --

    def dispatch(self, now_seconds: float) -> list[Dispatch]:
        """Hand out what can be handed out."""
        out: list[Dispatch] = []
        if self._opened:
            self._fill(now_seconds, out)
        self._place_arrivals(now_seconds, out)
        return out

    def _fill(self, now_seconds: float, out: list[Dispatch]) -> None:
        """Give workers with free slots the next tasks of the models on them, soonest end first."""
        opened, self._opened = self._opened, []
        contest: list[tuple[float, int, Worker]] = []
        for worker in opened:
            worker.opened = False
            task = worker.held_for
            if not worker.accepting:
                continue
            if task is None:
                contest.append((self._soonest_seconds(worker), worker.index, worker))
            elif not worker.in_flight:
                self._book(task, task.model.replicas[worker], now_seconds, out, "it runs alone")
        heapq.heapify(contest)
        while contest:
            seconds, index, worker = contest[0]
            if len(worker.ready) == 1:
                booked = self._book_alike(contest, now_seconds, out)
                if booked and len(contest) > 1:
                    heapq.heapreplace(contest, (self._soonest_seconds(worker), index, worker))
                    continue
            choice = self._choose(worker) if worker.is_open else None
            if choice is None:
                heapq.heappop(contest)
                if worker.is_open:
                    for replica in worker.ready:
                        self._offer(replica)
                continue
            task, replica, finish_seconds = choice
            if finish_seconds > seconds and len(contest) > 1:
                heapq.heapreplace(contest, (finish_seconds, index, worker))
                if contest[0][2] is not worker:
                    continue
            self._book(task, replica, now_seconds, out, _SLOT_CAME_FREE)
            heapq.heapreplace(contest, (self._soonest_seconds(worker), index, worker))

    def _book_alike(
        self, contest: list[tuple[float, int, Worker]], now_seconds: float, out: list[Dispatch]
    ) -> bool:
        """Give the first worker its next tasks until it is another's turn; False: none.

        What choosing each of them comes to where there is little to choose: the worker has one
        model, whose tasks are alike.
        """
        seconds, index, worker = contest[0]
        replica = worker.ready[0]
        model = replica.model
        queue = model.unrestricted
        if queue.num_waiting != model.waiting_unknown or len(model.queues) > 1 or queue.homes:
            return False
        # None offers itself meanwhile.
        offered = [group for group in model.classes.values() if group.heap]
        alone = len(contest) == 1
        one_speed = len(model.classes) < 2
        turn = (seconds, index)
        before = len(out)
        in_flight, limit = worker.in_flight, worker.limit if worker.is_open else 0
        while len(in_flight) < limit and (alone or (self._soonest_seconds(worker), index) <= turn):
            task = queue.head()
            if task is None or task.dependencies:
                break
            if not (one_speed or self._worthwhile(task, replica)) or (
                offered and self._has_rival(replica)
            ):
                break
            self._book(task, replica, now_seconds, out, _SLOT_CAME_FREE)
            if not alone:
                turn = min(contest[1:3])[:2]
        return len(out) > before

    def _has_rival(self, replica: Replica) -> bool:
        """Whether another worker with a free slot may be a better one for a task."""
        for group in replica.model.classes.values():
            if group.heap and self._least_loaded(group) is not None:
                for _, _, other in group.heap:
                    if other is not replica:
                        return True
        return False

    def _soonest_seconds(self, worker: Worker) -> float:
        """Before which nothing that the worker gets next can end; where tasks are alike, when."""
        seconds = worker.load_seconds
        if len(worker.ready) == 1:
            replica = worker.ready[0]
            model = replica.model
            if model.num_waiting == model.waiting_unknown:
                seconds += model.frames_mean / replica.rate
        return seconds

    def _choose(self, worker: Worker) -> tuple[Task, Replica, float] | None:
        """What a worker should get next, and when that would end."""
        hungry = worker.ready
        if len(hungry) > 1:
            hungry = [replica for replica in hungry if replica.model.num_waiting]
            # Time that a model had nothing to do gives it no right to catch up.
            least = worker.turn
            hungry.sort(key=lambda r: (r.turn if r.turn > least else least, r.model.turn))
        for replica in hungry:
            task = self._next_for(replica) if replica.model.num_waiting else None
            if task is not None:
                finish_seconds = worker.load_seconds + replica.model.work_of(task) / replica.rate
                if not self._ends_sooner_elsewhere(task, replica, finish_seconds):
                    return task, replica, finish_seconds
        return None

    def _ends_sooner_elsewhere(self, task: Task, here: Replica, finish_seconds: float) -> bool:
        """Whether another worker with a free slot would finish it first."""
        model = here.model
        if task.queue is not model.unrestricted:
            return False
        for group in model.classes.values():
            if not group.heap:
                continue
            other = self._least_loaded(group)
            if other is not None and other is not here:
                seconds = other.worker.load_seconds + model.work_of(task) / other.rate
                if seconds < finish_seconds:
                    self.wake(model)
                    return True
        if task.dependencies:
            finish_seconds += self._transfer_seconds(task, here.worker)
            near = self._nearest(task)
            if near is not None and near[0] is not here and near[1] < finish_seconds:
                self.wake(model)
                return True
        return False

    def _nearest(self, task: Task) -> tuple[Replica, float] | None:
        """The worker with a free slot, among those that hold its data, that finishes it first."""
        found: tuple[Replica, float] | None = None
        for address in sorted(task.dependencies or ()):
            worker = self.workers.get(address)
            replica = task.model.replicas.get(worker) if worker is not None else None
            if replica is None or replica.speed_class is None or not replica.worker.is_open:
                continue
            if not self._worthwhile(task, replica):
                # It would not take the task, so nobody may leave it to that worker.
                continue
            seconds = replica.worker.load_seconds + task.model.work_of(task) / replica.rate
            seconds += self._transfer_seconds(task, replica.worker)
            if found is None or seconds < found[1]:
                found = replica, seconds
        return found

    def _next_for(self, replica: Replica) -> Task | None:
        model, worker = replica.model, replica.worker
        best: Task | None = None
        if model.unrestricted.num_waiting:
            best = model.unrestricted.head_at(worker.address)
            if best is not None and not self._worthwhile(best, replica):
                best = None
        by_worker = model.queues_by_worker
        if by_worker:
            named, anywhere = by_worker.get(worker.address, ()), by_worker.get(ANYWHERE, ())
            for queue in (*named, *anywhere):
                if not queue.num_waiting or not worker.has(queue.signature.resources):
                    continue
                task = queue.head_at(worker.address)
                assert task is not None
                if best is None or (task.priority, task.sequence) < (best.priority, best.sequence):
                    best = task
        return best

    def _worthwhile(self, task: Task, replica: Replica) -> bool:
        """Whether the task should run here rather than wait for a faster worker's slot.

        While much waits, every worker helps. Near the end a slow worker would be the last to
        finish: then a task is kept back if a faster one, though full, finishes it sooner.
        """
        model = replica.model
        if len(model.classes) < 2:
            return True
        frames = model.work_of(task)
        finish_seconds = replica.worker.load_seconds + frames / replica.rate
        if finish_seconds <= model.queued_frames / model.supply_rate:
            return True
        fastest = model.classes[max(model.classes)]
        if replica.speed_class is fastest:
            return True
        full = next(iter(fastest.replicas)).worker.limit * model.frames_mean
        return finish_seconds <= (full + frames) / fastest.rate

    def _place_arrivals(self, now_seconds: float, out: list[Dispatch]) -> None:
        """Give tasks whose models have open workers to those that finish them first."""
        turns = self._turns
        while turns:
            turn, _, model = turns[0]
            if turn != model.turn:
                heapq.heapreplace(turns, (model.turn, model.key, model))
                continue
            if not self._place_next(model, now_seconds, out):
                model.in_turn = False
                heapq.heappop(turns)

    def _place_next(self, model: Model, now_seconds: float, out: list[Dispatch]) -> bool:
        runnable = model.runnable
        while runnable:
            if len(runnable) == 1:
                queue = next(iter(runnable))
                task = queue.head()
            else:
                heads = [task for q in runnable if (task := q.head()) is not None]
                task = min(heads, key=lambda t: (t.priority, t.sequence), default=None)
                queue = task.queue if task is not None else next(iter(runnable))
            if task is not None:
                replica = self._best(task)
                if replica is not None:
                    reason = "finishes there first"
                    self._book(task, replica, now_seconds, out, reason)
                    return True
            del runnable[queue]
        return False

    def _best(self, task: Task) -> Replica | None:
        model = task.model
        frames = model.work_of(task)
        addresses, resources, alone = task.queue.signature
        if alone:
            return self._best_alone(task)
        if addresses is not None or resources:
            return self._best_of(task, frames, addresses, resources)
        best: Replica | None = None
        best_seconds = 0.0
        for group in model.classes.values():
            replica = self._least_loaded(group)
            if replica is not None:
                seconds = replica.worker.load_seconds + frames / replica.rate
                if best is None or seconds < best_seconds:
                    best, best_seconds = replica, seconds
        if task.dependencies and best is not None:
            best_seconds += self._transfer_seconds(task, best.worker)
            near = self._nearest(task)
            if near is not None and near[1] < best_seconds:
                best = near[0]
        if best is not None and not self._worthwhile(task, best):
            return None
        return best

    def _best_of(
        self,
        task: Task,
        frames: float,
        addresses: frozenset[str] | None,
        resources: tuple[tuple[str, float], ...],
    ) -> Replica | None:
        """The slower way, for tasks that the user restricted: look at each worker allowed."""
        model = task.model
        if addresses is None:
            candidates = list(model.replicas)
        else:
            candidates = [self.workers[a] for a in sorted(addresses) if a in self.workers]
        best: Replica | None = None
        best_seconds = 0.0
        for worker in candidates:
            replica = model.replicas.get(worker)
            if replica is None or replica.speed_class is None or not worker.is_open:
                continue
            if resources and not worker.has(resources):
                continue
            seconds = worker.load_seconds + frames / replica.rate
            seconds += self._transfer_seconds(task, worker)
            if best is None or seconds < best_seconds:
                best, best_seconds = replica, seconds
        return best

    def _best_alone(self, task: Task) -> Replica | None:
        """An empty worker; without one, let the least loaded empty for the task."""
        model = task.model
        addresses, resources, _ = task.queue.signature
        held = [w for w in self.workers.values() if w.held_for is not None]
        if any(w.held_for is task for w in held) or len(held) >= max(1, len(self.workers) // 4):
            return None
        able = [
            replica
            for worker, replica in model.replicas.items()
            if replica.speed_class is not None
            and worker.held_for is None
            and (addresses is None or worker.address in addresses)
            and worker.offers(resources)
        ]
        if not able:
            return None
        best = min(able, key=lambda r: (r.worker.load_seconds, r.worker.index))
        if not best.worker.in_flight:
            return best
        best.worker.held_for = task
        return None

    def _transfer_seconds(self, task: Task, worker: Worker) -> float:
        if not task.dependencies:
            return 0.0
        total = sum(task.dependencies.values()) - task.dependencies.get(worker.address, 0)
        return total / self.options.transfer_bytes_per_second

    def _book(
        self, task: Task, replica: Replica, now_seconds: float, out: list[Dispatch], why: str
    ) -> None:
        model, worker, device = task.model, replica.worker, replica.worker.device
        self.dequeue(task)
        seconds = model.work_of(task) / replica.rate
        task.seconds = seconds
        task.sent_seconds = now_seconds
        task.replica = replica
        worker.in_flight[task.key] = task
        worker.outstanding_seconds += seconds
        device.outstanding_seconds += seconds
        signature = task.queue.signature
        if signature is not UNRESTRICTED:
            worker.reserve(signature.resources, 1)
            if signature.alone:
                worker.held_for = task
        replica.in_flight += 1
        replica.last_used_seconds = now_seconds
        model.in_flight += 1
        if worker.turn < replica.turn:
            worker.turn = replica.turn
        if self._virtual_turn < model.turn:
            self._virtual_turn = model.turn
        turn = seconds / model.weight
        replica.turn = worker.turn + turn
        model.turn += turn
        self.num_dispatched += 1
        decision = _make_dispatch(
            (
                task.key,
                worker.address,
                model.key,
                why,
                worker.load_seconds,
                replica.rate,
                len(worker.in_flight),
            )
        )
        task.decision = decision
        out.append(decision)

    def release(self, task: Task, now_seconds: float) -> None:
        """Take a task that is in flight off its worker."""
        replica = task.replica
        assert replica is not None
        worker, device = replica.worker, replica.worker.device
        del worker.in_flight[task.key]
        worker.outstanding_seconds -= task.seconds
        device.outstanding_seconds -= task.seconds
        if not worker.in_flight:
            # No rounding is carried on.
            worker.outstanding_seconds = 0.0
            if not any(w.in_flight for w in device.workers.values()):
                device.outstanding_seconds = 0.0
        signature = task.queue.signature
        if signature is not UNRESTRICTED:
            worker.reserve(signature.resources, -1)
            if signature.alone:
                self._let_go(task)
        replica.in_flight -= 1
        replica.last_used_seconds = now_seconds
        task.model.in_flight -= 1
        task.replica = None
        task.decision = None
        if replica.state == "draining" and not replica.in_flight:
            self.drained.append(replica)
        if not worker.opened:
            self.open(worker)
