"""How a report looks, to people and to programs."""

from __future__ import annotations

import json

from daskshare.doctor.findings import Check, Status
from daskshare.doctor.report import as_json, render

GOOD = Check("PyAV", Status.OK, "18.1.0")
BAD = Check("bokeh", Status.ERROR, "3.10; daskshare needs <3.10", "pip install 'bokeh<3.10'")
SLOW = Check("compiler", Status.WARNING, "none", "apt-get install gcc")


def test_a_fix_stands_below_its_finding():
    lines = render({"this machine": [GOOD, BAD]}).splitlines()
    assert lines[0] == "this machine"
    assert lines[1].split() == ["ok", "PyAV:", "18.1.0"]
    assert lines[2].strip() == "ERROR  bokeh: 3.10; daskshare needs <3.10"
    assert lines[3].strip() == "-> pip install 'bokeh<3.10'"
    assert lines[-1] == "Something will fail: correct the errors above. (1 errors, 0 warnings)"


def test_the_verdict():
    assert render({"a": [GOOD]}).endswith("All is well. (0 errors, 0 warnings)")
    assert "less than it could" in render({"a": [GOOD, SLOW]})


def test_equal_workers_are_told_once():
    text = render({f"tcp://w{i}": [GOOD, SLOW] for i in range(5)} | {"tcp://x": [BAD]})
    assert "5 workers alike: tcp://w0, tcp://w1, tcp://w2 and 2 more" in text
    assert text.count("PyAV") == 1
    assert "1 errors, 5 warnings" in text


def test_lines_keep_to_the_width():
    check = Check("versions", Status.OK, ", ".join(f"package{i} 1.{i}" for i in range(30)))
    assert max(map(len, render({"a": [check]}, width=80).splitlines())) <= 80


def test_colours_are_the_callers():
    text = render({"a": [BAD]}, style=lambda text, status: f"<{status}>{text}</>")
    assert "<error>    ERROR</>" in text


def test_json_is_the_same_report():
    answer = json.loads(json.dumps(as_json({"a": [GOOD, SLOW]})))
    assert (answer["status"], answer["exit_status"]) == ("warning", 0)
    assert answer["checks"]["a"][1] == {
        "name": "compiler",
        "status": "warning",
        "found": "none",
        "fix": "apt-get install gcc",
    }
    assert as_json({"a": [SLOW]}, strict=True)["exit_status"] == 1
