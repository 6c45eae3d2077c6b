"""What the allocator costs the scheduler: tasks that do nothing but carry a model.

The same tasks run on two clusters side by side, one with daskshare installed and one without, in
turns; who begins changes from round to round, and the bars are medians of each round's difference,
because a shared machine is faster at one time than at another. Both have two workers with as many
threads as a GPU's worker has. Beside the wall time of a task, the time that the scheduler's event
loop computes for it is given: where the machine does other things as well, only that one means
something.
"""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack
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


def main() -> int:
    """Measure and report."""
    parser = argument_parser(__doc__)
    parser.add_argument("--tasks", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=16, help="of each worker")
    arguments = parser.parse_args()
    report = Report(
        "allocator_overhead",
        settings={
            "tasks": arguments.tasks,
            "rounds": arguments.rounds,
            "workers": arguments.workers,
            "threads": arguments.threads,
        },
    )
    model = SharedModel(FakeSpec(name="carried"))
    with ExitStack() as stack:
        clients = {}
        for name in ("dask", "daskshare"):
            with dask.config.set({"distributed.worker.profile.enabled": False}):
                cluster = LocalCluster(
                    n_workers=arguments.workers,
                    threads_per_worker=arguments.threads,
                    dashboard_address=":0",
                )
            stack.enter_context(cluster)
            clients[name] = stack.enter_context(Client(cluster, set_as_default=False))
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
