"""The same calls through Spark Connect, in a program of its own: a process has one kind."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("pyspark")
pytest.importorskip("grpc_status", reason="needs pip install 'daskshare[spark-connect]'")

from tests.networks import SMALL_CFG, random_floats, small_plan, write_darknet
from tests.spark.conftest import ROOT

pytestmark = pytest.mark.timeout(400)

#: Bound of the run; a quiet machine needs a tenth of it.
RUN_TIMEOUT = 300


def test_predict_detect_and_the_source_through_spark_connect(host_folder, tmp_path):
    (tmp_path / "small.cfg").write_text(SMALL_CFG)
    write_darknet(tmp_path / "small.weights", random_floats(small_plan()))
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "spark" / "connect_program.py", tmp_path],
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=RUN_TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    [line] = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    found = json.loads(line.removeprefix("FOUND "))
    assert found == {
        "session": "pyspark.sql.connect.session",
        "hosts": 1,
        "ids": [0, 1, 2, 3, 4, 5],
        "images": 6,
    }
