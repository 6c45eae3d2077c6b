"""The YOLO-v3 family as a torch module: trunk, head decoding and the choice of candidates.

Imported only where a model is loaded; everything above works from the plan alone.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import cast

import numpy as np
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
from daskshare.models.packed import can_pack, pack_block
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

__all__ = [
    "MAX_CANDIDATES",
    "Candidates",
    "YoloNetwork",
    "compile_network",
    "first_convolution_channels",
]

#: Most boxes of a frame that non-maximum suppression looks at, those of highest confidence.
MAX_CANDIDATES = 1024

#: Of one layer's output for one frame; caches of the second level hold about as much.
_LARGE_BYTES = 2**21


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
        # So many layers are computed for a few frames at a time, and for how many.
        self._num_split = 0
        self._split_rows = 1
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
        block = self.blocks[0]
        channels = first_convolution_channels(self.plan, self.dtype)
        if not (channels and isinstance(block, ConvolutionBlock) and block.weight.is_cuda):
            return False
        from daskshare.kernels.first_convolution import convolve_frames, pack_weights

        taps, bias = pack_weights(block.weight), block.bias

        def first(batch: torch.Tensor) -> torch.Tensor:
            return convolve_frames(batch, taps, bias, slope=LEAKY_SLOPE)

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
        height, width = plan.height, plan.width
        for layer in plan.layers:
            self.blocks[layer.index] = pack_block(
                self.blocks[layer.index],
                batch_size=batch_size,
                height=height,
                width=width,
                threshold=self.confidence_threshold,
            )
            height, width = layer.height, layer.width
        self.split_large_layers(1)
        return True

    def split_large_layers(self, rows: int) -> None:
        """Compute layers with large outputs for a part of the frames after the other.

        With 16 frames of 416 x 416 pixels in half precision, the first layers of YOLO-v3 take
        350 MiB at once, several times what all the others need.

        Parameters
        ----------
        rows : int
            Frames of a part, 1 or more. What is compiled computes all frames at once.
        """
        self._num_split = _num_large(self.plan, self.dtype.itemsize)
        self._split_rows = rows

    def _block(self, layer: Layer, weights: dict[int, LayerWeights]) -> nn.Module:
        if isinstance(layer, Convolutional):
            own = weights[layer.index]
            if layer.index == 0:
                own = LayerWeights(own.weight.astype(np.float32) / 255, own.bias)
            feeds_head = layer.index in {head.index - 1 for head in self.plan.heads}
            feeds_head = feeds_head and layer.index not in self._last_use
            # Kernels for tensor cores want channels in eights; 255 of them cost four times as much.
            extra = -layer.channels % 8 if feeds_head else 0
            return ConvolutionBlock(layer, own, self.dtype, extra)
        if isinstance(layer, MaxPool):
            return MaxPoolBlock(layer)
        if isinstance(layer, Yolo):
            return HeadBlock(layer, self.plan.height, self.plan.width)
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

        return functools.partial(activate, name=name)

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
        split, rows = self._num_split, self._split_rows
        # Not is_compiling(), which is true for all threads while one compiles.
        if split and len(batch) > rows and not torch.compiler.is_dynamo_compiling():
            parts = [self._run(0, split, some, {}) for some in torch.split(batch, rows)]
            x = torch.cat([x for x, _, _ in parts])
            kept = {i: torch.cat([own[i] for _, own, _ in parts]) for i in parts[0][1]}
            del parts
            _, _, heads = self._run(split, len(self.blocks), x, kept)
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
                x = activate(x, layer.activation)
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


def first_convolution_channels(plan: NetworkPlan, dtype: torch.dtype) -> int:
    """Output channels of a first convolution that a kernel of our own can do on a GPU, else 0."""
    layer = plan.layers[0]
    if (
        isinstance(layer, Convolutional)
        and dtype in (torch.float16, torch.bfloat16)
        and (layer.size, layer.stride, layer.padding, layer.groups) == (3, 1, 1, 1)
        and layer.activation == "leaky"
        and layer.channels in (16, 32, 64, 128)
    ):
        return layer.channels
    return 0


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
