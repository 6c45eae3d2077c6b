from __future__ import annotations

import functools
import pickle
import subprocess
import sys
import threading
import warnings
from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch

from daskshare.config import EngineOptions
from daskshare.device import Device
from daskshare.engine import InferenceEngine
from daskshare.errors import ConfigurationError, InvalidInputError, ModelLoadError
from daskshare.models.spec import ModelSpec
from daskshare.models.torch_model import torch_model_spec

Pair = namedtuple("Pair", "sums firsts")


class SmallNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)
        self.dropout = torch.nn.Dropout(0.5)
        self.register_buffer("shift", torch.ones(2))

    def forward(self, batch):
        return self.dropout(self.linear(batch)) + self.shift


NET_BYTES = (3 * 2 + 2 + 2) * 4


def load_net(device):
    torch.manual_seed(0)
    return SmallNet().to(device)


def loader_of(function):
    return lambda device: function


def spec_of(function, **options):
    return torch_model_spec(loader_of(function), name="model", **options)


@pytest.fixture
def engine():
    """Makes engines on the CPU and closes them."""
    made = []

    def make(spec):
        device = Device.cpu()
        made.append(
            InferenceEngine(spec.load(device), device, options=EngineOptions(), name=spec.name)
        )
        return made[-1]

    yield make
    for one in made:
        one.close(timeout_seconds=10)


# -- the spec --


def test_it_is_a_model_spec_that_survives_pickling():
    spec = torch_model_spec(load_net, name="net")
    assert isinstance(spec, ModelSpec)
    again = pickle.loads(pickle.dumps(spec))  # noqa: S301
    assert again == spec
    assert hash(again) == hash(spec)
    assert again.load(Device.cpu()).model_bytes == NET_BYTES
    assert spec.estimated_bytes() == 0


def test_unpickling_imports_no_torch():
    text = pickle.dumps(spec_of(torch.sin))
    code = f"import pickle, sys; pickle.loads({text!r}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_key_depends_on_all_that_matters():
    specs = [
        spec_of(torch.sin),
        spec_of(torch.cos),
        torch_model_spec(loader_of(torch.sin), name="other"),
        spec_of(torch.sin, max_batch_size=4),
        spec_of(torch.sin, batch_sizes=(4,)),
        spec_of(torch.sin, input_dtype="float64"),
        spec_of(torch.sin, cuda_graph=True),
        spec_of(torch.sin, version="1"),
        spec_of(torch.sin, version="2"),
    ]
    assert len({spec.key for spec in specs}) == len(specs)
    assert spec_of(torch.sin).key == spec_of(torch.sin).key


def test_a_version_stands_for_the_loader():
    assert spec_of(torch.sin, version="1").key == spec_of(torch.cos, version="1").key


def test_cuda_graphs_get_sizes_to_pad_to():
    assert spec_of(torch.sin, cuda_graph=True, max_batch_size=12).batch_sizes == (1, 2, 4, 8, 12)
    assert spec_of(torch.sin, cuda_graph=True, max_batch_size=8).batch_sizes == (1, 2, 4, 8)
    assert spec_of(torch.sin, cuda_graph=True, batch_sizes=(8, 3)).batch_sizes == (3, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": ""}, "name"),
        ({"name": None}, "name"),
        ({"max_batch_size": 0}, "max_batch_size 0"),
        ({"max_batch_size": 2.0}, "max_batch_size 2.0"),
        ({"max_batch_size": True}, "max_batch_size True"),
        ({"max_batch_size": 4, "batch_sizes": (8,)}, "batch_sizes 8"),
        ({"batch_sizes": (0,)}, "batch_sizes 0"),
        ({"input_dtype": "int4"}, "int4"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ConfigurationError, match=message):
        torch_model_spec(load_net, **{"name": "net", **options})


@pytest.mark.parametrize(
    ("load", "message"),
    [
        ("resnet", "Got a loader of type str"),
        (SmallNet(), r"Got a torch\.nn\.Module"),
        (functools.partial(load_net, threading.Lock()), "cannot be pickled"),
    ],
)
def test_wrong_loaders_are_refused(load, message):
    with pytest.raises(ConfigurationError, match=message):
        torch_model_spec(load, name="net")


# -- loading --


def test_a_module_is_set_to_inference():
    program = torch_model_spec(load_net, name="net").load(Device.cpu())
    batch = torch.ones(2, 3)
    out = program.forward(batch)
    assert torch.equal(out, program.forward(batch)), "dropout is on"
    assert out.is_inference()


def test_the_loader_gets_a_torch_device():
    def load(device):
        assert isinstance(device, torch.device)
        return lambda batch: batch + len(str(device))

    loaded = torch_model_spec(load, name="m").load(Device.cpu())
    assert loaded.forward(torch.zeros(1)).tolist() == [len("cpu")]
    assert loaded.model_bytes == 0


@pytest.mark.parametrize(
    "load",
    [
        lambda device: (lambda net: lambda batch: net(batch) / 2)(load_net(device)),
        lambda device: functools.partial(SmallNet.forward, load_net(device)),
        lambda device: load_net(device).forward,
    ],
    ids=["closure", "partial", "method"],
)
def test_the_bytes_of_wrapped_modules_are_found(load):
    assert torch_model_spec(load, name="net").load(Device.cpu()).model_bytes == NET_BYTES


def test_shared_weights_count_once():
    def load(device):
        linear = torch.nn.Linear(3, 3, bias=False)
        return torch.nn.Sequential(linear, torch.nn.ReLU(), linear)

    assert torch_model_spec(load, name="tied").load(Device.cpu()).model_bytes == 9 * 4


def test_a_loader_that_returns_no_model_is_named():
    with pytest.raises(ModelLoadError, match="returned dict") as caught:
        torch_model_spec(lambda device: {}, name="weights").load(Device.cpu())
    assert caught.value.model == "weights"


# -- through an engine --


@pytest.mark.parametrize(
    "dtype", ["uint8", "int16", "int64", "float16", "float32", "float64", "bool", ">f4"]
)
def test_items_of_many_dtypes(engine, dtype):
    items = np.arange(6).reshape(3, 2).astype(dtype)
    out = engine(spec_of(lambda batch: batch.float() * 2)).infer(items)
    assert out.dtype == np.float32
    np.testing.assert_array_equal(out, items.astype(np.float32) * 2)


def test_input_dtype_converts_on_the_device(engine):
    out = engine(spec_of(lambda batch: batch / 2, input_dtype="float64")).infer(
        np.array([[1], [3]], np.uint8)
    )
    assert out.dtype == np.float64
    np.testing.assert_array_equal(out, [[0.5], [1.5]])


@pytest.mark.parametrize(
    "inputs",
    [
        torch.arange(6.0).reshape(2, 3),
        torch.arange(6.0).reshape(2, 3).T.contiguous().T,
        torch.arange(6.0).reshape(2, 3).requires_grad_(),
        [np.arange(3.0), np.arange(3.0, 6.0)],
        [torch.arange(3.0), torch.arange(3.0, 6.0)],
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(5.0, -1.0, -1.0).reshape(2, 3)[::-1, ::-1],
    ],
)
def test_kinds_of_inputs(engine, inputs):
    out = engine(spec_of(lambda batch: batch + 1)).infer(inputs)
    np.testing.assert_array_equal(out, np.arange(1.0, 7.0).reshape(2, 3))


def test_read_only_arrays_as_dask_hands_them_over(engine):
    items = np.ones((2, 3))
    items.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(engine(spec_of(torch.neg)).infer(items), -np.ones((2, 3)))


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda b: (b, b + 1), ([1.0], [2.0])),
        (lambda b: [b, {"x": b + 1}], [[1.0], {"x": [2.0]}]),
        (lambda b: OrderedDict(a=b, b=b + 1), {"a": [1.0], "b": [2.0]}),
        (lambda b: Pair(b, b + 1), Pair([1.0], [2.0])),
        (lambda b: b.bfloat16(), [1.0]),
    ],
)
def test_outputs_keep_their_structure(engine, function, expected):
    out = engine(spec_of(function)).infer(np.ones(1, np.float32))

    def plain(value):
        if isinstance(value, np.ndarray):
            return value.tolist()
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        values = [plain(v) for v in value]
        return type(value)(*values) if hasattr(value, "_fields") else type(value)(values)

    assert plain(out) == expected
    # Classes of loaders that travelled by value are copies, equal but not the same.
    assert type(out).__name__ in (type(expected).__name__, "ndarray")


@pytest.mark.parametrize(
    ("inputs", "got"),
    [
        ([], "an empty list"),
        ([np.ones(2), np.ones(3)], "different shapes"),
        ([np.ones(2), np.ones(2, np.float32)], "different shapes, dtypes"),
        ([np.ones(2), torch.ones(2)], "or kinds"),
        (np.array(1.0), "without axes"),
        (torch.tensor(1.0), "without axes"),
        ("text", "type str"),
        (np.array(["a"]), "dtype <U1"),
        (np.array([{}], dtype=object), "dtype object"),
        (np.ones(2, np.complex64), "complex64"),
        (torch.ones(2, device="meta"), "a tensor on meta"),
    ],
)
def test_what_no_model_takes_is_refused(inputs, got):
    program = spec_of(torch.sin).load(Device.cpu())
    with pytest.raises(InvalidInputError, match=got) as caught:
        program.prepare(inputs)
    assert caught.value.model == "model"


def test_gpu_memory_on_a_worker_without_a_gpu_is_refused():
    class CudaArray:
        @property
        def __cuda_array_interface__(self):
            return {"shape": (1,), "typestr": "<f4", "data": (0, False), "version": 3}

    with pytest.raises(InvalidInputError, match="GPU memory"):
        spec_of(torch.sin).load(Device.cpu()).prepare(CudaArray())
