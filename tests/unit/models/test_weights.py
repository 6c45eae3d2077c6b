"""Darknet's weights files of every version, safetensors, and files that do not fit."""

from __future__ import annotations

import importlib.resources
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from daskshare.errors import ChecksumError, WeightsError
from daskshare.models.fetch import KNOWN_WEIGHTS
from daskshare.models.weights import (
    LayerWeights,
    check_sha256,
    file_sha256,
    main,
    read_darknet,
    read_safetensors,
    read_weights,
    write_safetensors,
)
from tests.networks import SMALL_CFG, random_floats, small_plan, write_darknet


@pytest.fixture
def plan():
    return small_plan()


@pytest.fixture
def floats(plan):
    return random_floats(plan)


# The last ones carry the mark of transposed dense layers, with the old and the new counter.
@pytest.mark.parametrize(
    ("version", "header_bytes"),
    [((0, 1, 0), 16), ((0, 2, 0), 20), ((0, 2, 5), 20), ((1, 0, 0), 20)],
)
def test_every_header_version(tmp_path, plan, floats, version, header_bytes):
    path = write_darknet(tmp_path / "w.weights", floats, version=version)
    assert path.stat().st_size == header_bytes + floats.nbytes
    weights = read_darknet(path, plan)
    assert set(weights) == {0, 1, 4, 9, 14}
    # The last convolution has no batch norm: its numbers come out as they went in.
    n = weights[14].weight.size
    np.testing.assert_array_equal(weights[14].weight.ravel(), floats[-n:])
    np.testing.assert_array_equal(weights[14].bias, floats[-n - 14 : -n])


@pytest.mark.parametrize("version", [(1000, 1, 0), (0, 1000, 0)])
def test_the_transposed_mark_means_the_old_counter(tmp_path, plan, floats, version):
    import struct

    path = tmp_path / "w.weights"
    path.write_bytes(struct.pack("<4i", *version, 7) + floats.tobytes())
    n = read_darknet(path, plan)[14].weight.size
    np.testing.assert_array_equal(read_darknet(path, plan)[14].weight.ravel(), floats[-n:])


def test_batch_norm_is_folded(tmp_path, plan, floats):
    weights = read_darknet(write_darknet(tmp_path / "w.weights", floats), plan)[0]
    beta, gamma, mean, variance = floats[:32].reshape(4, 8).astype(np.float64)
    kernel = floats[32 : 32 + 216].reshape(8, 3, 3, 3)
    rng = np.random.default_rng(1)
    patch = rng.normal(size=(3, 3, 3))
    normalised = ((kernel * patch).sum(axis=(1, 2, 3)) - mean) / np.sqrt(variance + 1e-5)
    folded = (weights.weight * patch).sum(axis=(1, 2, 3)) + weights.bias
    np.testing.assert_allclose(folded, normalised * gamma + beta, rtol=1e-5, atol=1e-5)
    assert weights.weight.dtype == weights.bias.dtype == np.float32


@pytest.mark.parametrize(
    ("change", "word"),
    [(lambda data: data[:-1], "too short"), (lambda data: data + b"\0\0\0\0", "too long")],
)
@pytest.mark.parametrize("version", [(0, 1, 0), (0, 2, 0)])
def test_a_file_of_another_size(tmp_path, plan, floats, change, word, version):
    path = write_darknet(tmp_path / "w.weights", floats, version=version)
    right = path.stat().st_size
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(WeightsError, match=word) as caught:
        read_weights(path, plan)
    assert caught.value.path == str(path)
    assert caught.value.got_bytes == path.stat().st_size != right
    assert caught.value.expected_bytes == right


@pytest.mark.parametrize("size", [0, 11, 12, 15])
def test_a_file_shorter_than_its_header(tmp_path, plan, size):
    path = tmp_path / "w.weights"
    path.write_bytes(b"\0" * size)
    with pytest.raises(WeightsError, match="too short") as caught:
        read_darknet(path, plan)
    assert caught.value.got_bytes == size
    assert caught.value.expected_bytes >= 16 + 4 * plan.num_parameters


def test_a_missing_file(tmp_path, plan):
    with pytest.raises(WeightsError, match="on this machine"):
        read_weights(tmp_path / "none.weights", plan)


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", np.float16), ("fp32", np.float32)])
def test_safetensors_round_trip(tmp_path, plan, floats, precision, dtype):
    weights = read_darknet(write_darknet(tmp_path / "w.weights", floats), plan)
    path = tmp_path / "w.safetensors"
    write_safetensors(path, plan, weights, precision=precision)
    again = read_weights(path, plan)
    assert set(load_file(path)) == {
        f"layers.{i}.{part}" for i in (0, 1, 4, 9, 14) for part in ("weight", "bias")
    }
    for index, layer in weights.items():
        np.testing.assert_array_equal(again[index].weight, layer.weight.astype(dtype))
        np.testing.assert_array_equal(again[index].bias, layer.bias)
        assert again[index].weight.dtype == dtype


def test_kernels_beyond_fp16_are_refused(tmp_path, plan, floats):
    weights = read_darknet(write_darknet(tmp_path / "w.weights", floats), plan)
    weights[0] = LayerWeights(weights[0].weight * 1e6, weights[0].bias)
    with pytest.raises(WeightsError, match=r"layers\.0\.weight .*65504.*fp32"):
        write_safetensors(tmp_path / "w.safetensors", plan, weights)
    write_safetensors(tmp_path / "w.safetensors", plan, weights, precision="fp32")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("layers.4.bias"), "layers.4.bias is missing"),
        (lambda t: t.update({"layers.2.bias": np.zeros(1, "f4")}), "layers.2.bias is not needed"),
        (
            lambda t: t.update({"layers.0.bias": np.zeros(9, "f4")}),
            r"shape \(9,\), expected \(8,\)",
        ),
        (lambda t: t.update({"layers.0.bias": np.zeros(8, "f8")}), "type F64, expected F16 or F32"),
    ],
)
def test_safetensors_that_do_not_fit(tmp_path, plan, floats, change, words):
    path = tmp_path / "w.safetensors"
    weights = read_darknet(write_darknet(tmp_path / "w.weights", floats), plan)
    write_safetensors(path, plan, weights)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(WeightsError, match=words):
        read_safetensors(path, plan)


@pytest.mark.parametrize("content", [b"", b"no tensors at all", b"\xff" * 64])
def test_a_file_that_is_no_safetensors(tmp_path, plan, content):
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="no complete safetensors") as caught:
        read_safetensors(path, plan)
    assert caught.value.got_bytes == len(content)


def test_conversion_is_reproducible(tmp_path, plan, floats, capsys):
    (tmp_path / "net.cfg").write_text(SMALL_CFG)
    source = write_darknet(tmp_path / "w.weights", floats)
    outputs = [tmp_path / f"{i}.safetensors" for i in range(2)]
    assert main([str(source), str(tmp_path / "net.cfg"), str(outputs[0])]) == 0
    assert file_sha256(outputs[0]) in capsys.readouterr().out
    command = [sys.executable, "-m", "daskshare.models.weights"]
    subprocess.run(
        [*command, str(source), str(tmp_path / "net.cfg"), str(outputs[1])], check=True, timeout=60
    )
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    assert set(read_safetensors(outputs[0], plan)) == {0, 1, 4, 9, 14}


def test_the_packaged_weights_are_those_of_the_provenance_note():
    data = importlib.resources.files("daskshare").joinpath("data")
    known = KNOWN_WEIGHTS["yolov3-tiny"]
    check_sha256(str(data.joinpath(known.file)), known.sha256, advice="")
    note = data.joinpath("PROVENANCE.md").read_text("utf-8")
    assert known.sha256 in note
    assert "dccea06f59b781ec1234ddf8d1e94b9519a97f4245748a7d4db75d5b7080a42c" in note


def test_a_wrong_digest(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    with pytest.raises(ChecksumError, match="Do something") as caught:
        check_sha256(path, "0" * 64, advice="Do something.")
    assert caught.value.got_sha256 == file_sha256(path)
    assert caught.value.expected_sha256 == "0" * 64
