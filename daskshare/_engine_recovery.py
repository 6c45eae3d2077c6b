"""What to do about a batch that failed: smaller batches, halves, or an error for one caller."""

from __future__ import annotations

from dataclasses import dataclass

from daskshare._engine_request import Segment, split
from daskshare._engine_runner import is_out_of_memory
from daskshare.device import Device
from daskshare.errors import InferenceError, OutOfDeviceMemoryError

__all__ = ["Reaction", "react"]


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
