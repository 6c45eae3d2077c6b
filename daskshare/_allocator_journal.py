"""What the allocator decided and why, for events and statistics."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from daskshare.placement import Decision, Dispatch, Fail, Load, Unload
from daskshare.worker_plugin import PLUGIN_NAME

if TYPE_CHECKING:
    from distributed import Scheduler

__all__ = ["Journal"]

#: Decisions that are kept for each worker.
_KEPT = 32


class Journal:
    """Keeps the last decisions about each worker, and publishes all of them.

    Parameters
    ----------
    scheduler : distributed.Scheduler
        Whose topic "daskshare" gets an event for each round of decisions:
        ``{"action": "decided", "decisions": [...]}``.

    Notes
    -----
    Runs on the scheduler's event loop.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._recent: dict[str, deque[Dispatch | Load | Unload]] = {}

    def write(self, decisions: list[Decision]) -> None:
        """Take down decisions that were carried out."""
        told = []
        for decision in decisions:
            told.append(_event(decision))
            if isinstance(decision, Fail):
                continue
            recent = self._recent.get(decision.worker)
            if recent is None:
                recent = self._recent[decision.worker] = deque(maxlen=_KEPT)
            recent.append(decision)
        self._scheduler.log_event(PLUGIN_NAME, {"action": "decided", "decisions": told})

    def forget(self, worker: str) -> None:
        """Drop what is kept of a worker."""
        self._recent.pop(worker, None)

    def about(self, worker: str) -> list[dict[str, Any]]:
        """Return the last decisions about a worker, oldest first; see :func:`_describe`."""
        return [_describe(decision) for decision in self._recent.get(worker, ())]


def _describe(decision: Decision) -> dict[str, Any]:
    """A decision as plain data: ``kind``, ``worker``, ``model`` (its key), ``task``, ``reason``."""
    described: dict[str, Any] = {
        "kind": type(decision).__name__.lower(),
        "model": decision.model_key,
        "reason": decision.reason,
    }
    if not isinstance(decision, Fail):
        described["worker"] = decision.worker
    if isinstance(decision, (Dispatch, Fail)):
        described["task"] = decision.task
    return described


def _event(decision: Decision) -> dict[str, Any]:
    """As :func:`_describe`; of dispatches, of which there are many, figures in place of words."""
    if not isinstance(decision, Dispatch):
        return _describe(decision)
    return {
        "kind": "dispatch",
        "model": decision.model_key,
        "reason": decision.cause,
        "worker": decision.worker,
        "task": decision.task,
        "busy_seconds": decision.busy_seconds,
        "frames_per_second": decision.frames_per_second,
        "num_in_flight": decision.num_in_flight,
    }
