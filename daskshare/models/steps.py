"""What a fused network is made of: steps, the views they read and write, and the buffers.

Without torch; :mod:`daskshare.models.fusion` makes such plans and :mod:`daskshare.models.fused`
carries them out.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "Buffer",
    "Convolve",
    "Copy",
    "Enlarge",
    "FusedPlan",
    "Head",
    "Pool",
    "Stem",
    "Step",
    "Sum",
    "Unit",
    "View",
    "views_of",
]


@dataclass(frozen=True, slots=True)
class Buffer:
    """Activations (height, width, channels) of each frame, channels innermost.

    Parameters
    ----------
    channels, height, width : int
        Shape for one frame.
    offset : int
        Where it starts in the arena, in values of one frame; times the batch size.
    first_step, last_step : int
        From which step on and up to which one its content counts.
    """

    channels: int
    height: int
    width: int
    offset: int
    first_step: int
    last_step: int

    @property
    def size(self) -> int:
        """Values of one frame."""
        return self.channels * self.height * self.width


@dataclass(frozen=True, slots=True)
class View:
    """``channels`` channels of buffer number ``buffer``, from ``start`` on."""

    buffer: int
    start: int
    channels: int


@dataclass(frozen=True, slots=True)
class Convolve:
    """Convolution ``layer`` with bias and activation, then perhaps a sum with ``residual``.

    ``source`` is None for the frames themselves. ``target`` has the channels of the layer, rounded
    up to eights where only a head reads it.
    """

    layer: int
    source: View | None
    target: View
    residual: View | None = None


@dataclass(frozen=True, slots=True)
class Stem:
    """Convolutions ``first`` and ``second`` in one kernel that reads the frames."""

    first: int
    second: int
    target: View


@dataclass(frozen=True, slots=True)
class Unit:
    """Convolutions ``first`` and ``second`` and the sum with ``source`` in one kernel."""

    first: int
    second: int
    source: View
    target: View


@dataclass(frozen=True, slots=True)
class Enlarge:
    """Every pixel of ``source`` becomes ``factor`` x ``factor`` pixels of ``target``."""

    source: View
    target: View
    factor: int


@dataclass(frozen=True, slots=True)
class Pool:
    """Maxima over windows, as ``layer`` says."""

    layer: int
    source: View
    target: View


@dataclass(frozen=True, slots=True)
class Sum:
    """Sum of ``sources``, then the activation of shortcut ``layer``."""

    layer: int
    sources: tuple[View, ...]
    target: View


@dataclass(frozen=True, slots=True)
class Copy:
    """What could not be written in place."""

    source: View
    target: View


@dataclass(frozen=True, slots=True)
class Head:
    """Detection head ``layer`` reads ``source``."""

    layer: int
    source: View


Step = Convolve | Stem | Unit | Enlarge | Pool | Sum | Copy | Head


@dataclass(frozen=True, slots=True)
class FusedPlan:
    """Steps in order and the buffers they work on.

    Parameters
    ----------
    steps : tuple of Step
        The last ones are the heads.
    buffers : tuple of Buffer
        By number.
    arena_size : int
        Values of all buffers together for one frame.
    """

    steps: tuple[Step, ...]
    buffers: tuple[Buffer, ...]
    arena_size: int


def views_of(step: Step) -> list[View]:
    """All views that a step reads or writes."""
    names = ("source", "residual", "target")
    found = [getattr(step, name, None) for name in names]
    return [view for view in (*found, *getattr(step, "sources", ())) if view is not None]
