"""Hosts in processes of their own and in Dask workers, used by processes that are neither."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import cloudpickle
import dask.config
import numpy as np
import psutil
import pytest
from distributed import Client

import daskshare
from daskshare._host_address import HostAddress
from daskshare.errors import HostError
from daskshare.host import HostClient, PredictSpec
from daskshare.models.torch_model import torch_model_spec
from tests.cluster.conftest import ROOT, TIMEOUT, start

#: What a process that is no worker does: waits for a line, uses the model, tells what it saw.
USER = """
import sys
import cloudpickle, numpy as np
from daskshare.host import HostClient, PredictSpec
loader = bytes.fromhex(sys.argv[1])
print("here", flush=True)
sys.stdin.readline()
with HostClient("cpu", allow_code=True) as client:
    model = client.open(PredictSpec("raced", "raced", loader, 64))
    print(int(model.infer([np.full(3, 7)])[0]), client.host["pid"], flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of sockets that all processes of the test use, and hosts that end soon."""
    options = {"directory": str(tmp_path / "h"), "idle-timeout": "200ms"}
    for name, value in options.items():
        variable = f"DASK_DASKSHARE__HOST__{name.upper().replace('-', '_')}"
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with dask.config.set({f"daskshare.host.{name}": value for name, value in options.items()}):
        yield Path(options["directory"])
        assert wait_until(lambda: not hosts_of(options["directory"])), "a host stayed behind"
        assert not list(Path(options["directory"]).glob("*.sock"))


def hosts_of(folder):
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = process.info["cmdline"] or []
        if "daskshare._host_process" in line and folder in line:
            found.append(process)
    return found


def wait_until(condition):
    never = threading.Event()
    for _ in range(int(TIMEOUT / 0.05)):
        if condition():
            return True
        never.wait(0.05)
    return False


def load_scaled(device):
    import torch

    return torch.nn.Identity()


def adding():
    return lambda x: x + 1


def users(number, make):
    loader = cloudpickle.dumps(make).hex()
    return [
        subprocess.Popen(
            [sys.executable, "-c", USER, loader],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(number)
    ]


def test_processes_that_race_start_one_host_with_one_load(folder, tmp_path):
    log = tmp_path / "loads"

    def make():
        with open(log, "a") as file:
            file.write("loaded\n")
        return lambda x: x * 2

    racing = users(8, make)
    try:
        for user in racing:
            assert user.stdout.readline() == "here\n"
        for user in racing:
            user.stdin.write("go\n")
            user.stdin.flush()
        answers = [user.stdout.readline().split() for user in racing]
        assert {answer[0] for answer in answers} == {"14"}
        assert len({answer[1] for answer in answers}) == 1
        assert log.read_text() == "loaded\n"
        assert [process.pid for process in hosts_of(str(folder))] == [int(answers[0][1])]
        # However they end: half are killed, half end by themselves.
        for user in racing[:4]:
            user.kill()
    finally:
        for user in racing:
            user.communicate("end\n", timeout=TIMEOUT)


def test_a_killed_host_leaves_nothing_and_the_client_goes_on(folder):
    with HostClient("cpu", allow_code=True) as client:
        model = client.open(PredictSpec("mine", "k", cloudpickle.dumps(adding), 64))
        big = np.zeros(100_000)
        first = client.host["pid"]
        for _ in range(2):
            assert model.infer([big])[0] == 1.0
            os.kill(client.host["pid"], signal.SIGKILL)
        assert model.infer([big])[0] == 1.0
        assert client.host["pid"] != first
        assert len(hosts_of(str(folder))) == 1


def test_a_loader_that_kills_its_host_is_tried_twice_and_no_more(folder):
    def make():
        import os
        import signal

        os.kill(os.getpid(), signal.SIGKILL)

    with HostClient("cpu", allow_code=True) as client:
        with pytest.raises(HostError, match="ended twice"):
            client.open(PredictSpec("deadly", "deadly", cloudpickle.dumps(make), 64))
        model = client.open(PredictSpec("mine", "k", cloudpickle.dumps(adding), 64))
        assert model.infer([np.zeros(1)]).tolist() == [1.0]


def test_a_host_that_cannot_start_says_why(folder, monkeypatch):
    address = HostAddress("cpu")
    address.make_directory()
    address.socket.mkdir()
    with pytest.raises(HostError, match="ended before it listened") as caught:
        HostClient("cpu")
    assert str(address) in str(caught.value)
    assert "Traceback" in str(caught.value)
    address.socket.rmdir()


def test_the_loader_finds_its_callers_modules_and_files(folder, tmp_path, monkeypatch):
    (tmp_path / "only_here.py").write_text("FACTOR = 5\n")
    (tmp_path / "weights.txt").write_text("3")

    def make():
        import only_here

        factor = only_here.FACTOR * int(Path("weights.txt").read_text())
        return lambda x: x * factor

    spec = PredictSpec(
        "mine",
        "k",
        cloudpickle.dumps(make),
        64,
        paths=(str(tmp_path),),
        directory=str(tmp_path),
    )
    with HostClient("cpu", allow_code=True) as client:
        assert client.open(spec).infer([np.ones(2)]).tolist() == [15.0, 15.0]


def test_a_dask_worker_is_the_host_with_one_copy_for_all(folder):
    spec = torch_model_spec(load_scaled, name="scaled")
    with start() as cluster, Client(cluster) as client:
        daskshare.install(client)
        model = daskshare.SharedModel(spec)
        assert client.submit(model, np.ones((2, 3))).result(TIMEOUT).shape == (2, 3)
        worker_pid = next(iter(client.run(os.getpid).values()))
        with HostClient("cpu", allow_code=True) as here:
            assert here.host["owner"] == "worker"
            assert here.host["pid"] == worker_pid
            assert here.open(spec).infer(np.ones((4, 3))).shape == (4, 3)
        stats = next(iter(daskshare.stats(client).values()))
        assert stats["loads"] == 1
        assert stats["frames"] == 6


def test_a_host_gives_way_to_a_dask_worker_and_follows_when_it_goes(folder):
    with HostClient("cpu", allow_code=True) as here:
        model = here.open(PredictSpec("mine", "k", cloudpickle.dumps(adding), 64))
        assert here.host["owner"] == "process"
        with start() as cluster, Client(cluster) as client:
            daskshare.install(client)
            assert wait_until(lambda: not hosts_of(str(folder)))
            assert model.infer([np.zeros(2)]).tolist() == [1.0, 1.0]
            assert here.host["owner"] == "worker"
            pid = here.host["pid"]
            client.retire_workers()
            assert wait_until(lambda: not psutil.pid_exists(pid))
            assert model.infer([np.zeros(2)]).tolist() == [1.0, 1.0]
            assert here.host["owner"] == "process"
