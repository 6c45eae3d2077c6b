"""Convolutions on a CPU: weights laid out for oneDNN, the activation within the same pass.

The operations are torch's own. torch.compile writes the same ones for a frozen network; used
directly they need no C++ compiler on the worker and no minute of compiling.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from daskshare.models.plan import Convolutional

__all__ = ["PackedConvolution", "can_pack"]

#: By our name of an activation: torch's, and its parameters.
_FUSED: dict[str, tuple[str, list[float]]] = {
    "leaky": ("leaky_relu", [0.1]),
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


class PackedConvolution(nn.Module):
    """A convolution with bias and activation on the CPU.

    Parameters
    ----------
    layer : Convolutional
        Of the network.
    weight : torch.Tensor, shape (channels, in_channels // groups, size, size)
        float32 or bfloat16, in host memory. There may be more channels than the layer's.
    bias : torch.Tensor, shape (channels,)
        Of the same dtype.
    input_shape : tuple of int
        Frames, channels, height and width for which the weights are laid out. Others are
        computed as well.

    Notes
    -----
    Its own activation is that of :attr:`fused`; what torch does not fuse is left to the caller.
    """

    def __init__(
        self,
        layer: Convolutional,
        weight: torch.Tensor,
        bias: torch.Tensor,
        input_shape: tuple[int, int, int, int],
    ) -> None:
        super().__init__()
        self.layer = layer
        #: Whether the layer's activation is computed here.
        self.fused = layer.activation in _FUSED
        self._activation = _FUSED.get(layer.activation, _FUSED["linear"])
        self._geometry = [layer.padding] * 2, [layer.stride] * 2, [1, 1], layer.groups
        packed = torch.ops.mkldnn._reorder_convolution_weight(
            weight.contiguous(), *self._geometry, list(input_shape)
        )
        self.register_buffer("weight", packed)
        self.register_buffer("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the layer for (n, in_channels, height, width) in channels-last memory."""
        name, parameters = self._activation
        found: torch.Tensor = torch.ops.mkldnn._convolution_pointwise.default(
            x, self.weight, self.bias, *self._geometry, name, parameters, ""
        )
        return found
