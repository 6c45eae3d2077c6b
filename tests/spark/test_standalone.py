"""A standalone cluster of two workers on loopback hosts, whose processes are killed one by one."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import uuid
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

pytest.importorskip("pyspark")

from tests.networks import SMALL_CFG, random_floats, small_plan, write_darknet
from tests.spark.conftest import ROOT, TIMEOUT, wait_until
from tests.spark.standalone_program import ROWS

pytestmark = pytest.mark.timeout(600)

#: Bound of the run; a quiet machine needs a sixth of it.
RUN_TIMEOUT = 480
#: Finds the processes of these tests, whoever started them.
MARKER = "DASKSHARE_STANDALONE_TEST"
SCENARIOS = ("python", "executor", "host", "speculation", "dask")


def marked(value):
    """Living processes of the test, by pid."""
    found = {}
    for process in psutil.process_iter(["cmdline"]):
        try:
            if process.environ().get(MARKER) == value and process.status() != psutil.STATUS_ZOMBIE:
                found[process.pid] = " ".join(process.info["cmdline"] or [])[:200]
        except psutil.Error:
            # It has just ended, or is somebody else's.
            continue
    return found


class Cluster:
    """A master and two workers; the environment in which its programs run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.marker = uuid.uuid4().hex
        self.environment = {
            **os.environ,
            MARKER: self.marker,
            "SPARK_DAEMON_MEMORY": "256m",
            "PYTHONWARNINGS": "ignore",
        }
        self.environment.pop("SPARK_HOME", None)
        self._daemons = []
        log = self._start("master", "master.Master", "--host", "127.0.0.1")
        self.master = self._said(log, r"Starting Spark master at (spark://\S+)")
        logs = [
            self._start(
                f"worker{i}",
                "worker.Worker",
                *("--host", f"127.0.0.{i}", "--cores", "2", "--memory", "1g"),
                *("--work-dir", str(folder / f"work{i}"), self.master),
            )
            for i in (1, 2)
        ]
        for log in logs:
            self._said(log, r"Successfully registered with master")

    def _start(self, name, cls, *arguments):
        log = self.folder / f"{name}.log"
        launcher = Path(find_spec("pyspark").origin).parent / "bin" / "spark-class"
        ports = ["--port", "0", "--webui-port", "0"]
        with open(log, "wb") as file:
            self._daemons.append(
                subprocess.Popen(
                    [launcher, f"org.apache.spark.deploy.{cls}", *ports, *arguments],
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    cwd=self.folder,
                )
            )
        return log

    def _said(self, log, pattern):
        assert wait_until(lambda: re.search(pattern, log.read_text())), log.read_text()
        match = re.search(pattern, log.read_text())
        return match.group(match.lastindex or 0)

    def others(self):
        """Processes of the test besides the master and the workers."""
        own = {daemon.pid for daemon in self._daemons}
        return {pid: line for pid, line in marked(self.marker).items() if pid not in own}

    def close(self):
        for daemon in self._daemons:
            daemon.send_signal(signal.SIGTERM)
        for daemon in self._daemons:
            daemon.wait(TIMEOUT)


@pytest.fixture(scope="module")
def ran(host_folder, tmp_path_factory):
    """What the program found, with what is left of its processes and segments afterwards."""
    folder = tmp_path_factory.mktemp("standalone")
    (folder / "small.cfg").write_text(SMALL_CFG)
    write_darknet(folder / "small.weights", random_floats(small_plan()))
    segments = set(os.listdir("/dev/shm"))
    cluster = Cluster(folder)
    try:
        done = subprocess.run(
            [
                *(sys.executable, ROOT / "tests" / "spark" / "standalone_program.py"),
                *(cluster.master, folder),
            ],
            env=cluster.environment,
            capture_output=True,
            text=True,
            timeout=RUN_TIMEOUT,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        # Executors and hosts end by themselves, some time after the program.
        wait_until(lambda: not cluster.others())
        left = cluster.others()
    finally:
        cluster.close()
    [line] = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    return {
        **json.loads(line.removeprefix("FOUND ")),
        "left": left,
        "segments": set(os.listdir("/dev/shm")) - segments,
    }


def test_two_executors_work_and_each_row_comes_out(ran):
    assert ran["executors"] == 2
    assert [(id_, twice) for id_, twice, _ in ran["quiet"]] == [(i, 2 * i) for i in range(ROWS)]
    assert all(count > 0 for *_, count in ran["quiet"])


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_rows_are_distinct_and_complete_when(ran, scenario):
    assert ran[scenario] == ran["quiet"]


def test_everybody_was_killed_or_copied(ran):
    assert ran["acted"] == ["copied", "dask", "executor", "host", "python"]


def test_no_process_and_no_segment_is_left(ran):
    assert ran["left"] == {}
    assert ran["segments"] == set()
