"""The fused network on a GPU: cuDNN's fused convolutions and kernels of our own.

Every choice between them is measured once for a GPU and the versions at hand, and then read from
disk.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch.nn import functional

from daskshare.kernels.capture import undisturbed
from daskshare.kernels.cudnn_convolution import ConvolutionCase, CudnnConvolutions, Plan
from daskshare.kernels.decode import HeadDecoder, HeadShape
from daskshare.kernels.enlarge import enlarge, enlarge_kernel
from daskshare.kernels.residual_unit import RESIDUAL_UNIT_VARIANTS, ResidualUnit, UnitTile
from daskshare.kernels.stem import STEM_VARIANTS, StemTile
from daskshare.kernels.stem import Stem as StemKernel
from daskshare.models.fused import Call, TorchOperations
from daskshare.models.network import Candidates, YoloNetwork
from daskshare.models.plan import Convolutional
from daskshare.models.steps import Convolve, Enlarge, Stem, Unit

__all__ = ["DTYPES", "MAX_PLANS", "CudaOperations", "NoVariantError"]

logger = logging.getLogger(__name__)

#: Of the up to eighty plans that cuDNN offers for a convolution, in the order that it recommends,
#: so many are tried: building one takes a fifth of a second.
MAX_PLANS = 12
_RUNS = 7
#: Half precisions by torch's type, as measured choices name them.
DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
# Far above rounding and far below what a wrong kernel gives.
_MAX_ERROR = {torch.float16: 5e-3, torch.bfloat16: 2e-2}
_Tile = TypeVar("_Tile", StemTile, UnitTile)


class NoVariantError(Exception):
    """A kernel of our own that does not work on this GPU."""


@dataclass(slots=True)
class _Report:
    """How the steps run, for people and benchmarks."""

    measured: int = 0
    loaded: int = 0
    seconds: float = 0.0
    fallbacks: list[str] = field(default_factory=list)
    microseconds: dict[str, float] = field(default_factory=dict)
    tried: dict[str, list[tuple[str, float]]] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """Microseconds of all steps whose kernel was chosen by measuring."""
        return sum(self.microseconds.values())


class CudaOperations(TorchOperations):
    """Fused kernels for every step that has one; torch for the others.

    Parameters
    ----------
    network : YoloNetwork
        On a CUDA device, in half precision.
    cudnn : CudnnConvolutions
        Of that device.
    choices : dict
        What was measured before; new measurements are added.
    max_plans : int
        Plans to try for a convolution.
    """

    def __init__(
        self,
        network: YoloNetwork,
        cudnn: CudnnConvolutions,
        choices: dict[str, Any],
        *,
        max_plans: int = MAX_PLANS,
    ) -> None:
        super().__init__(network)
        self._max_plans = max_plans
        self.report = _Report()
        self.cudnn = cudnn
        self._choices = choices
        self._workspace_bytes = 1
        self._workspace: torch.Tensor | None = None
        self._plans: dict[str, Plan] = {}

    @property
    def description(self) -> str:
        """What runs, for people."""
        report = self.report
        text = f"fused kernels: {len(report.microseconds)} chosen by measuring"
        if report.fallbacks:
            text += f"; {len(report.fallbacks)} steps left to torch: {report.fallbacks[0]}"
        return text

    def finish(self) -> None:
        """Make the scratch memory that all convolutions share, once all are bound."""
        self._workspace = torch.zeros(
            self._workspace_bytes, dtype=torch.uint8, device=self.network.device
        )

    def convolve(
        self,
        step: Convolve,
        source: torch.Tensor | None,
        target: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> Call:
        layer = self.network.plan.layers[step.layer]
        block: Any = self.network.blocks[step.layer]
        if (
            source is None
            or not isinstance(layer, Convolutional)
            or layer.groups != 1
            or layer.activation not in ("leaky", "relu", "linear")
        ):
            return super().convolve(step, source, target, residual)
        case = ConvolutionCase(
            batch=source.shape[0],
            in_channels=source.shape[1],
            height=source.shape[2],
            width=source.shape[3],
            out_channels=target.shape[1],
            size=layer.size,
            stride=layer.stride,
            padding=layer.padding,
            in_pitch=source.stride(3),
            out_pitch=target.stride(3),
            residual_pitch=0 if residual is None else residual.stride(3),
            activation=layer.activation,
            dtype=DTYPES[self.network.dtype],
        )
        tensors = self.cudnn.addresses(source, block.weight, block.bias, target, residual)
        try:
            plan = self._plan(case, tensors)
        except RuntimeError as error:
            self.report.fallbacks.append(f"layer {step.layer}: {error}")
            return super().convolve(step, source, target, residual)
        self._workspace_bytes = max(self._workspace_bytes, plan.workspace_bytes)
        self.report.microseconds[f"layer {step.layer}"] = plan.microseconds

        def call(frames: torch.Tensor) -> None:
            assert self._workspace is not None
            self.cudnn.run(plan, tensors, self._workspace)

        return call

    def _plan(self, case: ConvolutionCase, tensors: dict[int, int]) -> Plan:
        if case.key in self._plans:
            return self._plans[case.key]
        known = self._choices.get(case.key)
        plan = None
        if known is not None:
            try:
                plan = self.cudnn.load(
                    base64.b64decode(known["plan"]),
                    workspace_bytes=known["workspace_bytes"],
                    name=known["name"],
                    microseconds=known["microseconds"],
                )
                self.report.loaded += 1
            except Exception as error:
                logger.warning("A kept plan does not load (%s); measuring anew", error)
        if plan is None:
            plan, content, tried = self.cudnn.measure(case, tensors, max_plans=self._max_plans)
            self.report.measured += 1
            self.report.tried[case.key] = tried
            self._choices[case.key] = {
                "plan": base64.b64encode(content).decode(),
                "workspace_bytes": plan.workspace_bytes,
                "name": plan.name,
                "microseconds": plan.microseconds,
            }
        self._plans[case.key] = plan
        return plan

    def stem(self, step: Stem, target: torch.Tensor) -> Call:
        first, second = self._weights(step.first), self._weights(step.second)
        plan = self.network.plan
        # Torch's own generator fails while another thread captures a graph.
        frames = torch.randint(
            256,
            (target.shape[0], plan.height, plan.width, 3),
            dtype=torch.uint8,
            device=target.device,
            generator=torch.Generator(device=target.device).manual_seed(0),
        )

        def make(tile: StemTile) -> Callable[[], None]:
            kernel = StemKernel(first, second, tile)
            kernels[tile] = kernel
            return lambda: kernel(frames, target)

        kernels: dict[StemTile, StemKernel] = {}
        middle = _convolved(frames[:1].permute(0, 3, 1, 2), *first, padding=1).to(target.dtype)
        expected = _convolved(middle, *second, padding=1, stride=2)
        name = f"stem-{tuple(target.shape)}"
        layers = f"layers {step.first} and {step.second}"
        chosen = self._fastest(layers, name, STEM_VARIANTS, make, target, expected)
        if chosen not in kernels:
            make(chosen)
        kernel = kernels[chosen]
        return lambda frames: kernel(frames, target)

    def unit(self, step: Unit, source: torch.Tensor, target: torch.Tensor) -> Call:
        first, second = self._weights(step.first), self._weights(step.second)
        kernels: dict[UnitTile, ResidualUnit] = {}

        def make(tile: UnitTile) -> Callable[[], None]:
            kernel = ResidualUnit(first, second, tile)
            kernels[tile] = kernel
            return lambda: kernel(source, target)

        middle = _convolved(source[:1], *first).to(target.dtype)
        expected = _convolved(middle, *second, padding=1) + source[:1].float()
        tiles = RESIDUAL_UNIT_VARIANTS[target.shape[1]]
        name = f"unit-{tuple(target.shape)}"
        layers = f"layers {step.first} and {step.second}"
        chosen = self._fastest(layers, name, tiles, make, target, expected)
        if chosen not in kernels:
            make(chosen)
        kernel = kernels[chosen]
        return lambda frames: kernel(source, target)

    def enlarge(self, step: Enlarge, source: torch.Tensor, target: torch.Tensor) -> Call:
        if source.shape[1] % 8:
            return super().enlarge(step, source, target)
        enlarge_kernel.compile(source.device)
        return lambda frames: enlarge(source, target, factor=step.factor)

    def candidates(self, heads: list[torch.Tensor]) -> Callable[[], Candidates]:
        network, plan = self.network, self.network.plan
        shapes = [
            HeadShape(
                height=head.height,
                width=head.width,
                anchors=head.anchors,
                cell_width=plan.width / head.width,
                cell_height=plan.height / head.height,
                scale=head.scale_xy,
            )
            for head in plan.heads
        ]
        decoder = HeadDecoder(
            shapes,
            num_classes=plan.num_classes,
            batch_size=heads[0].shape[0],
            confidence_threshold=network.confidence_threshold,
            allowed=network.allowed,
            max_candidates=network.max_candidates,
            dtype=network.dtype,
            device=network.device,
        )
        decoder.bind(heads)
        return decoder

    def _weights(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        block: Any = self.network.blocks[index]
        return block.weight, block.bias

    def _fastest(
        self,
        layers: str,
        name: str,
        tiles: Sequence[_Tile],
        make: Callable[[_Tile], Callable[[], None]],
        target: torch.Tensor,
        expected: torch.Tensor,
    ) -> _Tile:
        """The fastest tile whose first frame of ``target`` comes out as expected."""
        by_name = {str(tile): tile for tile in tiles}
        known = self._choices.get(name)
        if known is not None and known["tile"] in by_name:
            self.report.loaded += 1
            self.report.microseconds[layers] = known["microseconds"]
            return by_name[known["tile"]]
        times: list[tuple[float, str]] = []
        problems = []
        for tile in tiles:
            try:
                run = undisturbed(partial(make, tile))
            except RuntimeError as error:
                problems.append(f"{tile}: {error}")
                continue
            target[:1].fill_(torch.nan)
            microseconds = _microseconds(run)
            difference = (target[:1].float() - expected).norm() / expected.norm()
            if difference < _MAX_ERROR[target.dtype]:
                times.append((microseconds, str(tile)))
            else:
                problems.append(f"{tile}: relative error {difference.item():.1e}")
        if problems:
            logger.warning("Variants of %s that do not work here: %s", name, "; ".join(problems))
        if not times:
            raise NoVariantError(f"no variant of {name} runs here: {problems[:2]}")
        self.report.measured += 1
        self.report.tried[name] = [(row[1], row[0]) for row in sorted(times)]
        microseconds, chosen = min(times)
        self.report.microseconds[layers] = microseconds
        self._choices[name] = {"tile": chosen, "microseconds": microseconds}
        return by_name[chosen]


def _convolved(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, **options: int
) -> torch.Tensor:
    out = functional.conv2d(x.float(), weight.float(), bias.float(), **options)
    return functional.leaky_relu(out, 0.1)


def _microseconds(run: Callable[[], None]) -> float:
    times = []
    for number in range(_RUNS):
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        stop = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        run()
        stop.record()
        stop.synchronize()
        if number > 1:
            times.append(float(start.elapsed_time(stop)) * 1e3)
    # The least: an engine may be serving on the same GPU meanwhile.
    return min(times)
