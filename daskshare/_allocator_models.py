"""The models that a scheduler knows of, and loading and unloading them on workers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from distributed.protocol.pickle import dumps, loads

from daskshare.errors import DaskshareError, ModelLoadError, ModelTooLargeError
from daskshare.placement import Fail, Load, Unload

if TYPE_CHECKING:
    from distributed import Scheduler

    from daskshare.placement import GpuPool

__all__ = ["KnownModel", "ModelLoader"]

logger = logging.getLogger("daskshare.scheduler")

#: How long a worker that broke off a call may take to be missed by Dask.
_GRACE_SECONDS = 10.0


class KnownModel:
    """A model that a task or a user has named.

    Parameters
    ----------
    key : str
        Its key.
    handle : SharedModel or None
        None when only its key is known: then its tasks load it themselves.
    """

    __slots__ = ("error", "estimated_bytes", "key", "name", "spec")

    def __init__(self, key: str, handle: Any | None) -> None:
        self.key = key
        self.name: str = key if handle is None else handle.name
        self.spec: bytes | None = None if handle is None else dumps(handle.spec)
        self.estimated_bytes = 0 if handle is None else _estimated_bytes(handle.spec)
        self.error: DaskshareError | None = None


def _estimated_bytes(spec: Any) -> int:
    try:
        return int(spec.estimated_bytes())
    except Exception:
        # A model of somebody else's; loading it will tell.
        logger.warning("Cannot estimate the size of model %s", spec.name, exc_info=True)
        return 0


class ModelLoader:
    """Carries out the pool's loads and unloads, and tells it how they went.

    Parameters
    ----------
    scheduler : distributed.Scheduler
        Running.
    pool : GpuPool
        Which decides.
    on_change : callable
        Called after each event that may lead to new decisions.
    load_timeout_seconds : float
        After which a load that does not answer has failed.

    Notes
    -----
    Runs on the scheduler's event loop; workers load in threads of their own.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        pool: GpuPool,
        on_change: Callable[[], None],
        *,
        load_timeout_seconds: float,
    ) -> None:
        self._scheduler = scheduler
        self._pool = pool
        self._on_change = on_change
        self._load_timeout_seconds = load_timeout_seconds
        self._running: set[asyncio.Task[None]] = set()
        self._waiting: set[asyncio.Future[None]] = set()
        self._loading: Counter[str] = Counter()
        self.models: dict[str, KnownModel] = {}

    def carry_out(self, decision: Load | Unload) -> None:
        """Start a load or an unload."""
        if isinstance(decision, Load):
            self._loading[decision.model_key] += 1
            self._start(self._load(decision.worker, self.models[decision.model_key]))
        else:
            self._start(self._unload(decision.worker, decision.model_key))

    def is_loading(self, key: str) -> bool:
        """Whether a model is being loaded somewhere."""
        return self._loading[key] > 0

    def error(self, decision: Fail) -> DaskshareError:
        """Make the exception for a task whose model cannot be loaded anywhere."""
        model = self.models[decision.model_key]
        cls = ModelTooLargeError if decision.kind == "too_large" else ModelLoadError
        if model.error is not None:
            if isinstance(model.error, ModelTooLargeError):
                cls = ModelTooLargeError
            return cls(str(model.error), **model.error.fields)
        return cls(
            f"Model {model.name!r} could not be loaded on any worker: {decision.reason}",
            model=model.name,
            reason=decision.reason,
        )

    async def changed(self) -> None:
        """Wait for the next load or unload to end."""
        waiting = asyncio.get_running_loop().create_future()
        self._waiting.add(waiting)
        try:
            await waiting
        finally:
            self._waiting.discard(waiting)

    def close(self) -> None:
        """Give up what is going on."""
        for task in self._running:
            task.cancel()

    def notify(self) -> None:
        """Wake who waits for a change."""
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(None)
        self._on_change()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _load(self, worker: str, model: KnownModel) -> None:
        if model.spec is None:
            self._loading[model.key] -= 1
            # Its first task there loads it.
            self._pool.load_finished(worker, model.key, now_seconds=time.monotonic())
            self.notify()
            return
        state = self._scheduler.workers.get(worker)
        try:
            answer = await self._ask(worker, "daskshare_load", spec=model.spec)
        finally:
            self._loading[model.key] -= 1
        if state is None or self._scheduler.workers.get(worker) is not state:
            self.notify()
            return  # it left, and the pool knows
        now_seconds = time.monotonic()
        if answer["status"] == "OK":
            self._pool.load_finished(
                worker, model.key, model_bytes=answer["model_bytes"], now_seconds=now_seconds
            )
        else:
            reason = answer["reason"]
            logger.warning("Model %s could not be loaded on %s: %s", model.name, worker, reason)
            if answer.get("exception") is not None:
                model.error = loads(answer["exception"])
            self._pool.load_failed(worker, model.key, reason=reason, now_seconds=now_seconds)
        self.notify()

    async def _unload(self, worker: str, key: str) -> None:
        state = self._scheduler.workers.get(worker)
        answer = await self._ask(worker, "daskshare_unload", key=key)
        if state is None or self._scheduler.workers.get(worker) is not state:
            return
        now_seconds = time.monotonic()
        if answer["status"] == "OK":
            self._pool.unload_finished(worker, key, now_seconds=now_seconds)
        else:
            self._pool.unload_failed(worker, key, reason=answer["reason"], now_seconds=now_seconds)
        self.notify()

    async def _ask(self, worker: str, operation: str, **arguments: Any) -> dict[str, Any]:
        try:
            async with asyncio.timeout(self._load_timeout_seconds):
                call = getattr(self._scheduler.rpc(worker), operation)
                answer: dict[str, Any] = await call(**arguments)
        except TimeoutError:
            reason = f"no answer within {self._load_timeout_seconds:g} s"
            return {"status": "error", "reason": reason}
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            if not isinstance(error, OSError):
                return {"status": "error", "reason": reason}
            answer = {"status": "leaving", "reason": reason}
        else:
            if answer["status"] != "leaving":
                return answer
            reason = answer["reason"]
        # A worker that dies is no fault of the model; Dask will say so in a moment.
        await self._gone(worker)
        return {"status": "error", "reason": reason}

    async def _gone(self, worker: str) -> None:
        state = self._scheduler.workers.get(worker)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GRACE_SECONDS):
                while state is not None and self._scheduler.workers.get(worker) is state:
                    await self.changed()
