"""One ModelShare in each worker process: its life, its lookup by tasks, its reports."""

from __future__ import annotations

import asyncio
import atexit
import gc
import json
import logging
import sys
import threading
import time
import uuid
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from distributed import Status, Worker, WorkerPlugin, get_worker
from distributed.comm.addressing import get_address_host
from distributed.protocol.pickle import dumps, loads

from daskshare._malloc import retain_freed
from daskshare._worker_pauses import keep_imports, profile_less
from daskshare._worker_report import RecentRates, batch_bins, for_heartbeat
from daskshare.config import EngineOptions, FlightOptions, HostOptions, ShareOptions, WorkerOptions
from daskshare.dashboard.metrics import WORKER_METRICS
from daskshare.errors import (
    DaskshareError,
    EngineClosedError,
    ModelLoadError,
    NotOnWorkerError,
)
from daskshare.option_names import check_option_names
from daskshare.streaming import stream_counts

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from daskshare.device import Device
    from daskshare.flight import FlightEndpoint
    from daskshare.host import WorkerHost
    from daskshare.share import ModelShare

__all__ = [
    "PLUGIN_NAME",
    "DaskshareWorkerPlugin",
    "current_task",
    "local_share",
    "worker_report",
    "worker_report_async",
]

#: Name of both plugins and of the metric and the event topic that they use.
PLUGIN_NAME = "daskshare"

logger = logging.getLogger("daskshare.worker")


class _ProcessShare:
    """The one ModelShare of this process, alive while at least one plugin owns it.

    Notes
    -----
    Thread-safe. Building and closing run in threads of their own, because both may take seconds
    (importing torch, starting CUDA, waiting for batches) that an event loop must not lose.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owners: set[object] = set()
        self._build: Future[ModelShare] | None = None
        self._rates = RecentRates()
        #: By this, workers of one process are known to share one copy.
        self.id = ""

    def acquire(
        self, owner: object, *, task_threads: int, fresh_process: bool
    ) -> Future[ModelShare]:
        with self._lock:
            self._owners.add(owner)
            if self._build is None:
                self.id = uuid.uuid4().hex
                self._build = _in_thread(
                    "daskshare-build", _build_share, task_threads, fresh_process
                )
            return self._build

    def release(self, owner: object) -> Future[None] | None:
        """Give up ownership; the last one starts closing and gets the future of its end."""
        with self._lock:
            self._owners.discard(owner)
            if self._owners or self._build is None:
                return None
            build, self._build = self._build, None
        return _in_thread("daskshare-close", _close_share, build)

    def current(self) -> Future[ModelShare] | None:
        with self._lock:
            return self._build

    def recent(self, report: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            return self._rates.recent(time.monotonic(), report)


_process_share = _ProcessShare()


def _in_thread(name: str, function: Any, *args: Any) -> Future[Any]:
    executor = ThreadPoolExecutor(1, thread_name_prefix=name)
    future = executor.submit(function, *args)
    executor.shutdown(wait=False)
    return future


def _build_share(task_threads: int, fresh_process: bool) -> ModelShare:
    from daskshare.device import current_device
    from daskshare.share import ModelShare

    check_option_names()
    device = current_device()
    of_worker = WorkerOptions.from_config()
    if device.kind == "cpu":
        _set_torch_threads(task_threads)
        if of_worker.retain_memory_bytes is not None:
            retain_freed(of_worker.retain_memory_bytes)
    if fresh_process and _computes_on_gpu(device) and of_worker.freeze_imports:
        keep_imports()
    share = ModelShare(
        device, options=ShareOptions.from_config(), engine_options=EngineOptions.from_config()
    )
    options = HostOptions.from_config()
    # Unix sockets that tell who is at the other end are Linux's.
    if options.serve and sys.platform == "linux":
        from daskshare.host import WorkerHost

        _hosts[share] = WorkerHost(share, options)
    return share


def _computes_on_gpu(device: Device) -> bool:
    return device.torch_device().type == "cuda"


#: Through which other processes of this machine use a share.
_hosts: weakref.WeakKeyDictionary[ModelShare, WorkerHost] = weakref.WeakKeyDictionary()


def _close_share(build: Future[ModelShare]) -> None:
    if build.exception() is None:
        share = build.result()
        host = _hosts.pop(share, None)
        if host is not None:
            host.stop()
        share.close()


def _set_torch_threads(task_threads: int) -> None:
    import torch
    from dask.system import CPU_COUNT

    # A nanny starts its worker with OMP_NUM_THREADS=1, made for many tasks that compute side by
    # side; here one engine thread computes for all of them. Dask deals the machine's cores out as
    # task threads, so taking as many keeps several workers of one machine within its cores.
    threads = WorkerOptions.from_config().torch_threads or min(task_threads, CPU_COUNT)
    torch.set_num_threads(threads)


def local_share() -> ModelShare:
    """Return the ModelShare of the worker that runs the calling task.

    Returns
    -------
    ModelShare
        One for all workers of this process. Waits while it is being built.

    Raises
    ------
    NotOnWorkerError
        Outside a Dask worker, on a worker without the plugin, or when the share could not be
        built (field ``reason``).

    Notes
    -----
    For tasks' threads, and threads that tasks start; never for an event loop.
    """
    try:
        worker = get_worker()
    except ValueError:
        worker = None
    build = _process_share.current()
    if worker is not None and (PLUGIN_NAME not in worker.plugins or build is None):
        raise NotOnWorkerError(
            f"Dask worker {worker.address} has no daskshare plugin; a shared model needs it. Call "
            "daskshare.install(client) once, or start the scheduler with "
            "--preload daskshare_scheduler.py (or each worker with --preload "
            "daskshare_worker.py).",
            reason="no plugin",
        )
    if build is None:
        raise NotOnWorkerError(
            "A shared model was called outside a Dask worker; it runs only inside tasks. Start a "
            "cluster (Client(daskshare.local_cluster())), call daskshare.install(client), and "
            "hand the model to Dask: client.submit(model, frames), client.map(model, batches) or "
            "bag.map_partitions(model).",
            reason="no worker",
        )
    error = build.exception()
    if error is not None:
        raise NotOnWorkerError(
            f"daskshare could not start in this worker process: {type(error).__name__}: {error}. "
            "Correct the cause and restart the worker (client.restart()).",
            reason=f"{type(error).__name__}: {error}",
        ) from error
    return build.result()


def current_task() -> str | None:
    """Key of the Dask task that the calling thread runs; None when it runs none."""
    try:
        return str(get_worker().get_current_task())
    except (ValueError, KeyError):
        return None


def worker_report() -> dict[str, Any]:
    """Say how this process's share is doing, as plain JSON-able data.

    Returns
    -------
    dict
        ``state`` ("absent", "starting", "ready", "failed"), ``reason`` of a failure, ``chunks``
        (see :func:`daskshare.streaming.stream_counts`), ``models`` and totals over them
        (``loads``, ``frames``, ``batches``, ``mean_batch_size``, ``model_bytes``), what else
        ``ModelShare.report`` gives, ``recent`` and ``batch_bins`` (see
        :mod:`daskshare._worker_report`), and ``share``, which is the same for workers that share
        one copy of each model.

    Notes
    -----
    May wait for the share's locks: not for an event loop.
    """
    report: dict[str, Any] = {"state": "starting", "reason": "", "models": {}}
    report["share"] = _process_share.id
    build = _process_share.current()
    if build is None:
        report["state"] = "absent"
    elif build.done():
        error = build.exception()
        if error is None:
            report |= {"state": "ready", **build.result().report()}
            report["batch_bins"] = batch_bins(
                model["batch_size_counts"] for model in report["models"].values()
            )
            report["recent"] = _process_share.recent(report)
        else:
            report |= {"state": "failed", "reason": f"{type(error).__name__}: {error}"}
    models = list(report["models"].values())
    for total in ("loads", "frames", "batches", "model_bytes"):
        report[total] = sum(model[total] for model in models)
    report["mean_batch_size"] = report["frames"] / report["batches"] if report["batches"] else 0.0
    report["chunks"] = stream_counts()
    plain: dict[str, Any] = json.loads(json.dumps(report))
    return plain


async def worker_report_async() -> dict[str, Any]:
    """Return :func:`worker_report` without blocking the event loop; for ``Client.run``."""
    return await asyncio.wrap_future(_in_thread("daskshare-report", worker_report))


class DaskshareWorkerPlugin(WorkerPlugin):
    """Gives a worker its share of one copy of each model.

    Notes
    -----
    All methods run on the worker's event loop and return at once, except that the teardown of a
    closing worker waits, without blocking the loop and with a bound, for the share to close. A
    setup that fails leaves a worker that works but for shared models: the error is kept, comes up
    again in each task that looks the share up (:func:`local_share`), and goes to the scheduler.
    """

    name = PLUGIN_NAME

    def setup(self, worker: Worker) -> None:
        """Start building the share; returns before it is built."""
        self._worker = worker
        self._owner = object()
        self._flight: FlightEndpoint | None = None
        self._latest: dict[str, Any] = {}
        self._refreshing: Future[dict[str, Any]] | None = None
        self._profile_as_before: Callable[[], None] | None = None
        self._reporter = ThreadPoolExecutor(1, thread_name_prefix="daskshare-report")
        worker.metrics[PLUGIN_NAME] = self.heartbeat_report
        worker.handlers["daskshare_load"] = self.load_model
        worker.handlers["daskshare_unload"] = self.unload_model
        WORKER_METRICS.add(self._owner, lambda: self._latest)
        # Under a nanny, a process is the worker's own; later it may hold anything of its tasks'.
        build = _process_share.acquire(
            self._owner,
            task_threads=worker.state.nthreads,
            fresh_process=worker.nanny is not None and not worker.state.tasks,
        )
        build.add_done_callback(self._on_built)

    def teardown(self, worker: Worker) -> Awaitable[None] | None:
        """Give the share up; the process's last worker closes it."""
        worker.metrics.pop(PLUGIN_NAME, None)
        if self._profile_as_before is not None:
            self._profile_as_before()
            self._profile_as_before = None
        WORKER_METRICS.remove(self._owner)
        # The handlers stay, to answer with an error: without one, a call is never answered.
        self._reporter.shutdown(wait=False, cancel_futures=True)
        if self._flight is not None:
            # It ends with its clients' streams, which may take longer than a worker should.
            _in_thread("daskshare-flight", self._flight.close)
            self._flight = None
        if worker.status in (Status.closing, Status.closed, Status.failed):
            return self._close()
        # Dask replaces a plugin by teardown, then setup, in one step of the loop. Waiting for the
        # next step lets the newcomer take the share over, with the models that tasks are using.
        asyncio.get_running_loop().call_soon(self._leave)
        return None

    def _leave(self) -> None:
        if PLUGIN_NAME not in self._worker.plugins:
            self._log_event({"action": "stopped", "report": {"state": "absent"}})
        _process_share.release(self._owner)

    async def _close(self) -> None:
        if self._worker.nanny:
            # The process is the worker's own and ends with it. Without this the interpreter would
            # look through all of torch for garbage first: half a second.
            atexit.register(gc.freeze)
        closing = _process_share.release(self._owner)
        if closing is None:
            return
        limit_seconds = 2 * ShareOptions.from_config().close_timeout_seconds
        try:
            await asyncio.wait_for(asyncio.wrap_future(closing), limit_seconds)
        except TimeoutError:
            logger.warning("The share did not close within %.0f s; it is left", limit_seconds)

    def heartbeat_report(self, worker: Worker) -> dict[str, Any]:
        """Return the newest finished report and start making the next one.

        A heartbeat must not wait for a lock that a loading model holds, so what it carries is as
        old as the heartbeat before; :func:`daskshare.stats` asks anew.
        """
        if self._refreshing is None:
            self._refreshing = self._reporter.submit(worker_report)
        if self._refreshing.done():
            error = self._refreshing.exception()
            if error is None:
                self._latest = self._refreshing.result()
            else:
                self._latest = {"state": "failed", "reason": f"{type(error).__name__}: {error}"}
            self._refreshing = self._reporter.submit(worker_report)
        # Clients on other machines find the endpoints by the scheduler's copy of this.
        flight = {} if self._flight is None else {"flight": self._flight.report()}
        return for_heartbeat(self._latest) | flight

    async def load_model(self, spec: bytes) -> dict[str, Any]:
        """Load a model ahead of its first task; the scheduler's call ``daskshare_load``.

        Parameters
        ----------
        spec : bytes
            Pickled ModelSpec.

        Returns
        -------
        dict
            ``status`` "OK" and ``model_bytes``; or "error", ``reason``, and the pickled
            ``exception``; or "leaving" when the worker ends or lost the plugin.

        Notes
        -----
        The work is done in a thread; the event loop only waits.
        """
        try:
            model = await asyncio.wrap_future(_in_thread("daskshare-load", _load_model, spec))
        except Exception as error:
            return self._failed("load-failed", error)
        await self._changed({"action": "loaded", "model": model["key"]})
        return {"status": "OK", "model_bytes": model["model_bytes"]}

    async def unload_model(self, key: str) -> dict[str, Any]:
        """Give a model's memory back; the scheduler's call ``daskshare_unload``.

        Returns
        -------
        dict
            ``status`` "OK", also when it was not loaded; "error" and ``reason`` while it is in use.
        """
        try:
            await asyncio.wrap_future(_in_thread("daskshare-unload", _unload_model, key))
        except Exception as error:
            return self._failed("unload-failed", error)
        await self._changed({"action": "unloaded", "model": key})
        return {"status": "OK"}

    def _failed(self, action: str, error: Exception) -> dict[str, Any]:
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, ModelLoadError):
            reason = getattr(error, "reason", "") or reason
        if isinstance(error, (EngineClosedError, NotOnWorkerError)):
            return {"status": "leaving", "reason": reason}
        self._log_event({"action": action, "reason": reason})
        # Others than daskshare's own may not survive pickling.
        exception = dumps(error) if isinstance(error, DaskshareError) else None
        return {"status": "error", "reason": reason, "exception": exception}

    async def _changed(self, event: dict[str, Any]) -> None:
        report = await asyncio.wrap_future(_in_thread("daskshare-report", worker_report))
        self._log_event({**event, "report": report})

    def _on_built(self, build: Future[ModelShare]) -> None:
        error = build.exception()
        event: dict[str, Any] = {"action": "started"}
        if error is not None:
            logger.error("daskshare could not start in this worker", exc_info=error)
            event = {"action": "failed", "reason": f"{type(error).__name__}: {error}"}
        else:
            if _computes_on_gpu(build.result().device):
                self._worker.loop.add_callback(self._profile_less)
            if (reason := self._serve_flight(build.result())) is not None:
                event["flight_error"] = reason
        # Called in the building thread, or at once when another worker of the process has built.
        self._worker.loop.add_callback(self._changed, event)

    def _profile_less(self) -> None:
        interval_seconds = WorkerOptions.from_config().profile_interval_seconds
        if interval_seconds is not None and self._worker.plugins.get(PLUGIN_NAME) is self:
            self._profile_as_before = profile_less(self._worker, interval_seconds)

    def _log_event(self, event: dict[str, Any]) -> None:
        if self._worker.status not in (Status.closing, Status.closed, Status.failed):
            self._worker.log_event(PLUGIN_NAME, {**event, "worker": self._worker.address})

    def _serve_flight(self, share: ModelShare) -> str | None:
        """Start the endpoint for other machines where one is asked for; says why it failed."""
        options = FlightOptions.from_config()
        if options.port is None:
            return None
        from daskshare.flight import FlightEndpoint

        try:
            self._flight = FlightEndpoint(
                share,
                options,
                HostOptions.from_config(),
                host=get_address_host(self._worker.address),
            )
        except Exception as error:
            # The worker's own tasks need no endpoint.
            logger.exception("This worker has no Arrow Flight endpoint")
            return f"{type(error).__name__}: {error}"
        logger.info("Arrow Flight endpoint at %s", self._flight.location)
        return None


def _load_model(pickled: bytes) -> dict[str, Any]:
    share = _wait_for_share()
    spec = loads(pickled)
    share.load(spec)
    return asdict(share.stats()[spec.key])


def _unload_model(key: str) -> bool:
    return _wait_for_share().unload(key)


def _wait_for_share() -> ModelShare:
    build = _process_share.current()
    if build is None:
        raise NotOnWorkerError("This worker's daskshare plugin was removed.", reason="no plugin")
    return build.result()
