"""The spec's options and identity; the packaged network against another implementation."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from dask.base import tokenize

import daskshare.models.yolov3 as yolov3_module
from daskshare.device import Device
from daskshare.errors import (
    ChecksumError,
    ConfigurationError,
    DarknetConfigError,
    ModelLoadError,
    WeightsError,
)
from daskshare.models.spec import ModelSpec
from daskshare.models.weights import file_sha256 as whole_file_sha256
from daskshare.models.yolov3 import yolov3_spec
from tests.networks import SMALL_CFG, random_floats, small_plan, write_darknet
from tests.reference import disagreements, reference_frames


@pytest.fixture
def custom(tmp_path):
    """Options of a small network of the caller's own."""
    (tmp_path / "small.cfg").write_text(SMALL_CFG)
    (tmp_path / "small.names").write_text("cat\ndog\n\n")
    weights = write_darknet(tmp_path / "small.weights", random_floats(small_plan()))
    return {
        "cfg": tmp_path / "small.cfg",
        "weights": weights,
        "names": tmp_path / "small.names",
    }


def infer(program, frames):
    prepared = program.prepare(frames)
    outputs = program.forward(torch.from_numpy(prepared.items))
    return program.finish({k: v.numpy() for k, v in outputs.items()}, prepared.context)


def test_packaged_network_agrees_with_another_implementation():
    program = yolov3_spec("yolov3-tiny", precision="fp32").load(Device.cpu())
    results = infer(program, reference_frames())
    assert disagreements(results, min_iou=0.95, max_confidence_error=0.02) == []
    # The agreement is closer than asked; this holds the letterbox and the mapping back in place.
    assert disagreements(results, min_iou=0.99, max_confidence_error=0.005) == []


def test_the_comparison_sees_differences():
    program = yolov3_spec("yolov3-tiny", precision="fp32").load(Device.cpu())
    wrong_colours = infer(program, np.ascontiguousarray(reference_frames()[..., ::-1]))
    assert disagreements(wrong_colours, min_iou=0.95, max_confidence_error=0.02)


def test_bf16_is_close_on_the_cpu_too():
    program = yolov3_spec("yolov3-tiny", precision="bf16").load(Device.cpu())
    results = infer(program, reference_frames()[5:8])
    exact = infer(yolov3_spec("yolov3-tiny").load(Device.cpu()), reference_frames()[5:8])
    for ours, theirs in zip(results, exact, strict=True):
        sure = theirs.confidence > 0.35
        np.testing.assert_array_equal(
            ours.class_id[: sure.sum()].sum(), theirs.class_id[sure].sum()
        )
        np.testing.assert_allclose(
            ours.confidence[: sure.sum()], theirs.confidence[sure], atol=0.05
        )


def test_spec_is_small_picklable_and_hashed_by_content():
    spec = yolov3_spec("yolov3-tiny", classes=["car", "bus"])
    assert isinstance(spec, ModelSpec)
    again = pickle.loads(pickle.dumps(spec))  # noqa: S301
    assert again == spec
    assert hash(again) == hash(spec)
    assert again.key == spec.key
    assert tokenize(again) == tokenize(spec)
    assert len(pickle.dumps(spec)) < 4000
    assert spec.class_ids == (2, 5)
    assert spec.name == "yolov3-tiny"
    assert spec != "yolov3-tiny"


def test_equal_options_share_and_different_ones_do_not(custom, tmp_path):
    base = yolov3_spec("yolov3-tiny")
    same = [
        yolov3_spec("yolov3-tiny", input_size=416),
        yolov3_spec("yolov3-tiny", input_size=(416, 416), confidence_threshold=0.25),
    ]
    others = [
        yolov3_spec("yolov3"),
        yolov3_spec("yolov3-spp"),
        yolov3_spec("yolov3-tiny", input_size=320),
        yolov3_spec("yolov3-tiny", precision="fp16"),
        yolov3_spec("yolov3-tiny", confidence_threshold=0.3),
        yolov3_spec("yolov3-tiny", iou_threshold=0.5),
        yolov3_spec("yolov3-tiny", classes=[2]),
        yolov3_spec("yolov3-tiny", max_batch_size=2),
        yolov3_spec("yolov3-tiny", names=[f"thing {i}" for i in range(80)]),
        yolov3_spec(**custom),
    ]
    assert {spec.key for spec in same} == {base.key}
    keys = [base.key, *(spec.key for spec in others)]
    assert len(set(keys)) == len(keys)
    # The same weights under another path are the same model; other weights are not.
    before = yolov3_spec(**custom)
    copy = tmp_path / "copy.weights"
    copy.write_bytes(custom["weights"].read_bytes())
    assert yolov3_spec(**{**custom, "weights": copy}).key == before.key
    write_darknet(copy, random_floats(small_plan(), seed=1))
    assert yolov3_spec(**{**custom, "weights": copy}).key != before.key


def test_a_network_of_ones_own(custom):
    spec = yolov3_spec(**custom)
    assert spec.name == "small"
    assert spec.class_names == ("cat", "dog")
    assert spec.input_size == (48, 64)
    custom["cfg"].unlink()
    program = spec.load(Device.cpu())
    assert program.item_shape == (48, 64, 3)
    assert yolov3_spec("mine", **{**custom, "cfg": _restore(custom["cfg"])}).name == "mine"


def _restore(path):
    path.write_text(SMALL_CFG)
    return path


def test_other_input_sizes(custom):
    spec = yolov3_spec("yolov3-tiny", input_size=(256, 320))
    assert spec.plan().num_boxes == (8 * 10 + 16 * 20) * 3
    assert spec.load(Device.cpu()).item_shape == (256, 320, 3)
    assert yolov3_spec(**custom, input_size=96).input_size == (96, 96)


def test_estimated_bytes_hold(custom):
    for precision in (None, "fp32", "fp16", "bf16"):
        spec = yolov3_spec("yolov3-tiny", precision=precision)
        loaded = spec.load(Device.cpu()).model_bytes
        assert spec.estimated_bytes() <= loaded < 1.01 * spec.estimated_bytes()
    assert yolov3_spec("yolov3", precision="fp16").estimated_bytes() == pytest.approx(
        124e6, rel=0.01
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "yolov3-tny"}, "Did you mean 'yolov3-tiny'"),
        ({"name": "resnet"}, "expected one of 'yolov3', 'yolov3-spp', 'yolov3-tiny'"),
        ({"precision": "int8"}, "'fp32', 'fp16', 'bf16'"),
        ({"confidence_threshold": 1.0}, r"\[0, 1\)"),
        ({"confidence_threshold": float("nan")}, r"\[0, 1\)"),
        ({"iou_threshold": 0}, r"\(0, 1\]"),
        ({"input_size": 400}, "multiple of 32"),
        ({"input_size": 0}, "multiple of 32"),
        ({"input_size": (416,)}, "multiple of 32"),
        ({"input_size": 416.0}, "multiple of 32"),
        ({"classes": ["cars"]}, "Did you mean 'car'"),
        ({"classes": ["Car"]}, "Did you mean 'car'"),
        ({"classes": [80]}, "0 to 79"),
        ({"classes": []}, "at least one class"),
        ({"max_batch_size": 0}, "integer >= 1"),
        ({"max_batch_size": True}, "integer >= 1"),
        ({"names": ["a", "b"]}, "80 class names, one for each class of the network; got 2"),
        ({"names": "/no/such.names"}, "a file that can be read here"),
        ({"weights": "/no/such.weights"}, "same path on every worker"),
        ({"cfg": "/no/such.cfg"}, "a file that can be read here"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(ConfigurationError, match=words) as caught:
        yolov3_spec(**{"name": "yolov3-tiny", **options})
    assert caught.value.option == next(iter(options))


def test_classes_by_name_number_and_text():
    for classes in (["car", "bus"], [5, 2], "bus,car", ["car", 5], np.array([2, 5])):
        assert yolov3_spec("yolov3-tiny", classes=classes).class_ids == (2, 5)


def test_a_cfg_needs_its_weights_and_names(custom):
    with pytest.raises(ConfigurationError, match="weights that belong to"):
        yolov3_spec(cfg=custom["cfg"])
    with pytest.raises(ConfigurationError, match=r"2 class names.*only COCO"):
        yolov3_spec(cfg=custom["cfg"], weights=custom["weights"])
    custom["cfg"].write_text(SMALL_CFG.replace("leaky", "lekay"))
    with pytest.raises(DarknetConfigError, match=r"small\.cfg, line 13") as caught:
        yolov3_spec(**custom)
    assert caught.value.path == str(custom["cfg"])


def test_weights_that_changed_or_went_away(custom):
    spec = yolov3_spec(**custom)
    write_darknet(custom["weights"], random_floats(small_plan(), seed=1))
    with pytest.raises(ChecksumError, match="same on every machine") as caught:
        spec.load(Device.cpu())
    assert caught.value.expected_sha256 == spec.weights_sha256
    custom["weights"].write_bytes(b"\0" * 100)
    with pytest.raises(WeightsError, match="too short"):
        spec.load(Device.cpu())
    custom["weights"].unlink()
    with pytest.raises(WeightsError, match="on this machine"):
        spec.load(Device.cpu())


def test_weights_are_hashed_once_as_long_as_the_file_stays_the_same(custom, monkeypatch):
    hashed = []

    def file_sha256(path):
        hashed.append(path)
        return whole_file_sha256(path)

    monkeypatch.setattr(yolov3_module, "file_sha256", file_sha256)
    yolov3_module._sha256_of_version.cache_clear()
    spec = yolov3_spec(**custom)
    spec.load(Device.cpu())
    assert hashed == [str(custom["weights"])]
    status = custom["weights"].stat()
    os.utime(custom["weights"], ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    spec.load(Device.cpu())
    assert len(hashed) == 2


def test_a_device_that_refuses(custom):
    class Broken(Device):
        def torch_device(self):
            raise RuntimeError("no such device")

    device = Broken(kind="cpu", index=0, uuid="cpu-x", name="broken", total_bytes=1)
    with pytest.raises(
        ModelLoadError, match="small in fp32 could not be loaded on broken"
    ) as caught:
        yolov3_spec(**custom).load(device)
    assert caught.value.reason == "no such device"


def test_the_spec_needs_no_torch():
    code = (
        "import sys, daskshare.models.yolov3 as y; spec = y.yolov3_spec('yolov3-tiny'); "
        "import pickle; pickle.loads(pickle.dumps(spec)).estimated_bytes(); "
        "bad = {'torch', 'cv2', 'av', 'cupy', 'pandas'} & set(sys.modules); "
        "sys.exit(', '.join(sorted(bad)) or None)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
