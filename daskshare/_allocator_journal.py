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
        Whose topic "daskshare" gets an event for each round of decisions: ``{"action": "decided",
        "decisions": [...], "dispatch_fields": [...], "dispatches": [...]}``. A decision is as
        :func:`_describe` says. Dispatches, of which there are many, are rows of values:
        ``dispatch_fields`` names them, as :class:`~daskshare.placement.Dispatch` does.

    Notes
    -----
    Runs on the scheduler's event loop.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._recent: dict[str, deque[Dispatch | Load | Unload]] = {}

    def write(self, decisions: list[Decision]) -> None:
        """Take down decisions that were carried out."""
        told: list[dict[str, Any]] = []
        dispatches: list[Dispatch] = []
        all_recent = self._recent
        for decision in decisions:
            if isinstance(decision, Dispatch):
                dispatches.append(decision)
            else:
                told.append(_describe(decision))
                if isinstance(decision, Fail):
                    continue
            recent = all_recent.get(decision.worker)
            if recent is None:
                recent = all_recent[decision.worker] = deque(maxlen=_KEPT)
            recent.append(decision)
        event = {
            "action": "decided",
            "decisions": told,
            "dispatch_fields": Dispatch._fields,
            "dispatches": dispatches,
        }
        self._scheduler.log_event(PLUGIN_NAME, event)

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
