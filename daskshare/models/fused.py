"""A network run step by step as :mod:`daskshare.models.fusion` plans it.

The executor makes the buffers and calls one function a step. Which functions, is a table of
operations: those here are torch's, for any device; the GPU's fast ones replace some of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from daskshare.models.network import Candidates, YoloNetwork
from daskshare.models.steps import (
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
)

__all__ = ["FusedNetwork", "TorchOperations"]

#: Runs one step; the frames (n, height, width, 3) are its argument.
Call = Callable[[torch.Tensor], None]


class TorchOperations:
    """Every step in plain torch: exact twins of the fused kernels, and what the GPU lacks.

    Parameters
    ----------
    network : YoloNetwork
        Whose weights to use; on its device.
    """

    def __init__(self, network: YoloNetwork) -> None:
        self.network = network

    def convolve(
        self,
        step: Convolve,
        source: torch.Tensor | None,
        target: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> Call:
        """Convolution, bias, activation and perhaps a sum."""
        block: Any = self.network.blocks[step.layer]

        def call(frames: torch.Tensor) -> None:
            out = self.network.first_block(frames) if source is None else block(source)
            # Together, so that half precision is rounded once less than by two passes.
            if residual is None:
                target.copy_(out)
            else:
                torch.add(out, residual, out=target)

        return call

    def stem(self, step: Stem, target: torch.Tensor) -> Call:
        """The first two convolutions."""
        second: Any = self.network.blocks[step.second]

        def call(frames: torch.Tensor) -> None:
            target.copy_(second(self.network.first_block(frames)))

        return call

    def unit(self, step: Unit, source: torch.Tensor, target: torch.Tensor) -> Call:
        """Two convolutions and the sum with their input."""
        first: Any = self.network.blocks[step.first]
        second: Any = self.network.blocks[step.second]

        def call(frames: torch.Tensor) -> None:
            torch.add(second(first(source)), source, out=target)

        return call

    def enlarge(self, step: Enlarge, source: torch.Tensor, target: torch.Tensor) -> Call:
        """Nearest-neighbour enlargement."""
        factor = step.factor

        def call(frames: torch.Tensor) -> None:
            target.copy_(functional.interpolate(source, scale_factor=factor, mode="nearest"))

        return call

    def pool(self, step: Pool, source: torch.Tensor, target: torch.Tensor) -> Call:
        """Maxima over windows."""
        block: Any = self.network.blocks[step.layer]

        def call(frames: torch.Tensor) -> None:
            target.copy_(block(source))

        return call

    def add(self, step: Sum, sources: list[torch.Tensor], target: torch.Tensor) -> Call:
        """Sum and activation of a shortcut that no convolution takes along."""
        activate = self.network.activation(step.layer)

        def call(frames: torch.Tensor) -> None:
            total = sources[0] + sources[1]
            for source in sources[2:]:
                total = total + source
            target.copy_(activate(total))

        return call

    def copy(self, step: Copy, source: torch.Tensor, target: torch.Tensor) -> Call:
        """Copy of a part of a concatenation."""

        def call(frames: torch.Tensor) -> None:
            target.copy_(source)

        return call

    def candidates(self, heads: list[torch.Tensor]) -> Callable[[], Candidates]:
        """Decoding of the heads and choice of candidates."""
        network = self.network

        def call() -> Candidates:
            return network.candidates(network.decode(heads))

        return call


class FusedNetwork:
    """A network for one batch size, from uint8 frames to candidates.

    Parameters
    ----------
    network : YoloNetwork
        On its device.
    plan : FusedPlan
        Made from ``network.plan``.
    batch_size : int
        Frames of every batch.
    operations : TorchOperations
        What runs the steps.

    Notes
    -----
    Calls run on the current stream, allocate nothing themselves and wait for nothing; one call at a
    time, as the buffers are reused by each.
    """

    def __init__(
        self,
        network: YoloNetwork,
        plan: FusedPlan,
        batch_size: int,
        operations: TorchOperations,
    ) -> None:
        self.plan = plan
        self.batch_size = batch_size
        #: All buffers, one after another; offsets count for a batch of any size.
        # Random: kernels are measured on it, and on zeros they are faster than in earnest.
        generator = torch.Generator(device=network.device).manual_seed(0)
        self.arena = torch.randn(
            plan.arena_size * batch_size,
            dtype=network.dtype,
            device=network.device,
            generator=generator,
        )
        self._operations = operations
        self.calls = [(step, self._bind(step)) for step in plan.steps if not isinstance(step, Head)]
        heads = [self.tensor(step.source) for step in plan.steps if isinstance(step, Head)]
        self._candidates = operations.candidates(heads)

    @property
    def num_bytes(self) -> int:
        """Bytes of all buffers."""
        return self.arena.numel() * self.arena.element_size()

    def tensor(self, view: View) -> torch.Tensor:
        """A view as a tensor (n, channels, height, width), channels innermost in memory."""
        buffer = self.plan.buffers[view.buffer]
        pitch, row = buffer.channels, buffer.channels * buffer.width
        return self.arena.as_strided(
            (self.batch_size, view.channels, buffer.height, buffer.width),
            (buffer.size, 1, row, pitch),
            buffer.offset * self.batch_size + view.start,
        )

    def _bind(self, step: Step) -> Call:
        operations = self._operations
        if isinstance(step, Head):
            raise TypeError("heads are decoded together")
        target = self.tensor(step.target)
        if isinstance(step, Stem):
            return operations.stem(step, target)
        if isinstance(step, Sum):
            return operations.add(step, [self.tensor(view) for view in step.sources], target)
        if isinstance(step, Convolve):
            source = None if step.source is None else self.tensor(step.source)
            residual = None if step.residual is None else self.tensor(step.residual)
            return operations.convolve(step, source, target, residual)
        source = self.tensor(step.source)
        if isinstance(step, Unit):
            return operations.unit(step, source, target)
        if isinstance(step, Enlarge):
            return operations.enlarge(step, source, target)
        if isinstance(step, Pool):
            return operations.pool(step, source, target)
        return operations.copy(step, source, target)

    def __call__(self, frames: torch.Tensor) -> Candidates:
        """Candidates of uint8 frames (batch_size, height, width, 3)."""
        for _, call in self.calls:
            call(frames)
        return self._candidates()
