"""Probing this machine, and programs that answer in odd ways."""

from __future__ import annotations

import sys
import types

import dask.config
import numpy as np
import pytest
import torch

import daskshare.device
import daskshare.video.nvdec
from daskshare.device import Device
from daskshare.doctor import probe
from daskshare.doctor.findings import Gpu


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Put a program with the given body first, and alone, on the path."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)

    def make(name, body):
        script = tmp_path / name
        script.write_text(f"#!/bin/sh\n{body}\n")
        script.chmod(0o755)
        return script

    return make


def test_this_machine():
    machine = probe.probe_machine()
    assert machine.packages["dask"] == "2026.7.1"
    assert machine.imports["torch"] == ""
    assert machine.h264_encoder
    assert machine.config_problems == ()
    assert ("daskshare", "bokeh") in {(r.owner, r.name) for r in machine.requirements}
    assert ("daskshare", "jupyterlab") not in {(r.owner, r.name) for r in machine.requirements}


@pytest.mark.parametrize(
    ("body", "driver", "problem", "gpus"),
    [
        (
            "echo '580.95.05, 143771, NVIDIA H200'; echo '580.95.05, 143771, NVIDIA H200'",
            *("580.95.05", "", (Gpu("NVIDIA H200", 143771 * 2**20),) * 2),
        ),
        ("echo '580.1, [N/A], NVIDIA GB10'", "580.1", "", (Gpu("NVIDIA GB10", 0),)),
        ("echo 'No devices were found'", "", "No devices were found", ()),
        ("echo 'it failed'; echo more; exit 9", "", "it failed", ()),
        ("exit 9", "", "status 9", ()),
    ],
)
def test_the_driver(command, body, driver, problem, gpus):
    command("nvidia-smi", body)
    assert probe._driver() == (driver, problem, gpus)


def test_no_driver(command):
    assert probe._driver() == ("", "", ())


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("echo 'openjdk version \"17.0.15\" 2025-04-15' >&2", ("17.0.15", "")),
        ("echo 'java version \"1.8.0_392\"' >&2", ("1.8.0_392", "")),
        (
            "echo 'Unable to locate a Java Runtime.' >&2; exit 1",
            ("", "Unable to locate a Java Runtime."),
        ),
    ],
)
def test_java(command, body, expected):
    command("java", body)
    assert probe._java() == expected


def test_java_home_counts_before_the_path(command, monkeypatch, tmp_path):
    command("java", "echo 'version \"17\"'")
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "jdk"))
    version, problem = probe._java()
    assert version == ""
    assert "jdk/bin/java" in problem


def test_the_compiler(command, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    assert probe._compiler() == ""
    clang = command("clang", "exit 0")
    assert probe._compiler() == str(clang)
    monkeypatch.setenv("CC", str(command("mycc", "exit 0")))
    assert probe._compiler().endswith("mycc")


def test_a_module_that_breaks_while_it_loads(tmp_path, monkeypatch):
    (tmp_path / "broken_build.py").write_text("raise OSError('libx.so: no such file\\nmore')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert probe._import_problem("broken_build") == "OSError: libx.so: no such file"


def test_wrong_configuration():
    with dask.config.set({"daskshare.engine.slots": 0, "daskshare.vidoe": 1}):
        name, value = list(probe._config_problems())
    assert "daskshare.vidoe" in name
    assert "daskshare.engine.slots" in value


def test_where_weights_cannot_be_written(tmp_path):
    assert probe._write_problem(tmp_path / "new" / "folder") == ""
    file = tmp_path / "file"
    file.touch()
    assert "directory" in probe._write_problem(file / "below").lower()


# -- GPUs that are not here --


@pytest.fixture
def cuda(monkeypatch):
    """Let torch claim a GPU, on which the first computation may fail with a given error."""

    def claim(error=None, available=True):
        device = Device("cuda", 0, "GPU-1", "NVIDIA H200", 141 * 2**30)

        def zeros(*args, **options):
            if error:
                raise error
            return torch.ones(1)

        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
        monkeypatch.setattr(torch, "zeros", zeros)
        monkeypatch.setattr(daskshare.device, "list_devices", lambda: [device])
        monkeypatch.setattr(
            daskshare.video.nvdec,
            "refusal",
            lambda chunk, device: "" if chunk.codec == "h264" else f"no {chunk.codec}",
        )
        return probe._cuda({"torch": ""})

    return claim


def test_a_gpu_that_works(cuda):
    build, [gpu], problem = cuda()
    assert (build, gpu.name, gpu.total_bytes, problem) == ("13.0", "NVIDIA H200", 141 * 2**30, "")
    assert gpu.decodes == {"h264": "", "hevc": "no hevc", "vp9": "no vp9", "av1": "no av1"}


def test_a_gpu_that_does_not_start(cuda):
    error = RuntimeError("CUDA error 802: system not yet initialized\nmore")
    assert cuda(error) == ("13.0", (), "CUDA error 802: system not yet initialized")
    assert cuda(available=False) == ("13.0", (), "")


def test_no_torch_no_gpu():
    assert probe._cuda({"torch": "ImportError: libtorch"}) == ("", (), "")
    assert probe._cuda({}) == ("", (), "")


@pytest.mark.parametrize(
    ("result", "problem"),
    [
        (42, ""),
        (0, "a kernel wrote 0 where 42 was expected"),
        (OSError("cuda_fp16.h: No such file\nmore"), "OSError: cuda_fp16.h: No such file"),
    ],
)
def test_cupy_compiles_and_runs_a_kernel(monkeypatch, result, problem):
    class RawKernel:
        def __init__(self, source, name):
            assert name in source

        def __call__(self, grid, block, arguments):
            if isinstance(result, Exception):
                raise result
            arguments[0][0] = result

    cupy = types.SimpleNamespace(zeros=np.zeros, int32=np.int32, RawKernel=RawKernel)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    assert probe._cupy_problem() == problem


def test_a_command_that_does_not_end(command, monkeypatch):
    monkeypatch.setattr(probe, "_COMMAND_SECONDS", 0.2)
    command("nvidia-smi", "while :; do :; done")
    assert probe._driver() == ("", "no answer within 0.2 s", ())
