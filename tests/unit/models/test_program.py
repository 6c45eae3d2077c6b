"""What callers may hand in, and what they get back."""

from __future__ import annotations

import threading

import dask.config
import numpy as np
import pytest
import torch

from daskshare.device import Device
from daskshare.errors import InvalidInputError
from daskshare.kernels.preprocess import Letterbox, letterbox_host
from daskshare.models.fused_build import FusedUnavailableError
from daskshare.models.spec import Program
from daskshare.models.yolov3 import yolov3_spec
from tests.networks import SMALL_CFG, random_floats, small_plan, write_darknet


@pytest.fixture
def load(tmp_path):
    def load(cfg=SMALL_CFG, **options):
        (tmp_path / "small.cfg").write_text(cfg)
        weights = write_darknet(tmp_path / "small.weights", random_floats(small_plan(cfg)))
        options = {"names": ["cat", "dog"], "confidence_threshold": 0.4, **options}
        spec = yolov3_spec(cfg=tmp_path / "small.cfg", weights=weights, **options)
        return spec.load(Device.cpu())

    return load


def infer(program, inputs):
    """Do what an engine does."""
    prepared = program.prepare(inputs)
    outputs = program.forward(torch.from_numpy(prepared.items))
    assert all(len(output) == prepared.num_items for output in outputs.values())
    return program.finish({k: v.numpy() for k, v in outputs.items()}, prepared.context)


def images(*sizes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def assert_same(a, b):
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        np.testing.assert_array_equal(one.xyxy, other.xyxy)
        np.testing.assert_array_equal(one.confidence, other.confidence)
        np.testing.assert_array_equal(one.class_id, other.class_id)


def test_is_a_program_with_the_cpu_defaults(load):
    program: Program = load()
    assert program.item_shape == (48, 64, 3)
    assert program.max_batch_size == 4
    assert program.batch_sizes == ()
    assert program.graph_capturable is False
    assert program.model_bytes > 0
    assert program.compile(4) is None
    assert load(max_batch_size=9).max_batch_size == 9


def test_frames_of_the_input_size_are_passed_without_a_copy(load):
    program = load()
    frames = np.stack(images((48, 64), (48, 64)))
    prepared = program.prepare(frames)
    assert prepared.items is frames
    assert prepared.context == [Letterbox(48, 64, 48, 64)] * 2
    assert np.shares_memory(program.prepare(torch.from_numpy(frames)).items, frames)


def test_frames_of_other_sizes_are_letterboxed(load):
    program = load()
    frames = images((100, 60), (20, 90), (48, 64))
    prepared = program.prepare(frames)
    assert prepared.items.shape == (3, 48, 64, 3)
    assert prepared.items.dtype == np.uint8
    for frame, item, box in zip(frames, prepared.items, prepared.context, strict=True):
        expected = np.empty((48, 64, 3), dtype=np.uint8)
        letterbox_host(frame, expected)
        np.testing.assert_array_equal(item, expected)
        assert (box.source_height, box.source_width) == frame.shape[:2]


def test_arrays_tensors_and_lists_give_the_same(load):
    program = load()
    frames = np.stack(images((70, 90), (70, 90), (70, 90)))
    expected = infer(program, frames)
    assert sum(map(len, expected)) > 0
    assert_same(infer(program, torch.from_numpy(frames)), expected)
    assert_same(infer(program, list(frames)), expected)
    assert_same(infer(program, tuple(torch.from_numpy(frames))), expected)
    assert_same(infer(program, [frames[0], torch.from_numpy(frames[1]), frames[2]]), expected)
    assert_same(infer(program, np.asfortranarray(frames)), expected)


class DLPack:
    """An array of another library."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def test_arrays_of_other_libraries_come_by_dlpack(load):
    program = load()
    frames = np.stack(images((48, 64)))
    prepared = program.prepare(DLPack(frames))
    assert np.shares_memory(prepared.items, frames)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (np.zeros((48, 64, 3), np.uint8), r"shape \(48, 64, 3\).*frame\[None\]"),
        (np.zeros((1, 3, 48, 64), np.uint8), r"shape \(1, 3, 48, 64\)"),
        (np.zeros((1, 48, 64, 4), np.uint8), r"shape \(1, 48, 64, 4\)"),
        (np.zeros((0, 48, 64, 3), np.uint8), "at least one frame"),
        (np.zeros((1, 0, 64, 3), np.uint8), r"shape \(1, 0, 64, 3\)"),
        (np.zeros((1, 48, 64, 3), np.float32), r"dtype float32.*astype"),
        (torch.zeros(1, 48, 64, 3), r"dtype float32"),
        ([], "empty list"),
        ([np.zeros((48, 64), np.uint8)], r"shape \(48, 64\)"),
        ([np.zeros((1, 48, 64, 3), np.uint8)], r"shape \(1, 48, 64, 3\)"),
        ([np.zeros((48, 64, 3), np.uint8), "frame"], "got a str"),
        ("clip.mp4", "got a str"),
        (None, "got a NoneType"),
    ],
)
def test_wrong_inputs_are_refused(load, inputs, words):
    with pytest.raises(InvalidInputError, match=words) as caught:
        load().prepare(inputs)
    assert "expected a uint8 RGB array" in str(caught.value)


def test_detections_are_in_source_pixels_and_ordered(load):
    program = load()
    small = images((48, 64))[0]
    large = np.kron(small, np.ones((4, 4, 1), np.uint8))
    for found in infer(program, [small, large]):
        assert len(found) > 0
        assert found.xyxy.dtype == found.confidence.dtype == np.float32
        assert found.xyxy.shape == (len(found), 4)
        assert found.class_id.dtype == np.int16
        assert (np.diff(found.confidence) <= 0).all()
        assert found.confidence.min() > 0.4
        assert found.class_names == ("cat", "dog")
    outputs = {k: v.numpy() for k, v in program.forward(torch.from_numpy(small[None])).items()}
    at_input_size = program.finish(outputs, program.prepare([small]).context)[0]
    at_source_size = program.finish(outputs, program.prepare([large]).context)[0]
    np.testing.assert_allclose(at_source_size.xyxy, 4 * at_input_size.xyxy, rtol=1e-5)


def test_suppression_and_class_filter(load):
    frames = np.stack(images((48, 64), (48, 64)))
    loose, strict = infer(load(iou_threshold=1.0), frames), infer(load(iou_threshold=0.3), frames)
    assert sum(map(len, loose)) > sum(map(len, strict)) > 0
    dogs = infer(load(iou_threshold=0.3, classes=["dog"]), frames)
    for one, all_ in zip(dogs, strict, strict=True):
        mine = all_.class_id == 1
        np.testing.assert_array_equal(one.xyxy, all_.xyxy[mine])
        np.testing.assert_array_equal(one.confidence, all_.confidence[mine])
    assert sum(map(len, dogs)) > 0


def test_a_frame_without_an_object(load):
    program = load(confidence_threshold=0.999999)
    (found,) = infer(program, images((48, 64)))
    assert len(found) == 0
    assert found.xyxy.shape == (0, 4)
    assert found.class_id.dtype == np.int16


def test_callers_in_many_threads(load):
    program = load()
    frames = images((70, 90), (100, 60))
    expected = infer(program, frames)
    results: list = [None] * 8

    def work(i):
        results[i] = infer(program, frames)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(results))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for result in results:
        assert_same(result, expected)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_rows_divided_among_threads_give_the_same(load, count):
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        program = load()
        assert program._lanes._most >= 4
        items = torch.from_numpy(program.prepare(images(*[(70, 50)] * count)).items)
        divided, whole = program.forward(items), program._forward(items)
        assert int(whole["count"].sum()) > 0
        for name, values in whole.items():
            torch.testing.assert_close(divided[name], values, msg=name)
    finally:
        torch.set_num_threads(before)


def test_frames_that_a_decoder_letterboxed_map_back_to_its_frames(load):
    program = load()
    (frame,) = images((100, 80))
    direct = program.prepare([frame])
    letterboxed = program.prepare_letterboxed(torch.from_numpy(direct.items), (100, 80))
    assert program.letterbox_size == program.item_shape[:2]
    assert letterboxed.context == direct.context
    np.testing.assert_array_equal(letterboxed.items, direct.items)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (FusedUnavailableError("needs a newer GPU"), "needs a newer GPU"),
        (RuntimeError("no such symbol"), "RuntimeError: no such symbol"),
    ],
)
def test_torch_compiles_where_fused_kernels_do_not_work(load, monkeypatch, error, reason):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("daskshare.models.fused_build.build_fused", fail)
    monkeypatch.setattr("daskshare.models.program.compile_network", lambda network: network)
    program = load()
    with dask.config.set({"daskshare.models.fused-kernels": "auto"}):
        candidates, description = program._fast_candidates(4)
    assert candidates is program._network
    assert description == f"torch.compile; no fused kernels: {reason}"
    with (
        dask.config.set({"daskshare.models.fused-kernels": True}),
        pytest.raises(type(error), match=str(error)),
    ):
        program._fast_candidates(4)
    with dask.config.set({"daskshare.models.fused-kernels": False}):
        assert "switched off" in program._fast_candidates(4)[1]
