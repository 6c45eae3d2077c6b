"""Fused kernels against torch in float32, and the fused network against the ordinary one."""

from __future__ import annotations

import importlib

import dask.config
import numpy as np
import pytest
import torch
from torch.nn import functional

from daskshare.device import list_devices
from daskshare.kernels.cudnn_convolution import ConvolutionCase, CudnnConvolutions
from daskshare.kernels.enlarge import enlarge
from daskshare.kernels.hopper import is_hopper
from daskshare.kernels.residual_unit import RESIDUAL_UNIT_VARIANTS, ResidualUnit
from daskshare.kernels.stem import STEM_VARIANTS, Stem
from daskshare.models.fused_build import FusedUnavailableError, build_fused
from daskshare.models.fused_cuda import CudaOperations
from daskshare.models.network import YoloNetwork
from daskshare.models.weights import read_darknet
from daskshare.models.yolov3 import yolov3_spec
from tests.networks import random_floats, small_plan, write_darknet
from tests.reference import disagreements, reference_frames

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)
#: Of a layer, by the precision of its inputs and its output.
MAX_ERROR = {torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture(autouse=True)
def exact_references():
    with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
        yield


@pytest.fixture
def hopper():
    if not is_hopper(DEVICE):
        pytest.skip("for compute capability 9.0; other GPUs run these layers through cuDNN")


def random(*shape, dtype=torch.float16, scale=1.0, seed=0):
    generator = torch.Generator(device=DEVICE).manual_seed(seed + sum(shape))
    values = torch.randn(shape, generator=generator, device=DEVICE) * scale
    values = values.to(dtype)
    return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values


def relative_error(got, expected):
    return ((got.float() - expected).norm() / expected.norm()).item()


def convolve(x, weight, bias, **options):
    out = functional.conv2d(x.float(), weight.float(), bias.float(), **options)
    return functional.leaky_relu(out, 0.1)


def in_both_precisions(variants):
    """All in float16, the first in bfloat16 too: another type of the same kernel."""
    half = [(*variant, torch.float16) for variant in variants]
    return [*half, (*variants[0], torch.bfloat16)]


@pytest.mark.parametrize(
    ("channels", "tile", "dtype"),
    [
        case
        for channels, tiles in RESIDUAL_UNIT_VARIANTS.items()
        for case in in_both_precisions([(channels, tile) for tile in tiles])
    ],
    ids=str,
)
# The last fits no tile, so that every edge is cut.
@pytest.mark.parametrize("shape", [(2, 52, 76), (3, 29, 35)])
def test_residual_unit(hopper, channels, tile, shape, dtype):
    n, height, width = shape
    half = channels // 2
    first = (
        random(half, channels, 1, 1, dtype=dtype, scale=channels**-0.5),
        random(half, dtype=dtype),
    )
    second = random(channels, half, 3, 3, dtype=dtype, scale=0.08), random(channels, dtype=dtype)
    x = random(n, channels, height, width, dtype=dtype)
    out = torch.full_like(x, torch.nan)
    ResidualUnit(first, second, tile)(x, out)
    middle = convolve(x, *first).to(dtype)
    expected = convolve(middle, *second, padding=1) + x.float()
    assert relative_error(out, expected) < MAX_ERROR[dtype]


@pytest.mark.parametrize(
    ("tile", "dtype"), in_both_precisions([(tile,) for tile in STEM_VARIANTS]), ids=str
)
@pytest.mark.parametrize("shape", [(2, 104, 152), (3, 50, 36)])
def test_stem(hopper, tile, shape, dtype):
    n, height, width = shape
    first = random(32, 3, 3, 3, dtype=dtype, scale=0.2 / 255), random(32, dtype=dtype)
    second = random(64, 32, 3, 3, dtype=dtype, scale=0.08), random(64, dtype=dtype)
    frames = torch.randint(256, (n, height, width, 3), dtype=torch.uint8, device=DEVICE)
    out = random(n, 64, height // 2, width // 2, dtype=dtype).fill_(torch.nan)
    Stem(first, second, tile)(frames, out)
    middle = convolve(frames.permute(0, 3, 1, 2), *first, padding=1).to(dtype)
    expected = convolve(middle, *second, padding=1, stride=2)
    assert relative_error(out, expected) < MAX_ERROR[dtype]


def test_enlarge_writes_its_part_only():
    source = random(2, 48, 5, 7)[:, 8:40]
    whole = torch.full((2, 10, 14, 64), 3.0, dtype=torch.float16, device=DEVICE)
    whole = whole.permute(0, 3, 1, 2)
    enlarge(source, whole[:, 16:48], factor=2)
    expected = functional.interpolate(source, scale_factor=2, mode="nearest")
    assert torch.equal(whole[:, 16:48], expected)
    assert torch.equal(whole[:, :16], torch.full_like(whole[:, :16], 3.0))
    assert torch.equal(whole[:, 48:], torch.full_like(whole[:, 48:], 3.0))


@pytest.mark.parametrize(
    ("inner", "out", "size", "stride", "residual", "activation"),
    [
        (64, 96, 3, 1, True, "leaky"),
        (32, 64, 3, 2, False, "leaky"),
        (64, 256, 1, 1, False, "linear"),
    ],
)
def test_cudnn_convolution_and_its_kept_plan(inner, out, size, stride, residual, activation):
    cudnn = CudnnConvolutions(DEVICE)
    x = random(2, inner, 26, 26)
    weight, bias = random(out, inner, size, size, scale=0.05), random(out)
    y = random(2, out, 26 // stride, 26 // stride)
    added = random(*y.shape, seed=1) if residual else None
    case = ConvolutionCase(
        batch=2,
        in_channels=inner,
        height=26,
        width=26,
        out_channels=out,
        size=size,
        stride=stride,
        padding=size // 2,
        in_pitch=inner,
        out_pitch=out,
        residual_pitch=out if residual else 0,
        activation=activation,
        dtype="float16",
    )
    addresses = cudnn.addresses(x, weight, bias, y, added)
    plan, content, tried = cudnn.measure(case, addresses, max_plans=3)
    assert plan.microseconds == min(microseconds for _, microseconds in tried) > 0
    again = cudnn.load(
        content,
        workspace_bytes=plan.workspace_bytes,
        name=plan.name,
        microseconds=plan.microseconds,
    )
    expected = functional.conv2d(
        x.float(), weight.float(), bias.float(), stride=stride, padding=size // 2
    )
    if activation == "leaky":
        expected = functional.leaky_relu(expected, 0.1)
    if added is not None:
        expected = expected + added.float()
    workspace = torch.empty(max(1, plan.workspace_bytes), dtype=torch.uint8, device=DEVICE)
    for candidate in (plan, again):
        y.fill_(torch.nan)
        cudnn.bind()
        cudnn.run(candidate, addresses, workspace)
        assert relative_error(y, expected) < MAX_ERROR[torch.float16]


def test_a_convolution_that_cudnn_cannot_do_is_an_error():
    # A window of three pixels finds no place on one.
    case = ConvolutionCase(1, 8, 1, 1, 8, 3, 1, 0, 8, 8, 0, "leaky", "float16")
    x, y = random(1, 8, 1, 1), random(1, 8, 1, 1)
    cudnn = CudnnConvolutions(DEVICE)
    addresses = cudnn.addresses(x, random(8, 8, 3, 3), random(8), y, None)
    with pytest.raises(RuntimeError, match="cuDNN"):
        cudnn.measure(case, addresses, max_plans=2)


def small_network(tmp_path, dtype, **options):
    plan = small_plan()
    weights = read_darknet(write_darknet(tmp_path / "w", random_floats(plan)), plan)
    options = {"confidence_threshold": 0.2, **options}
    network = YoloNetwork(plan, weights, dtype=dtype, **options)
    return network.requires_grad_(False).eval().to(DEVICE)


def assert_same_candidates(got, expected):
    """Equal boxes in equal order; where confidences are close the order is nobody's promise."""
    boxes, confidence, class_id = got
    torch.testing.assert_close(confidence, expected[1], rtol=0, atol=1e-5)
    alone = confidence > 0
    for shift in (1, -1):
        alone &= (confidence - confidence.roll(shift, dims=1)).abs() > 1e-4
    assert alone.sum() > 20
    assert torch.equal(class_id[alone], expected[2][alone])
    torch.testing.assert_close(boxes[alone], expected[0][alone], rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("threshold", [0.2, 0.0])
@pytest.mark.parametrize("class_ids", [None, (1,)])
@pytest.mark.parametrize("most", [1024, 16])
def test_decoder_equals_the_network(tmp_path, dtype, threshold, class_ids, most):
    network = small_network(tmp_path, dtype, confidence_threshold=threshold, class_ids=class_ids)
    network.max_candidates = min(most, network.max_candidates)
    operations = CudaOperations(network, CudnnConvolutions(DEVICE), {})
    heads = [
        random(3, -(layer.channels // -8) * 8, layer.height, layer.width, dtype=dtype)
        for layer in (network.plan.layers[head.index - 1] for head in network.plan.heads)
    ]
    got = operations.candidates(heads)()
    assert_same_candidates(got, network.candidates(network.decode(heads)))


def test_every_kind_of_layer(tmp_path):
    network = small_network(tmp_path, torch.float16)
    forward, _, fused = build_fused(network, 4, folder=tmp_path, max_plans=2)
    shape = (4, network.plan.height, network.plan.width, 3)
    frames = torch.randint(256, shape, dtype=torch.uint8, device=DEVICE)
    fused.arena.fill_(torch.nan)
    _, confidence, _ = forward(frames)
    _, expected, _ = network(frames)
    assert (expected > 0).sum() > 20
    torch.testing.assert_close(confidence, expected, rtol=0, atol=0.02)


@pytest.fixture
def cache(tmp_path):
    options = {"cache-directory": str(tmp_path / "cache"), "fused-kernels": "auto"}
    with dask.config.set({f"daskshare.models.{name}": value for name, value in options.items()}):
        yield tmp_path / "cache"


def detect(program, forward, prepared):
    items = torch.as_tensor(prepared.items).cuda()
    outputs = {name: output.cpu().numpy() for name, output in forward(items).items()}
    return program.finish(outputs, prepared.context)


@pytest.mark.timeout(600)
def test_a_program_compiles_to_fused_kernels(cache, monkeypatch):
    monkeypatch.setattr("daskshare.models.fused_build.MAX_PLANS", 2)
    program = yolov3_spec("yolov3-tiny", precision="fp16").load(list_devices()[0])
    prepared = program.prepare(reference_frames())
    count = prepared.num_items
    compiled = program.compile(count)
    assert compiled.description.startswith("fused kernels"), compiled.description
    results = detect(program, compiled, prepared)
    assert disagreements(results, min_iou=0.90, max_confidence_error=0.05) == []

    batch = torch.zeros((count, 416, 416, 3), dtype=torch.uint8, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = compiled(batch)
    batch.copy_(torch.from_numpy(prepared.items))
    graph.replay()
    captured = {name: output.cpu().numpy() for name, output in outputs.items()}
    for got, expected in zip(program.finish(captured, prepared.context), results, strict=True):
        np.testing.assert_array_equal(got.xyxy, expected.xyxy)
        np.testing.assert_array_equal(got.confidence, expected.confidence)


def test_the_second_start_measures_nothing(tmp_path):
    network = small_network(tmp_path, torch.float16)
    frames = torch.randint(256, (2, 48, 64, 3), dtype=torch.uint8, device=DEVICE)
    first, cold, _ = build_fused(network, 2, folder=tmp_path, max_plans=2)
    second, warm, _ = build_fused(network, 2, folder=tmp_path, max_plans=2)
    assert cold.report.measured > 0
    assert warm.report.measured == 0
    assert warm.report.loaded > 0
    for one, other in zip(first(frames), second(frames), strict=True):
        assert torch.equal(one, other)


@pytest.fixture
def no_compiler(monkeypatch):
    """Stands in for the compiler, which takes half a minute; tests/gpu/test_yolov3.py runs it."""
    monkeypatch.setattr("daskshare.models.program.compile_network", lambda network: network)


def test_without_the_package_torch_compiles(cache, monkeypatch, no_compiler):
    import_module = importlib.import_module

    def without(name, *args):
        if name == "cudnn":
            raise ImportError("No module named 'cudnn'")
        return import_module(name, *args)

    monkeypatch.setattr(importlib, "import_module", without)
    program = yolov3_spec("yolov3-tiny").load(list_devices()[0])
    description = program.compile(2).description
    assert description.startswith("torch.compile; no fused kernels")
    assert "nvidia-cudnn-frontend" in description
    with (
        dask.config.set({"daskshare.models.fused-kernels": True}),
        pytest.raises(FusedUnavailableError, match="nvidia-cudnn-frontend"),
    ):
        program.compile(2)


@pytest.mark.parametrize(
    ("precision", "option", "reason"),
    [("fp32", "auto", "needs float16 or bfloat16"), ("fp16", False, "switched off")],
)
def test_otherwise_torch_compiles_and_says_why(cache, no_compiler, precision, option, reason):
    program = yolov3_spec("yolov3-tiny", precision=precision).load(list_devices()[0])
    with dask.config.set({"daskshare.models.fused-kernels": option}):
        description = program.compile(2).description
    assert description.startswith("torch.compile; no fused kernels")
    assert reason in description
