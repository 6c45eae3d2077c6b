"""Layers as a CPU computes them fast.

Convolutions have weights laid out for oneDNN, and the activation within the same pass. The
operations are torch's own. torch.compile writes the same ones for a frozen network; used
directly they need no C++ compiler on the worker and no minute of compiling.
"""

from __future__ import annotations

import torch
from torch import nn

from daskshare.models.layers import (
    LEAKY_SLOPE,
    Candidates,
    ConvolutionBlock,
    HeadBlock,
    MaxPoolBlock,
    activate,
)

__all__ = ["HalvingPool", "PackedConvolution", "SparseHead", "can_pack", "pack_block"]

#: By our name of an activation: torch's, and its parameters.
_FUSED: dict[str, tuple[str, list[float]]] = {
    "leaky": ("leaky_relu", [LEAKY_SLOPE]),
    "linear": ("none", []),
    "logistic": ("sigmoid", []),
    "relu": ("relu", []),
}

_OPERATIONS = (
    "_convolution_pointwise",
    "_is_mkldnn_bf16_supported",
    "_reorder_convolution_weight",
)


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this torch and this CPU have the operations in a precision.

    Parameters
    ----------
    dtype : torch.dtype
        float32 is had wherever oneDNN is, bfloat16 where the CPU computes in it.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    # Not documented by torch, so another version may lack them.
    if not all(hasattr(torch.ops.mkldnn, name) for name in _OPERATIONS):
        return False
    return dtype == torch.float32 or (
        dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def pack_block(
    block: nn.Module, *, batch_size: int, height: int, width: int, threshold: float
) -> nn.Module:
    """Return what computes the same faster on a CPU; the block itself where nothing does.

    Parameters
    ----------
    block : torch.nn.Module
        A network's layer in host memory, in a dtype that :func:`can_pack`.
    batch_size : int
        Frames for which weights are laid out; other numbers are computed as well.
    height, width : int
        Of the layer's input.
    threshold : float
        Boxes of a head that are not of more confidence may be left out.
    """
    if isinstance(block, ConvolutionBlock):
        return PackedConvolution(block, batch_size, height, width)
    if (
        isinstance(block, MaxPoolBlock)
        and (block.size, block.stride, set(block.pads)) == (2, 2, {0})
        and height % 2 == width % 2 == 0
    ):
        return HalvingPool()
    if isinstance(block, HeadBlock):
        return SparseHead(block, threshold)
    return block


class PackedConvolution(nn.Module):
    """A convolution whose bias, and activation where oneDNN has it, cost no pass of their own.

    Parameters
    ----------
    block : ConvolutionBlock
        To compute.
    batch_size, height, width : int
        Shape of the input for which the weights are laid out. Others are computed as well.
    """

    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(self, block: ConvolutionBlock, batch_size: int, height: int, width: int) -> None:
        super().__init__()
        layer = block.layer
        self.activation = layer.activation
        self._geometry = [layer.padding] * 2, [layer.stride] * 2, [1, 1], layer.groups
        packed = torch.ops.mkldnn._reorder_convolution_weight(
            block.weight.contiguous(),
            *self._geometry,
            [batch_size, layer.in_channels, height, width],
        )
        self.register_buffer("weight", packed)
        self.register_buffer("bias", block.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the layer for (n, in_channels, height, width) in channels-last memory."""
        fused = _FUSED.get(self.activation)
        name, parameters = fused or _FUSED["linear"]
        x = torch.ops.mkldnn._convolution_pointwise.default(
            x, self.weight, self.bias, *self._geometry, name, parameters, ""
        )
        return x if fused else activate(x, self.activation)


class HalvingPool(nn.Module):
    """Maximum of squares of 2 x 2 pixels, of even numbers of rows and columns.

    In half the time of ``max_pool2d``, which notes as well where each maximum was.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pool (n, channels, height, width) in channels-last memory."""
        pixels = x.permute(0, 2, 3, 1)
        rows = torch.maximum(pixels[:, 0::2], pixels[:, 1::2])
        n, height, width, channels = rows.shape
        pairs = rows.view(n, height, width // 2, 2, channels)
        return torch.maximum(pairs[..., 0, :], pairs[..., 1, :]).permute(0, 3, 1, 2)


class SparseHead(nn.Module):
    """Decodes the boxes of a head that may be above a threshold; the others are all zero.

    A box's confidence is never above its objectness, and few boxes are of much objectness. On a
    CPU, where no shape need be fixed, this saves most of the decoding.

    Parameters
    ----------
    head : HeadBlock
        To decode.
    threshold : float
        Of the objectness.
    """

    def __init__(self, head: HeadBlock, threshold: float) -> None:
        super().__init__()
        self.head = head
        self.threshold = threshold

    def forward(self, x: torch.Tensor) -> Candidates:
        """Decode (n, channels, height, width) in channels-last memory."""
        head = self.head
        raw = head.raw(x)
        objectness = raw[..., 4].float().sigmoid()
        wanted = objectness > self.threshold
        chosen = raw[wanted]
        objectness, wanted = objectness.flatten(1), wanted.flatten(1)
        _, place = wanted.nonzero(as_tuple=True)
        best, best_class = chosen[:, 5:].max(dim=-1)
        boxes = torch.zeros(*wanted.shape, 4)
        boxes[wanted] = head.boxes(
            chosen[:, :2], chosen[:, 2:4], head.offset[place], head.half_anchor[place]
        )
        confidence = torch.zeros_like(objectness)
        confidence[wanted] = objectness[wanted] * best.float().sigmoid()
        class_id = torch.zeros_like(wanted, dtype=torch.int64)
        class_id[wanted] = best_class
        return boxes, confidence, class_id
