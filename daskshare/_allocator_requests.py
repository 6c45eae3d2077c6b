"""What clients ask the allocator: load, unload, why."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from distributed.protocol.pickle import loads

from daskshare.errors import ConfigurationError, ModelError, ModelLoadError, ModelTooLargeError

if TYPE_CHECKING:
    from dask.typing import Key

    from daskshare.allocator import Allocator

__all__ = ["Requests"]


class Requests:
    """Answers clients.

    Parameters
    ----------
    allocator : Allocator
        Whose pool decides.

    Notes
    -----
    Coroutines on the scheduler's event loop, any number at once.
    """

    def __init__(self, allocator: Allocator) -> None:
        self._allocator = allocator

    async def load(
        self,
        model: bytes,
        replicas: int | None,
        devices: list[str] | None,
        replaces: str | None,
        timeout_seconds: float,
    ) -> list[str]:
        """Load a model; see :func:`daskshare.load`.

        Parameters
        ----------
        model : bytes
            Pickled SharedModel.
        replicas : int or None
            How many.
        devices : list of str or None
            Uuids of devices, or addresses of workers on them, to pin the model to.
        replaces : str or None
            Key of the model that it takes over from.
        timeout_seconds : float
            How long to wait.

        Returns
        -------
        list of str
            Addresses of the workers where it is ready.
        """
        allocator, workers = self._allocator, self._allocator.workers
        known = allocator.register(loads(model))
        key, pool = known.key, allocator.pool
        known.error = None
        if devices and not all(map(workers.find_device, devices)):
            # Perhaps a worker has not reported its device yet.
            with contextlib.suppress(TimeoutError):
                await self._until(workers.all_reported, lambda: None, timeout_seconds)
        wanted = set(map(self._device, devices or ()))
        if wanted:
            pool.pin_model(key, wanted, now_seconds=time.monotonic())
        elif replaces is not None:
            pool.supersede_model(replaces, key, now_seconds=time.monotonic())
        else:
            pool.request_replicas(key, replicas or 1, now_seconds=time.monotonic())

        def done() -> bool:
            ready = workers.with_model(key)
            if wanted:
                return wanted <= {workers.device(address) for address in ready}
            return len(ready) >= (replicas or 1)

        def failed() -> None:
            budget_bytes = workers.largest_budget_bytes()
            if budget_bytes is not None and known.estimated_bytes > budget_bytes:
                raise ModelTooLargeError(
                    f"Model {known.name!r} needs {known.estimated_bytes} bytes; the largest "
                    f"budget of a device is {budget_bytes} bytes. Raise "
                    "daskshare.share.memory-limit or use a lower precision.",
                    model=known.name,
                    needed_bytes=known.estimated_bytes,
                    budget_bytes=budget_bytes,
                )
            if known.error is not None and not allocator.loader.is_loading(key):
                raise known.error

        try:
            await self._until(done, failed, timeout_seconds)
        except TimeoutError:
            raise ModelLoadError(
                f"Model {known.name!r} is ready on {len(workers.with_model(key))} workers after "
                f"{timeout_seconds:g} s; expected {len(wanted) or replicas or 1}. Ask for fewer "
                "copies, make room (daskshare.unload), or add workers.",
                model=known.name,
                reason="no room or no worker",
            ) from None
        finally:
            if not wanted and replaces is None and replicas is None:
                # It is there; from now on its number follows its tasks.
                pool.request_replicas(key, None, now_seconds=time.monotonic())
                allocator.kick()
        ready = workers.with_model(key)
        return [address for address in ready if not wanted or workers.device(address) in wanted]

    async def unload(self, key: str, timeout_seconds: float) -> list[str]:
        """Unload a model; see :func:`daskshare.unload`.

        Returns
        -------
        list of str
            Addresses of the workers that held it.
        """
        allocator, workers = self._allocator, self._allocator.workers
        model = allocator.loader.models.get(key)
        if model is None:
            return []
        before = workers.with_model(key)
        allocator.pool.unload_model(key, now_seconds=time.monotonic())

        def done() -> bool:
            # The worker's report may come before its answer, and its room counts from then on.
            booked = allocator.pool.snapshot()["models"][key]["replicas"]
            return not booked and not workers.with_model(key)

        try:
            await self._until(done, lambda: None, timeout_seconds)
        except TimeoutError:
            raise ModelError(
                f"Model {model.name!r} is still on {', '.join(workers.with_model(key))} after "
                f"{timeout_seconds:g} s, because tasks use it or wait for it. Cancel them, or "
                "wait longer.",
                model=model.name,
            ) from None
        return before

    async def why(self, key: Key) -> str:
        """Answer why a task waits, or runs where it runs; see :func:`daskshare.why`."""
        allocator = self._allocator
        ts = allocator.scheduler.tasks.get(key)
        if ts is None:
            return f"The scheduler knows no task {key!r}."
        allocator.settle()
        if key in allocator.pool:
            return allocator.pool.why(key)
        if ts.state == "waiting":
            missing = len(ts.waiting_on or ())
            return f"Task {key!r} waits for {missing} tasks whose results it needs."
        if not allocator.holds(key):
            return f"Task {key!r} is {ts.state}; it has no model, so Dask decides where it runs."
        where = f" on {ts.processing_on.address}" if ts.processing_on else ""
        return f"Task {key!r} is {ts.state}{where}."

    async def placement(self) -> dict[str, dict[str, Any]]:
        """Describe each worker as the allocator sees it; part of :func:`daskshare.stats`.

        Returns
        -------
        dict
            By worker address: ``failure``, why it runs no models, or ""; and ``decisions``, the
            last about it, oldest first.
        """
        workers, journal = self._allocator.workers, self._allocator.journal
        return {
            address: {"failure": workers.failure(address), "decisions": journal.about(address)}
            for address in workers
        }

    def _device(self, name: str) -> str:
        workers = self._allocator.workers
        device = workers.find_device(name)
        if not device:
            raise ConfigurationError(
                f"Got {name!r}; expected the uuid of a device, or the address of a worker, of "
                f"{', '.join(workers.devices()) or 'a cluster without devices yet'}.",
                option="devices",
            )
        return device

    async def _until(
        self, done: Callable[[], bool], check: Callable[[], None], timeout_seconds: float
    ) -> None:
        async with asyncio.timeout(timeout_seconds):
            while True:
                # What was asked starts here, so that nothing is loading means nothing will.
                self._allocator.decide()
                if done():
                    return
                check()
                await self._allocator.loader.changed()
