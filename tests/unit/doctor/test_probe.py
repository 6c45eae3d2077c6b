"""Probing this machine, and programs that answer in odd ways."""

from __future__ import annotations

import dask.config
import pytest

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
