"""A network's layers as torch modules: convolution, pooling, detection head."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

from daskshare.models.plan import Convolutional, MaxPool, Yolo
from daskshare.models.weights import LayerWeights

__all__ = [
    "LEAKY_SLOPE",
    "Candidates",
    "ConvolutionBlock",
    "HeadBlock",
    "MaxPoolBlock",
    "activate",
]

#: Boxes (n, k, 4) float32 xyxy in input pixels, confidence (n, k) float32 falling along k and 0
#: where there is no candidate, class (n, k) int64.
Candidates = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

#: Of Darknet's ``leaky`` for negative numbers.
LEAKY_SLOPE = 0.1


def activate(x: torch.Tensor, name: str) -> torch.Tensor:
    """Compute an activation of :data:`daskshare.models.plan.ACTIVATIONS`.

    Always in place: the callers own ``x``, and memory traffic is what these layers cost.
    """
    if name == "leaky":
        return functional.leaky_relu_(x, LEAKY_SLOPE)
    if name == "relu":
        return functional.relu_(x)
    if name == "logistic":
        return x.sigmoid_()
    if name == "mish":
        return functional.mish(x, inplace=True)
    return x


class ConvolutionBlock(nn.Module):
    """Convolution, bias and activation.

    Parameters
    ----------
    layer : Convolutional
        Of the network.
    weights : LayerWeights
        Its kernel and bias, batch norm folded.
    dtype : torch.dtype
        In which it computes.
    extra : int
        Channels of zeros behind the layer's own.
    """

    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(
        self, layer: Convolutional, weights: LayerWeights, dtype: torch.dtype, extra: int = 0
    ) -> None:
        super().__init__()
        # Rounded first, as there is less to reorder then.
        kernel = torch.from_numpy(weights.weight).to(dtype)
        bias = torch.from_numpy(weights.bias)
        if extra:
            kernel = functional.pad(kernel, (0,) * 7 + (extra,))
            bias = functional.pad(bias, (0, extra))
        # The kernels share the activations' layout, so that no convolution has to reorder them.
        self.register_buffer("weight", kernel.contiguous(memory_format=torch.channels_last))
        self.register_buffer("bias", bias.to(dtype))
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the layer for (n, in_channels, height, width)."""
        layer = self.layer
        x = functional.conv2d(
            x,
            self.weight,
            self.bias,
            stride=layer.stride,
            padding=layer.padding,
            groups=layer.groups,
        )
        return activate(x, layer.activation)


class MaxPoolBlock(nn.Module):
    """Maximum over windows.

    Parameters
    ----------
    layer : MaxPool
        Of the network.
    """

    def __init__(self, layer: MaxPool) -> None:
        super().__init__()
        self.size, self.stride, self.pads = layer.size, layer.stride, layer.pads
        # The pooling's own padding costs nothing, but is the same on all sides and at most half.
        self.even = len(set(layer.pads)) == 1 and 2 * layer.pads[0] <= layer.size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pool (n, channels, height, width)."""
        if self.even:
            return functional.max_pool2d(x, self.size, self.stride, padding=self.pads[0])
        x = functional.pad(x, self.pads, value=-math.inf)
        return functional.max_pool2d(x, self.size, self.stride)


class HeadBlock(nn.Module):
    """Decode one detection head to input pixels.

    Parameters
    ----------
    layer : Yolo
        Of the network.
    height, width : int
        Of the network's input, pixels.
    """

    offset: torch.Tensor
    half_anchor: torch.Tensor
    cell: torch.Tensor

    def __init__(self, layer: Yolo, height: int, width: int) -> None:
        super().__init__()
        self.channels = 5 + layer.num_classes
        self.anchors = len(layer.anchors)
        self.scale = layer.scale_xy
        y, x = torch.meshgrid(
            torch.arange(layer.height, dtype=torch.float32),
            torch.arange(layer.width, dtype=torch.float32),
            indexing="ij",
        )
        cells = torch.stack((x, y), dim=-1).reshape(-1, 1, 2)
        anchors = torch.tensor(layer.anchors, dtype=torch.float32).reshape(1, -1, 2)
        shape = (cells.shape[0], anchors.shape[1], 2)
        # sigmoid(t) * scale + offset is the centre in cells, stretched about the cell's middle.
        offset = cells - (self.scale - 1) / 2
        self.register_buffer("offset", offset.expand(shape).reshape(-1, 2).contiguous())
        self.register_buffer("half_anchor", (anchors / 2).expand(shape).reshape(-1, 2).contiguous())
        self.register_buffer("cell", torch.tensor((width / layer.width, height / layer.height)))

    def raw(self, x: torch.Tensor) -> torch.Tensor:
        """The head's numbers by box: (n, height, width, anchors, 5 + classes)."""
        # Channels-last memory makes this a view.
        raw = x.permute(0, 2, 3, 1)[..., : self.anchors * self.channels]
        return raw.view(*raw.shape[:3], self.anchors, self.channels)

    def boxes(
        self,
        position: torch.Tensor,
        size: torch.Tensor,
        offset: torch.Tensor,
        half_anchor: torch.Tensor,
    ) -> torch.Tensor:
        """Boxes xyxy in input pixels, float32, from a head's numbers (..., 2) and constants."""
        centre = position.float().sigmoid() * self.scale + offset
        centre = centre * self.cell
        half = size.float().exp() * half_anchor
        return torch.cat((centre - half, centre + half), dim=-1)

    def forward(self, x: torch.Tensor) -> Candidates:
        """Decode all boxes of (n, channels, height, width)."""
        raw = self.raw(x)
        # The sigmoid is monotonic, so the best class is known before it; geometry and confidence
        # are computed in fp32, as fp16 would move a wide box by whole pixels.
        best, class_id = raw[..., 5:].max(dim=-1)
        confidence = raw[..., 4].float().sigmoid() * best.float().sigmoid()
        boxes = self.boxes(
            raw[..., :2].flatten(1, 3), raw[..., 2:4].flatten(1, 3), self.offset, self.half_anchor
        )
        return boxes, confidence.flatten(1), class_id.flatten(1)
