"""How a network runs with few passes over memory: which layers become one step, where results lie.

Pure planning, without torch. A step reads and writes views: some channels of a buffer. A
concatenation is a buffer whose parts are written in place by whoever computes them, so it costs
nothing by itself; buffers whose lifetimes do not overlap share memory.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import TypeGuard

from daskshare.models.plan import (
    Convolutional,
    Layer,
    MaxPool,
    NetworkPlan,
    Route,
    Shortcut,
    Upsample,
    Yolo,
)
from daskshare.models.steps import (
    Buffer,
    Convolve,
    Copy,
    Enlarge,
    FusedPlan,
    Head,
    Pool,
    Stem,
    Step,
    Sum,
    Unit,
    View,
    views_of,
)

__all__ = ["fuse"]

# Channels of a buffer come in eights, 16 bytes in half precision: what the kernels move at once.
_CHANNELS = 8
_ALIGNMENT = 256


def fuse(
    network: NetworkPlan,
    *,
    stem: bool = False,
    units: Collection[int] = (),
    strided: bool = True,
) -> FusedPlan:
    """Plan a network.

    Parameters
    ----------
    network : NetworkPlan
        All layers with shapes.
    stem : bool
        Whether a kernel exists that does the first two convolutions, 3 to 32 to 64 channels, the
        second with stride 2.
    units : collection of int
        Channels for which a kernel exists that does a residual unit with half of them between.
    strided : bool
        Whether convolutions may write and read parts of wider buffers.

    Returns
    -------
    FusedPlan
    """
    return _Planner(network, stem=stem, units=units, strided=strided).plan()


class _Planner:
    def __init__(
        self, network: NetworkPlan, *, stem: bool, units: Collection[int], strided: bool
    ) -> None:
        self._layers = network.layers
        self._stem, self._units, self._strided = stem, units, strided
        self._readers = _readers(network)
        self._shapes: list[tuple[int, int, int]] = []
        self._steps: list[Step] = []
        #: Where each layer's output lies, once decided.
        self._views: dict[int, View] = {}

    def plan(self) -> FusedPlan:
        self._place_concatenations()
        heads: list[Head] = []
        index = 0
        while index < len(self._layers):
            layer = self._layers[index]
            used = self._fused(index)
            if used == 0:
                used = 1
                if isinstance(layer, Yolo):
                    heads.append(Head(index, self._views[index - 1]))
                else:
                    self._single(layer)
            index += used
        self._steps += heads
        return _allocate(self._steps, self._shapes)

    # -- where results lie --

    def _buffer(self, channels: int, height: int, width: int) -> View:
        padded = -(channels // -_CHANNELS) * _CHANNELS
        self._shapes.append((padded, height, width))
        return View(len(self._shapes) - 1, 0, channels)

    def _target(self, layer: Layer) -> View:
        if layer.index not in self._views:
            channels = layer.channels
            if self._feeds_only_heads(layer.index):
                channels = -(channels // -_CHANNELS) * _CHANNELS
            self._views[layer.index] = self._buffer(channels, layer.height, layer.width)
        return self._views[layer.index]

    def _place_concatenations(self) -> None:
        """Give the parts of each concatenation their places before anybody computes them."""
        for layer in self._layers:
            if not isinstance(layer, Route) or len(layer.sources) == 1 or layer.groups > 1:
                continue
            channels = [self._layers[source].channels for source in layer.sources]
            if any(count % _CHANNELS for count in channels):
                continue
            whole = self._target(layer)
            start = 0
            for source, count in zip(layer.sources, channels, strict=True):
                if self._may_write_apart(source):
                    self._views[source] = View(whole.buffer, start, count)
                start += count

    def _may_write_apart(self, index: int) -> bool:
        if index in self._views:
            return False
        layer = self._layers[index]
        if isinstance(layer, Route | Yolo):
            return False
        # Enlarging and pooling are kernels that write anywhere; the others need strides.
        return self._strided or isinstance(layer, Upsample | MaxPool)

    def _feeds_only_heads(self, index: int) -> bool:
        readers = self._readers[index]
        return bool(readers) and all(isinstance(self._layers[r], Yolo) for r in readers)

    # -- steps of several layers; each returns how many it took --

    def _fused(self, index: int) -> int:
        return self._fused_stem(index) or self._fused_unit(index) or self._fused_sum(index)

    def _fused_stem(self, index: int) -> int:
        pair = self._layers[:2]
        if not (self._stem and index == 0 and len(self._layers) > 2 and self._readers[0] == [1]):
            return 0
        shapes = [_convolution(layer) for layer in pair]
        if shapes != [(3, 3, 1, 1, 32, "leaky"), (32, 3, 2, 1, 64, "leaky")]:
            return 0
        if self._layers[0].height % 2 or self._layers[0].width % 4 or not self._packed(1):
            return 0
        self._steps.append(Stem(0, 1, self._target(self._layers[1])))
        return 2

    def _fused_unit(self, index: int) -> int:
        if not self._units or index == 0 or index + 3 > len(self._layers):
            return 0
        first, second, shortcut = self._layers[index : index + 3]
        channels = second.channels
        wanted = [
            (channels, 1, 1, 0, channels // 2, "leaky"),
            (channels // 2, 3, 1, 1, channels, "leaky"),
        ]
        if channels not in self._units or [_convolution(first), _convolution(second)] != wanted:
            return 0
        if not (
            _is_plain_sum(shortcut)
            and shortcut.sources == (index - 1,)
            and self._readers[index] == [index + 1]
            and self._readers[index + 1] == [index + 2]
            and self._packed(index - 1)
            and self._packed(index + 2)
        ):
            return 0
        source = self._views[index - 1]
        self._steps.append(Unit(index, index + 1, source, self._target(shortcut)))
        return 3

    def _packed(self, index: int) -> bool:
        view = self._target(self._layers[index])
        return view.start == 0 and view.channels == self._shapes[view.buffer][0]

    def _fused_sum(self, index: int) -> int:
        """A convolution whose only reader adds one earlier result to it."""
        if index + 2 > len(self._layers):
            return 0
        layer, shortcut = self._layers[index : index + 2]
        if not (
            isinstance(layer, Convolutional)
            and _is_plain_sum(shortcut)
            and len(shortcut.sources) == 1
            and shortcut.sources[0] != index
            and self._readers[index] == [index + 1]
            and self._layers[shortcut.sources[0]].channels == layer.channels
        ):
            return 0
        residual = self._views[shortcut.sources[0]]
        source = self._views[index - 1] if index else None
        self._steps.append(Convolve(index, source, self._target(shortcut), residual))
        return 2

    # -- steps of one layer --

    def _single(self, layer: Layer) -> None:
        index = layer.index
        if isinstance(layer, Route):
            self._route(layer)
            return
        source = self._views[index - 1] if index else None
        if isinstance(layer, Convolutional):
            self._steps.append(Convolve(index, source, self._target(layer)))
            return
        if source is None:
            raise ValueError("got a network that does not begin with a convolution; cannot fuse it")
        target = self._target(layer)
        if isinstance(layer, Upsample):
            self._steps.append(Enlarge(source, target, layer.stride))
        elif isinstance(layer, MaxPool):
            self._steps.append(Pool(index, source, target))
        elif isinstance(layer, Shortcut):
            sources = (source, *(self._views[i] for i in layer.sources))
            self._steps.append(Sum(index, sources, target))
        else:
            raise ValueError(f"got a {type(layer).__name__}; cannot fuse it")

    def _route(self, layer: Route) -> None:
        parts = []
        for source in layer.sources:
            view = self._views[source]
            count = self._layers[source].channels // layer.groups
            parts.append(View(view.buffer, view.start + layer.group_id * count, count))
        if len(parts) == 1 and layer.index not in self._views:
            self._views[layer.index] = parts[0]
            return
        target = self._target(layer)
        start = target.start
        for part in parts:
            place = View(target.buffer, start, part.channels)
            if part != place:
                self._steps.append(Copy(part, place))
            start += part.channels


def _convolution(layer: Layer) -> tuple[int, int, int, int, int, str] | None:
    if not isinstance(layer, Convolutional) or layer.groups != 1:
        return None
    return (
        layer.in_channels,
        layer.size,
        layer.stride,
        layer.padding,
        layer.channels,
        layer.activation,
    )


def _is_plain_sum(layer: Layer) -> TypeGuard[Shortcut]:
    return isinstance(layer, Shortcut) and layer.activation == "linear"


def _readers(network: NetworkPlan) -> list[list[int]]:
    """For each layer the layers that read its output, in order."""
    readers: list[list[int]] = [[] for _ in network.layers]
    for layer in network.layers:
        if isinstance(layer, Route):
            sources = set(layer.sources)
        else:
            sources = {layer.index - 1} if layer.index else set()
            if isinstance(layer, Shortcut):
                sources |= set(layer.sources)
            # A head's output is boxes: what follows it names its own sources.
        for source in sorted(sources):
            readers[source].append(layer.index)
    return readers


def _allocate(steps: list[Step], shapes: list[tuple[int, int, int]]) -> FusedPlan:
    first = [len(steps)] * len(shapes)
    last = [-1] * len(shapes)
    for number, step in enumerate(steps):
        for view in views_of(step):
            first[view.buffer] = min(first[view.buffer], number)
            last[view.buffer] = max(last[view.buffer], number)
    buffers = [
        Buffer(*shape, offset=-1, first_step=first[i], last_step=last[i])
        for i, shape in enumerate(shapes)
    ]
    # The largest first: the small ones find room between them.
    arena_size = 0
    for i in sorted(range(len(buffers)), key=lambda i: (-buffers[i].size, i)):
        own = buffers[i]
        offset = 0
        taken = [
            other
            for other in buffers
            if other.offset >= 0
            and other.first_step <= own.last_step
            and own.first_step <= other.last_step
        ]
        for other in sorted(taken, key=lambda other: other.offset):
            if offset + own.size <= other.offset:
                break
            offset = max(offset, -((other.offset + other.size) // -_ALIGNMENT) * _ALIGNMENT)
        buffers[i] = replace(own, offset=offset)
        arena_size = max(arena_size, offset + own.size)
    return FusedPlan(tuple(steps), tuple(buffers), arena_size)
