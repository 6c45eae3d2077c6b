"""What workers report, as the placement of models needs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["SpeedMeter", "WorkerFacts"]

#: Less of a device's time than this says nothing about its speed.
_MIN_BUSY_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """One worker's report in short.

    Parameters
    ----------
    state : {"ready", "starting", "failed", "absent"}
        Of its share.
    reason : str
        Of a failure.
    process : str
        The same for workers of one process, which share one copy of each model.
    device_uuid : str
        Its device, the same for all processes that use it.
    is_gpu : bool
        Whether that is a GPU.
    budget_bytes : int
        What models may take of the device.
    free_bytes : int or None
        What nobody has taken of the device.
    resident : dict of str to int
        Bytes of each model that is ready there.
    """

    state: str
    reason: str
    process: str
    device_uuid: str
    is_gpu: bool
    budget_bytes: int
    free_bytes: int | None
    resident: dict[str, int]

    @classmethod
    def from_report(cls, report: dict[str, Any]) -> WorkerFacts:
        """Read a report of :func:`daskshare.worker_plugin.worker_report`."""
        device = report.get("device") or {}
        return cls(
            state=report["state"],
            reason=report.get("reason", ""),
            process=report.get("share", ""),
            device_uuid=device.get("uuid", ""),
            is_gpu=device.get("kind") == "cuda",
            budget_bytes=report.get("budget_bytes", 0),
            free_bytes=report.get("free_bytes"),
            resident={
                key: model["model_bytes"]
                for key, model in (report.get("models") or {}).items()
                if model["state"] == "ready"
            },
        )


class SpeedMeter:
    """Frames a second of one worker's models while the device works, from its last reports."""

    def __init__(self) -> None:
        self._counted: dict[str, tuple[int, float]] = {}
        self._speeds: dict[str, float] = {}

    def measure(self, report: dict[str, Any]) -> dict[str, float]:
        """Take in a report; return the speed of each model that was measured so far."""
        for key, model in (report.get("models") or {}).items():
            engine = model.get("engine")
            if not engine:
                continue
            frames, busy_seconds = engine["frames"], engine["busy_seconds"]
            before_frames, before_seconds = self._counted.get(key, (0, 0.0))
            if busy_seconds < before_seconds:
                # A new engine counts from the start.
                before_frames, before_seconds = 0, 0.0
            if busy_seconds - before_seconds >= _MIN_BUSY_SECONDS:
                speed = (frames - before_frames) / (busy_seconds - before_seconds)
                last = self._speeds.get(key, speed)
                self._speeds[key] = (last + speed) / 2
                self._counted[key] = (frames, busy_seconds)
        return self._speeds
