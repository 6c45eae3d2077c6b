"""The fused plan, carried out in torch, computes what the ordinary network computes."""

from __future__ import annotations

import importlib.resources

import pytest
import torch

from daskshare.models.darknet import parse_cfg
from daskshare.models.fused import FusedNetwork, TorchOperations
from daskshare.models.fusion import fuse
from daskshare.models.network import YoloNetwork
from daskshare.models.steps import views_of
from daskshare.models.weights import LayerWeights, read_darknet
from tests.networks import random_floats, small_plan, write_darknet

BATCH = 2


def calm_weights(plan):
    """Weights that keep the activations of a deep network near one."""
    generator = torch.Generator().manual_seed(3)
    shortcuts = {layer.index for layer in plan.layers if type(layer).__name__ == "Shortcut"}
    weights = {}
    for layer in plan.convolutions:
        fan_in = layer.weight_shape[1] * layer.size**2
        gain = ((0.05 if layer.index + 1 in shortcuts else 2.0) / fan_in) ** 0.5
        weight = torch.randn(layer.weight_shape, generator=generator) * gain
        bias = torch.randn(layer.channels, generator=generator) * 0.1
        weights[layer.index] = LayerWeights(weight.numpy(), bias.numpy())
    return weights


def make(name, tmp_path):
    if name == "small":
        plan = small_plan()
        path = write_darknet(tmp_path / "small.weights", random_floats(plan))
        weights = read_darknet(path, plan)
    else:
        text = importlib.resources.files("daskshare").joinpath("data", f"{name}.cfg").read_text()
        plan = parse_cfg(text, path=name, input_size=(64, 96))
        weights = calm_weights(plan)
    network = YoloNetwork(plan, weights, dtype=torch.float32, confidence_threshold=0.1)
    return network.requires_grad_(False).eval()


# yolov3-spp is yolov3 with a pyramid of poolings.
@pytest.mark.parametrize("name", ["small", "yolov3-spp", "yolov3-tiny"])
def test_equals_the_ordinary_network(name, tmp_path):
    network = make(name, tmp_path)
    plan = network.plan
    generator = torch.Generator().manual_seed(5)
    shape = (BATCH, plan.height, plan.width, 3)
    batches = [torch.randint(256, shape, generator=generator, dtype=torch.uint8) for _ in range(2)]
    expected = [network(batch) for batch in batches]
    assert all((confidence > 0).sum() > 10 for _, confidence, _ in expected)
    for options in ({}, {"stem": True, "units": (64, 128)}, {"strided": False}):
        fused = FusedNetwork(network, fuse(plan, **options), BATCH, TorchOperations(network))
        # What was in the buffers before must not matter.
        fused.arena.fill_(float("nan"))
        for batch, reference in zip(batches, expected, strict=True):
            for got, wanted in zip(fused(batch), reference, strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_memory_of_the_buffers_is_what_was_planned(tmp_path):
    network = make("yolov3-tiny", tmp_path)
    plan = fuse(network.plan)
    fused = FusedNetwork(network, plan, 3, TorchOperations(network))
    assert fused.num_bytes == plan.arena_size * 3 * 4
    for step in plan.steps:
        tensor = fused.tensor(views_of(step)[-1])
        assert tensor.shape[0] == 3
        assert tensor.stride(1) == 1
