"""The YOLO-v3 family as a torch module: trunk, head decoding and the choice of candidates.

Imported only where a model is loaded; everything above works from the plan alone.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional

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
from daskshare.models.weights import LayerWeights

__all__ = ["MAX_CANDIDATES", "Candidates", "YoloNetwork", "compile_network"]

#: Most boxes of a frame that non-maximum suppression looks at, those of highest confidence.
MAX_CANDIDATES = 1024

#: Boxes (n, k, 4) float32 xyxy in input pixels, confidence (n, k) float32 falling along k and 0
#: where there is no candidate, class (n, k) int64.
Candidates = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


_LEAKY_SLOPE = 0.1


def _activate(x: torch.Tensor, name: str) -> torch.Tensor:
    # Always in place: the callers own x, and memory traffic is what these layers cost.
    if name == "leaky":
        return functional.leaky_relu_(x, _LEAKY_SLOPE)
    if name == "relu":
        return functional.relu_(x)
    if name == "logistic":
        return x.sigmoid_()
    if name == "mish":
        return functional.mish(x, inplace=True)
    return x


class _Convolution(nn.Module):
    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(
        self, layer: Convolutional, weights: LayerWeights, dtype: torch.dtype, extra: int = 0
    ) -> None:
        super().__init__()
        kernel = functional.pad(torch.from_numpy(weights.weight), (0,) * 7 + (extra,))
        # The kernels share the activations' layout, so that no convolution has to reorder them.
        kernel = kernel.to(dtype, memory_format=torch.channels_last)
        self.register_buffer("weight", kernel)
        bias = functional.pad(torch.from_numpy(weights.bias), (0, extra))
        self.register_buffer("bias", bias.to(dtype))
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer = self.layer
        x = functional.conv2d(
            x,
            self.weight,
            self.bias,
            stride=layer.stride,
            padding=layer.padding,
            groups=layer.groups,
        )
        return _activate(x, layer.activation)


class _MaxPool(nn.Module):
    def __init__(self, layer: MaxPool) -> None:
        super().__init__()
        self.size, self.stride, self.pads = layer.size, layer.stride, layer.pads
        # The pooling's own padding costs nothing, but is the same on all sides and at most half.
        self.even = len(set(layer.pads)) == 1 and 2 * layer.pads[0] <= layer.size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.even:
            return functional.max_pool2d(x, self.size, self.stride, padding=self.pads[0])
        x = functional.pad(x, self.pads, value=-math.inf)
        return functional.max_pool2d(x, self.size, self.stride)


class _Head(nn.Module):
    """Decode one detection head to input pixels."""

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

    def forward(self, x: torch.Tensor) -> Candidates:
        # Channels-last memory makes this a view: (n, height, width, anchors, 5 + classes).
        raw = x.permute(0, 2, 3, 1)[..., : self.anchors * self.channels]
        raw = raw.view(*raw.shape[:3], self.anchors, self.channels)
        # The sigmoid is monotonic, so the best class is known before it; geometry and confidence
        # are computed in fp32, as fp16 would move a wide box by whole pixels.
        best, class_id = raw[..., 5:].max(dim=-1)
        confidence = raw[..., 4].float().sigmoid() * best.float().sigmoid()
        centre = raw[..., :2].flatten(1, 3).float().sigmoid() * self.scale + self.offset
        centre = centre * self.cell
        half = raw[..., 2:4].flatten(1, 3).float().exp() * self.half_anchor
        boxes = torch.cat((centre - half, centre + half), dim=-1)
        return boxes, confidence.flatten(1), class_id.flatten(1)


class YoloNetwork(nn.Module):
    """A network of the YOLO-v3 family, up to the candidates for non-maximum suppression.

    A box has one class, its best; its confidence is objectness times that class's probability.

    Parameters
    ----------
    plan : NetworkPlan
        What to build.
    weights : dict of int to LayerWeights
        By layer index, batch norm folded.
    dtype : torch.dtype
        Of the trunk: float32, float16 or bfloat16. Heads are decoded in float32.
    confidence_threshold : float
        Boxes of more confidence are candidates.
    class_ids : tuple of int or None
        Classes to keep; ``None`` keeps all.

    Notes
    -----
    The module is built on the CPU; move it with ``.to(device)``. ``forward`` has fixed output
    shapes and no host round trip, so it can be captured in a CUDA graph and compiled whole.
    """

    allowed: torch.Tensor | None

    def __init__(
        self,
        plan: NetworkPlan,
        weights: dict[int, LayerWeights],
        *,
        dtype: torch.dtype,
        confidence_threshold: float,
        class_ids: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.plan = plan
        self.dtype = dtype
        self.confidence_threshold = confidence_threshold
        self.max_candidates = min(MAX_CANDIDATES, plan.num_boxes)
        self._last_use = _last_use(plan)
        self._first: Callable[[torch.Tensor], torch.Tensor] | None = None
        self.blocks = nn.ModuleList(self._block(layer, weights) for layer in plan.layers)
        allowed = torch.zeros(plan.num_classes, dtype=torch.bool)
        allowed[list(range(plan.num_classes) if class_ids is None else class_ids)] = True
        self.register_buffer("allowed", None if class_ids is None else allowed)

    def fuse_first_convolution(self) -> bool:
        """Compute the first convolution by one kernel of our own, where its shape allows that.

        Returns
        -------
        bool
            Whether it does from now on: on a CUDA device in float16 or bfloat16, for a 3 x 3
            convolution of stride 1 with a leaky ReLU and 16, 32, 64 or 128 channels.
        """
        layer = self.plan.layers[0]
        block = self.blocks[0]
        if not (
            isinstance(layer, Convolutional)
            and isinstance(block, _Convolution)
            and block.weight.is_cuda
            and self.dtype in (torch.float16, torch.bfloat16)
            and (layer.size, layer.stride, layer.padding, layer.groups) == (3, 1, 1, 1)
            and layer.activation == "leaky"
            and layer.channels in (16, 32, 64, 128)
        ):
            return False
        from daskshare.kernels.first_convolution import convolve_frames, pack_weights

        taps, bias = pack_weights(block.weight), block.bias

        def first(batch: torch.Tensor) -> torch.Tensor:
            return convolve_frames(batch, taps, bias, slope=_LEAKY_SLOPE)

        self._first = first
        return True

    def _block(self, layer: Layer, weights: dict[int, LayerWeights]) -> nn.Module:
        if isinstance(layer, Convolutional):
            own = weights[layer.index]
            if layer.index == 0:
                own = LayerWeights(own.weight.astype(np.float32) / 255, own.bias)
            feeds_head = layer.index in {head.index - 1 for head in self.plan.heads}
            feeds_head = feeds_head and layer.index not in self._last_use
            # Kernels for tensor cores want channels in eights; 255 of them cost four times as much.
            extra = -layer.channels % 8 if feeds_head else 0
            return _Convolution(layer, own, self.dtype, extra)
        if isinstance(layer, MaxPool):
            return _MaxPool(layer)
        if isinstance(layer, Yolo):
            return _Head(layer, self.plan.height, self.plan.width)
        if isinstance(layer, Upsample):
            return nn.Upsample(scale_factor=layer.stride, mode="nearest")
        return nn.Identity()

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights and constants."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.buffers()).device

    def first_block(self, batch: torch.Tensor) -> torch.Tensor:
        """Output of the first layer, from uint8 frames (n, height, width, 3)."""
        if self._first is not None:
            return self._first(batch)
        x = batch.permute(0, 3, 1, 2).to(self.dtype)
        # Bytes are exact in every precision, their 255ths are not: a first convolution has the
        # division in its kernel, which saves a pass as well.
        if not isinstance(self.plan.layers[0], Convolutional):
            x = x / 255
        return self.blocks[0](x)  # type: ignore[no-any-return]

    def activation(self, index: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """Activation of a layer that has one, in place."""
        name = cast(Convolutional | Shortcut, self.plan.layers[index]).activation

        def activate(x: torch.Tensor) -> torch.Tensor:
            return _activate(x, name)

        return activate

    def predict(self, batch: torch.Tensor) -> list[Candidates]:
        """Run the trunk and decode every head.

        Parameters
        ----------
        batch : torch.Tensor, shape (n, height, width, 3), uint8
            RGB frames of the network's input size.

        Returns
        -------
        list of Candidates
            For each head all its boxes, unordered and without threshold.
        """
        x = self.first_block(batch)
        kept: dict[int, torch.Tensor] = {0: x} if 0 in self._last_use else {}
        heads = []
        for layer, block in zip(self.plan.layers[1:], self.blocks[1:], strict=True):
            if isinstance(layer, Route):
                parts = [kept[source] for source in layer.sources]
                if layer.groups > 1:
                    parts = [part.chunk(layer.groups, dim=1)[layer.group_id] for part in parts]
                x = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
            elif isinstance(layer, Shortcut):
                for source in layer.sources:
                    x = x + kept[source]
                x = _activate(x, layer.activation)
            elif isinstance(layer, Yolo):
                heads.append(x)
            else:
                x = block(x)
            if layer.index in self._last_use:
                kept[layer.index] = x
            for index in [i for i in kept if self._last_use[i] <= layer.index]:
                del kept[index]
        return self.decode(heads)

    def decode(self, heads: list[torch.Tensor]) -> list[Candidates]:
        """Boxes of what the heads read, (n, channels, height, width) each."""
        blocks = [self.blocks[layer.index] for layer in self.plan.heads]
        return [block(x) for block, x in zip(blocks, heads, strict=True)]

    def candidates(self, decoded: list[Candidates]) -> Candidates:
        """The best boxes of each frame, of all heads."""
        boxes, confidence, class_id = (
            torch.cat(parts, dim=1) for parts in zip(*decoded, strict=True)
        )
        wanted = confidence > self.confidence_threshold
        if self.allowed is not None:
            wanted = wanted & self.allowed[class_id]
        # Zero, never NaN or a low value, so that a frame's candidates end at the first zero.
        confidence = torch.where(wanted, confidence, 0.0)
        confidence, order = confidence.topk(self.max_candidates, dim=1)
        boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4))
        return boxes, confidence, class_id.gather(1, order)

    def forward(self, batch: torch.Tensor) -> Candidates:
        """Candidates of a batch of uint8 RGB frames (n, height, width, 3)."""
        return self.candidates(self.predict(batch))


def _last_use(plan: NetworkPlan) -> dict[int, int]:
    """For each layer that a later one names, the last one that does."""
    return {
        source: layer.index
        for layer in plan.layers
        if isinstance(layer, Route | Shortcut)
        for source in layer.sources
    }


def compile_network(
    network: YoloNetwork, *, backend: str = "inductor"
) -> Callable[[torch.Tensor], Candidates]:
    """Return ``network`` compiled as one graph for the shape of its first batch.

    Parameters
    ----------
    network : YoloNetwork
        On its device.
    backend : str
        Of ``torch.compile``.

    Notes
    -----
    Call it once with a batch of the wanted size before serving with it: that compiles.
    """

    def candidates(batch: torch.Tensor) -> Candidates:
        return network(batch)  # type: ignore[no-any-return]

    # Dynamo counts recompilations by code object and gives up after eight; with seven batch sizes
    # a second model would not compile. A copy of the code has a count of its own.
    own = types.FunctionType(
        candidates.__code__.replace(co_name=f"candidates_{id(candidates)}"),
        candidates.__globals__,
        closure=candidates.__closure__,
    )
    return torch.compile(own, fullgraph=True, dynamic=False, backend=backend)
