"""What a worker reports: the last seconds besides all time, and less on heartbeats. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

__all__ = ["RecentRates", "batch_bins", "for_heartbeat"]

# Reports may be asked for in quick succession; samples this dense would say nothing new.
_LEAST_STEP_SECONDS = 0.25


class _Sample(NamedTuple):
    now_seconds: float
    spent_seconds: Mapping[str, float]
    #: By model: frames, batches.
    models: Mapping[str, tuple[int, int]]
    bins: Mapping[str, int]


class RecentRates:
    """A sliding window over a share's reports; time is an argument.

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
            ``ModelShare.report()`` with ``batch_bins`` (:func:`batch_bins` of all its models).

        Returns
        -------
        dict
            ``seconds`` that it spans (0.0 with the first report), ``time_fraction`` (by state, see
            :data:`daskshare.timesplit.STATES`; adds up to 1), ``frames``, ``batches``,
            ``batch_bins``, and ``frames_per_second`` by model, of those that ran.
        """
        sample = _Sample(
            now_seconds,
            report["spent_seconds"],
            {k: (m["frames"], m["batches"]) for k, m in report["models"].items()},
            report["batch_bins"],
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
    frames_per_second = {}
    frames = batches = 0
    for key, (all_frames, all_batches) in after.models.items():
        past_frames, past_batches = before.models.get(key, (0, 0))
        frames += all_frames - past_frames
        batches += all_batches - past_batches
        if all_frames > past_frames and seconds > 0:
            frames_per_second[key] = (all_frames - past_frames) / seconds
    return {
        "seconds": seconds,
        "time_fraction": {
            state: value / accounted if accounted > 0 else 0.0 for state, value in spent.items()
        },
        "frames": frames,
        "batches": batches,
        "batch_bins": {
            size: count - before.bins.get(size, 0)
            for size, count in after.bins.items()
            if count > before.bins.get(size, 0)
        },
        "frames_per_second": frames_per_second,
    }


def batch_bins(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Add up batches by size, in bins that end at powers of two.

    Parameters
    ----------
    counts : iterable of mapping
        How many batches held how many items; one mapping a model.

    Returns
    -------
    dict of str to int
        By the largest size of a bin: "1", "2", "4" (3 and 4), "8" (5 to 8), ...; without empty
        ones, the smallest first.
    """
    bins: dict[int, int] = {}
    for one in counts:
        for size, count in one.items():
            most = 1 << (int(size) - 1).bit_length()
            bins[most] = bins.get(most, 0) + count
    return {str(most): bins[most] for most in sorted(bins)}


def for_heartbeat(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return a report without what the scheduler has no use for: it gets one of each worker."""
    slim = dict(report)
    if "models" in slim:
        slim["models"] = {key: _slim(model) for key, model in slim["models"].items()}
    return slim


def _slim(model: Mapping[str, Any]) -> dict[str, Any]:
    slim = {name: value for name, value in model.items() if name != "batch_size_counts"}
    if slim.get("engine"):
        slim["engine"] = {k: v for k, v in slim["engine"].items() if k != "batch_size_counts"}
    return slim
