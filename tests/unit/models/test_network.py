"""The torch module against the same network written out in NumPy, and its compiled form."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import daskshare.models.network as network_module
from daskshare.models.network import YoloNetwork, compile_network
from daskshare.models.packed import PackedConvolution
from daskshare.models.plan import Convolutional, MaxPool, NetworkPlan, Route, Shortcut, Upsample
from daskshare.models.weights import LayerWeights, read_darknet
from tests.networks import SMALL_CFG, random_floats, small_plan, write_darknet


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def activate(x, name):
    return {
        "leaky": lambda: np.where(x > 0, x, 0.1 * x),
        "linear": lambda: x,
        "logistic": lambda: sigmoid(x),
        "relu": lambda: np.maximum(x, 0),
        "mish": lambda: x * np.tanh(np.log1p(np.exp(x))),
    }[name]()


def windows(x, size, stride, count_y, count_x):
    """(c, count_y, count_x, size, size) views of x (c, h, w)."""
    return np.stack(
        [
            np.stack(
                [x[:, i * stride :][:, :size, j * stride :][..., :size] for j in range(count_x)], 1
            )
            for i in range(count_y)
        ],
        1,
    )


def written_out(plan: NetworkPlan, weights: dict[int, LayerWeights], frame: np.ndarray):
    """Boxes (m, 4), confidence (m,), class (m,) of all heads, cell by cell in float64."""
    outputs, boxes, confidence, classes = [], [], [], []
    x = frame.transpose(2, 0, 1) / 255
    for layer in plan.layers:
        if isinstance(layer, Convolutional):
            kernel = weights[layer.index].weight.astype(np.float64)
            p = layer.padding
            padded = np.pad(x, ((0, 0), (p, p), (p, p)))
            per_group, out = layer.in_channels // layer.groups, layer.channels // layer.groups
            parts = [
                np.einsum(
                    "cyxij,ocij->oyx",
                    windows(
                        padded[g * per_group : (g + 1) * per_group],
                        layer.size,
                        layer.stride,
                        layer.height,
                        layer.width,
                    ),
                    kernel[g * out : (g + 1) * out],
                )
                for g in range(layer.groups)
            ]
            x = np.concatenate(parts) + weights[layer.index].bias[:, None, None]
            x = activate(x, layer.activation)
        elif isinstance(layer, Shortcut):
            x = activate(x + sum(outputs[s] for s in layer.sources), layer.activation)
        elif isinstance(layer, Route):
            parts = [np.split(outputs[s], layer.groups)[layer.group_id] for s in layer.sources]
            x = np.concatenate(parts)
        elif isinstance(layer, Upsample):
            x = x.repeat(layer.stride, axis=1).repeat(layer.stride, axis=2)
        elif isinstance(layer, MaxPool):
            start = (layer.size - 1) // 2
            far = layer.size + layer.stride
            padded = np.pad(x, ((0, 0), (start, far), (start, far)), constant_values=-np.inf)
            x = windows(padded, layer.size, layer.stride, layer.height, layer.width).max((3, 4))
        else:
            cell_x, cell_y = plan.width / layer.width, plan.height / layer.height
            for i in range(layer.height):
                for j in range(layer.width):
                    for a, (anchor_w, anchor_h) in enumerate(layer.anchors):
                        t = x[a * (5 + layer.num_classes) :][: 5 + layer.num_classes, i, j]
                        shift = (layer.scale_xy - 1) / 2
                        cx = (sigmoid(t[0]) * layer.scale_xy - shift + j) * cell_x
                        cy = (sigmoid(t[1]) * layer.scale_xy - shift + i) * cell_y
                        w, h = np.exp(t[2]) * anchor_w, np.exp(t[3]) * anchor_h
                        boxes.append([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])
                        confidence.append(sigmoid(t[4]) * sigmoid(t[5:]).max())
                        classes.append(int(t[5:].argmax()))
        outputs.append(x)
    return np.array(boxes), np.array(confidence), np.array(classes)


def build(tmp_path, cfg=SMALL_CFG, *, dtype=torch.float32, threshold=0.0, class_ids=None):
    plan = small_plan(cfg)
    path = write_darknet(tmp_path / "w.weights", random_floats(plan))
    weights = read_darknet(path, plan)
    network = YoloNetwork(
        plan, weights, dtype=dtype, confidence_threshold=threshold, class_ids=class_ids
    ).eval()
    return network, plan, weights


def frames(plan, count=2):
    rng = np.random.default_rng(3)
    return rng.integers(0, 256, (count, plan.height, plan.width, 3), dtype=np.uint8)


@pytest.mark.parametrize("activation", ["leaky", "relu", "logistic", "mish", "linear"])
@pytest.mark.parametrize("packed_for", [None, 2, 5])
def test_predictions_equal_those_written_out(tmp_path, activation, packed_for):
    network, plan, weights = build(tmp_path, SMALL_CFG.replace("leaky", activation))
    if packed_for is not None:
        assert network.pack_convolutions(packed_for)
    batch = frames(plan)
    with torch.inference_mode():
        heads = network.predict(torch.from_numpy(batch))
    got = [torch.cat(parts, dim=1).numpy() for parts in zip(*heads, strict=True)]
    for i, frame in enumerate(batch):
        boxes, confidence, classes = written_out(plan, weights, frame)
        np.testing.assert_allclose(got[0][i], boxes, rtol=1e-3, atol=1e-2)
        np.testing.assert_allclose(got[1][i], confidence, rtol=1e-4, atol=1e-5)
        assert (got[2][i] == classes).mean() > 0.999


@pytest.mark.parametrize("packed", [False, True])
def test_candidates_are_ordered_and_above_the_threshold(tmp_path, packed):
    network, plan, weights = build(tmp_path, threshold=0.3)
    assert not packed or network.pack_convolutions(2)
    batch = frames(plan)
    with torch.inference_mode():
        boxes, confidence, class_id = network(torch.from_numpy(batch))
    assert boxes.shape == (2, plan.num_boxes, 4)
    assert boxes.dtype == confidence.dtype == torch.float32
    for i, frame in enumerate(batch):
        all_boxes, all_confidence, all_classes = written_out(plan, weights, frame)
        count = int((all_confidence > 0.3).sum())
        assert 0 < count < plan.num_boxes
        assert (confidence[i, :count].diff() <= 0).all()
        assert (confidence[i, count:] == 0).all()
        # Neighbouring cells may tie in confidence, so each box is looked up by its geometry.
        wanted = all_confidence > 0.3
        distance = np.abs(boxes[i, :count, None].numpy() - all_boxes[wanted]).max(-1)
        nearest = distance.argmin(1)
        assert sorted(nearest) == list(range(count))
        assert distance.min(1).max() < 0.05
        np.testing.assert_allclose(
            confidence[i, :count], all_confidence[wanted][nearest], atol=1e-5
        )
        np.testing.assert_array_equal(class_id[i, :count], all_classes[wanted][nearest])


def test_class_filter_keeps_boxes_whose_best_class_is_wanted(tmp_path):
    everything, plan, _ = build(tmp_path, threshold=0.3)
    only, _, _ = build(tmp_path, threshold=0.3, class_ids=(1,))
    batch = torch.from_numpy(frames(plan, 1))
    with torch.inference_mode():
        _, confidence, class_id = everything(batch)
        _, filtered, filtered_class = only(batch)
    wanted = confidence[(class_id == 1) & (confidence > 0)]
    assert 0 < len(wanted) < (confidence > 0).sum()
    assert torch.equal(filtered[filtered > 0], wanted)
    assert (filtered_class[filtered > 0] == 1).all()


def test_at_most_1024_candidates_those_of_highest_confidence(tmp_path):
    network, plan, _ = build(tmp_path, SMALL_CFG.replace("=64", "=128").replace("=48", "=96"))
    assert plan.num_boxes > 1024
    batch = torch.from_numpy(frames(plan, 1))
    with torch.inference_mode():
        every = torch.cat([head[1] for head in network.predict(batch)], dim=1)
        _, confidence, _ = network(batch)
    assert torch.equal(confidence[0], every[0].sort(descending=True).values[:1024])


def test_numbers_that_are_not_finite_are_no_candidates(tmp_path):
    network, plan, _ = build(tmp_path)
    network.blocks[9].bias.fill_(float("nan"))
    with torch.inference_mode():
        _, confidence, _ = network(torch.from_numpy(frames(plan)))
    assert torch.isfinite(confidence).all()
    # The other head still sees.
    assert (confidence > 0).sum() == 2 * plan.heads[1].height * plan.heads[1].width * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(tmp_path, dtype):
    exact, plan, _ = build(tmp_path)
    half, _, _ = build(tmp_path, dtype=dtype)
    batch = torch.from_numpy(frames(plan))
    with torch.inference_mode():
        for a, b in zip(exact.predict(batch), half.predict(batch), strict=True):
            assert b[0].dtype == b[1].dtype == torch.float32
            assert (a[1] - b[1]).abs().max() < 0.05
    assert half.num_bytes < exact.num_bytes


def test_packed_convolutions_compute_in_bfloat16_where_the_cpu_does(tmp_path):
    plain, plan, _ = build(tmp_path, dtype=torch.bfloat16)
    network, _, _ = build(tmp_path, dtype=torch.bfloat16)
    packed = network.pack_convolutions(2)
    assert packed == torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert any(isinstance(block, PackedConvolution) for block in network.blocks) == packed
    batch = torch.from_numpy(frames(plan))
    with torch.inference_mode():
        for a, b in zip(plain.predict(batch), network.predict(batch), strict=True):
            assert (a[1] - b[1]).abs().max() < 0.02


def test_convolutions_that_the_cpu_cannot_pack_stay_as_they_are(tmp_path, monkeypatch):
    network, _, _ = build(tmp_path, dtype=torch.float16)
    blocks = list(network.blocks)
    assert not network.pack_convolutions(2)
    assert list(network.blocks) == blocks
    network, _, _ = build(tmp_path)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not network.pack_convolutions(2)


def test_large_layers_are_computed_frame_by_frame(tmp_path, monkeypatch):
    monkeypatch.setattr(network_module, "_LARGE_BYTES", 10_000)
    plain, plan, _ = build(tmp_path, threshold=0.3)
    network, _, _ = build(tmp_path, threshold=0.3)
    assert network.pack_convolutions(3)
    before_heads = plan.layers[: plan.heads[0].index]
    large = [x.index for x in before_heads if x.channels * x.height * x.width * 4 > 10_000]
    seen = {}
    for index, block in enumerate(network.blocks):
        block.register_forward_hook(
            lambda module, args, output, i=index: seen.setdefault(i, []).append(len(output))
        )
    batch = torch.from_numpy(frames(plan, 3))
    with torch.inference_mode():
        for got, expected in zip(network(batch), plain(batch), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    # Layers that are views of others have no output of their own to look at.
    alone = [index for index in large if index in seen]
    assert len(alone) > 2
    assert all(seen[index] == [1, 1, 1] for index in alone)
    assert [3] in seen.values()


def test_large_layers_are_computed_for_some_frames_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(network_module, "_LARGE_BYTES", 10_000)
    plain, plan, _ = build(tmp_path, threshold=0.3)
    network, _, _ = build(tmp_path, threshold=0.3)
    network.split_large_layers(2)
    seen = {}
    for index, block in enumerate(network.blocks):
        block.register_forward_hook(
            lambda module, args, output, i=index: seen.setdefault(i, []).append(len(output))
        )
    batch = torch.from_numpy(frames(plan, 5))
    with torch.inference_mode():
        expected = plain(batch)
        for got, same in zip(network(batch), expected, strict=True):
            torch.testing.assert_close(got, same, rtol=1e-5, atol=1e-5)
        assert seen[0] == [2, 2, 1]
        assert [5] in seen.values()
        seen.clear()
        # What is compiled knows its batch, and would only be made longer.
        for got, same in zip(
            compile_network(network, backend="eager")(batch), expected, strict=True
        ):
            torch.testing.assert_close(got, same, rtol=1e-5, atol=1e-5)
    assert seen[0] == [5]
    assert [2, 2, 1] not in seen.values()


def test_packed_weights_take_the_place_of_the_others(tmp_path):
    network, plan, _ = build(tmp_path)
    before = network.num_bytes
    assert network.pack_convolutions(2)
    assert network.num_bytes == before
    packed = sum(isinstance(module, PackedConvolution) for module in network.modules())
    assert packed == sum(isinstance(layer, Convolutional) for layer in plan.layers) > 0


def test_activations_and_kernels_are_channels_last(tmp_path):
    network, plan, _ = build(tmp_path)
    seen = []
    for block in network.blocks:
        block.register_forward_hook(lambda *args: seen.append(args[-1]))
    with torch.inference_mode():
        network(torch.from_numpy(frames(plan)))
    images = [x for x in seen if isinstance(x, torch.Tensor) and x.dim() == 4]
    assert len(images) > 8
    for x in [*images, network.blocks[0].weight]:
        assert x.is_contiguous(memory_format=torch.channels_last)


def test_compiles_as_one_graph_for_many_sizes_and_models(tmp_path):
    batches = [torch.from_numpy(frames(small_plan(), count)) for count in (1, 2, 3, 4, 5)]
    for _ in range(2):
        network, _, _ = build(tmp_path, threshold=0.2)
        for batch in batches:
            compiled = compile_network(network, backend="aot_eager")
            with torch.inference_mode():
                for got, expected in zip(compiled(batch), network(batch), strict=True):
                    torch.testing.assert_close(got, expected)


def test_a_network_that_does_not_begin_with_a_convolution(tmp_path):
    cfg = SMALL_CFG.replace("[convolutional]", "[maxpool]\nsize=1\nstride=1\n\n[convolutional]", 1)
    cfg = cfg.replace("-1, 5", "-1, 6")
    network, plan, weights = build(tmp_path, cfg)
    batch = frames(plan, 1)
    with torch.inference_mode():
        heads = network.predict(torch.from_numpy(batch))
    boxes, confidence, _ = written_out(plan, weights, batch[0])
    got = [torch.cat(parts, dim=1).numpy()[0] for parts in zip(*heads, strict=True)]
    np.testing.assert_allclose(got[0], boxes, rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(got[1], confidence, rtol=1e-4, atol=1e-5)
