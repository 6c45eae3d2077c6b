"""What pages, JSON route and metrics of a scheduler read, put together once an interval."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from distributed.metrics import time

from daskshare.dashboard.snapshot import Snapshot, take_snapshot

if TYPE_CHECKING:
    from distributed import Scheduler

__all__ = ["HISTORY_SECONDS", "METRIC", "Feed"]

#: Under which workers' reports ride on heartbeats.
METRIC = "daskshare"
#: How far back a page's curves go.
HISTORY_SECONDS = 300.0


class Feed:
    """The newest snapshot of a cluster, and its throughput in the last minutes.

    Parameters
    ----------
    scheduler : distributed.Scheduler
        Whose workers.
    held_tasks : callable
        Gives, by model key, how many tasks wait on the scheduler for a GPU.

    Notes
    -----
    Runs on the scheduler's event loop. Nothing runs by itself: while nobody looks it costs
    nothing, and then the history has a gap.
    """

    def __init__(
        self, scheduler: Scheduler, held_tasks: Callable[[], Mapping[str, int]] = dict
    ) -> None:
        self._scheduler = scheduler
        self._held_tasks = held_tasks
        self._snapshot: Snapshot | None = None
        #: (wall-clock seconds, frames/s by model key), oldest first.
        self.history: deque[tuple[float, dict[str, float]]] = deque()

    @property
    def interval_seconds(self) -> float:
        """How often new numbers come: about as often as Dask lets so many workers report."""
        num_workers = len(self._scheduler.workers)
        return 1.0 if num_workers < 50 else 3.0 if num_workers < 200 else 6.0

    def snapshot(self) -> Snapshot:
        """Return what workers last reported, put together now or just now."""
        now_seconds = time()
        last = self._snapshot
        # Several pages ask in one interval, each with its own timer.
        if last is None or now_seconds - last.time >= 0.5 * self.interval_seconds:
            last = self._snapshot = take_snapshot(
                now_seconds,
                (
                    (str(state.name), address, state.metrics.get(METRIC) or {})
                    for address, state in self._scheduler.workers.items()
                ),
                self._held_tasks(),
            )
            self._remember(now_seconds, last.models)
        return last

    def _remember(self, now_seconds: float, models: list[dict[str, Any]]) -> None:
        rates = {m["key"]: m["frames_per_second"] for m in models if m["frames_per_second"]}
        self.history.append((now_seconds, rates))
        while self.history[0][0] < now_seconds - HISTORY_SECONDS:
            self.history.popleft()
