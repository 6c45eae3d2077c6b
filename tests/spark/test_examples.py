"""The examples that need Spark, as a user runs them."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import cv2
import numpy as np
import pytest

from tests.clip import traffic_clip
from tests.spark.conftest import ROOT

pytestmark = pytest.mark.timeout(400)

#: Bound of a run; a quiet machine needs a tenth of it.
RUN_TIMEOUT = 300


@pytest.fixture
def run_example(tmp_path, host_folder):
    def run(name: str, *args: object) -> str:
        [script] = (ROOT / "examples").glob(f"{name}_*.py")
        done = subprocess.run(
            [sys.executable, script, *map(str, args)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONWARNINGS": "ignore"},
            capture_output=True,
            text=True,
            timeout=RUN_TIMEOUT,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_07_spark_images(run_example, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    capture = cv2.VideoCapture(str(traffic_clip()))
    for i in range(3):
        # Cars drive there.
        assert capture.set(cv2.CAP_PROP_POS_FRAMES, 40 + 10 * i)
        ok, frame = capture.read()
        assert ok
        assert cv2.imwrite(str(images / f"{i}.jpg"), frame)
    capture.release()
    text = run_example("07", images)
    for i in range(3):
        # In the table of things found, and in that of the function.
        assert len(re.findall(rf"\b{i}\.jpg", text)) >= 2
    mean = np.frombuffer((images / "0.jpg").read_bytes(), np.uint8).mean()
    assert f"{mean:.3f}"[:5] in text


def test_08_spark_and_dask(run_example, tmp_path):
    from tests.unit.video.conftest import write_clip

    path = write_clip(tmp_path / "clip.mp4", frames=20)
    text = run_example("08", path)
    assert "20 frames of 1 video" in text
    assert "camera|class_name|boxes|frames" in text.replace(" ", "")
