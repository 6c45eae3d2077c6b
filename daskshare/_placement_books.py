"""The books of a pool: devices, workers, models, replicas, tasks, and the sums kept over them."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple, TypeAlias

from daskshare._placement_types import Dispatch

__all__ = ["Device", "Failure", "Model", "Queue", "Replica", "Signature", "Task", "Worker"]

#: Work of a task whose model has none with a known number of frames yet.
DEFAULT_FRAMES = 300.0


class Signature(NamedTuple):
    """What restricts where a task may run."""

    #: The user's own choice; None: any.
    addresses: frozenset[str] | None = None
    #: Sorted pairs of name and amount.
    resources: tuple[tuple[str, float], ...] = ()
    #: With nothing beside it in flight on its worker.
    alone: bool = False


UNRESTRICTED = Signature()

#: Priority, number, task.
Entry: TypeAlias = "tuple[Any, int, Task]"

#: Instead of an address: for queues that ask for resources but name no worker.
ANYWHERE = ""


class Task:
    """A task that waits (``replica`` is None) or is in flight.

    There may be very many: one object for each, which whoever owns them may extend.

    Parameters
    ----------
    key : hashable
        Its key.
    """

    __slots__ = (
        "decision",
        "dependencies",
        "frames",
        "key",
        "model",
        "priority",
        "queue",
        "replica",
        "seconds",
        "sent_seconds",
        "sequence",
    )

    def __init__(self, key: Hashable) -> None:
        self.key = key
        # What it is, set whenever it comes to the pool.
        self.model: Model
        self.queue: Queue
        self.priority: Any = None
        self.frames: float | None = None
        # Of its one valid entry in a queue; None in flight and when gone.
        self.sequence: int | None = None
        self.dependencies: dict[str, int] | None = None
        self.replica: Replica | None = None
        self.seconds = 0.0
        self.sent_seconds = 0.0
        self.decision: Dispatch | None = None


class Queue:
    """Waiting tasks of one model and one restriction, by priority and then age.

    Tasks that come in order, as most do, stand in a line; the others in a heap. Deleting is lazy:
    an entry counts while its number is the task's ``sequence``. The line's numbers stand in a line
    of their own, so that a waiting task takes no further object that Python's garbage collector
    must look at.
    """

    __slots__ = ("heap", "homes", "last", "line", "model", "num_waiting", "numbers", "signature")

    def __init__(self, model: Model, signature: Signature) -> None:
        self.model = model
        self.signature = signature
        self.line: deque[Task] = deque()
        self.numbers: deque[int] = deque()
        # Priority and number with which the line ends; a task that left may have new ones.
        self.last: tuple[Any, int] | None = None
        self.heap: list[Entry] = []
        self.num_waiting = 0
        # Tasks with large dependencies, once more by the worker that holds most of them.
        self.homes: dict[str, list[Entry]] = {}

    def push(self, task: Task, sequence: int, home: str | None) -> None:
        """Add a task under a number that no other entry of its queue has."""
        task.sequence = sequence
        order = (task.priority, sequence)
        if not self.line or self.last is None or order > self.last:
            self.line.append(task)
            self.numbers.append(sequence)
            self.last = order
        else:
            heapq.heappush(self.heap, (*order, task))
        if home is not None:
            heapq.heappush(self.homes.setdefault(home, []), (*order, task))
        self.num_waiting += 1

    def discard(self, task: Task) -> None:
        """Take a waiting task out."""
        task.sequence = None
        self.num_waiting -= 1
        line, heap = self.line, self.heap
        if not self.num_waiting:
            line.clear()
            self.numbers.clear()
            self.last = None
            heap.clear()
            self.homes.clear()
        elif line and line[0] is task:
            line.popleft()
            self.numbers.popleft()
        elif heap and heap[0][2] is task:
            heapq.heappop(heap)
        elif len(line) + len(heap) > 2 * self.num_waiting + 64:
            kept = [(t, number) for t, number in self._in_line() if t.sequence == number]
            self.line = deque(t for t, _ in kept)
            self.numbers = deque(number for _, number in kept)
            self.heap = [entry for entry in heap if entry[2].sequence == entry[1]]
            heapq.heapify(self.heap)

    def head(self) -> Task | None:
        """The next task."""
        line, numbers, heap = self.line, self.numbers, self.heap
        while line and line[0].sequence != numbers[0]:
            line.popleft()
            numbers.popleft()
        if not heap:
            return line[0] if line else None
        while heap and heap[0][2].sequence != heap[0][1]:
            heapq.heappop(heap)
        if heap and (not line or heap[0][:2] < (line[0].priority, numbers[0])):
            return heap[0][2]
        return line[0] if line else None

    def head_at(self, address: str) -> Task | None:
        """The next task for a worker: one whose data lie there, among equals in urgency."""
        head = self.head()
        heap = self.homes.get(address)
        if heap is None or head is None:
            return head
        while heap and heap[0][2].sequence != heap[0][1]:
            heapq.heappop(heap)
        if not heap:
            del self.homes[address]
            return head
        local = heap[0][2]
        return local if urgency(local.priority) == urgency(head.priority) else head

    def tasks(self) -> Iterator[Task]:
        """All of them, in no order."""
        yield from (task for task, number in self._in_line() if task.sequence == number)
        yield from (task for _, number, task in self.heap if task.sequence == number)

    def _in_line(self) -> Iterator[tuple[Task, int]]:
        return zip(self.line, self.numbers, strict=True)


def urgency(priority: Any) -> Any:
    """What the user asked for: the first part of Dask's priorities; the rest is order."""
    return priority[0] if isinstance(priority, tuple) and priority else priority


class Failure:
    """A model that did not load on a device."""

    __slots__ = ("after_loads", "count", "reason", "retry_seconds")

    def __init__(self) -> None:
        self.count = 0
        # How often the model had loaded anywhere before: a later success makes it history.
        self.after_loads = 0
        self.retry_seconds = -math.inf
        self.reason = ""


class Device:
    """A GPU or MIG slice (or a machine's CPU), with all workers on it."""

    __slots__ = (
        "budget_bytes",
        "exceeded",
        "failures",
        "is_gpu",
        "outstanding_seconds",
        "rates",
        "reported",
        "reported_free_bytes",
        "used_bytes",
        "uuid",
        "workers",
    )

    def __init__(self, uuid: str, *, is_gpu: bool) -> None:
        self.uuid = uuid
        self.is_gpu = is_gpu
        self.budget_bytes = 0
        self.used_bytes = 0
        # True since a model turned out larger than estimated; no decision made it so.
        self.exceeded = False
        self.reported_free_bytes: int | None = None
        self.workers: dict[str, Worker] = {}
        self.rates: dict[str, float] = {}
        # Models whose rate the device's workers measured themselves.
        self.reported: set[str] = set()
        self.failures: dict[str, Failure] = {}
        # What is in flight, in seconds of the whole device.
        self.outstanding_seconds = 0.0

    def book(self, num_bytes: int) -> None:
        self.used_bytes += num_bytes
        if self.used_bytes <= self.budget_bytes:
            self.exceeded = False

    @property
    def free_bytes(self) -> int:
        free = self.budget_bytes - self.used_bytes
        if self.reported_free_bytes is not None:
            loading = sum(
                replica.num_bytes
                for worker in self.workers.values()
                for replica in worker.replicas.values()
                if replica.state == "loading"
            )
            free = min(free, self.reported_free_bytes - loading)
        return max(0, free)


class Worker:
    """A Dask worker."""

    __slots__ = (
        "accepting",
        "address",
        "device",
        "held_for",
        "in_flight",
        "index",
        "intent",
        "is_gpu",
        "limit",
        "num_loading",
        "opened",
        "outstanding_seconds",
        "peers",
        "process",
        "ready",
        "replicas",
        "resources",
        "resources_used",
        "slots",
        "turn",
        "usable",
    )

    def __init__(
        self, address: str, device: Device, *, index: int, slots: int, limit: int, is_gpu: bool
    ) -> None:
        self.address = address
        self.device = device
        self.index = index
        self.slots = slots
        self.limit = limit
        self.is_gpu = is_gpu
        self.usable = True
        self.accepting = True
        self.resources: dict[str, float] = {}
        self.resources_used: dict[str, float] = {}
        self.in_flight: dict[Hashable, Task] = {}
        self.outstanding_seconds = 0.0
        self.replicas: dict[str, Replica] = {}
        self.ready: list[Replica] = []
        # The model that room is being made for.
        self.intent: Model | None = None
        self.num_loading = 0
        self.opened = False
        self.turn = 0.0
        # A task that must run alone, for which the worker empties, or that runs there.
        self.held_for: Task | None = None
        # All workers of its process, itself included: they share one copy of each model.
        self.process: str | None = None
        self.peers: dict[str, Worker] = {}

    @property
    def load_seconds(self) -> float:
        """What is in flight; the own share makes siblings on one device take turns."""
        return 0.95 * self.device.outstanding_seconds + 0.05 * self.outstanding_seconds

    @property
    def is_open(self) -> bool:
        return self.accepting and self.held_for is None and len(self.in_flight) < self.limit

    def copy_of(self, model_key: str) -> Replica | None:
        """A replica that another worker of its process holds; first the one that is counted."""
        copies = [
            peer.replicas[model_key]
            for peer in self.peers.values()
            if peer is not self and model_key in peer.replicas
        ]
        return max(copies, key=lambda copy: copy.num_bytes, default=None)

    def has(self, resources: tuple[tuple[str, float], ...]) -> bool:
        """Whether what the task reserves is free now."""
        return all(
            self.resources.get(name, 0.0) - self.resources_used.get(name, 0.0) >= amount - 1e-9
            for name, amount in resources
        )

    def offers(self, resources: tuple[tuple[str, float], ...]) -> bool:
        """Whether what the task reserves exists here at all."""
        return all(self.resources.get(name, 0.0) >= amount for name, amount in resources)

    def reserve(self, resources: tuple[tuple[str, float], ...], sign: int) -> None:
        for name, amount in resources:
            self.resources_used[name] = self.resources_used.get(name, 0.0) + sign * amount


class Replica:
    """A model on a worker: ``loading``, ``ready``, ``draining`` (no new tasks) or ``unloading``."""

    __slots__ = (
        "condemned",
        "heap_seconds",
        "in_flight",
        "last_used_seconds",
        "missing_reports",
        "model",
        "num_bytes",
        "observed",
        "rate",
        "reason",
        "since_seconds",
        "speed_class",
        "state",
        "turn",
        "worker",
    )

    def __init__(self, worker: Worker, model: Model, num_bytes: int, now_seconds: float) -> None:
        self.worker = worker
        self.model = model
        self.num_bytes = num_bytes
        self.state = "loading"
        # To be unloaded whatever comes, as soon as it is loaded and not in use.
        self.condemned = False
        self.since_seconds = now_seconds
        self.last_used_seconds = now_seconds
        self.in_flight = 0
        self.missing_reports = 0
        # Tasks whose duration was looked at, or passed over.
        self.observed = 0
        self.rate = 0.0
        self.speed_class: SpeedClass | None = None
        # Key of its one valid entry in the speed class's heap.
        self.heap_seconds: float | None = None
        # What it was given on this worker, in seconds; the one that had least goes next.
        self.turn = 0.0
        self.reason = ""

    def __lt__(self, other: Replica) -> bool:
        # Heaps compare replicas only where an outdated entry equals the newer one of the same.
        return False


class SpeedClass:
    """Ready replicas of one model that are about equally fast; the least loaded open one on top."""

    __slots__ = ("heap", "rate", "replicas")

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.replicas: dict[Replica, None] = {}
        self.heap: list[tuple[float, int, Replica]] = []


class Model:
    """A model, its waiting tasks and its replicas."""

    __slots__ = (
        "classes",
        "estimated_bytes",
        "failed_reason",
        "failed_until_seconds",
        "failures_in_row",
        "frames_count",
        "frames_mean",
        "in_flight",
        "in_turn",
        "key",
        "load_seconds",
        "name",
        "needs_gpu",
        "num_loaded",
        "num_waiting",
        "pinned",
        "predecessor",
        "queues",
        "queues_by_worker",
        "redirect",
        "replicas",
        "runnable",
        "successor",
        "supply_rate",
        "switched",
        "turn",
        "unrestricted",
        "waiting_frames",
        "waiting_unknown",
        "wanted_replicas",
        "weight",
    )

    def __init__(self, key: str) -> None:
        self.key = key
        self.name = key
        self.estimated_bytes = 0
        self.needs_gpu = True
        self.weight = 1.0
        # Most tasks ask for nothing; their queue stays.
        self.unrestricted = Queue(self, UNRESTRICTED)
        self.queues: dict[Signature, Queue] = {UNRESTRICTED: self.unrestricted}
        self.queues_by_worker: dict[str, dict[Queue, None]] = {}
        # Queues that may find an open worker.
        self.runnable: dict[Queue, None] = {}
        self.num_waiting = 0
        self.waiting_frames = 0.0
        self.waiting_unknown = 0
        self.in_flight = 0
        self.turn = 0.0
        self.in_turn = False
        self.frames_mean = DEFAULT_FRAMES
        self.frames_count = 0
        self.replicas: dict[Worker, Replica] = {}
        self.classes: dict[int, SpeedClass] = {}
        # Frames/s of all ready replicas together.
        self.supply_rate = 0.0
        self.load_seconds: float | None = None
        self.failures_in_row = 0
        self.num_loaded = 0
        self.failed_until_seconds = -math.inf
        self.failed_reason = ""
        self.pinned: frozenset[str] = frozenset()
        self.wanted_replicas: int | None = None
        self.successor: Model | None = None
        self.predecessor: Model | None = None
        self.redirect = False
        self.switched = False

    @property
    def queued_frames(self) -> float:
        return self.waiting_frames + self.waiting_unknown * self.frames_mean

    def work_of(self, task: Task) -> float:
        """Frames of a task, the mean when they are unknown."""
        return self.frames_mean if task.frames is None else task.frames

    def fits_kind(self, worker: Worker) -> bool:
        """Whether the worker is of a kind that may run it."""
        return worker.usable and (worker.is_gpu or not self.needs_gpu)

    def may_live_on(self, worker: Worker) -> bool:
        return self.fits_kind(worker) and (not self.pinned or worker.device.uuid in self.pinned)

    def expected_load_seconds(self) -> float:
        if self.load_seconds is not None:
            return self.load_seconds
        return 2.0 + self.estimated_bytes / 1e9
