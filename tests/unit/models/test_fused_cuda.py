"""Which convolutions go to cuDNN and what is kept of the choice; a stand-in computes in torch."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from daskshare.kernels.cudnn_convolution import ConvolutionCase, Plan
from daskshare.models.fused import FusedNetwork, TorchOperations
from daskshare.models.fused_build import FusedUnavailableError, build_fused
from daskshare.models.fused_cuda import CudaOperations
from daskshare.models.fusion import fuse
from daskshare.models.network import YoloNetwork
from daskshare.models.plan import Convolutional
from daskshare.models.weights import read_darknet
from tests.networks import random_floats, small_plan, write_darknet

BATCH = 2


class StandIn:
    """cuDNN in torch: carries a case out on tensors instead of addresses."""

    def __init__(self, *, refuse=(), broken=False):
        self.refuse = refuse
        self.broken = broken
        self.measured = []
        self.loaded = []

    def addresses(self, x, weight, bias, y, residual):
        return {"x": x, "weight": weight, "bias": bias, "y": y, "residual": residual}

    def measure(self, case, tensors, *, max_plans):
        assert max_plans >= 1
        if case.size in self.refuse:
            raise RuntimeError("cuDNN has no plan")
        self.measured.append(case.key)
        return Plan(case, 32, "p", 1.5), case.key.encode(), [("p", 1.5), ("q", 2.0)]

    def load(self, content, *, workspace_bytes, name, microseconds):
        if self.broken:
            raise ValueError("another version wrote this")
        self.loaded.append(content.decode())
        values = [v if not v.isdigit() else int(v) for v in content.decode().split("-")]
        return Plan(ConvolutionCase(*values), workspace_bytes, name, microseconds)

    def run(self, plan, tensors, workspace):
        case = plan.graph
        x, y, residual = tensors["x"], tensors["y"], tensors["residual"]
        assert workspace.numel() >= plan.workspace_bytes
        assert tuple(x.shape) == (case.batch, case.in_channels, case.height, case.width)
        assert tuple(y.shape) == (case.batch, case.out_channels, *case.out_size)
        assert (x.stride(3), y.stride(3)) == (case.in_pitch, case.out_pitch)
        assert (0 if residual is None else residual.stride(3)) == case.residual_pitch
        out = functional.conv2d(
            x, tensors["weight"], tensors["bias"], stride=case.stride, padding=case.padding
        )
        out = {"leaky": lambda t: functional.leaky_relu(t, 0.1), "relu": torch.relu}.get(
            case.activation, lambda t: t
        )(out)
        y.copy_(out if residual is None else out + residual)


class Operations(CudaOperations):
    """Without what needs a device."""

    enlarge = TorchOperations.enlarge
    candidates = TorchOperations.candidates


@pytest.fixture
def network(tmp_path):
    plan = small_plan()
    weights = read_darknet(write_darknet(tmp_path / "w", random_floats(plan)), plan)
    network = YoloNetwork(plan, weights, dtype=torch.float16, confidence_threshold=0.2)
    return network.requires_grad_(False).eval()


def build(network, cudnn, choices):
    operations = Operations(network, cudnn, choices)
    fused = FusedNetwork(network, fuse(network.plan), BATCH, operations)
    operations.finish()
    return operations, fused


def frames(network):
    shape = (BATCH, network.plan.height, network.plan.width, 3)
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


def assert_equals_the_network(fused, network):
    batch = frames(network)
    _, confidence, _ = fused(batch)
    _, expected, _ = network(batch)
    assert (expected > 0).sum() > 20
    torch.testing.assert_close(confidence, expected, rtol=0, atol=5e-3)


def test_cudnn_gets_what_it_can_do(network):
    cudnn, choices = StandIn(), {}
    operations, fused = build(network, cudnn, choices)
    assert_equals_the_network(fused, network)
    convolutions = [x for x in network.plan.layers if isinstance(x, Convolutional)]
    # Not the first, which reads bytes, and not the grouped one.
    able = [x for x in convolutions if x.index > 0 and x.groups == 1]
    assert sorted(operations.report.microseconds) == sorted(f"layer {x.index}" for x in able)
    assert operations.report.measured == len(cudnn.measured) == len(choices) == len(able)
    assert operations.report.fallbacks == []
    assert operations.description == f"fused kernels: {len(able)} chosen by measuring"


def test_kept_choices_are_loaded_and_not_measured(network):
    choices = {}
    build(network, StandIn(), choices)
    kept = dict(choices)
    second = StandIn()
    operations, fused = build(network, second, choices)
    assert_equals_the_network(fused, network)
    assert second.measured == []
    assert sorted(second.loaded) == sorted(kept)
    assert (operations.report.measured, operations.report.loaded) == (0, len(kept))
    assert choices == kept


def test_kept_plans_that_do_not_load_are_measured_anew(network, caplog):
    choices = {}
    build(network, StandIn(), choices)
    broken = StandIn(broken=True)
    with caplog.at_level(logging.WARNING):
        _, fused = build(network, broken, choices)
    assert "another version wrote this" in caplog.text
    assert sorted(broken.measured) == sorted(choices)
    assert_equals_the_network(fused, network)


def test_what_cudnn_refuses_is_left_to_torch_and_told(network):
    operations, fused = build(network, StandIn(refuse=(1,)), {})
    assert_equals_the_network(fused, network)
    assert "steps left to torch" in operations.description
    assert "cuDNN has no plan" in operations.description


def test_cases_differ_in_everything_that_matters():
    case = ConvolutionCase(64, 128, 52, 52, 256, 3, 1, 1, 128, 384, 256, "leaky", "float16")
    others = [
        replace(case, batch=32),
        replace(case, out_pitch=256),
        replace(case, residual_pitch=0),
        replace(case, activation="linear"),
        replace(case, dtype="bfloat16"),
    ]
    assert len({case.key, *(other.key for other in others)}) == 6
    assert replace(case, stride=2).out_size == (26, 26)
    assert replace(case, size=1, padding=0).out_size == (52, 52)


def test_unavailable_on_the_cpu(network, tmp_path):
    with pytest.raises(FusedUnavailableError, match=r"compute capability 9\.0"):
        build_fused(network, BATCH, folder=tmp_path)
