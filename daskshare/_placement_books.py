"""The books of a pool: devices, workers, models, replicas, and the sums kept over them."""

from __future__ import annotations

import math
from collections.abc import Hashable

from daskshare._placement_tasks import UNRESTRICTED, Queue, Signature, Task

__all__ = ["Device", "Failure", "Model", "Replica", "SpeedClass", "Worker"]

#: Work of a task whose model has none with a known number of frames yet.
DEFAULT_FRAMES = 300.0


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
        "finished",
        "heap_seconds",
        "in_flight",
        "last_used_seconds",
        "missing_reports",
        "model",
        "num_bytes",
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
        # Tasks that succeeded.
        self.finished = 0
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
