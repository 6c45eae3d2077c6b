"""What daskshare keeps on the scheduler. Never imports torch."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from distributed import Scheduler, SchedulerPlugin
from distributed.protocol.pickle import dumps

from daskshare.dashboard.feed import Feed
from daskshare.dashboard.install import install_dashboard
from daskshare.dashboard.metrics import SCHEDULER_METRICS
from daskshare.errors import ConfigurationError
from daskshare.worker_plugin import PLUGIN_NAME, DaskshareWorkerPlugin

__all__ = ["DaskshareSchedulerPlugin", "install_on_scheduler"]

logger = logging.getLogger("daskshare.scheduler")


class DaskshareSchedulerPlugin(SchedulerPlugin):
    """Puts the worker plugin on every worker, and knows what each one last said.

    The allocator that decides which GPU holds which model and which task runs where belongs here:
    ``update_graph`` and ``transition`` would hand it the tasks that carry a SharedModel (they have
    a true ``__daskshare_model__``), ``add_worker``, ``remove_worker`` and ``log_event`` the
    events of workers, and its decisions would go out through ``scheduler.transitions``.

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

    def attach(self, scheduler: Scheduler) -> None:
        """Add the plugin to a running scheduler, in one step of its loop."""
        self._scheduler = scheduler
        scheduler.handlers["daskshare_state"] = self.get_state
        scheduler.add_plugin(self, name=self.name)
        self.feed = Feed(scheduler)
        install_dashboard(scheduler, self.feed)
        SCHEDULER_METRICS.add(self, self.feed.snapshot)

    async def close(self) -> None:
        """Leave what the process keeps; called when the scheduler ends."""
        SCHEDULER_METRICS.remove(self)

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

    def remove_worker(self, scheduler: Scheduler, worker: str, **kwargs: Any) -> None:
        """Forget a worker that left."""
        self._last_events.pop(worker, None)

    def log_event(self, topic: str, msg: Any) -> None:
        """Take in what workers say at once, without waiting for a heartbeat."""
        if topic == PLUGIN_NAME and isinstance(msg, dict) and "worker" in msg:
            self._last_events[msg["worker"]] = msg

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
