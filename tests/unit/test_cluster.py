"""Which cluster local_cluster() starts; tests/cluster starts real ones."""

from __future__ import annotations

import os
import sys
from types import ModuleType

import dask
import distributed
import pytest
from dask.system import CPU_COUNT

import daskshare.cluster
from daskshare import _device_names
from daskshare.cluster import GPU_TASK_THREADS, count_gpus, local_cluster
from daskshare.errors import ConfigurationError


class Started:
    def __init__(self, **options):
        self.options = options


class StartedOnGpus(Started):
    pass


@pytest.fixture
def machine(monkeypatch):
    """A machine with a number of GPUs, with dask-cuda or without."""

    def make(gpus, *, dask_cuda=True):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        uuids = [f"GPU-{number}{number}-x" for number in range(gpus)]
        for module in (_device_names, daskshare.cluster):
            monkeypatch.setattr(module, "driver_uuids", lambda: (uuids, []))
        monkeypatch.setattr(distributed, "LocalCluster", Started)
        module = ModuleType("dask_cuda")
        if dask_cuda:
            module.LocalCUDACluster = StartedOnGpus
        monkeypatch.setitem(sys.modules, "dask_cuda", module if dask_cuda else None)

    return make


def test_gpus_get_dask_cuda_with_many_task_threads(machine):
    machine(2)
    cluster = local_cluster()
    assert type(cluster) is StartedOnGpus
    assert cluster.options == {"threads_per_worker": GPU_TASK_THREADS}
    assert type(local_cluster(device="cuda")) is StartedOnGpus


def test_options_win_over_defaults(machine):
    machine(2)
    options = local_cluster(threads_per_worker=4, CUDA_VISIBLE_DEVICES=[1]).options
    assert options == {"threads_per_worker": 4, "CUDA_VISIBLE_DEVICES": [1]}


def test_without_gpus_one_process_computes_with_all_cores(machine):
    machine(0)
    cluster = local_cluster()
    assert type(cluster) is Started
    assert cluster.options == {
        "n_workers": 1,
        "processes": True,
        "threads_per_worker": min(16, max(4, 2 * CPU_COUNT)),
        "config": {"daskshare.worker.torch-threads": CPU_COUNT},
    }


def test_gpus_can_be_left_alone(machine):
    machine(2)
    cluster = local_cluster(device="cpu", env={"A": "1"}, config={"x": 1})
    assert type(cluster) is Started
    assert cluster.options["env"] == {"A": "1", "CUDA_VISIBLE_DEVICES": ""}
    assert cluster.options["config"]["x"] == 1


def test_several_workers_divide_the_cores(machine):
    machine(0)
    config = local_cluster(n_workers=2 * CPU_COUNT).options["config"]
    assert config == {"daskshare.worker.torch-threads": 1}


def test_configured_threads_are_left_as_they_are(machine):
    machine(0)
    with dask.config.set({"daskshare.worker.torch-threads": 3}):
        assert "config" not in local_cluster().options


def test_no_workers_yet(machine):
    machine(0)
    assert local_cluster(n_workers=0).options["n_workers"] == 0


def test_workers_in_this_process_take_no_environment(machine):
    machine(0)
    options = local_cluster(processes=False, device="cpu").options
    assert "env" not in options
    assert "config" not in options


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_hidden_gpus_do_not_count(machine, monkeypatch, hidden):
    machine(2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert type(local_cluster()) is Started
    with pytest.raises(ConfigurationError, match="no NVIDIA GPU is visible"):
        local_cluster(device="cuda")


@pytest.mark.parametrize(
    ("variable", "entries"),
    [
        ("1", [1]),
        ("2,0", [2, 0]),
        (" 2 , 0 ", [2, 0]),
        ("1,-1,0", [1]),
        ("1,9,0", [1]),
        ("GPU-2,GPU-00-x", ["GPU-22-x", "GPU-00-x"]),
        ("GPU-2, GPU-1", ["GPU-22-x", "GPU-11-x"]),
        ("GPU-1,0", ["GPU-11-x"]),
    ],
)
def test_visible_gpus_get_a_worker_each_and_are_named_as_dask_cuda_takes_them(
    machine, monkeypatch, variable, entries
):
    machine(3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert count_gpus() == len(entries)
    assert local_cluster().options["CUDA_VISIBLE_DEVICES"] == entries
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ",".join(map(str, entries))


def test_the_option_wins_over_the_environment(machine, monkeypatch):
    machine(3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    options = local_cluster(CUDA_VISIBLE_DEVICES=["GPU-2", "GPU-1"]).options
    assert options["CUDA_VISIBLE_DEVICES"] == ["GPU-22-x", "GPU-11-x"]
    assert local_cluster(CUDA_VISIBLE_DEVICES="1,-1").options["CUDA_VISIBLE_DEVICES"] == [1]


@pytest.mark.parametrize("option", ["", "-1"])
def test_the_option_may_hide_all_gpus(machine, option):
    machine(2)
    cluster = local_cluster(CUDA_VISIBLE_DEVICES=option)
    assert type(cluster) is Started
    assert cluster.options["env"] == {"CUDA_VISIBLE_DEVICES": ""}
    assert "CUDA_VISIBLE_DEVICES" not in cluster.options


@pytest.mark.parametrize("option", ["0,0", [0, 5], "GPU-0,1", "GPU-", [0, "GPU-1"], "GPU-7", "x"])
def test_an_option_that_names_no_gpu_or_one_twice_is_refused(machine, option):
    machine(2)
    with pytest.raises(ConfigurationError, match=r"each once.*0 \(GPU-00-x\), 1 \(GPU-11-x\)"):
        local_cluster(CUDA_VISIBLE_DEVICES=option)


def test_an_environment_that_names_a_gpu_twice_hides_all_as_in_cuda(machine, monkeypatch):
    machine(2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,0")
    assert count_gpus() == 0
    assert type(local_cluster()) is Started
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize(("gpus", "left"), [(2, ""), (0, "-1")])
@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_minus_one_is_written_so_that_dask_can_read_it(machine, monkeypatch, device, gpus, left):
    machine(gpus)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert type(local_cluster(device=device)) is Started
    assert os.environ["CUDA_VISIBLE_DEVICES"] == left


def test_no_variable_is_made_where_there_was_none(machine):
    machine(2)
    local_cluster(CUDA_VISIBLE_DEVICES=[1])
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_gpus_without_dask_cuda_are_an_error_that_says_what_to_install(machine):
    machine(1, dask_cuda=False)
    with pytest.raises(ConfigurationError, match=r"Install daskshare\[gpu\]"):
        local_cluster()
    assert type(local_cluster(device="cpu")) is Started


def test_an_unknown_device_is_refused():
    with pytest.raises(ConfigurationError, match="'tpu'"):
        local_cluster(device="tpu")
