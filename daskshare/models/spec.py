"""What a model is, before and after it is loaded. No torch here: the scheduler reads this module.

A :class:`ModelSpec` is the small picklable description that travels in task graphs. Its ``load``
turns it into a :class:`Program` on one device; an engine drives the program.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

if TYPE_CHECKING:
    import torch

    from daskshare.device import Device

__all__ = [
    "DETECTION_COLUMNS",
    "Detections",
    "FrameBatch",
    "FrameSource",
    "FrameStream",
    "ModelSpec",
    "Prepared",
    "Program",
]

#: Columns of a table of detections, one row an object.
DETECTION_COLUMNS = (
    "video",
    "frame",
    "pts_seconds",
    "class_id",
    "class_name",
    "confidence",
    "x_min",
    "y_min",
    "x_max",
    "y_max",
)


@runtime_checkable
class ModelSpec(Protocol):
    """Description of a model: frozen, picklable, hashable by content, free of torch at import.

    Attributes
    ----------
    name : str
        For people; need not be unique.
    key : str
        Digest of all that decides what the loaded model computes. Equal keys share one copy.
    """

    @property
    def name(self) -> str: ...

    @property
    def key(self) -> str: ...

    def estimated_bytes(self) -> int:
        """Bytes of device memory that the loaded weights will take; 0 when unknown."""
        ...

    def load(self, device: Device) -> Program:
        """Load onto ``device``. Runs in a loader thread, never on an event loop."""
        ...


@dataclass(slots=True)
class Prepared:
    """A request in the form that an engine takes.

    Parameters
    ----------
    items : numpy.ndarray or torch.Tensor
        One item a frame along the first axis, equal shapes; host memory (NumPy or torch CPU) or
        the engine's own device. The engine reads it until the request is done and never writes it.
    context : object
        What :meth:`Program.finish` needs to map outputs back (source sizes, for example).
    """

    items: Any
    context: Any = None

    @property
    def num_items(self) -> int:
        """Number of frames."""
        return int(self.items.shape[0])


class Program(Protocol):
    """A loaded model as the engine sees it.

    ``prepare`` and ``finish`` run in the callers' threads, many at once, and must release the
    interpreter lock for heavy work. ``forward`` and what ``compile`` returns run only in the
    engine's one thread.

    Attributes
    ----------
    item_shape : tuple of int or None
        Shape of one prepared item; ``None`` when it is taken from each request. Requests are
        batched only with requests of the same item shape and dtype.
    max_batch_size : int
        Default largest batch, frames.
    batch_sizes : tuple of int
        Ascending sizes to which a batch is padded; empty: batches are never padded.
    model_bytes : int
        Bytes of device memory that the weights take.
    graph_capturable : bool
        Whether ``forward`` may be captured into a CUDA graph (fixed shapes, no host round trip).

    Notes
    -----
    A program may have ``letterbox_size`` (height, width) and ``prepare_letterboxed(frames,
    source_size)``: then a decoder may letterbox frames on its way, which saves a pass over them.
    """

    item_shape: tuple[int, ...] | None
    max_batch_size: int
    batch_sizes: tuple[int, ...]
    model_bytes: int
    graph_capturable: bool

    def prepare(self, inputs: Any) -> Prepared:
        """Check and convert what a caller handed in. Raises InvalidInputError."""
        ...

    def forward(self, batch: torch.Tensor) -> Any:
        """Compute a batch ``(n, *item_shape)`` on the device.

        Returns a tensor, or a tuple, list or dict of tensors, each with n as its first axis.
        """
        ...

    def compile(self, batch_size: int) -> Any:
        """Return a faster callable equal to ``forward`` for batches of ``batch_size``, or ``None``.

        Runs in a background thread while ``forward`` goes on serving; may take a minute. Its
        attribute ``description``, where it has one, is shown in the engine's statistics.
        """
        ...

    def finish(self, outputs: Any, context: Any) -> Any:
        """Turn a request's outputs (host arrays, structured as ``forward``'s) into its result."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Detections:
    """Objects found in one frame, ordered by falling confidence.

    Parameters
    ----------
    xyxy : numpy.ndarray, shape (n, 4), float32
        Corners x_min, y_min, x_max, y_max in pixels of the source frame, not clipped.
    confidence : numpy.ndarray, shape (n,), float32
        In [0, 1].
    class_id : numpy.ndarray, shape (n,), int16
        Index into ``class_names``.
    class_names : tuple of str
        All classes of the model.
    """

    xyxy: np.ndarray
    confidence: np.ndarray
    class_id: np.ndarray
    class_names: tuple[str, ...] = field(repr=False)

    def __len__(self) -> int:
        return len(self.confidence)

    def names(self) -> list[str]:
        """Class names of the objects, in order."""
        return [self.class_names[i] for i in self.class_id]

    def _repr_html_(self) -> str:
        """Show the objects as a table, in notebooks."""
        from daskshare.html_repr import table

        rows = [
            [name, float(confidence), *(round(float(side), 1) for side in box)]
            for name, confidence, box in zip(self.names(), self.confidence, self.xyxy, strict=True)
        ]
        title = f"{len(self):,} object{'' if len(self) == 1 else 's'}"
        return table(title, ("class", "confidence", "x_min", "y_min", "x_max", "y_max"), rows)


@dataclass(slots=True)
class FrameBatch:
    """Decoded frames that follow one another.

    Parameters
    ----------
    frames : numpy.ndarray or torch.Tensor, shape (n, height, width, 3), uint8
        RGB; host memory, or a CUDA device's.
    first_frame : int
        0-based index of the first frame in the video's presentation order.
    pts_seconds : numpy.ndarray, shape (n,), float64
        Presentation times from the start of the stream's time axis.
    source_size : tuple of int, optional
        Height and width of the source's frames where ``frames`` are already letterboxed for the
        network; ``None``: they are the source's own.
    """

    frames: Any
    first_frame: int
    pts_seconds: np.ndarray
    source_size: tuple[int, int] | None = None


class FrameStream(Protocol):
    """Iterator of FrameBatch; after it ends, ``problem`` and ``decoder`` tell how it went."""

    #: Why frames are missing at the end of what came ("" when none are).
    problem: str
    #: "nvdec" or "pyav".
    decoder: str

    def __iter__(self) -> Iterator[FrameBatch]: ...


@runtime_checkable
class FrameSource(Protocol):
    """Something that can be decoded into frames inside a task: a VideoChunk, for example."""

    @property
    def video(self) -> str: ...

    def open_frames(
        self,
        *,
        device: Device | None = None,
        batch_frames: int | None = None,
        input_size: tuple[int, int] | None = None,
    ) -> AbstractContextManager[FrameStream]:
        """Start decoding; frames may come in the memory of ``device``, letterboxed for a network.

        ``input_size`` is given only to a model with a ``letterbox_size``, on a CUDA device.
        """
        ...
