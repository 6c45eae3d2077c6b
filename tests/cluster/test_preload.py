"""The preload scripts under real `dask scheduler` and `dask worker` processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import ExitStack, contextmanager

import dask.bag as db
import numpy as np
import pytest
from distributed import Client

import daskshare
from daskshare.client import SharedModel
from daskshare.errors import ConfigurationError
from daskshare.testing import FakeSpec
from daskshare.video.chunk import VideoChunk
from tests.cluster.conftest import ROOT, TIMEOUT
from tests.cluster.test_shared_model import Clip, first_pixel

SCHEDULER_SCRIPT = str(ROOT / "plugins" / "daskshare_scheduler.py")
WORKER_SCRIPT = str(ROOT / "plugins" / "daskshare_worker.py")
HEAVY = {"torch", "cv2", "av", "cupy"}


def command(*arguments):
    return [sys.executable, "-m", "dask", *map(str, arguments)]


def environment(*paths):
    """With daskshare and the tests on the path, after ``paths``."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, paths), str(ROOT)])}


@contextmanager
def process(*arguments, broken=None):
    # `python -m` puts the working directory first on the path.
    env = environment(*([broken] if broken else []))
    with subprocess.Popen(command(*arguments), env=env, cwd=broken) as running:
        try:
            yield running
        finally:
            running.terminate()
            try:
                running.wait(TIMEOUT)
            finally:
                running.kill()


@contextmanager
def cluster(directory, *, scheduler=(), worker=(), workers=1, broken=None):
    """A scheduler process, worker processes and a client; daskshare may be broken on the first."""
    file = directory / "scheduler.json"
    common = ("--scheduler-file", file)
    with ExitStack() as stack:
        scheduler_options = ("--port", 0, "--dashboard-address", ":0")
        stack.enter_context(
            process("scheduler", *common, *scheduler_options, *scheduler, broken=broken)
        )
        for _ in range(workers):
            options = ("--nthreads", 4, "--no-nanny", "--no-dashboard", "--memory-limit", 0)
            stack.enter_context(process("worker", *common, *options, *worker))
        client = Client(scheduler_file=str(file), timeout=TIMEOUT, set_as_default=False)
        stack.enter_context(client)
        if workers:
            client.wait_for_workers(workers, timeout=TIMEOUT)
        stack.enter_context(client.as_current())
        yield client


def loaded_modules():
    return sorted(sys.modules)


def test_a_scheduler_preload_is_enough_and_imports_nothing_heavy(tmp_path):
    with cluster(tmp_path, scheduler=("--preload", SCHEDULER_SCRIPT), workers=2) as client:
        assert len(daskshare.stats(client)) == 2
        # All that a scheduler unpickles: models of both kinds, and video, in graphs of each kind.
        fake = SharedModel(FakeSpec())
        pixels = daskshare.share(first_pixel, name="pixels")
        assert client.submit(fake, np.ones((1, 2))).result(TIMEOUT)[0, 0] == 2
        clips = db.from_sequence([Clip("a.mp4", 3), Clip("b.mp4", 2)], npartitions=2)
        assert len(clips.map_partitions(pixels).compute()) == 5
        missing = VideoChunk(video="c.mp4", index=0, error="c.mp4 does not exist")
        assert db.from_sequence([missing]).map_partitions(pixels).compute() == []
        daskshare.install(client)

        scheduler = set(client.run_on_scheduler(loaded_modules))
        assert "daskshare.client" in scheduler
        assert scheduler & HEAVY == set()
        assert all("torch" in modules for modules in client.run(loaded_modules).values())


def test_a_worker_preload_is_enough(tmp_path):
    with cluster(tmp_path, worker=("--preload", WORKER_SCRIPT)) as client:
        model = SharedModel(FakeSpec())
        assert client.submit(model, np.ones((1, 2))).result(TIMEOUT)[0, 0] == 2
        [report] = daskshare.stats(client).values()
        assert (report["state"], report["loads"]) == ("ready", 1)
        # Installing on top takes the models over.
        daskshare.install(client)
        assert client.submit(model, np.ones((2, 2))).result(TIMEOUT)[0, 0] == 2
        [report] = daskshare.stats(client).values()
        assert (report["state"], report["loads"], report["frames"]) == ("ready", 1, 3)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_a_scheduler_that_dies_and_comes_back_serves_again():
    port = free_port()
    address = f"tcp://127.0.0.1:{port}"
    scheduler = ("scheduler", "--host", "127.0.0.1", "--port", port)
    scheduler += ("--dashboard-address", ":0", "--preload", SCHEDULER_SCRIPT)
    worker = ("worker", address, "--nthreads", 2, "--no-nanny", "--no-dashboard")
    model = SharedModel(FakeSpec(name="of-two-lives"))
    for life in range(2):
        with process(*scheduler) as one, process(*worker, "--memory-limit", 0) as other:
            with Client(address, timeout=TIMEOUT, set_as_default=False) as client:
                client.wait_for_workers(1, timeout=TIMEOUT)
                future = client.submit(model, np.full((1, 2), life), pure=False)
                assert future.result(TIMEOUT)[0, 0] == 2 * life
                [report] = daskshare.stats(client).values()
                assert [d["kind"] for d in report["placement"]["decisions"]] == ["load", "dispatch"]
            one.kill()
            # Dask's workers end with their scheduler; whoever runs them starts new ones.
            other.wait(TIMEOUT)


@pytest.fixture
def without_daskshare(tmp_path):
    """A path on which daskshare is broken."""
    package = tmp_path / "broken" / "daskshare"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    # Dask loads this entry point whenever it is imported.
    (package / "sizeof.py").write_text("def register(sizeof): pass\n", "utf-8")
    for name in ("scheduler_plugin.py", "worker_plugin.py"):
        (package / name).write_text("raise ImportError('a library is missing')\n", "utf-8")
    return package.parent


def test_a_scheduler_without_daskshare_is_named(tmp_path, without_daskshare):
    with (
        cluster(tmp_path, workers=0, broken=without_daskshare) as client,
        pytest.raises(ConfigurationError, match="scheduler could not import daskshare"),
    ):
        daskshare.install(client)


def test_a_scheduler_that_cannot_install_daskshare_does_not_run(without_daskshare):
    done = subprocess.run(
        command("scheduler", "--port", 0, "--no-dashboard", "--preload", SCHEDULER_SCRIPT),
        env=environment(without_daskshare),
        # `python -m` puts the working directory first on the path.
        cwd=without_daskshare,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode != 0
    assert "could not be installed on the scheduler: a library is missing" in done.stderr


@pytest.mark.parametrize("nanny", ["--nanny", "--no-nanny"])
def test_a_worker_that_cannot_install_daskshare_does_not_run(two_workers, without_daskshare, nanny):
    # A nanny gives up after its worker failed to start.
    done = subprocess.run(
        command(
            "worker",
            two_workers.scheduler_address,
            nanny,
            "--no-dashboard",
            "--death-timeout",
            TIMEOUT,
            "--preload",
            WORKER_SCRIPT,
        ),
        env=environment(without_daskshare),
        # `python -m` puts the working directory first on the path.
        cwd=without_daskshare,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode != 0
    assert "could not be installed on this worker: a library is missing" in done.stderr
