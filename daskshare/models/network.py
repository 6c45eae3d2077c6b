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

from daskshare.models.packed import PackedConvolution, can_pack
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

#: Of one layer's output for one frame; caches of the second level hold about as much.
_LARGE_BYTES = 2**21


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


class _Activation(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _activate(x, self.name)


class _MaxPool(nn.Module):
    def __init__(self, layer: MaxPool) -> None:
        super().__init__()
        self.size, self.stride, self.pads = layer.size, layer.stride, layer.pads
        # The pooling's own padding costs nothing, but is the same on all sides and at most half.
        self.even = len(set(layer.pads)) == 1 and 2 * layer.pads[0] <= layer.size
        #: Whether :func:`_halved` does the same for an even number of rows and columns.
        self.halves = (layer.size, layer.stride) == (2, 2) and set(layer.pads) == {0}
        self.packed = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.packed and self.halves and x.shape[2] % 2 == x.shape[3] % 2 == 0:
            return _halved(x)
        if self.even:
            return functional.max_pool2d(x, self.size, self.stride, padding=self.pads[0])
        x = functional.pad(x, self.pads, value=-math.inf)
        return functional.max_pool2d(x, self.size, self.stride)


def _halved(x: torch.Tensor) -> torch.Tensor:
    """Maximum of squares of 2 x 2: on a CPU in half the time of max_pool2d, which notes where."""
    pixels = x.permute(0, 2, 3, 1).contiguous()
    rows = torch.maximum(pixels[:, 0::2], pixels[:, 1::2])
    n, height, width, channels = rows.shape
    pairs = rows.view(n, height, width // 2, 2, channels)
    return torch.maximum(pairs[..., 0, :], pairs[..., 1, :]).permute(0, 3, 1, 2)


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

    def _raw(self, x: torch.Tensor) -> torch.Tensor:
        # Channels-last memory makes this a view: (n, height, width, anchors, 5 + classes).
        raw = x.permute(0, 2, 3, 1)[..., : self.anchors * self.channels]
        return raw.view(*raw.shape[:3], self.anchors, self.channels)

    def above(self, x: torch.Tensor, threshold: float) -> Candidates:
        """Decode boxes of more objectness than ``threshold`` alone; the others are all zero.

        A box's confidence is never above its objectness. Few boxes are above any sensible
        threshold, so on a CPU, where no shape need be fixed, this saves most of the decoding.
        """
        raw = self._raw(x).flatten(1, 3)
        objectness = raw[..., 4].float().sigmoid()
        frame, index = (objectness > threshold).nonzero(as_tuple=True)
        chosen = raw[frame, index]
        best, best_class = chosen[:, 5:].max(dim=-1)
        centre = chosen[:, :2].float().sigmoid() * self.scale + self.offset[index]
        centre = centre * self.cell
        half = chosen[:, 2:4].float().exp() * self.half_anchor[index]
        boxes = torch.zeros(*objectness.shape, 4)
        boxes[frame, index] = torch.cat((centre - half, centre + half), dim=-1)
        confidence = torch.zeros_like(objectness)
        confidence[frame, index] = objectness[frame, index] * best.float().sigmoid()
        class_id = torch.zeros_like(objectness, dtype=torch.int64)
        class_id[frame, index] = best_class
        return boxes, confidence, class_id

    def forward(self, x: torch.Tensor) -> Candidates:
        raw = self._raw(x)
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
        # So many layers are computed frame by frame.
        self._num_alone = 0
        self._packed = False
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

    def pack_convolutions(self, batch_size: int) -> bool:
        """Lay the weights out for the CPU, and fuse activations into the convolutions.

        Layers with large outputs are computed frame by frame from then on, which keeps these in
        the cache and away from the kernel's page tables.

        Parameters
        ----------
        batch_size : int
            Frames for which to do that; other numbers are computed as well.

        Returns
        -------
        bool
            Whether it was done: in host memory, in float32, or in bfloat16 where the CPU computes
            in it.
        """
        if self.device.type != "cpu" or not can_pack(self.dtype):
            return False
        plan = self.plan
        shape = (plan.height, plan.width)
        for layer in plan.layers:
            block = self.blocks[layer.index]
            if isinstance(block, _Convolution):
                own = cast(Convolutional, layer)
                packed = PackedConvolution(
                    own, block.weight, block.bias, (batch_size, own.in_channels, *shape)
                )
                self.blocks[layer.index] = (
                    packed if packed.fused else nn.Sequential(packed, _Activation(own.activation))
                )
            elif isinstance(block, _MaxPool):
                block.packed = True
            shape = (layer.height, layer.width)
        self._num_alone = _num_large(plan, self.dtype.itemsize)
        self._packed = True
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
            For each head all its boxes, unordered. After :meth:`pack_convolutions` those that
            cannot be above the threshold are zero.
        """
        alone = self._num_alone
        if alone and len(batch) > 1:
            parts = [self._run(0, alone, frame[None], {}) for frame in batch]
            x = torch.cat([x for x, _, _ in parts])
            kept = {i: torch.cat([own[i] for _, own, _ in parts]) for i in parts[0][1]}
            _, _, heads = self._run(alone, len(self.blocks), x, kept)
        else:
            _, _, heads = self._run(0, len(self.blocks), batch, {})
        return self.decode(heads)

    def _run(
        self, start: int, stop: int, x: torch.Tensor, kept: dict[int, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor], list[torch.Tensor]]:
        """Some layers: their output, what later ones need besides, what heads read."""
        heads = []
        for layer in self.plan.layers[start:stop]:
            if layer.index == 0:
                x = self.first_block(x)
            elif isinstance(layer, Route):
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
                x = self.blocks[layer.index](x)
            if layer.index in self._last_use:
                kept[layer.index] = x
            for index in [i for i in kept if self._last_use[i] <= layer.index]:
                del kept[index]
        return x, kept, heads

    def decode(self, heads: list[torch.Tensor]) -> list[Candidates]:
        """Boxes of what the heads read, (n, channels, height, width) each."""
        blocks = [cast(_Head, self.blocks[layer.index]) for layer in self.plan.heads]
        if self._packed:
            threshold = self.confidence_threshold
            return [block.above(x, threshold) for block, x in zip(blocks, heads, strict=True)]
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


def _num_large(plan: NetworkPlan, value_bytes: int) -> int:
    """Number of leading layers up to the last one whose output is large, and what shrinks it."""
    count = 0
    for layer in plan.layers:
        if isinstance(layer, Yolo):
            break
        if layer.channels * layer.height * layer.width * value_bytes > _LARGE_BYTES or (
            count == layer.index > 0 and isinstance(layer, MaxPool)
        ):
            count = layer.index + 1
    return count


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
