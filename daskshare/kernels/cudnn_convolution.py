"""Convolution with bias, activation and residual sum in one kernel, through cuDNN's graphs.

cuDNN offers many plans for a convolution; which is fastest only measuring tells. A measured plan is
kept as bytes, which load in another process without measuring.
"""

from __future__ import annotations

import dataclasses
import importlib
import weakref
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from daskshare.kernels.capture import undisturbed

__all__ = ["ConvolutionCase", "CudnnConvolutions", "Plan"]

_X, _WEIGHT, _BIAS, _Y, _RESIDUAL = 1, 2, 3, 4, 5
# More scratch memory than this is not worth any plan here.
_MAX_WORKSPACE_BYTES = 64 << 20
_RUNS = 9


@dataclass(frozen=True, slots=True)
class ConvolutionCase:
    """All that the choice of a plan depends on. A pitch is the values from a pixel to the next.

    Parameters
    ----------
    batch, in_channels, height, width : int
        Shape of the input.
    out_channels, size, stride, padding : int
        Of the convolution.
    in_pitch, out_pitch : int
        Of the input and of the output.
    residual_pitch : int
        Of what is added after the activation; 0 for nothing.
    activation : {"leaky", "relu", "linear"}
        Leaky with slope 0.1.
    dtype : {"float16", "bfloat16"}
        Of all tensors; sums are taken in float32.
    """

    batch: int
    in_channels: int
    height: int
    width: int
    out_channels: int
    size: int
    stride: int
    padding: int
    in_pitch: int
    out_pitch: int
    residual_pitch: int
    activation: str
    dtype: str

    @property
    def key(self) -> str:
        """Name in a file of measured plans."""
        return "-".join(str(value) for value in dataclasses.astuple(self))

    @property
    def out_size(self) -> tuple[int, int]:
        """Height and width of the output."""
        spare = 2 * self.padding - self.size
        return (self.height + spare) // self.stride + 1, (self.width + spare) // self.stride + 1


@dataclass(slots=True)
class Plan:
    """A convolution ready to run.

    Parameters
    ----------
    graph : object
        cuDNN's.
    workspace_bytes : int
        Scratch memory of a run.
    name : str
        cuDNN's name of the plan.
    microseconds : float
        Measured.
    """

    graph: Any
    workspace_bytes: int
    name: str
    microseconds: float


class CudnnConvolutions:
    """cuDNN on one device.

    Parameters
    ----------
    device : torch.device
        A CUDA device with an index.

    Raises
    ------
    ImportError
        Without nvidia-cudnn-frontend.

    Notes
    -----
    Not thread-safe; :meth:`bind` the calling thread's stream before runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._cudnn: Any = importlib.import_module("cudnn")
        self._device = device
        with torch.cuda.device(device):
            self._handle = self._cudnn.create_handle()
        weakref.finalize(self, self._cudnn.destroy_handle, self._handle)

    @property
    def versions(self) -> tuple[str, str]:
        """Of cuDNN and of its Python package: plans belong to them."""
        return str(self._cudnn.backend_version()), str(self._cudnn.__version__)

    def bind(self) -> None:
        """Run on the calling thread's current stream from now on."""
        stream = torch.cuda.current_stream(self._device).cuda_stream
        self._cudnn.set_stream(handle=self._handle, stream=stream)

    def run(self, plan: Plan, tensors: dict[int, int], workspace: torch.Tensor) -> None:
        """Run a plan on addresses from :meth:`addresses`."""
        plan.graph.execute(tensors, workspace.data_ptr(), handle=self._handle)

    @staticmethod
    def addresses(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        y: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> dict[int, int]:
        """Addresses of the tensors as :meth:`run` takes them."""
        tensors = {_X: x, _WEIGHT: weight, _BIAS: bias, _Y: y}
        if residual is not None:
            tensors[_RESIDUAL] = residual
        return {uid: tensor.data_ptr() for uid, tensor in tensors.items()}

    def measure(
        self, case: ConvolutionCase, tensors: dict[int, int], *, max_plans: int
    ) -> tuple[Plan, bytes, list[tuple[str, float]]]:
        """Try cuDNN's plans and keep the fastest.

        Parameters
        ----------
        case : ConvolutionCase
            What to compute.
        tensors : dict
            Addresses that a run may overwrite.
        max_plans : int
            How many plans to try, in the order that cuDNN recommends.

        Returns
        -------
        tuple
            The fastest plan, its bytes for :meth:`load`, and (name, microseconds) of all.

        Raises
        ------
        RuntimeError
            When no plan works.
        """
        self.bind()
        try:
            graph = self._describe(case)
            graph.create_execution_plans([self._cudnn.heur_mode.A, self._cudnn.heur_mode.B])
            graph.check_support()
        except Exception as error:  # the package's own kinds do not share a base
            raise RuntimeError(f"cuDNN does not support {case}: {error}") from error
        found: list[tuple[float, int, str, int]] = []
        problems = []
        workspace = torch.empty(_MAX_WORKSPACE_BYTES, dtype=torch.uint8, device=self._device)
        for index in range(min(max_plans, graph.get_execution_plan_count())):
            try:
                undisturbed(partial(graph.build_plan_at_index, index))
                size = graph.get_workspace_size_plan_at_index(index)
                if size > _MAX_WORKSPACE_BYTES:
                    continue
                name = str(graph.get_plan_name_at_index(index))
                best = min((other[0] for other in found), default=float("inf"))
                time = self._time(graph, index, tensors, workspace, best)
                found.append((time, index, name, size))
            except Exception as error:
                # Many plans are offered that the device or the fusion cannot do.
                problems.append(f"{type(error).__name__}: {error}")
        if not found:
            raise RuntimeError(f"cuDNN has no plan for {case}: {problems[:3]}")
        microseconds, index, name, size = min(found)
        undisturbed(partial(graph.build_plan_at_index, index))
        plan = Plan(graph, size, name, microseconds)
        return plan, bytes(graph.serialize()), [(row[2], row[0]) for row in sorted(found)]

    def load(self, content: bytes, *, workspace_bytes: int, name: str, microseconds: float) -> Plan:
        """A plan from the bytes that :meth:`measure` returned, for equal versions and device."""
        numbers = list(content)

        def deserialize() -> Any:
            graph = self._cudnn.pygraph(handle=self._handle)
            graph.deserialize(self._handle, numbers)
            return graph

        return Plan(undisturbed(deserialize), workspace_bytes, name, microseconds)

    def _time(
        self,
        graph: Any,
        index: int,
        tensors: dict[int, int],
        workspace: torch.Tensor,
        best_microseconds: float,
    ) -> float:
        def run() -> None:
            graph.execute_plan_at_index(tensors, workspace.data_ptr(), index, handle=self._handle)

        times = []
        for number in range(_RUNS):
            start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            stop = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            start.record()
            run()
            stop.record()
            stop.synchronize()
            microseconds = float(start.elapsed_time(stop)) * 1e3
            if number > 0:
                times.append(microseconds)
            if number == 2 and min(times) > 2 * best_microseconds:
                break
        # The least: an engine may be serving on the same GPU meanwhile.
        return min(times)

    def _describe(self, case: ConvolutionCase) -> Any:
        cudnn = self._cudnn
        kind = {"float16": cudnn.data_type.HALF, "bfloat16": cudnn.data_type.BFLOAT16}[case.dtype]
        graph = cudnn.pygraph(
            handle=self._handle,
            io_data_type=kind,
            intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT,
        )

        def image(name: str, uid: int, channels: int, size: tuple[int, int], pitch: int) -> Any:
            height, width = size
            return graph.tensor(
                name=name,
                dim=[case.batch, channels, height, width],
                stride=[height * width * pitch, 1, width * pitch, pitch],
                data_type=kind,
                uid=uid,
            )

        inner, out, size = case.in_channels, case.out_channels, case.size
        x = image("x", _X, inner, (case.height, case.width), case.in_pitch)
        weight = graph.tensor(
            name="weight",
            dim=[out, inner, size, size],
            stride=[size * size * inner, 1, size * inner, inner],
            data_type=kind,
            uid=_WEIGHT,
        )
        bias = graph.tensor(
            name="bias", dim=[1, out, 1, 1], stride=[out, 1, out, out], data_type=kind, uid=_BIAS
        )
        y = graph.conv_fprop(
            image=x,
            weight=weight,
            padding=[case.padding] * 2,
            stride=[case.stride] * 2,
            dilation=[1, 1],
        )
        y = graph.bias(name="sum", input=y, bias=bias)
        if case.activation == "leaky":
            y = graph.leaky_relu(input=y, negative_slope=0.1)
        elif case.activation == "relu":
            y = graph.relu(input=y)
        if case.residual_pitch:
            residual = image("residual", _RESIDUAL, out, case.out_size, case.residual_pitch)
            y = graph.add(a=y, b=residual)
        height, width = case.out_size
        y.set_output(True).set_data_type(kind)
        y.set_dim([case.batch, out, height, width])
        y.set_stride([height * width * case.out_pitch, 1, width * case.out_pitch, case.out_pitch])
        y.set_uid(_Y)
        graph.validate()
        graph.build_operation_graph()
        return graph
