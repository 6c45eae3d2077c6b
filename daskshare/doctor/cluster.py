"""The same questions put to a Dask cluster: each worker's machine, and whether all fit together."""

from __future__ import annotations

import asyncio
import platform
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from daskshare.doctor.checks import diagnose
from daskshare.doctor.findings import Check, Machine, Status
from daskshare.doctor.probe import installed_packages, probe_machine

if TYPE_CHECKING:
    from distributed import Client, Scheduler

__all__ = ["Cluster", "diagnose_cluster", "probe_cluster"]

#: Packages whose releases must be the same everywhere, because they talk to each other.
_SAME = ("daskshare", "dask", "distributed", "cloudpickle", "msgpack")

#: A worker with fewer task threads leaves a GPU waiting for decoders.
_FEW_THREADS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """What was found out about a Dask cluster.

    Parameters
    ----------
    python, packages
        Of this process, which the others must agree with.
    scheduler_python : str
        Version of the scheduler's interpreter.
    scheduler_packages : dict of str to str
        What is installed there.
    plugin : bool
        Whether daskshare's plugin is installed on the scheduler.
    workers : dict of str to Machine or str
        By address; text: why the worker could not be asked.
    threads : dict of str to int
        Task threads of each worker.
    """

    python: str
    packages: dict[str, str]
    scheduler_python: str
    scheduler_packages: dict[str, str]
    plugin: bool
    workers: dict[str, Machine | str] = field(default_factory=dict)
    threads: dict[str, int] = field(default_factory=dict)


async def _probe_worker() -> Machine:
    # A worker that imports torch on its event loop misses heartbeats.
    return await asyncio.to_thread(probe_machine)


def _probe_scheduler(dask_scheduler: Scheduler) -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "packages": installed_packages(),
        "plugin": "daskshare" in dask_scheduler.plugins,
    }


def probe_cluster(client: Client) -> Cluster:
    """Ask the scheduler and every worker of a cluster.

    Parameters
    ----------
    client : distributed.Client
        Connected and synchronous.

    Returns
    -------
    Cluster

    Raises
    ------
    Exception
        What the scheduler raised, where it has no daskshare for example.

    Notes
    -----
    Workers answer from a thread of their own, beside their tasks.
    """
    scheduler = client.run_on_scheduler(_probe_scheduler)
    answers = client.run(_probe_worker, on_error="return")
    threads = client.nthreads()
    return Cluster(
        python=platform.python_version(),
        packages=installed_packages(),
        scheduler_python=scheduler["python"],
        scheduler_packages=scheduler["packages"],
        plugin=scheduler["plugin"],
        workers={
            address: f"{type(answer).__name__}: {answer}"
            if isinstance(answer, Exception)
            else answer
            for address, answer in sorted(answers.items())
        },
        threads=dict(threads),
    )


def diagnose_cluster(cluster: Cluster, *, needs: Collection[str] = ()) -> dict[str, list[Check]]:
    """Judge a cluster; pure.

    Parameters
    ----------
    cluster : Cluster
        From :func:`probe_cluster`.
    needs : collection of str
        As for :func:`daskshare.doctor.checks.diagnose`, of each worker.

    Returns
    -------
    dict of str to list of Check
        ``"scheduler"``, then each worker's address.
    """
    report = {"scheduler": _scheduler(cluster)}
    for address, machine in cluster.workers.items():
        if isinstance(machine, str):
            report[address] = [
                Check(
                    "daskshare",
                    Status.ERROR,
                    f"the worker could not be asked: {machine}",
                    "Install the same daskshare on scheduler, workers and client.",
                )
            ]
            continue
        report[address] = [
            *_same_versions(cluster, machine.python, machine.packages),
            *diagnose(machine, needs=needs),
            *_threads(machine, cluster.threads.get(address, 0)),
        ]
    return report


def _scheduler(cluster: Cluster) -> list[Check]:
    checks = _same_versions(cluster, cluster.scheduler_python, cluster.scheduler_packages)
    if not checks:
        found = ", ".join(
            f"{name} {cluster.scheduler_packages[name]}"
            for name in _SAME
            if name in cluster.scheduler_packages
        )
        checks.append(Check("versions", Status.OK, f"as here: {found}"))
    checks.append(
        Check("plugin", Status.OK, "daskshare is installed on the scheduler")
        if cluster.plugin
        else Check(
            "plugin",
            Status.WARNING,
            "daskshare is not installed on this cluster yet",
            "daskshare.install(client), or start the scheduler with --preload "
            "daskshare_scheduler.py; daskshare.detect does it by itself.",
        )
    )
    if not cluster.workers:
        checks.append(
            Check("workers", Status.ERROR, "none", "Start workers, or wait until they have joined.")
        )
    return checks


def _same_versions(cluster: Cluster, python: str, packages: dict[str, str]) -> list[Check]:
    pairs = {name: (packages.get(name), cluster.packages.get(name)) for name in _SAME}
    # Functions of a notebook travel as bytecode, which changes with the minor release.
    pairs["python"] = (python.rpartition(".")[0], cluster.python.rpartition(".")[0])
    return [
        Check(
            name,
            Status.ERROR,
            f"{there or 'none'} there, {here or 'none'} here",
            f"Use the same {name} on scheduler, workers and client.",
        )
        for name, (there, here) in pairs.items()
        if there != here
    ]


def _threads(machine: Machine, threads: int) -> list[Check]:
    if machine.gpus and threads < _FEW_THREADS:
        return [
            Check(
                "threads",
                Status.WARNING,
                f"{threads} for a GPU: tasks decode and wait, so the GPU will idle",
                "Start the worker with --nthreads 16.",
            )
        ]
    return []
