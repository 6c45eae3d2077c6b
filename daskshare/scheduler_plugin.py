"""What daskshare keeps on the scheduler. Never imports torch."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from distributed import Scheduler, SchedulerPlugin
from distributed.protocol.pickle import dumps

from daskshare._allocator_endpoints import Endpoints
from daskshare._allocator_requests import Requests
from daskshare.allocator import Allocator
from daskshare.config import AllocatorOptions
from daskshare.dashboard.feed import Feed
from daskshare.dashboard.install import install_dashboard
from daskshare.dashboard.metrics import SCHEDULER_METRICS
from daskshare.errors import ConfigurationError, DaskshareError
from daskshare.worker_plugin import PLUGIN_NAME, DaskshareWorkerPlugin

if TYPE_CHECKING:
    from dask.typing import Key
    from distributed.scheduler import WorkerState

__all__ = ["DaskshareSchedulerPlugin", "ask_allocator", "install_on_scheduler"]

logger = logging.getLogger("daskshare.scheduler")


class DaskshareSchedulerPlugin(SchedulerPlugin):
    """Puts the worker plugin on every worker, and Dask's hooks through to the allocator.

    Notes
    -----
    Everything runs on the scheduler's event loop.
    """

    name = PLUGIN_NAME
    idempotent = True

    def __init__(self) -> None:
        self._scheduler: Scheduler | None = None
        self._installing: asyncio.Task[None] | None = None
        self._last_events: dict[str, dict[str, Any]] = {}
        #: None when ``daskshare.allocator.enabled`` is false.
        self.allocator: Allocator | None = None
        #: None before :meth:`attach`.
        self.endpoints: Endpoints | None = None

    def attach(self, scheduler: Scheduler) -> None:
        """Add the plugin to a running scheduler, in one step of its loop.

        Raises
        ------
        ConfigurationError
            When the scheduler's ``daskshare.allocator`` options are wrong.
        """
        options = AllocatorOptions.from_config()
        self._scheduler = scheduler
        if options.enabled:
            self.allocator = Allocator(scheduler, options)
            self.allocator.attach()
            # Called most of all hooks: without a step in between.
            self.transition = self.allocator.transition  # type: ignore[method-assign]
        self.endpoints = Endpoints(scheduler, self.allocator)
        scheduler.handlers["daskshare_state"] = self.get_state
        scheduler.add_plugin(self, name=self.name)
        self.feed = Feed(scheduler, self._waiting_tasks)
        install_dashboard(scheduler, self.feed)
        SCHEDULER_METRICS.add(self, self.feed.snapshot)

    async def close(self) -> None:
        """Leave what the process keeps, and stop the allocator; called when the scheduler ends."""
        SCHEDULER_METRICS.remove(self)
        if self.allocator is not None:
            self.allocator.close()

    def _waiting_tasks(self) -> dict[str, int]:
        return {} if self.allocator is None else self.allocator.waiting_tasks()

    async def install_workers(self) -> None:
        """Put the worker plugin on all present and future workers, once.

        Raises
        ------
        ConfigurationError
            When a worker cannot take it; the next call tries again.
        """
        # Callers at the same time await one installation, and none returns before it is done.
        if self._installing is None:
            self._installing = asyncio.create_task(self._install_workers())
        installing = self._installing
        try:
            await asyncio.shield(installing)
        except ConfigurationError:
            if self._installing is installing:
                self._installing = None
            raise

    async def _install_workers(self) -> None:
        scheduler = self._scheduler
        assert scheduler is not None, "attach() comes first"
        plugin = dumps(DaskshareWorkerPlugin())
        scheduler.worker_plugins[PLUGIN_NAME] = plugin
        message = {"op": "plugin-add", "plugin": plugin, "name": PLUGIN_NAME}
        answers = await scheduler.broadcast(msg=message, on_error="return")
        for address, answer in answers.items():
            if isinstance(answer, Exception):
                reason = f"{type(answer).__name__}: {answer}"
            elif answer["status"] == "error":
                reason = answer["exception_text"]
            else:
                continue
            # A worker that left meanwhile is no failure; its successor gets the plugin on joining.
            if address in scheduler.workers:
                raise ConfigurationError(
                    f"Dask worker {address} could not take daskshare's plugin: {reason}; expected "
                    "daskshare to be importable there. Install the same version of it on "
                    "scheduler, workers and client.",
                    worker=address,
                    reason=reason,
                )

    def update_graph(self, scheduler: Scheduler, *, tasks: list[Key], **kwargs: Any) -> None:
        """Look for tasks that need a model."""
        if self.allocator is not None:
            self.allocator.update_graph(tasks)

    def restart(self, scheduler: Scheduler) -> None:
        """Forget all tasks."""
        if self.allocator is not None:
            self.allocator.restart()

    def add_worker(self, scheduler: Scheduler, worker: str) -> None:
        """Take in a worker that joined."""
        if self.allocator is not None:
            self.allocator.add_worker(scheduler.workers[worker])

    def remove_worker(self, scheduler: Scheduler, worker: str, **kwargs: Any) -> None:
        """Forget a worker that left."""
        self._last_events.pop(worker, None)
        if self.endpoints is not None:
            self.endpoints.forget(worker)
        if self.allocator is not None:
            self.allocator.remove_worker(worker)

    def valid_workers_downscaling(
        self, scheduler: Scheduler, workers: list[WorkerState]
    ) -> list[WorkerState]:
        """Keep workers that run models or load them when a cluster shrinks."""
        if self.allocator is None:
            return workers
        busy = self.allocator.busy_workers()
        return [ws for ws in workers if ws.address not in busy]

    def log_event(self, topic: str, msg: Any) -> None:
        """Take in what workers say at once, without waiting for a heartbeat."""
        if topic == PLUGIN_NAME and isinstance(msg, dict) and "worker" in msg:
            event = {name: value for name, value in msg.items() if name != "report"}
            self._last_events[msg["worker"]] = event
        if self.allocator is not None:
            self.allocator.log_event(topic, msg)

    async def get_state(self) -> dict[str, dict[str, Any]]:
        """Return each worker's last report, as old as its heartbeat, without asking any worker.

        Returns
        -------
        dict
            By worker address: the report of :func:`daskshare.worker_plugin.worker_report` (empty
            before the first heartbeat) with the last ``event``. Also the scheduler's RPC
            ``daskshare_state``.
        """
        scheduler = self._scheduler
        assert scheduler is not None, "attach() comes first"
        return {
            address: {
                **(state.metrics.get(PLUGIN_NAME) or {}),
                "event": self._last_events.get(address, {}),
            }
            for address, state in scheduler.workers.items()
        }


async def install_on_scheduler(dask_scheduler: Scheduler) -> None:
    """Install daskshare on a scheduler and on all its workers, present and future. Idempotent.

    Parameters
    ----------
    dask_scheduler : distributed.Scheduler
        Running; the name is the one by which ``Client.run_on_scheduler`` hands it over.

    Raises
    ------
    ConfigurationError
        When a worker cannot take the plugin.
    """
    plugin = dask_scheduler.plugins.get(PLUGIN_NAME)
    if not isinstance(plugin, DaskshareSchedulerPlugin):
        plugin = DaskshareSchedulerPlugin()
        plugin.attach(dask_scheduler)
    await plugin.install_workers()


async def ask_allocator(
    request: str, arguments: dict[str, Any], dask_scheduler: Scheduler
) -> tuple[Any, DaskshareError | None]:
    """Put a client's request to the allocator; for ``Client.run_on_scheduler``.

    Parameters
    ----------
    request : str
        A coroutine of :class:`daskshare._allocator_requests.Requests`.
    arguments : dict
        Its keyword arguments.
    dask_scheduler : distributed.Scheduler
        Handed over by ``Client.run_on_scheduler``.

    Returns
    -------
    tuple
        The answer, or the error to raise in the client: ConfigurationError when the scheduler has
        no allocator. Dask would write a raised one into the scheduler's log as its own failure.
    """
    plugin = dask_scheduler.plugins.get(PLUGIN_NAME)
    if not isinstance(plugin, DaskshareSchedulerPlugin) or plugin.allocator is None:
        error = ConfigurationError(
            "This cluster's scheduler places no models; expected daskshare to be installed there "
            "with daskshare.allocator.enabled. Call daskshare.install(client), or start the "
            "scheduler with --preload daskshare_scheduler.py.",
            option="daskshare.allocator.enabled",
        )
        return None, error
    try:
        return await getattr(Requests(plugin.allocator), request)(**arguments), None
    except DaskshareError as error:
        return None, error
