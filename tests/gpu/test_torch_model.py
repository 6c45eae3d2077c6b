from __future__ import annotations

import numpy as np
import pytest
import torch

from daskshare.config import EngineOptions
from daskshare.device import Device, current_device
from daskshare.engine import InferenceEngine
from daskshare.errors import InvalidInputError
from daskshare.models.torch_model import torch_model_spec

pytestmark = pytest.mark.gpu


def load_net(device):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))


ITEMS = np.random.default_rng(0).random((50, 6), dtype=np.float32)


@pytest.fixture
def program():
    return torch_model_spec(load_net, name="net").load(current_device())


def test_device_memory_is_taken_as_it_is(program):
    import cupy

    array = cupy.asarray(ITEMS)
    assert program.prepare(array).items.data_ptr() == array.data.ptr
    tensor = torch.from_numpy(ITEMS).cuda()
    assert program.prepare(tensor).items.data_ptr() == tensor.data_ptr()
    stacked = program.prepare([tensor[0], tensor[1]]).items
    assert stacked.device == tensor.device
    assert torch.equal(stacked, tensor[:2])


def test_memory_of_another_gpu_is_refused():
    import cupy

    device = current_device()
    elsewhere = Device("cuda", device.index + 1, "GPU-other", "other", device.total_bytes)

    spec = torch_model_spec(lambda device: torch.sin, name="sin")
    program = spec.load(elsewhere)
    for array in (torch.ones(2, device="cuda:0"), cupy.ones(2)):
        with pytest.raises(InvalidInputError, match="a tensor on cuda:0"):
            program.prepare(array)


def test_the_cpu_model_refuses_gpu_memory():
    import cupy

    program = torch_model_spec(load_net, name="net").load(Device.cpu())
    with pytest.raises(InvalidInputError, match="GPU memory"):
        program.prepare(cupy.ones((2, 6)))
    with pytest.raises(InvalidInputError, match="a tensor on cuda:0"):
        program.prepare(torch.ones(2, 6, device="cuda:0"))


@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("input_dtype", [None, "float64"])
def test_same_results_as_on_the_cpu(cuda_graph, input_dtype):
    def load(device):
        dtype = torch.float64 if input_dtype else torch.float32
        return load_net(device).to(dtype)

    results = []
    for device in (current_device(), Device.cpu()):
        spec = torch_model_spec(
            load, name="net", max_batch_size=16, cuda_graph=cuda_graph, input_dtype=input_dtype
        )
        program = spec.load(device)
        assert program.model_bytes == (6 * 5 + 5 + 5 * 3 + 3) * (8 if input_dtype else 4)
        engine = InferenceEngine(program, device, options=EngineOptions(), name="net")
        try:
            results.append(engine.infer(ITEMS))
            if device.is_cuda and cuda_graph:
                assert engine.stats().graphs > 0, engine.stats().graph_error
        finally:
            engine.close(timeout_seconds=30)
    np.testing.assert_allclose(results[0], results[1], rtol=1e-3, atol=1e-3)
    assert results[0].dtype == results[1].dtype


def test_work_still_queued_on_the_callers_stream_is_waited_for():
    engine = InferenceEngine(
        torch_model_spec(lambda device: torch.clone, name="copy").load(current_device()),
        current_device(),
        options=EngineOptions(),
        name="copy",
    )
    try:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            value = torch.zeros(8, 1024, device="cuda")
            torch.cuda._sleep(50_000_000)
            value += 1
            out = engine.infer(value)
        np.testing.assert_array_equal(out, np.ones((8, 1024)))
    finally:
        engine.close(timeout_seconds=30)
