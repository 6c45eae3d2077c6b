"""A network as a checked list of layers with shapes: what a Darknet cfg says, without torch."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "ACTIVATIONS",
    "Convolutional",
    "Layer",
    "MaxPool",
    "NetworkPlan",
    "Route",
    "Shortcut",
    "Upsample",
    "Yolo",
]

#: Activations that :mod:`daskshare.models.network` computes.
ACTIVATIONS = ("leaky", "linear", "logistic", "mish", "relu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One layer; every index counts layers from 0, ``[net]`` left out.

    Parameters
    ----------
    index : int
        Position in the network.
    line : int
        1-based line of the section's header.
    channels, height, width : int
        Shape of the output.
    """

    index: int
    line: int
    channels: int
    height: int
    width: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Convolutional(Layer):
    """Convolution, batch norm (folded when weights are read), activation."""

    in_channels: int
    size: int
    stride: int
    padding: int
    groups: int
    batch_normalize: bool
    activation: str

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """Shape of the kernel: (out channels, in channels of a group, size, size)."""
        return (self.channels, self.in_channels // self.groups, self.size, self.size)

    @property
    def num_parameters(self) -> int:
        """Floats that Darknet stores: the kernel, the bias and three batch-norm vectors."""
        out, per_group, size, _ = self.weight_shape
        return out * per_group * size * size + out * (4 if self.batch_normalize else 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortcut(Layer):
    """Sum of the previous layer and of the ``sources``, then an activation."""

    sources: tuple[int, ...]
    activation: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Route(Layer):
    """Channels of the ``sources`` one after another; of each, part ``group_id`` of ``groups``."""

    sources: tuple[int, ...]
    groups: int
    group_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Upsample(Layer):
    """Nearest-neighbour enlargement."""

    stride: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MaxPool(Layer):
    """Maximum over windows; pads are (left, right, top, bottom) and never win."""

    size: int
    stride: int
    pads: tuple[int, int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Yolo(Layer):
    """Detection head.

    Parameters
    ----------
    anchors : tuple of (float, float)
        Width and height in pixels of the network's input, those of this head's mask only.
    num_classes : int
        Classes a box can have.
    scale_xy : float
        Stretch of the centre's sigmoid about 0.5.
    """

    anchors: tuple[tuple[float, float], ...]
    num_classes: int
    scale_xy: float


@dataclass(frozen=True, slots=True)
class NetworkPlan:
    """All layers of one network for one input size.

    Parameters
    ----------
    height, width : int
        Input size in pixels. The input has three channels.
    layers : tuple of Layer
        In order of computing.
    """

    height: int
    width: int
    layers: tuple[Layer, ...]

    @property
    def convolutions(self) -> tuple[Convolutional, ...]:
        """Layers that have weights, in the order of the weights file."""
        return tuple(layer for layer in self.layers if isinstance(layer, Convolutional))

    @property
    def heads(self) -> tuple[Yolo, ...]:
        """Detection heads, in order."""
        return tuple(layer for layer in self.layers if isinstance(layer, Yolo))

    @property
    def num_classes(self) -> int:
        """Number of classes, the same in every head."""
        return self.heads[0].num_classes

    @property
    def num_boxes(self) -> int:
        """Boxes that all heads predict for one frame."""
        return sum(head.height * head.width * len(head.anchors) for head in self.heads)

    @property
    def num_parameters(self) -> int:
        """Floats of a Darknet weights file of this network, its header left out."""
        return sum(layer.num_parameters for layer in self.convolutions)

    @property
    def num_folded_parameters(self) -> int:
        """Numbers that remain once batch norm is folded: kernels and one bias a channel."""
        return sum(
            layer.num_parameters - (3 * layer.channels if layer.batch_normalize else 0)
            for layer in self.convolutions
        )

    @property
    def stride(self) -> int:
        """Input pixels to one cell of the coarsest head."""
        return max(self.width // head.width for head in self.heads)
