"""What a worker's share did in the last seconds, from what it has done in all."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

__all__ = ["RecentRates"]

# Reports may be asked for in quick succession; samples this dense would say nothing new.
_LEAST_STEP_SECONDS = 0.25


class _Sample(NamedTuple):
    now_seconds: float
    spent_seconds: Mapping[str, float]
    models: Mapping[str, tuple[int, Mapping[str, int]]]


class RecentRates:
    """A sliding window over a share's reports. Pure: time is an argument.

    Parameters
    ----------
    window_seconds : float
        How far back, as far as reports came that often.

    Notes
    -----
    Not thread-safe.
    """

    def __init__(self, window_seconds: float = 5.0) -> None:
        self.window_seconds = window_seconds
        self._samples: deque[_Sample] = deque()

    def recent(self, now_seconds: float, report: Mapping[str, Any]) -> dict[str, Any]:
        """Take in a report and say what happened since the oldest one of the window.

        Parameters
        ----------
        now_seconds : float
            When the report was made.
        report : mapping
            ``ModelShare.report()``.

        Returns
        -------
        dict
            ``seconds`` that it spans (0.0 with the first report), ``time_fraction`` (by state, see
            :data:`daskshare.timesplit.STATES`; adds up to 1) and ``models``: for each that ran,
            ``frames_per_second`` and ``batch_size_counts``.
        """
        sample = _Sample(
            now_seconds,
            report["spent_seconds"],
            {k: (m["frames"], m["batch_size_counts"]) for k, m in report["models"].items()},
        )
        samples = self._samples
        if samples and not _follows(samples[-1], sample):
            # Another share than before: the process's last worker left and a new one came.
            samples.clear()
        while len(samples) > 1 and samples[1].now_seconds <= now_seconds - self.window_seconds:
            samples.popleft()
        answer = _between(samples[0] if samples else sample, sample)
        if not samples or now_seconds - samples[-1].now_seconds >= _LEAST_STEP_SECONDS:
            samples.append(sample)
        return answer


def _follows(before: _Sample, after: _Sample) -> bool:
    return before.models.keys() <= after.models.keys() and all(
        seconds <= after.spent_seconds[state] for state, seconds in before.spent_seconds.items()
    )


def _between(before: _Sample, after: _Sample) -> dict[str, Any]:
    seconds = after.now_seconds - before.now_seconds
    spent = {
        state: total - before.spent_seconds[state] for state, total in after.spent_seconds.items()
    }
    accounted = sum(spent.values())
    models = {}
    for key, (frames, counts) in after.models.items():
        past_frames, past_counts = before.models.get(key, (0, {}))
        if frames > past_frames and seconds > 0:
            models[key] = {
                "frames_per_second": (frames - past_frames) / seconds,
                "batch_size_counts": {
                    size: count - past_counts.get(size, 0)
                    for size, count in counts.items()
                    if count > past_counts.get(size, 0)
                },
            }
    return {
        "seconds": seconds,
        "time_fraction": {
            state: value / accounted if accounted > 0 else 0.0 for state, value in spent.items()
        },
        "models": models,
    }
