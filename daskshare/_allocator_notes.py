"""What happens most, told to the pool of many tasks at once: they are ready, they succeeded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from daskshare._allocator_holding import HeldTask, dependency_bytes

if TYPE_CHECKING:
    from dask.typing import Key
    from distributed import Scheduler
    from distributed.scheduler import TaskState

    from daskshare._allocator_workers import WorkerBook
    from daskshare.placement import GpuPool

__all__ = ["Notes"]


class Notes:
    """What hooks saw and the pool has not heard of yet.

    Parameters
    ----------
    scheduler : distributed.Scheduler
        Whose tasks these are.
    pool : GpuPool
        Which is told.
    workers : WorkerBook
        Which knows the workers that cannot run models.

    Attributes
    ----------
    done : list of key
        Tasks that succeeded.
    ready : list of HeldTask
        Tasks that could run now if there were a place for them.
    hopeless : list of key
        Tasks, told of as ready, that no worker can serve.
    """

    def __init__(self, scheduler: Scheduler, pool: GpuPool, workers: WorkerBook) -> None:
        self._scheduler = scheduler
        self._pool = pool
        self._workers = workers
        self.done: list[Key] = []
        self.ready: list[HeldTask] = []
        self.hopeless: list[Key] = []

    def tell(self, now_seconds: float) -> None:
        """Tell the pool all of it."""
        if self.done:
            done, self.done = self.done, []
            self._pool.finish_tasks(done, now_seconds=now_seconds)
        if self.ready:
            ready, self.ready = self.ready, []
            self.tell_ready(ready, now_seconds)

    def tell_ready(self, ready: Iterable[HeldTask], now_seconds: float) -> None:
        """Tell the pool of tasks that could run now, unless it knows."""
        pool, tasks, any_failed = self._pool, self._scheduler.tasks, self._workers.any_failed
        # Neighbours of one model that may run anywhere come to the pool together.
        alike: list[HeldTask] = []
        for held in dict.fromkeys(ready):
            if held.key in pool:
                continue
            ts = tasks[held.key]
            special = held.restricted or held.alone or ts.resource_restrictions or any_failed
            if alike and (special or held.model_key != alike[0].model_key):
                pool.add_tasks(alike, alike[0].model_key, now_seconds=now_seconds)
                alike = []
            if special:
                self._tell_special(held, ts, now_seconds)
            else:
                held.priority = ts.priority
                held.dependencies = dependency_bytes(ts) if ts.dependencies else None
                alike.append(held)
        if alike:
            pool.add_tasks(alike, alike[0].model_key, now_seconds=now_seconds)

    def _tell_special(self, held: HeldTask, ts: TaskState, now_seconds: float) -> None:
        allowed = held.allowed(self._scheduler) if held.restricted else None
        if self._workers.any_failed and self._workers.failed(allowed):
            self.hopeless.append(held.key)
        self._pool.add_task(
            held,
            held.model_key,
            priority=ts.priority,
            frames=held.frames,
            workers=allowed,
            resources=ts.resource_restrictions or None,
            dependency_bytes=dependency_bytes(ts) if ts.dependencies else None,
            alone=held.alone,
            now_seconds=now_seconds,
        )
