"""Which waiting task goes to which worker that holds its model; no look at all tasks or devices."""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from itertools import count

from daskshare._placement_books import (
    ANYWHERE,
    UNRESTRICTED,
    Device,
    Model,
    Queue,
    Replica,
    Signature,
    SpeedClass,
    Task,
    Worker,
)
from daskshare._placement_speed import Speeds, speed_class
from daskshare._placement_types import Dispatch, PlacementOptions

__all__ = ["Dispatcher"]

#: Dependencies that move faster than this are no reason to prefer a worker.
SMALL_TRANSFER_SECONDS = 0.01


class Dispatcher:
    """The books, and the turns that models take on open workers.

    A slot that comes free is filled at once with the model, among those on that worker, whose
    turn is nearest. Models whose tasks found no slot wait aside until one opens, so a full
    cluster costs nothing. Tasks that come while workers are open go to the one that finishes
    first: the best of each speed class's least loaded worker.
    """

    def __init__(self, options: PlacementOptions) -> None:
        self.options = options
        self.speeds = Speeds()
        self.tasks: dict[Hashable, Task] = {}
        self.models: dict[str, Model] = {}
        self.workers: dict[str, Worker] = {}
        self.devices: dict[str, Device] = {}
        self.drained: list[Replica] = []
        self._opened: list[Worker] = []
        # Queues of tasks that must run alone.
        self._alone: dict[Queue, None] = {}
        # (turn, model key, model): a model is there once while its in_turn is set.
        self._turns: list[tuple[float, str, Model]] = []
        self._virtual_turn = 0.0
        self._sequence = count(1)
        self._urgent_sequence = count(-1, -1)
        self.num_dispatched = 0

    # -- waiting tasks --

    def enqueue(self, task: Task, signature: Signature, *, again: bool = False) -> None:
        """Let a task wait; one that was lost goes before others of its priority."""
        model = task.model
        queue = model.queues.get(signature)
        if queue is None:
            queue = model.queues[signature] = Queue(model, signature)
            if signature.alone:
                self._alone[queue] = None
            elif signature != UNRESTRICTED:
                for address in sorted(signature.addresses or {ANYWHERE}):
                    model.queues_by_worker.setdefault(address, {})[queue] = None
        task.queue = queue
        if not model.num_waiting:
            # Time that it had nothing to do gives no right to catch up.
            model.turn = max(model.turn, self._virtual_turn)
        queue.push(task, next(self._urgent_sequence if again else self._sequence), self._home(task))
        model.num_waiting += 1
        if task.frames is None:
            model.waiting_unknown += 1
        else:
            model.waiting_frames += task.frames
        model.runnable[queue] = None
        if not model.in_turn:
            self._take_turn(model)

    def dequeue(self, task: Task) -> None:
        """Take a waiting task out of its queue."""
        model, queue = task.model, task.queue
        queue.discard(task)
        if queue.signature.alone:
            self._let_go(task)
        model.num_waiting -= 1
        if task.frames is None:
            model.waiting_unknown -= 1
        else:
            model.waiting_frames -= task.frames
        if not model.num_waiting:
            model.waiting_frames = 0.0
        if not queue.num_waiting and queue.signature != UNRESTRICTED:
            self._drop_queue(queue)

    def _drop_queue(self, queue: Queue) -> None:
        model = queue.model
        del model.queues[queue.signature]
        model.runnable.pop(queue, None)
        self._alone.pop(queue, None)
        if queue.signature.alone:
            return
        for address in queue.signature.addresses or (ANYWHERE,):
            queues = model.queues_by_worker[address]
            del queues[queue]
            if not queues:
                del model.queues_by_worker[address]

    def _home(self, task: Task) -> str | None:
        if not task.dependencies:
            return None
        total = sum(task.dependencies.values())
        if total / self.options.transfer_bytes_per_second < SMALL_TRANSFER_SECONDS:
            return None
        return max(sorted(task.dependencies), key=task.dependencies.__getitem__)

    def _take_turn(self, model: Model) -> None:
        model.in_turn = True
        heapq.heappush(self._turns, (model.turn, model.key, model))

    def wake(self, model: Model) -> None:
        """Look again for workers for what waits for a model."""
        for queue in model.queues.values():
            if queue.num_waiting:
                model.runnable[queue] = None
        if model.num_waiting and not model.in_turn:
            self._take_turn(model)

    # -- replicas that take tasks --

    def make_available(self, replica: Replica) -> None:
        """Hand tasks to a ready replica from now on."""
        worker, model = replica.worker, replica.model
        worker.ready.append(replica)
        rate = self.speeds.estimate(worker.device, model)
        self._classify(replica, rate)
        self.open(worker)

    def make_unavailable(self, replica: Replica) -> None:
        """Hand no more tasks to a replica."""
        if replica.speed_class is None:
            return
        replica.worker.ready.remove(replica)
        self._declassify(replica)
        # Tasks may have been kept back for this one.
        self.wake(replica.model)
        held_for = replica.worker.held_for
        if held_for is not None and held_for.replica is None and held_for.model is replica.model:
            self._let_go(held_for)

    def update_rate(self, replica: Replica) -> None:
        """Take over a new estimate of the speed, unless it is about the old one."""
        if replica.speed_class is None:
            return
        rate = self.speeds.estimate(replica.worker.device, replica.model)
        if not 0.9 < rate / replica.rate < 1.1:
            self._declassify(replica)
            self._classify(replica, rate)
            if replica.worker.is_open:
                self._offer(replica)

    def observe(self, task: Task, now_seconds: float) -> None:
        """Learn a device's speed from a task that is done."""
        assert task.replica is not None
        assert task.decision is not None
        worker = task.replica.worker
        device = worker.device
        # Throughput is the number in flight over the time that one of them takes.
        in_flight = sum(len(w.in_flight) for w in device.workers.values())
        number = max(1.0, (in_flight + task.decision.num_in_flight) / 2)
        seconds = (now_seconds - task.sent_seconds) / number
        if self.speeds.observe(device, task.model, task.model.work_of(task), seconds):
            for sibling in device.workers.values():
                replica = sibling.replicas.get(task.model.key)
                if replica is not None:
                    self.update_rate(replica)

    def _classify(self, replica: Replica, rate: float) -> None:
        model = replica.model
        number = speed_class(rate)
        group = model.classes.get(number)
        if group is None:
            group = model.classes[number] = SpeedClass(rate)
        group.replicas[replica] = None
        replica.rate = rate
        replica.speed_class = group
        replica.heap_seconds = None
        model.supply_rate += rate

    def _declassify(self, replica: Replica) -> None:
        group, model = replica.speed_class, replica.model
        assert group is not None
        del group.replicas[replica]
        replica.speed_class = None
        replica.heap_seconds = None
        model.supply_rate -= replica.rate
        if not group.replicas:
            model.classes = {n: c for n, c in model.classes.items() if c is not group}
        if not model.classes:
            model.supply_rate = 0.0

    def open(self, worker: Worker) -> None:
        """Look at a worker at the next decision: it may have a free slot."""
        if not worker.opened:
            worker.opened = True
            self._opened.append(worker)

    def _offer(self, replica: Replica) -> None:
        """Put an open worker's replica where tasks that come will find it."""
        seconds = replica.worker.load_seconds
        if replica.heap_seconds is not None and replica.heap_seconds <= seconds:
            return  # Corrected when it comes to the top.
        group = replica.speed_class
        assert group is not None
        replica.heap_seconds = seconds
        heap = group.heap
        if len(heap) > 2 * len(group.replicas) + 64:
            heap[:] = [entry for entry in heap if entry[2].heap_seconds == entry[0]]
            heapq.heapify(heap)
        heapq.heappush(heap, (seconds, replica.worker.index, replica))

    def _least_loaded(self, group: SpeedClass) -> Replica | None:
        heap = group.heap
        while heap:
            seconds, _, replica = heap[0]
            if replica.heap_seconds != seconds or replica.speed_class is not group:
                heapq.heappop(heap)
                continue
            worker = replica.worker
            if not worker.is_open:
                replica.heap_seconds = None
                heapq.heappop(heap)
                continue
            now = worker.load_seconds
            if now <= seconds:
                return replica
            replica.heap_seconds = now
            heapq.heapreplace(heap, (now, worker.index, replica))
        return None

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
                contest.append((worker.load_seconds, worker.index, worker))
            elif not worker.in_flight:
                self._book(task, task.model.replicas[worker], now_seconds, out, "it runs alone")
        heapq.heapify(contest)
        while contest:
            seconds, index, worker = contest[0]
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
            self._book(task, replica, now_seconds, out, "a slot came free there")

    def _choose(self, worker: Worker) -> tuple[Task, Replica, float] | None:
        """What a worker should get next, and when that would end."""
        hungry = [replica for replica in worker.ready if replica.model.num_waiting]
        if len(hungry) > 1:
            # Time that a model had nothing to do gives it no right to catch up.
            least = worker.turn
            hungry.sort(key=lambda r: (r.turn if r.turn > least else least, r.model.turn))
        for replica in hungry:
            task = self._next_for(replica)
            if task is not None:
                finish_seconds = worker.load_seconds + replica.model.work_of(task) / replica.rate
                if not self._ends_sooner_elsewhere(task, replica, finish_seconds):
                    return task, replica, finish_seconds
        return None

    def _ends_sooner_elsewhere(self, task: Task, here: Replica, finish_seconds: float) -> bool:
        """Whether another worker with a free slot would finish it first."""
        model = here.model
        if task.queue.signature is not UNRESTRICTED:
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
            seconds = replica.worker.load_seconds + task.model.work_of(task) / replica.rate
            seconds += self._transfer_seconds(task, replica.worker)
            if found is None or seconds < found[1]:
                found = replica, seconds
        return found

    def _next_for(self, replica: Replica) -> Task | None:
        model, worker = replica.model, replica.worker
        best: Task | None = None
        queue = model.queues.get(UNRESTRICTED)
        if queue is not None and queue.num_waiting:
            best = queue.head_at(worker.address)
            if best is not None and not self._worthwhile(best, replica):
                best = None
        if len(model.queues) > 1:
            by_worker = model.queues_by_worker
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

    def _let_go(self, task: Task) -> None:
        """Give a worker back that was held for a task."""
        for worker in self.workers.values():
            if worker.held_for is task:
                worker.held_for = None
                self.open(worker)
        for queue in self._alone:
            self.wake(queue.model)

    def _transfer_seconds(self, task: Task, worker: Worker) -> float:
        if not task.dependencies:
            return 0.0
        total = sum(task.dependencies.values()) - task.dependencies.get(worker.address, 0)
        return total / self.options.transfer_bytes_per_second

    def _book(
        self, task: Task, replica: Replica, now_seconds: float, out: list[Dispatch], why: str
    ) -> None:
        model, worker = task.model, replica.worker
        self.dequeue(task)
        frames = model.work_of(task)
        seconds = frames / replica.rate
        task.seconds = seconds
        task.sent_seconds = now_seconds
        task.replica = replica
        worker.in_flight[task.key] = task
        worker.outstanding_seconds += seconds
        worker.device.outstanding_seconds += seconds
        if task.queue.signature.alone:
            worker.held_for = task
        if task.queue.signature.resources:
            worker.reserve(task.queue.signature.resources, 1)
        replica.in_flight += 1
        replica.last_used_seconds = now_seconds
        model.in_flight += 1
        worker.turn = max(worker.turn, replica.turn)
        replica.turn = worker.turn + seconds / model.weight
        self._virtual_turn = max(self._virtual_turn, model.turn)
        model.turn += seconds / model.weight
        self.num_dispatched += 1
        decision = Dispatch(
            task.key,
            worker.address,
            model.key,
            why,
            worker.load_seconds,
            replica.rate,
            len(worker.in_flight),
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
        if task.queue.signature.resources:
            worker.reserve(task.queue.signature.resources, -1)
        if task.queue.signature.alone:
            self._let_go(task)
        replica.in_flight -= 1
        replica.last_used_seconds = now_seconds
        task.model.in_flight -= 1
        task.replica = None
        task.decision = None
        task.seconds = 0.0
        if replica.state == "draining" and not replica.in_flight:
            self.drained.append(replica)
        self.open(worker)
