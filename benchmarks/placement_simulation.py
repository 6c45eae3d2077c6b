"""How far the placement policy is from the best possible, on many GPUs, in simulated time.

    python -m benchmarks.placement_simulation [--gpus 1000 --tasks 1000000] [--plot FILE]

GPUs of three speeds and sizes, models that do not all fit on one GPU, tasks of different lengths
that all wait at the start, in random order or model by model. GPUs are lost with what they were
doing and come back as new workers, some loads fail. The same events meet three policies:

* ``daskshare``: :class:`daskshare.placement.GpuPool`, which learns speeds from reports only.
* ``earliest start``: Dask's own, with its queuing: a task is handed to the worker with a free
  slot that has least to do, by the mean duration of such tasks. It knows of no models.
* ``round robin``: every task goes to the next worker when it comes.

The makespan is compared with the lower bound: all work over all speed that was there. The time
that the pool takes to decide is real.
"""

from __future__ import annotations

import argparse
import gc
import heapq
import math
import random
import statistics
import sys
import time
from abc import ABC, abstractmethod
from collections import deque
from pathlib import Path
from typing import Any

import psutil

from benchmarks.report import Report, argument_parser
from benchmarks.simulated_cluster import Cluster, Gpu, ModelKind, TaskSpec, Worker
from daskshare.placement import Dispatch, Fail, GpuPool, Load, PlacementOptions, Unload

GIB = 2**30
#: Speed relative to the slowest, and bytes for models, a third of the GPUs each.
GPU_KINDS = ((1.0, 12 * GIB), (2.0, 24 * GIB), (4.0, 64 * GIB))
SURPLUS = 1.1


def make_models(number: int, rng: random.Random) -> list[ModelKind]:
    models = []
    for index in range(number):
        num_bytes = int(GIB * math.exp(rng.uniform(math.log(0.5), math.log(8))))
        rate = math.exp(rng.uniform(math.log(200), math.log(1500)))
        models.append(ModelKind(f"model-{index:02}", num_bytes, 2.0 + num_bytes / 2e9, rate))
    return models


def make_tasks(
    number: int, models: list[ModelKind], rng: random.Random, *, by_model: bool
) -> list[TaskSpec]:
    """Tasks of about 1,000 frames; the n-th model has 1/n of the first one's."""
    weights = [1 / (n + 1) for n in range(len(models))]
    chosen = rng.choices(models, weights, k=number)
    if by_model:
        chosen.sort(key=lambda model: model.key)
    return [TaskSpec(i, m, 200 + rng.expovariate(1 / 800)) for i, m in enumerate(chosen)]


class Policy(ABC):
    """What the three have in common: the cluster, and samples of what it does."""

    name = ""

    def __init__(self, options: argparse.Namespace, models: list[ModelKind]) -> None:
        self.options = options
        self.models = models
        self.cluster = Cluster(self, load_failure_rate=0.02, seed=options.seed)
        self.busy: list[tuple[float, float]] = []
        self.replicas: list[tuple[float, list[int]]] = []
        self.backlog: list[tuple[float, list[int]]] = []

    @abstractmethod
    def submit(self, tasks: list[TaskSpec]) -> None: ...

    @abstractmethod
    def on_worker_joined(self, worker: Worker) -> None: ...

    @abstractmethod
    def on_worker_lost(self, worker: Worker, tasks: list[TaskSpec]) -> None: ...

    @abstractmethod
    def on_task_done(self, worker: Worker, task: TaskSpec) -> None: ...

    def on_loaded(self, worker: Worker, model: ModelKind, ok: bool) -> None:  # noqa: B027
        """Not all of them want to know."""

    def sample(self) -> None:
        cluster = self.cluster
        self.busy.append((cluster.now, cluster.busy_speed() / max(cluster.speed, 1e-9)))
        cluster.at(cluster.now + self.options.sample_seconds, self.sample)


class Daskshare(Policy):
    name = "daskshare"

    def __init__(self, options: argparse.Namespace, models: list[ModelKind]) -> None:
        super().__init__(options, models)
        self.pool = GpuPool(PlacementOptions(mode=options.mode))
        self.by_key = {model.key: model for model in models}
        self.tasks: dict[Any, TaskSpec] = {}
        self.noise = random.Random(options.seed + 1)
        self.pool_seconds = 0.0
        self.decision_seconds: list[float] = []
        self.wake: float | None = None
        for model in models:
            self.pool.add_model(
                model.key, name=model.key, estimated_bytes=model.num_bytes, now_seconds=0.0
            )

    def submit(self, tasks: list[TaskSpec]) -> None:
        self.tasks = {task.key: task for task in tasks}
        started = time.perf_counter()
        for task in tasks:
            self.pool.add_task(
                task.key,
                task.model.key,
                priority=(0, task.key),
                frames=task.frames,
                now_seconds=self.cluster.now,
            )
        self.pool_seconds += time.perf_counter() - started
        self.act()

    def act(self, started: float | None = None) -> None:
        """Let the pool decide and carry it out; its time counts from ``started``."""
        cluster = self.cluster
        started = time.perf_counter() if started is None else started
        decisions = self.pool.decide(cluster.now)
        took = time.perf_counter() - started
        self.pool_seconds += took
        num_dispatched = 0
        for decision in decisions:
            match decision:
                case Dispatch(task=key, worker=address):
                    num_dispatched += 1
                    cluster.send(cluster.workers[address], self.tasks[key])
                case Load(worker=address, model_key=model_key):
                    cluster.load(cluster.workers[address], self.by_key[model_key])
                case Unload(worker=address, model_key=model_key):
                    worker = cluster.workers[address]
                    cluster.unload(worker, model_key)
                    cluster.at(cluster.now + 0.2, self.on_unloaded, worker, model_key)
                case Fail():
                    raise RuntimeError(f"{decision}: no model fails everywhere here")
        if num_dispatched:
            self.decision_seconds.append(took / num_dispatched)
        wake = self.pool.next_wake_seconds()
        if wake is not None and (self.wake is None or wake < self.wake or self.wake < cluster.now):
            self.wake = max(wake, cluster.now)
            cluster.at(self.wake, self.on_wake, self.wake)

    def on_wake(self, seconds: float) -> None:
        if seconds == self.wake:
            self.wake = None
            self.act()

    def on_worker_joined(self, worker: Worker) -> None:
        started = time.perf_counter()
        self.pool.add_worker(
            worker.address,
            device_uuid=worker.gpu.uuid,
            budget_bytes=worker.gpu.budget_bytes,
            slots=worker.slots,
            now_seconds=self.cluster.now,
        )
        # The first heartbeats come at different times.
        delay = self.noise.random() * self.options.report_seconds
        self.cluster.at(self.cluster.now + delay, self.report, worker)
        if self.tasks:
            self.act(started)

    def report(self, worker: Worker) -> None:
        if not worker.alive:
            return
        rates = {
            key: self.by_key[key].rate * worker.gpu.speed * self.noise.uniform(0.95, 1.05)
            for key in worker.measured
        }
        worker.measured = {t.model.key for _, _, t in worker.running}
        started = time.perf_counter()
        self.pool.report_worker(
            worker.address,
            resident={key: model.num_bytes for key, model in worker.ready.items()},
            frames_per_second=rates,
            now_seconds=self.cluster.now,
        )
        self.pool_seconds += time.perf_counter() - started
        self.cluster.at(self.cluster.now + self.options.report_seconds, self.report, worker)

    def on_worker_lost(self, worker: Worker, tasks: list[TaskSpec]) -> None:
        started = time.perf_counter()
        lost = self.pool.remove_worker(worker.address, now_seconds=self.cluster.now)
        if {task.key for task in tasks} != set(lost):
            raise RuntimeError(f"{worker.address} had {len(tasks)} tasks, the pool {len(lost)}")
        self.act(started)

    def on_task_done(self, worker: Worker, task: TaskSpec) -> None:
        started = time.perf_counter()
        self.pool.finish_task(task.key, now_seconds=self.cluster.now)
        self.act(started)

    def on_loaded(self, worker: Worker, model: ModelKind, ok: bool) -> None:
        started = time.perf_counter()
        if ok:
            self.pool.load_finished(
                worker.address,
                model.key,
                model_bytes=model.num_bytes,
                now_seconds=self.cluster.now,
            )
        else:
            self.pool.load_failed(
                worker.address, model.key, reason="simulated", now_seconds=self.cluster.now
            )
        self.act(started)

    def on_unloaded(self, worker: Worker, model_key: str) -> None:
        if worker.alive:
            started = time.perf_counter()
            self.pool.unload_finished(worker.address, model_key, now_seconds=self.cluster.now)
            self.act(started)

    def sample(self) -> None:
        super().sample()
        models = self.pool.snapshot()["models"]
        ready = [models[m.key]["replicas"].get("ready", 0) for m in self.models]
        self.replicas.append((self.cluster.now, ready))
        self.backlog.append((self.cluster.now, [models[m.key]["waiting"] for m in self.models]))


class EarliestStart(Policy):
    name = "earliest start"

    def __init__(self, options: argparse.Namespace, models: list[ModelKind]) -> None:
        super().__init__(options, models)
        self.queue: deque[TaskSpec] = deque()
        self.again: list[tuple[int, TaskSpec]] = []
        self.means = {model.key: [0.5, 1] for model in models}
        self.occupancy: dict[str, float] = {}
        self.booked: dict[int, tuple[float, float]] = {}
        self.open: list[tuple[float, str]] = []

    def submit(self, tasks: list[TaskSpec]) -> None:
        self.queue.extend(tasks)
        self.hand_out()

    def room(self, worker: Worker) -> bool:
        return worker.num_tasks < math.ceil(worker.slots * SURPLUS)

    def hand_out(self) -> None:
        cluster = self.cluster
        while self.open and (self.again or self.queue):
            occupancy, address = heapq.heappop(self.open)
            worker = cluster.workers.get(address)
            if worker is None or not self.room(worker):
                continue
            if occupancy != self.occupancy[address]:
                continue
            task = heapq.heappop(self.again)[1] if self.again else self.queue.popleft()
            total, count = self.means[task.model.key]
            self.booked[task.key] = (total / count, cluster.now)
            self.occupancy[address] += total / count
            heapq.heappush(self.open, (self.occupancy[address], address))
            cluster.send(worker, task)

    def on_worker_joined(self, worker: Worker) -> None:
        self.occupancy[worker.address] = 0.0
        heapq.heappush(self.open, (0.0, worker.address))
        self.hand_out()

    def on_worker_lost(self, worker: Worker, tasks: list[TaskSpec]) -> None:
        for task in tasks:
            heapq.heappush(self.again, (task.key, task))
        self.hand_out()

    def on_task_done(self, worker: Worker, task: TaskSpec) -> None:
        seconds, sent = self.booked.pop(task.key)
        mean = self.means[task.model.key]
        mean[0] += self.cluster.now - sent
        mean[1] += 1
        self.occupancy[worker.address] -= seconds
        heapq.heappush(self.open, (self.occupancy[worker.address], worker.address))
        self.hand_out()


class RoundRobin(Policy):
    name = "round robin"

    def __init__(self, options: argparse.Namespace, models: list[ModelKind]) -> None:
        super().__init__(options, models)
        self.next = 0
        self.homeless: list[TaskSpec] = []

    def submit(self, tasks: list[TaskSpec]) -> None:
        workers = list(self.cluster.workers.values())
        if not workers:
            self.homeless += tasks
            return
        for task in tasks:
            self.next += 1
            self.cluster.send(workers[self.next % len(workers)], task)

    def on_worker_joined(self, worker: Worker) -> None:
        homeless, self.homeless = self.homeless, []
        self.submit(homeless)

    def on_worker_lost(self, worker: Worker, tasks: list[TaskSpec]) -> None:
        self.submit(tasks)

    def on_task_done(self, worker: Worker, task: TaskSpec) -> None:
        pass


def simulate(kind: type[Policy], options: argparse.Namespace, *, by_model: bool) -> dict[str, Any]:
    """One policy through all events; a row of figures."""
    rng = random.Random(options.seed)
    models = make_models(options.models, rng)
    tasks = make_tasks(options.tasks, models, rng, by_model=by_model)
    work = sum(task.frames / task.model.rate for task in tasks)
    speed = sum(GPU_KINDS[n % len(GPU_KINDS)][0] for n in range(options.gpus))
    expected_seconds = work / speed
    options.sample_seconds = expected_seconds / 150
    policy = kind(options, models)
    cluster = policy.cluster
    for n in range(options.gpus):
        gpu_speed, budget_bytes = GPU_KINDS[n % len(GPU_KINDS)]
        cluster.join(f"worker-{n}", Gpu(f"GPU-{n}", gpu_speed, budget_bytes), options.slots)
    lost = rng.sample(range(options.gpus), int(options.gpus * options.lost))
    for n in lost:
        when = rng.uniform(0.05, 0.8) * expected_seconds
        cluster.at(when, cluster.replace, f"worker-{n}", f"worker-{n}-again", 60.0)
    process = psutil.Process()
    gc.collect()
    before_bytes = process.memory_info().rss
    started = time.perf_counter()
    cluster.at(0.0, policy.submit, tasks)
    cluster.at(0.0, policy.sample)
    cluster.run(len(tasks))
    bound_seconds = cluster.lower_bound_seconds(work)
    row: dict[str, Any] = {
        "policy": kind.name,
        "order": "by model" if by_model else "random",
        "makespan_seconds": cluster.now,
        "lower_bound_seconds": bound_seconds,
        "over_lower_bound": cluster.now / bound_seconds,
        "loads": cluster.num_loads,
        "failed_loads": cluster.num_failed_loads,
        "gpus_lost": len(lost),
        "simulated_in_seconds": time.perf_counter() - started,
    }
    if isinstance(policy, Daskshare):
        policy.pool.validate()
        if len(policy.pool):
            raise RuntimeError(f"{len(policy.pool)} tasks are left in the pool")
        times = sorted(policy.decision_seconds)
        row |= {
            "median_decision_us": statistics.median(times) * 1e6,
            "p99_decision_us": times[int(0.99 * len(times))] * 1e6,
            "all_events_us_a_task": policy.pool_seconds / len(tasks) * 1e6,
            "memory_bytes": max(0, process.memory_info().rss - before_bytes),
        }
    print(row, file=sys.stderr, flush=True)
    policy.tasks = {}
    return row | {"policy_object": policy}


def plot(policies: list[Policy], bounds: list[float], path: Path) -> None:
    """Draw how busy the GPUs are over time, and how replicas follow the backlog."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (busy, replicas) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    bound = bounds[0]
    for policy in policies:
        x = [seconds / bound for seconds, _ in policy.busy]
        y = [100 * fraction for _, fraction in policy.busy]
        busy.plot(x, y, lw=2.5 if policy.name == "daskshare" else 1.3, label=policy.name)
    busy.axvline(1.0, color="0.5", ls="--", lw=1, label="lower bound")
    busy.set(xlabel="time / lower bound", ylabel="speed in use, %", ylim=(0, 103))
    busy.set_xlim(0, min(4.0, max(p.busy[-1][0] for p in policies) / bound))
    busy.legend(fontsize=8)
    ours = next(p for p in policies if p.name == "daskshare")
    for index in range(0, len(ours.models), max(1, len(ours.models) // 6)):
        x = [seconds / bound for seconds, _ in ours.replicas]
        (line,) = replicas.plot(x, [r[index] for _, r in ours.replicas], lw=1.8)
        waiting = [b[index] for _, b in ours.backlog]
        most = max(1, *waiting)
        scale = max(r[index] for _, r in ours.replicas) / most
        replicas.plot(x, [w * scale for w in waiting], ls=":", lw=1, color=line.get_color())
    replicas.set(xlabel="time / lower bound", ylabel="ready replicas (dotted: its backlog, scaled)")
    for axes in (busy, replicas):
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--gpus", type=int, default=1000)
    parser.add_argument("--models", type=int, default=20)
    parser.add_argument("--tasks", type=int, default=1_000_000)
    parser.add_argument("--slots", type=int, default=16, help="tasks that a worker runs at once")
    parser.add_argument("--lost", type=float, default=0.03, help="fraction of GPUs lost")
    parser.add_argument("--report-seconds", type=float, default=10.0, help="between heartbeats")
    parser.add_argument("--mode", default="auto", choices=["auto", "spread", "pack"])
    parser.add_argument("--order", default="both", choices=["random", "by-model", "both"])
    parser.add_argument("--only", default="", help="comma list of policies")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="PNG or SVG")
    arguments = parser.parse_args()
    settings = {k: v for k, v in vars(arguments).items() if k not in ("json", "strict", "plot")}
    report = Report("placement_simulation", settings=settings)
    only = set(filter(None, arguments.only.split(",")))
    drawn: list[Policy] = []
    bounds: list[float] = []
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    orders = {"random": [False], "by-model": [True], "both": [False, True]}[arguments.order]
    for by_model in orders:
        for kind in (Daskshare, EarliestStart, RoundRobin):
            if only and kind.name not in only:
                continue
            row = simulate(kind, arguments, by_model=by_model)
            policy = row.pop("policy_object")
            if by_model == orders[0]:
                drawn.append(policy)
                bounds.append(row["lower_bound_seconds"])
            report.add_row(**row)
            rows[row["order"], kind.name] = row
    for (order, name), row in rows.items():
        if name == Daskshare.name:
            ratio = row["over_lower_bound"]
            report.add_bar(f"makespan, {order}", ratio, "x bound", bound=1.05, comparison="<=")
            microseconds = row["median_decision_us"]
            report.add_bar(f"decision, {order}", microseconds, "us", bound=20, comparison="<=")
        elif (order, Daskshare.name) in rows:
            faster = row["makespan_seconds"] / rows[order, Daskshare.name]["makespan_seconds"]
            report.add_bar(f"faster than {name}, {order}", faster, "x", bound=1.0)
    if arguments.plot:
        plot(drawn, bounds, arguments.plot)
    return report.finish(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
