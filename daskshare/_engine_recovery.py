"""What to do about a batch that failed: smaller batches, halves, or an error for one caller."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from daskshare._engine_queue import RequestQueue
from daskshare._engine_request import Group, HostOutputs, Request, Segment, split
from daskshare._engine_runner import Runner, is_out_of_memory
from daskshare.device import Device
from daskshare.errors import InferenceError, OutOfDeviceMemoryError

__all__ = ["Reaction", "Recovery", "react"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Reaction:
    """What follows a failure.

    Parameters
    ----------
    parts : list of list of Segment
        To run again, in this order.
    ceiling : int or None
        Largest batch from now on.
    failure : InferenceError or None
        For the request of the one item that was run.
    """

    parts: list[list[Segment]]
    ceiling: int | None = None
    failure: InferenceError | None = None


def react(
    segments: list[Segment], padded_size: int, error: Exception, *, model: str, device: Device
) -> Reaction:
    """Decide what follows the failure of a batch.

    Parameters
    ----------
    segments : list of Segment
        What the batch held; at least one item.
    padded_size : int
        Rows that ran.
    error : Exception
        What the model raised.
    model : str
        Name for messages.
    device : Device
        Where it runs.
    """
    out_of_memory = is_out_of_memory(error)
    if out_of_memory and padded_size > 1:
        return Reaction([segments], ceiling=padded_size // 2)
    num_items = sum(segment.num_items for segment in segments)
    if num_items > 1:
        return Reaction(list(split(segments, num_items // 2)))
    frame = segments[0].piece.offset + segments[0].start
    reason = f"{type(error).__name__}: {error}"
    if out_of_memory:
        failure: InferenceError = OutOfDeviceMemoryError(
            f"Model {model!r} has no memory on {device.name} for a batch of one frame ({reason}). "
            "Unload other models or make frames smaller.",
            model=model,
            frame=frame,
        )
    else:
        failure = InferenceError(
            f"Model {model!r} failed on frame {frame} of the request: {reason}",
            model=model,
            frame=frame,
        )
    failure.__cause__ = error
    return Reaction([], failure=failure)


class Recovery:
    """Runs a failed batch again in ever smaller parts, so that only its bad frames fail.

    Parameters
    ----------
    runner : Runner
        With no batch in flight.
    queue : RequestQueue
        Its batcher's ceiling falls when memory ran out.
    model : str
        Name for messages.
    device : Device
        Where it runs.
    deliver : callable
        Takes the outputs of a part that succeeded.
    fail : callable
        Ends a request with an error.

    Notes
    -----
    Used by the engine's thread for one failed batch.
    """

    def __init__(
        self,
        runner: Runner,
        queue: RequestQueue,
        model: str,
        device: Device,
        deliver: Callable[[list[Segment], int, int, HostOutputs, float], None],
        fail: Callable[[Request, InferenceError], None],
    ) -> None:
        self._runner = runner
        self._queue = queue
        self._model = model
        self._device = device
        self._deliver = deliver
        self._fail = fail
        self._todo: list[list[Segment]] = []

    def start(self, segments: list[Segment], padded_size: int, error: Exception) -> None:
        """Take a batch that failed with ``error``."""
        num_items = sum(segment.num_items for segment in segments)
        if num_items < padded_size and not is_out_of_memory(error):
            # An old row in the padding may be the bad one: run again with padding of its own.
            traceback.clear_frames(error.__traceback__)
            self._todo = [segments]
        else:
            self._react(segments, padded_size, error)

    def step(self, group: Group) -> bool:
        """Run one part; False when none is left."""
        if not self._todo:
            return False
        part = [s for s in self._todo.pop() if not s.piece.request.finished]
        part, rest = split(part, self._queue.batcher.ceiling)
        if rest:
            self._todo.append(rest)
        num_items = sum(segment.num_items for segment in part)
        if not num_items:
            return True
        padded_size = self._queue.batcher.padded_size(num_items)
        started_seconds = time.monotonic()
        try:
            outputs = self._runner.run_now(part, group, num_items, padded_size)
        except Exception as error:
            self._runner.check_device()
            self._react(part, padded_size, error)
        else:
            self._deliver(part, num_items, padded_size, outputs, started_seconds)
        return True

    def _react(self, segments: list[Segment], padded_size: int, error: Exception) -> None:
        # Frames of the failed call hold tensors: device memory, for as long as the error lives.
        traceback.clear_frames(error.__traceback__)
        reaction = react(segments, padded_size, error, model=self._model, device=self._device)
        if reaction.ceiling is not None:
            with self._queue.lock:
                ceiling = min(self._queue.batcher.ceiling, reaction.ceiling)
                self._queue.batcher.set_ceiling(ceiling)
            logger.warning("Model %s: out of memory, batches of %d now", self._model, ceiling)
            self._runner.shrink(ceiling)
        if reaction.failure is not None:
            self._fail(segments[0].piece.request, reaction.failure)
        self._todo += reaction.parts[::-1]
