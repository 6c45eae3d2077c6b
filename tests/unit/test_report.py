"""The module that every benchmark reports through."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path

import numpy as np
import pytest

from benchmarks import report as report_module
from benchmarks.report import Bar, Report, argument_parser, machine, versions


@pytest.mark.parametrize(
    ("comparison", "below", "equal", "above"),
    [
        (">=", False, True, True),
        (">", False, False, True),
        ("<=", True, True, False),
        ("<", True, False, False),
    ],
)
def test_bar_compares(comparison, below, equal, above):
    holds = [Bar("x", value, "MB", 50.0, comparison).holds for value in (49.0, 50.0, 51.0)]
    assert holds == [below, equal, above]


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("comparison", [">=", "<"])
def test_bar_that_was_not_measured_does_not_hold(value, comparison):
    bar = Bar("x", value, "MB", 50.0, comparison)
    assert not bar.holds
    assert bar.as_dict()["value"] is None


def test_bar_refuses_what_it_cannot_compare():
    with pytest.raises(ValueError, match="comparison is '=='"):
        Bar("x", 1.0, "MB", 50.0, "==")
    with pytest.raises(ValueError, match="expected a finite number"):
        Bar("x", 1.0, "MB", math.nan)


def test_json_holds_machine_versions_rows_and_bars(tmp_path):
    report = Report("example", settings={"path": Path("a/b"), "sizes": (1, 2)})
    report.add_row(tasks=np.int64(4), frames_per_second=np.float32(2.5), loads=1)
    report.add_row(tasks=8, frames_per_second=math.nan, label="x")
    report.add_bar("speed", 5300, "frames/s", bound=5200)
    report.add_bar("memory", np.float64(51), "MB", bound=50, comparison="<")
    path = report.write(tmp_path / "new" / "folder" / "example.json")

    got = json.loads(path.read_text())
    assert got["benchmark"] == "example"
    assert got["settings"] == {"path": os.path.join("a", "b"), "sizes": [1, 2]}
    assert got["rows"] == [
        {"tasks": 4, "frames_per_second": 2.5, "loads": 1},
        {"tasks": 8, "frames_per_second": None, "label": "x"},
    ]
    assert [(b["name"], b["value"], b["bound"], b["holds"]) for b in got["bars"]] == [
        ("speed", 5300, 5200, True),
        ("memory", 51.0, 50, False),
    ]
    assert got["machine"] == machine()
    assert got["versions"] == versions()
    assert not report.holds


def test_machine_and_versions_name_what_decides_a_figure():
    described = machine()
    assert described["cpu"]
    assert described["cpu_cores"] >= 1
    assert described["memory_bytes"] > 2**28
    assert {"python", "torch", "dask", "distributed", "numpy"} <= versions().keys()


def _fake_nvidia_smi(folder: Path, body: str) -> None:
    script = folder / "nvidia-smi"
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)


def test_gpus_are_read_from_nvidia_smi(tmp_path, monkeypatch):
    _fake_nvidia_smi(
        tmp_path, "echo 'NVIDIA H200, GPU-1, 143771, 580.1'; echo 'GB10, GPU-2, [N/A], 580.1'"
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine()["gpus"] == [
        {
            "name": "NVIDIA H200",
            "uuid": "GPU-1",
            "memory_bytes": 143771 * 2**20,
            "driver": "580.1",
        },
        {"name": "GB10", "uuid": "GPU-2", "memory_bytes": None, "driver": "580.1"},
    ]


def test_a_driver_that_does_not_answer_means_no_gpu(tmp_path, monkeypatch):
    _fake_nvidia_smi(tmp_path, "echo 'could not communicate with the driver'; exit 9")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine()["gpus"] == []


def test_finish_prints_and_writes_and_is_strict_only_when_asked(tmp_path, capsys):
    report = Report("example")
    report.add_row(tasks=4, frames_per_second=1234.5678)
    report.add_bar("speed", 10.0, "frames/s", bound=20.0)
    path = tmp_path / "r.json"
    parser = argument_parser("What it asks.")

    assert report.finish(parser.parse_args([])) == 0
    assert not path.exists()
    assert report.finish(parser.parse_args(["--strict", "--json", str(path)])) == 1
    printed = capsys.readouterr().out
    assert "frames_per_second" in printed
    assert "1234.6" in printed
    assert ">= 20" in printed
    assert str(path) in printed

    report.bars.clear()
    report.add_bar("speed", 30.0, "frames/s", bound=20.0)
    assert report.finish(parser.parse_args(["--strict"])) == 0


def test_finished_reports_print_as_markdown(tmp_path, capsys):
    report = Report("example")
    report.add_row(tasks=4, frames_per_second=100)
    report.add_bar("speed", 100, "frames/s", bound=50)
    path = report.write(tmp_path / "r.json")
    assert report_module.main([str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("|") and "tasks" in line for line in lines)
    assert any("speed" in line and "yes" in line for line in lines)


def test_the_bars_of_many_reports_are_one_table(tmp_path, capsys):
    report = Report("sharing")
    report.add_bar("over copies", 3.4, "x", bound=2.2)
    report.add_bar("memory", 60.0, "MB", bound=50, comparison="<")
    report.write(tmp_path / "sharing.json")
    files = [str(tmp_path / name) for name in ("sharing.json", "video.json")]
    assert report_module.main(["--bars", *files]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[2:] == [
        ["sharing", "over", "copies", "3.4", ">=", "2.2", "x", "yes"],
        ["sharing", "memory", "60", "<", "50", "MB", "NO"],
        ["video", "not", "run", "here"],
    ]
