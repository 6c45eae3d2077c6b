"""Which worker's Arrow Flight endpoint a process on another machine had best use."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from distributed import Status
from distributed.metrics import monotonic, time

from daskshare.worker_plugin import PLUGIN_NAME

if TYPE_CHECKING:
    from distributed import Scheduler
    from distributed.scheduler import WorkerState

    from daskshare.allocator import Allocator

__all__ = ["Endpoints", "rank_endpoints"]

#: How many clients more a device counts that lacks the model: two keep a device busy, and loading
#: takes seconds.
_LOAD_CLIENTS = 2
#: How long a recommendation counts as a client: until the worker's reports have it.
_PROMISE_SECONDS = 3.0
#: How old a heartbeat may be; Dask itself misses a machine that vanished only after minutes.
_LATE_SECONDS = 15.0


class Endpoints:
    """Ranks the endpoints of a cluster's workers for clients.

    Parameters
    ----------
    scheduler : distributed.Scheduler
        Whose workers' reports tell of endpoints, models and queues.
    allocator : Allocator or None
        Which knows the workers that cannot run models.

    Notes
    -----
    Runs on the scheduler's event loop.
    """

    def __init__(self, scheduler: Scheduler, allocator: Allocator | None) -> None:
        self._scheduler = scheduler
        self._allocator = allocator
        self._promised: dict[str, deque[float]] = {}

    def rank(self, model: str | None, hosts: Collection[str], *, now_seconds: float) -> list[str]:
        """Return the locations, best first, and count on the client's taking the first.

        Parameters
        ----------
        model : str or None
            Key or name of the model that the client is going to use.
        hosts : collection of str
            Addresses of the client's machine.
        now_seconds : float
            The time.

        Returns
        -------
        list of str
            The client's own machine comes first; then the devices with the fewest clients and
            tasks, where one without the model counts two more; then those with fewer frames in
            their queues. Workers that cannot run models, take no tasks now or have sent no
            heartbeat for a while come last.
        """
        workers = [ws for ws in self._scheduler.workers.values() if "flight" in _report(ws)]
        load = dict.fromkeys(map(_device, workers), 0)
        for ws in workers:
            promised = self._promises(ws.address, now_seconds)
            flight = _report(ws)["flight"]
            load[_device(ws)] += flight["sessions"] + len(ws.processing) + len(promised)
        ranked = []
        for ws in workers:
            report, device = _report(ws), _device(ws)
            location = report["flight"]["location"]
            # A worker's first heartbeat tells of its endpoint, not yet of its models.
            reported = report.get("models", {})
            models = {k: m for k, m in reported.items() if m["state"] == "ready"}
            names = {m["name"] for m in models.values()}
            lacks = model is not None and model not in models and model not in names
            clients = load[device] + lacks * _LOAD_CLIENTS
            queue = sum((m.get("engine") or {}).get("queue_frames", 0) for m in models.values())
            away = urlsplit(location).hostname not in hosts
            rank = (not self._usable(ws), away, clients, lacks, queue)
            ranked.append((*rank, location, ws.address))
        ranked.sort()
        if ranked:
            self._promised.setdefault(ranked[0][-1], deque()).append(now_seconds)
        return [location for *_, location, _ in ranked]

    def forget(self, worker: str) -> None:
        """Drop what is kept of a worker."""
        self._promised.pop(worker, None)

    def _usable(self, ws: WorkerState) -> bool:
        failed = self._allocator is not None and self._allocator.workers.failure(ws.address)
        late = time() - ws.last_seen > _LATE_SECONDS
        return ws.status == Status.running and not failed and not late

    def _promises(self, worker: str, now_seconds: float) -> Collection[float]:
        promised = self._promised.get(worker, deque())
        while promised and promised[0] <= now_seconds - _PROMISE_SECONDS:
            promised.popleft()
        return promised


def _report(ws: WorkerState) -> dict[str, Any]:
    return ws.metrics.get(PLUGIN_NAME) or {}


def _device(ws: WorkerState) -> str:
    """The same for workers that share a device."""
    uuid: str = (_report(ws).get("device") or {}).get("uuid", "")
    return uuid or ws.address


def rank_endpoints(model: str | None, hosts: list[str], dask_scheduler: Scheduler) -> list[str]:
    """Answer a client; for the scheduler's ``run_function``, which answers in any cluster.

    Parameters
    ----------
    model, hosts
        As for :meth:`Endpoints.rank`.
    dask_scheduler : distributed.Scheduler
        Handed over by Dask.

    Notes
    -----
    Where daskshare came to the workers alone, by their preload script, there is no allocator, and
    what they report is all that counts.
    """
    plugin = dask_scheduler.plugins.get(PLUGIN_NAME)
    endpoints = getattr(plugin, "endpoints", None) or Endpoints(dask_scheduler, None)
    return endpoints.rank(model, hosts, now_seconds=monotonic())
