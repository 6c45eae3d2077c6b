from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from daskshare.config import EngineOptions
from daskshare.device import Device
from daskshare.engine import InferenceEngine
from daskshare.errors import InferenceError
from daskshare.models.spec import ModelSpec
from daskshare.testing import FakeDevice, FakeSpec, check_loader

EXAMPLE = np.random.default_rng(0).random((4, 3)).astype(np.float32)


class BatchNormNet(torch.nn.Module):
    def __init__(self, *, trains):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(3)
        self.trains = trains

    def forward(self, batch):
        self.norm.train(self.trains)
        return self.norm(batch)


def loader_of(function):
    return lambda device: function


# -- check_loader --


def test_a_good_loader_passes():
    check = check_loader(lambda device: torch.nn.Linear(3, 5), EXAMPLE)
    assert check.output_shapes == {"": (5,)}
    assert check.output_dtypes == {"": "float32"}
    assert check.model_bytes == (3 * 5 + 5) * 4
    assert 0 <= check.largest_difference < 1e-4


def test_nested_outputs_are_named_by_their_place():
    check = check_loader(
        loader_of(lambda b: {"logits": b, "parts": [b.sum(1), b.bfloat16()]}), EXAMPLE
    )
    assert check.output_shapes == {"['logits']": (3,), "['parts'][0]": (), "['parts'][1]": (3,)}
    assert check.output_dtypes["['parts'][1]"] == "float32"


def test_a_list_of_items_and_a_dtype_are_taken_as_share_takes_them():
    items = list((EXAMPLE * 255).astype(np.uint8))
    check = check_loader(loader_of(lambda b: b / 255), items, input_dtype="float16")
    assert check.output_dtypes == {"": "float16"}


def test_an_untrained_batch_norm_in_eval_mode_passes():
    check_loader(lambda device: BatchNormNet(trains=False), EXAMPLE)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda b: b + torch.rand(1), "differs between two calls"),
        (lambda b: b - b.mean(0), "depends on the other items"),
        (lambda b: b.sum(0), r"is \(3,\); expected a tensor whose first axis is 4"),
        (lambda b: b.sum(), r"is \(\)"),
        (lambda b: (b, "label"), r"Output\[1\] of a batch of 4 is str"),
        (lambda b: b.numpy(), "is ndarray"),
        (lambda b: b.expand(len(b), 3)[:, : len(b)], "when item 0 comes alone"),
        (lambda b: {str(i): b for i in range(len(b))}, "another structure"),
    ],
)
def test_bad_models_are_found(function, message):
    with pytest.raises(AssertionError, match=message):
        check_loader(loader_of(function), EXAMPLE)


def test_batch_statistics_are_found():
    def load(device):
        net = torch.nn.BatchNorm1d(3, track_running_stats=False)
        return lambda batch: net(batch.repeat(2, 1))[: len(batch)]

    with pytest.raises(AssertionError, match="depends on the other items"):
        check_loader(load, EXAMPLE)


def test_one_item_is_too_few():
    with pytest.raises(AssertionError, match="expected 2 or more"):
        check_loader(loader_of(torch.sin), EXAMPLE[:1])


# -- fakes --


def test_a_fake_device_has_the_size_it_is_told():
    device = FakeDevice(total_bytes=100, used_bytes=30)
    assert isinstance(device, Device)
    assert (device.total_bytes, device.free_bytes()) == (100, 70)
    assert device.torch_device() == torch.device("cpu")
    assert pickle.loads(pickle.dumps(device)) == device  # noqa: S301


def test_fake_specs_are_specs():
    assert isinstance(FakeSpec(), ModelSpec)
    assert FakeSpec().key == FakeSpec().key
    assert FakeSpec(factor=3).key != FakeSpec(factor=4).key
    with pytest.raises(RuntimeError, match="no such file"):
        FakeSpec(load_error="no such file").load(FakeDevice())


def test_a_fake_program_runs_in_an_engine():
    device = FakeDevice()
    program = FakeSpec(factor=3, poison=-1).load(device)
    engine = InferenceEngine(program, device, options=EngineOptions(), name="fake")
    try:
        np.testing.assert_array_equal(engine.infer([[1.0], [2.0]]), [[3.0], [6.0]])
        with pytest.raises(InferenceError, match=r"an item holds -1"):
            engine.infer([[-1.0]])
    finally:
        engine.close(timeout_seconds=10)
    assert program.batch_lengths[0] == 2
    assert len(program.threads) == 1
