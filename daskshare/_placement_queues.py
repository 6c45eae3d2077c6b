"""What waits for which model, and which replicas take tasks: the books that every event changes."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Hashable
from itertools import count

from daskshare._placement_books import Device, Model, Replica, SpeedClass, Worker
from daskshare._placement_speed import Speeds, speed_class
from daskshare._placement_tasks import ANYWHERE, UNRESTRICTED, Queue, Signature, Task
from daskshare._placement_types import PlacementOptions

__all__ = ["Books"]

#: Dependencies that move faster than this are no reason to prefer a worker.
SMALL_TRANSFER_SECONDS = 0.01


class Books:
    """All devices, workers, models and tasks, with indexes to find the next ones quickly.

    Parameters
    ----------
    options : PlacementOptions
        Of the pool.
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

    def enqueue(
        self, tasks: Collection[Task], model: Model, signature: Signature, *, again: bool = False
    ) -> None:
        """Let tasks wait that ask for the same; lost ones go before others of their priority."""
        queue = model.unrestricted if signature is UNRESTRICTED else model.queues.get(signature)
        if queue is None:
            queue = model.queues[signature] = Queue(model, signature)
            if signature.alone:
                self._alone[queue] = None
            else:
                for address in sorted(signature.addresses or {ANYWHERE}):
                    model.queues_by_worker.setdefault(address, {})[queue] = None
        if not model.num_waiting:
            # Time that it had nothing to do gives no right to catch up.
            model.turn = max(model.turn, self._virtual_turn)
        numbers = self._urgent_sequence if again else self._sequence
        for task in tasks:
            task.model = model
            task.queue = queue
            queue.push(task, next(numbers), self._home(task) if task.dependencies else None)
            if task.frames is None:
                model.waiting_unknown += 1
            else:
                model.waiting_frames += task.frames
        model.num_waiting += len(tasks)
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
        if not queue.num_waiting and queue is not model.unrestricted:
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
        """The worker that holds most of a task's input, if it is large."""
        there = task.dependencies
        assert there
        if sum(there.values()) / self.options.transfer_bytes_per_second < SMALL_TRANSFER_SECONDS:
            return None
        return max(sorted(there), key=there.__getitem__)

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
        self.wake(model)

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
        replica = task.replica
        assert replica is not None
        assert task.decision is not None
        worker = replica.worker
        device = worker.device
        # Throughput is the number in flight over the time that one of them takes.
        in_flight = len(worker.in_flight)
        if len(device.workers) > 1:
            in_flight = sum(len(w.in_flight) for w in device.workers.values())
        number = max(1.0, (in_flight + task.decision.num_in_flight) / 2)
        seconds = (now_seconds - task.sent_seconds) / number
        if self.speeds.observe(device, task.model, task.model.work_of(task), seconds):
            for sibling in device.workers.values():
                there = sibling.replicas.get(task.model.key)
                if there is not None:
                    self.update_rate(there)

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

    def _let_go(self, task: Task) -> None:
        """Give a worker back that was held for a task."""
        for worker in self.workers.values():
            if worker.held_for is task:
                worker.held_for = None
                self.open(worker)
        for queue in self._alone:
            self.wake(queue.model)
