"""Which cluster local_cluster() starts; tests/cluster starts real ones."""

from __future__ import annotations

import sys
from types import ModuleType

import dask
import distributed
import pytest
from dask.system import CPU_COUNT
from distributed.diagnostics import nvml

from daskshare.cluster import GPU_TASK_THREADS, local_cluster
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
        monkeypatch.setattr(nvml, "device_get_count", lambda: gpus)
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


def test_gpus_without_dask_cuda_are_an_error_that_says_what_to_install(machine):
    machine(1, dask_cuda=False)
    with pytest.raises(ConfigurationError, match=r"Install daskshare\[gpu\]"):
        local_cluster()
    assert type(local_cluster(device="cpu")) is Started


def test_an_unknown_device_is_refused():
    with pytest.raises(ConfigurationError, match="'tpu'"):
        local_cluster(device="tpu")
