"""What the allocator costs the scheduler: tasks that do nothing but carry a model.

The same tasks run on two clusters side by side, one with daskshare installed and one without, in
turns; who begins changes from round to round, and the bars are medians of each round's difference,
because a shared machine is faster at one time than at another. Both have two workers with as many
threads as a GPU's worker has. Beside the wall time of a task, the time that the scheduler's event
loop computes for it is given: where the machine does other things as well, only that one means
something.

Schedulers and workers are processes of ``dask scheduler`` and ``dask worker``, as of a cluster of
machines; with ``--deploy local`` each scheduler is in a process with its client, as a
``LocalCluster`` has it. Python's garbage collector then looks at the client's objects, too, and
three times as often, as Dask's commands make it look less.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import dask
from distributed import Client, LocalCluster, wait

import daskshare
from benchmarks.report import Report, argument_parser
from daskshare.client import SharedModel
from daskshare.testing import FakeSpec

WARM_UP_TASKS = 1_000


def carry(model: SharedModel, number: int) -> None:
    """Do nothing, with a model."""


def event_loop_seconds(dask_scheduler: Any) -> float:
    """Processor time of the scheduler's thread so far."""
    return time.thread_time()


def measure(client: Client, model: SharedModel, num_tasks: int) -> dict[str, float]:
    """Run tasks through a cluster; microseconds a task."""
    before_seconds = client.run_on_scheduler(event_loop_seconds)
    begin_seconds = time.perf_counter()
    with client.as_current():
        futures = client.map(carry, [model] * num_tasks, range(num_tasks), pure=False)
        wait(futures)
    seconds = time.perf_counter() - begin_seconds
    loop_seconds = client.run_on_scheduler(event_loop_seconds) - before_seconds
    del futures
    while client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks)):
        time.sleep(0.05)
    return {
        "wall_microseconds_per_task": seconds / num_tasks * 1e6,
        "event_loop_microseconds_per_task": loop_seconds / num_tasks * 1e6,
    }


@contextmanager
def local_cluster(workers: int, threads: int) -> Iterator[Client]:
    """A scheduler in this process."""
    with (
        dask.config.set({"distributed.worker.profile.enabled": False}),
        LocalCluster(n_workers=workers, threads_per_worker=threads, dashboard_address=":0") as made,
        Client(made, set_as_default=False) as client,
    ):
        yield client


@contextmanager
def running(*arguments: str) -> Iterator[None]:
    """A process of Dask's command line."""
    command = [sys.executable, "-m", "dask", *arguments]
    environment = {
        **os.environ,
        "DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED": "False",
        "DASK_LOGGING__DISTRIBUTED": "warning",
    }
    with subprocess.Popen(command, env=environment) as process:
        try:
            yield
        finally:
            process.terminate()


@contextmanager
def process_cluster(workers: int, threads: int) -> Iterator[Client]:
    """A scheduler and workers in processes of their own."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        common = ("--scheduler-file", str(folder / "scheduler.json"))
        ports = ("--port", "0", "--dashboard-address", ":0")
        stack.enter_context(running("scheduler", *common, *ports))
        for _ in range(workers):
            options = ("--nthreads", str(threads), "--no-dashboard", "--memory-limit", "0")
            stack.enter_context(running("worker", *common, *options))
        client = Client(scheduler_file=common[1], timeout=60, set_as_default=False)
        stack.enter_context(client)
        client.wait_for_workers(workers, timeout=60)
        yield client


def main() -> int:
    """Measure and report."""
    parser = argument_parser(__doc__)
    parser.add_argument("--tasks", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=16, help="of each worker")
    parser.add_argument("--deploy", choices=("processes", "local"), default="processes")
    arguments = parser.parse_args()
    report = Report(
        "allocator_overhead",
        settings={
            "tasks": arguments.tasks,
            "rounds": arguments.rounds,
            "workers": arguments.workers,
            "threads": arguments.threads,
            "deploy": arguments.deploy,
        },
    )
    model = SharedModel(FakeSpec(name="carried"))
    with ExitStack() as stack:
        clients = {}
        for name in ("dask", "daskshare"):
            cluster = process_cluster if arguments.deploy == "processes" else local_cluster
            clients[name] = stack.enter_context(cluster(arguments.workers, arguments.threads))
        daskshare.install(clients["daskshare"])
        daskshare.load(clients["daskshare"], model, replicas=arguments.workers)
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in clients}
        for client in clients.values():
            measure(client, model, WARM_UP_TASKS)
        for number in range(arguments.rounds):
            for name in sorted(clients, reverse=number % 2 == 1):
                rounds[name].append(measure(clients[name], model, arguments.tasks))
    medians = {
        name: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        for name, rows in rounds.items()
    }
    for name, row in medians.items():
        report.add_row(scheduler=name, **row)
    for key, what in (
        ("wall_microseconds_per_task", "wall time"),
        ("event_loop_microseconds_per_task", "scheduler's processor time"),
    ):
        report.add_bar(
            f"more {what} a task than plain Dask",
            statistics.median(
                ours[key] - plain[key]
                for ours, plain in zip(rounds["daskshare"], rounds["dask"], strict=True)
            ),
            "us",
            bound=20.0,
            comparison="<=",
        )
    return report.finish(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
