"""YOLO-v3 on the GPU: the reference, the CPU's results, device inputs, graphs, compiling."""

from __future__ import annotations

import dask.config
import numpy as np
import pytest
import torch

from daskshare.device import Device, list_devices
from daskshare.models.yolov3 import yolov3_spec
from tests.reference import disagreements, reference_frames

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def load():
    """Load each program once in this module."""
    programs = {}

    def load(**options):
        key = tuple(sorted(options.items()))
        if key not in programs:
            programs[key] = yolov3_spec("yolov3-tiny", **options).load(list_devices()[0])
        return programs[key]

    yield load
    programs.clear()


def run(program, forward, prepared):
    items = torch.as_tensor(prepared.items).cuda()
    outputs = {name: output.cpu().numpy() for name, output in forward(items).items()}
    return program.finish(outputs, prepared.context)


def infer(program, inputs):
    return run(program, program.forward, program.prepare(inputs))


def assert_close(a, b, *, pixels, confidence):
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        np.testing.assert_array_equal(one.class_id, other.class_id)
        np.testing.assert_allclose(one.xyxy, other.xyxy, atol=pixels)
        np.testing.assert_allclose(one.confidence, other.confidence, atol=confidence)


@pytest.mark.parametrize(
    ("precision", "min_iou", "max_confidence_error"),
    [("fp32", 0.95, 0.02), ("fp16", 0.90, 0.05), ("bf16", 0.90, 0.05), (None, 0.90, 0.05)],
)
def test_agrees_with_another_implementation(load, precision, min_iou, max_confidence_error):
    results = infer(load(precision=precision), reference_frames())
    assert disagreements(results, min_iou=min_iou, max_confidence_error=max_confidence_error) == []


def test_frames_on_the_device_agree_too(load):
    frames = torch.from_numpy(reference_frames()).cuda()
    results = infer(load(precision="fp16"), frames)
    assert disagreements(results, min_iou=0.90, max_confidence_error=0.05) == []


def test_the_default_precision_is_fp16_with_buckets_and_graphs(load):
    program = load()
    assert program.max_batch_size == 64
    assert program.batch_sizes == (1, 2, 4, 8, 16, 32, 64)
    assert program.graph_capturable
    fp32 = load(precision="fp32")
    assert program.model_bytes < 0.51 * fp32.model_bytes


def test_detections_equal_the_cpus(load):
    with torch.backends.cudnn.flags(allow_tf32=False):
        on_gpu = infer(load(precision="fp32"), reference_frames())
    program = yolov3_spec("yolov3-tiny", precision="fp32").load(Device.cpu())
    prepared = program.prepare(reference_frames())
    outputs = program.forward(torch.from_numpy(prepared.items))
    on_cpu = program.finish({k: v.numpy() for k, v in outputs.items()}, prepared.context)
    assert sum(map(len, on_cpu)) > 20
    assert_close(on_gpu, on_cpu, pixels=0.1, confidence=1e-3)


def test_torch_and_cupy_arrays_of_the_input_size_are_not_copied(load):
    import cupy

    program = load()
    tensor = torch.randint(0, 256, (2, 416, 416, 3), dtype=torch.uint8, device="cuda:0")
    assert program.prepare(tensor).items.data_ptr() == tensor.data_ptr()
    array = cupy.asarray(np.zeros((2, 416, 416, 3), dtype=np.uint8))
    items = program.prepare(array).items
    assert items.data_ptr() == array.data.ptr
    assert items.device == torch.device("cuda", 0)


def test_device_arrays_of_other_sizes_are_letterboxed_there(load):
    import cupy

    program = load()
    frames = reference_frames()[11:14]
    expected = program.prepare(frames).items.astype(int)
    inputs = [
        torch.from_numpy(frames).cuda(),
        cupy.asarray(frames),
        list(torch.from_numpy(frames).cuda()),
        [
            cupy.asarray(frames[0]),
            torch.from_numpy(frames[1]).cuda(),
            frames[2][::-1, ::-1][::-1, ::-1],
        ],
        torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 2, 1, 3))).cuda().transpose(1, 2),
    ]
    for value in inputs:
        prepared = program.prepare(value)
        assert prepared.items.is_cuda
        assert np.abs(prepared.items.cpu().numpy().astype(int) - expected).max() <= 1
        assert len(prepared.context) == 3
    sizes = [(272, 640), (1080, 1920), (416, 416)]
    mixed = program.prepare([torch.zeros(*s, 3, dtype=torch.uint8, device="cuda") for s in sizes])
    assert [(box.source_height, box.source_width) for box in mixed.context] == sizes


def test_a_cpu_program_takes_device_arrays():
    program = yolov3_spec("yolov3-tiny").load(Device.cpu())
    frames = reference_frames()[:2]
    items = program.prepare(torch.from_numpy(frames).cuda()).items
    np.testing.assert_array_equal(items, program.prepare(frames).items)


def capture(forward, batch):
    """Capture ``forward`` as an engine does: warm on a side stream, then record."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        forward(batch)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = forward(batch)
    return graph, outputs


def test_forward_in_a_cuda_graph(load):
    program = load(precision="fp16")
    prepared = program.prepare(reference_frames()[:16])
    expected = run(program, program.forward, prepared)
    batch = torch.zeros((16, 416, 416, 3), dtype=torch.uint8, device="cuda")
    graph, outputs = capture(program.forward, batch)
    batch.copy_(torch.from_numpy(prepared.items))
    graph.replay()
    got = program.finish({k: v.cpu().numpy() for k, v in outputs.items()}, prepared.context)
    assert sum(map(len, got)) > 10
    assert_close(got, expected, pixels=1.0, confidence=0.01)


def test_class_filter(load):
    frames = reference_frames()
    every, cars = infer(load(), frames), infer(load(classes="car"), frames)
    for some, all_ in zip(cars, every, strict=True):
        np.testing.assert_array_equal(some.xyxy, all_.xyxy[all_.class_id == 2])


@pytest.mark.slow
@pytest.mark.timeout(600)
# The compiler's own libraries warn; none of it is about this code.
@pytest.mark.filterwarnings("ignore")
def test_compiled_agrees_and_can_be_captured(load):
    program = load(precision="fp16")
    prepared = program.prepare(reference_frames())
    count = prepared.num_items
    with dask.config.set({"daskshare.models.fused-kernels": False}):
        compiled = program.compile(count)
    assert compiled.description.startswith("torch.compile")
    results = run(program, compiled, prepared)
    assert disagreements(results, min_iou=0.90, max_confidence_error=0.05) == []
    batch = torch.zeros((count, 416, 416, 3), dtype=torch.uint8, device="cuda")
    graph, outputs = capture(compiled, batch)
    batch.copy_(torch.from_numpy(prepared.items))
    graph.replay()
    got = program.finish({k: v.cpu().numpy() for k, v in outputs.items()}, prepared.context)
    assert_close(got, results, pixels=0.5, confidence=0.005)
    # The compiled forward and its graph hold memory until they are dropped.
    del graph, outputs, compiled
    torch.compiler.reset()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_first_batch_finds_its_kernel_compiled(precision):
    from daskshare.kernels.first_convolution import _convolve
    from daskshare.models.warm_up import warm_up

    device = list_devices()[0]
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    spec = yolov3_spec("yolov3-tiny", precision=precision)
    _convolve.device_caches.clear()
    warm_up(spec.plan(), device.torch_device(), dtype)
    compiled = set(_convolve.device_caches[device.index][0])
    assert len(compiled) == 1
    infer(spec.load(device), np.zeros((3, 416, 416, 3), np.uint8))
    assert set(_convolve.device_caches[device.index][0]) == compiled


def test_batches_that_are_not_compiled_take_little_memory(load):
    program = load()
    network = program._network
    batch = torch.randint(256, (16, 416, 416, 3), dtype=torch.uint8, device="cuda")

    def peak_bytes():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        network.forward(batch)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    with torch.inference_mode():
        split_bytes = peak_bytes()
        rows, network._split_rows = network._split_rows, 16
        try:
            whole_bytes = peak_bytes()
        finally:
            network._split_rows = rows
    assert split_bytes < 0.6 * whole_bytes
