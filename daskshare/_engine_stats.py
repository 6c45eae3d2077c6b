"""What an engine has done, counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["EngineStats", "Tally"]


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What an engine has done so far.

    Parameters
    ----------
    frames : int
        Items whose outputs were delivered.
    batches : int
        Forward passes that delivered them.
    batch_size_counts : dict of int to int
        How many batches held how many items (padding not counted).
    queue_frames : int
        Items that wait now.
    queue_age_seconds : float
        How long the oldest of them has waited; 0.0 when none waits.
    busy_seconds : float
        Time during which at least one batch was on the device.
    mode : {"eager", "compiled"}
        Which forward pass serves full batches.
    compiled_as : str
        How the compiled forward pass was made, in the model's words; "" for none.
    graphs : int
        CUDA graphs captured.
    ceiling : int
        Largest batch now; less than asked for after memory ran out.
    errors : int
        Requests that failed.
    compile_error, graph_error : str
        Why there is no compiled forward pass or no CUDA graph although asked for; "" otherwise.
    """

    frames: int
    batches: int
    batch_size_counts: dict[int, int]
    queue_frames: int
    queue_age_seconds: float
    busy_seconds: float
    mode: str
    compiled_as: str
    graphs: int
    ceiling: int
    errors: int
    compile_error: str
    graph_error: str

    @property
    def mean_batch_size(self) -> float:
        """Items in a batch on average; 0.0 before the first."""
        return self.frames / self.batches if self.batches else 0.0


class Tally:
    """Running counts; under the engine's lock."""

    def __init__(self) -> None:
        self.frames = 0
        self.batches = 0
        self.errors = 0
        self.sizes: Counter[int] = Counter()
        self.busy_seconds = 0.0
        self._last_done_seconds = 0.0
        self._usual_seconds: dict[int, float] = {}

    def add(
        self, num_items: int, padded_size: int, launched_seconds: float, done_seconds: float
    ) -> None:
        """Count a batch that is done; batches overlap, so its time starts after the last one's."""
        self.frames += num_items
        self.batches += 1
        self.sizes[num_items] += 1
        took_seconds = done_seconds - max(launched_seconds, self._last_done_seconds)
        self.busy_seconds += took_seconds
        self._last_done_seconds = done_seconds
        before = self._usual_seconds.get(padded_size, took_seconds)
        self._usual_seconds[padded_size] = (before + took_seconds) / 2

    def free_seconds(self, launched_seconds: float, padded_sizes: Iterable[int]) -> float:
        """Guess when the device will have run the batches in flight, the first launched then."""
        return max(launched_seconds, self._last_done_seconds) + sum(
            self._usual_seconds.get(size, 0.0) for size in padded_sizes
        )
