"""A short clip, and examples as programs of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import pytest

from tests.clip import traffic_clip

ROOT = Path(__file__).parents[2]
#: Bound of a run; a busy machine of two cores needs a third of it.
TIMEOUT = 300
#: Of the clip that examples are run on: cars first, then people.
FIRST, LAST = 30, 78


LOG_RECORD = re.compile(r"^(?=\d{4}-\d\d-\d\d [\d:,]+ - )", re.MULTILINE)
LAST_HEARTBEAT = (
    "distributed.worker - ERROR - Failed to communicate with scheduler during heartbeat.\n"
)


def without_last_heartbeats(log: str) -> str:
    """Leave out what Dask's workers log of a heartbeat under way when their cluster closes."""
    return "".join(
        record
        for record in LOG_RECORD.split(log)
        if LAST_HEARTBEAT not in record
        or not record.splitlines()[-1].startswith("distributed.comm.core.CommClosedError: ")
    )


@pytest.fixture(scope="session")
def short_clip(tmp_path_factory) -> Path:
    """Two seconds of the traffic clip with a keyframe every half."""
    path = tmp_path_factory.mktemp("clip") / "short.mp4"
    with av.open(str(traffic_clip())) as source, av.open(str(path), "w") as target:
        stream = target.add_stream("libx264", rate=25, options={"g": "12", "crf": "18"})
        stream.width, stream.height, stream.pix_fmt = 640, 272, "yuv420p"
        for number, frame in enumerate(source.decode(video=0)):
            if FIRST <= number < LAST:
                frame.pts, frame.time_base = number - FIRST, Fraction(1, 25)
                frame.pict_type = 0
                target.mux(stream.encode(frame))
        target.mux(stream.encode(None))
    return path


@pytest.fixture
def run_example(tmp_path):
    """Run an example in an empty folder, where it must not warn; returns its output."""

    def run(name: str, *args: object) -> str:
        [script] = (ROOT / "examples").glob(f"{name}_*.py")
        done = subprocess.run(
            [sys.executable, script, *map(str, args)],
            cwd=tmp_path,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
                # Somebody else's dashboard on this machine is no fault of the example.
                "PYTHONWARNINGS": "ignore:Port 8787 is already in use.",
            },
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        said = without_last_heartbeats(done.stderr)
        assert "Warning" not in said
        assert "Traceback" not in said
        return done.stdout

    return run
