"""A Dask cluster on this machine that suits shared models."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from dask.system import CPU_COUNT

from daskshare._device_names import VisibleGpu, driver_uuids, visible_gpus
from daskshare.config import WorkerOptions
from daskshare.errors import ConfigurationError

if TYPE_CHECKING:
    from distributed import LocalCluster

__all__ = ["GPU_TASK_THREADS", "count_gpus", "local_cluster"]

#: Tasks at once on a GPU's worker: enough decoders to keep the GPU busy.
GPU_TASK_THREADS = 16


def local_cluster(*, device: str = "auto", **options: Any) -> LocalCluster:
    """Start a Dask cluster on this machine, for ``Client(daskshare.local_cluster())``.

    With NVIDIA GPUs: ``dask_cuda.LocalCUDACluster``, one worker process for each GPU with 16 task
    threads. Without: ``distributed.LocalCluster`` with one worker process, because a process keeps
    one copy of a model, and twice as many task threads as cores (4 to 16), because tasks mostly
    wait for the one thread that computes with all cores.

    Parameters
    ----------
    device : {"auto", "cuda", "cpu"}
        ``"cpu"`` hides the GPUs from the workers, unless they are threads of this process
        (``processes=False``); ``"cuda"`` fails without one.
    **options
        Passed to the cluster's class, over the defaults above; for example ``n_workers``,
        ``threads_per_worker``, ``memory_limit`` (bytes of host memory of one worker),
        ``dashboard_address``, ``CUDA_VISIBLE_DEVICES`` (the GPUs, each once: numbers, or UUIDs,
        which may be cut short). With several workers without a GPU, torch's threads are divided
        among them.

    Returns
    -------
    distributed.LocalCluster
        Running; a context manager.

    Raises
    ------
    ConfigurationError
        For an unknown device, ``device="cuda"`` without a GPU, GPUs without dask-cuda, or when
        the option ``CUDA_VISIBLE_DEVICES`` names a GPU that is not there, or one twice.

    Notes
    -----
    Workers inherit this process's Dask configuration, ``daskshare.engine`` for example, as it is
    now. Does not import torch, and does not touch the GPUs beyond counting them. Memory limits are
    Dask's own: all of the machine's memory for one worker, its part of it for each of several. The
    device's memory is watched by each worker's ModelShare (``daskshare.share.memory-limit``).
    Where there are GPUs, this process's ``CUDA_VISIBLE_DEVICES`` is rewritten to name the same ones
    plainly: without short UUIDs and -1, with which Dask's schedulers and workers do not start.
    """
    if device not in ("auto", "cuda", "cpu"):
        raise ConfigurationError(
            f"Got device={device!r}; expected 'auto', 'cuda' or 'cpu'.", option="device"
        )
    _rewrite_environment()
    option = options.pop("CUDA_VISIBLE_DEVICES", None)
    gpus = [] if device == "cpu" else _chosen_gpus(option)
    if device == "cuda" and not gpus:
        raise ConfigurationError(
            "Got device='cuda' on a machine where no NVIDIA GPU is visible. Check nvidia-smi and "
            "CUDA_VISIBLE_DEVICES, or use device='cpu'.",
            option="device",
        )
    if not gpus:
        return _cpu_cluster(options, hide_gpus=device == "cpu" or option is not None)
    if option is not None or "CUDA_VISIBLE_DEVICES" in os.environ:
        # dask-cuda starts a worker for each entry, also for one that CUDA does not read, and knows
        # UUIDs only in full.
        options["CUDA_VISIBLE_DEVICES"] = [gpu.entry for gpu in gpus]
    return _cuda_cluster(options)


def count_gpus() -> int:
    """Count the NVIDIA GPUs that a local cluster would use."""
    return len(visible_gpus())


def _rewrite_environment() -> None:
    # distributed.diagnostics.nvml looks for the first entry, as it stands, all the time.
    variable = os.environ.get("CUDA_VISIBLE_DEVICES")
    if variable is not None and driver_uuids()[0]:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(str(gpu.entry) for gpu in visible_gpus())


def _chosen_gpus(option: str | Iterable[int | str] | None) -> list[VisibleGpu]:
    if option is None:
        return visible_gpus()
    variable = option if isinstance(option, str) else ",".join(map(str, option))
    gpus = visible_gpus(variable)
    # CUDA passes over what it cannot read in silence; an argument is meant as it stands.
    wanted = [entry.strip() for entry in variable.split(",")] if variable.strip() else []
    if "-1" in wanted:
        wanted = wanted[: wanted.index("-1")]
    if len(gpus) != len(wanted):
        there = ", ".join(f"{number} ({uuid})" for number, uuid in enumerate(driver_uuids()[0]))
        raise ConfigurationError(
            f"Got CUDA_VISIBLE_DEVICES={option!r}; expected GPUs of this machine, each once, all "
            f"by number or all by UUID. There are: {there or 'none'}.",
            option="CUDA_VISIBLE_DEVICES",
        )
    return gpus


def _cuda_cluster(options: dict[str, Any]) -> LocalCluster:
    try:
        from dask_cuda import LocalCUDACluster
    except ImportError as error:
        raise ConfigurationError(
            f"This machine has a GPU, but dask-cuda cannot be imported ({error}). Install "
            "daskshare[gpu], or leave the GPU alone with local_cluster(device='cpu').",
            option="device",
        ) from error
    cluster: LocalCluster = LocalCUDACluster(**{"threads_per_worker": GPU_TASK_THREADS, **options})
    return cluster


def _cpu_cluster(options: dict[str, Any], *, hide_gpus: bool) -> LocalCluster:
    from distributed import LocalCluster

    workers: int = options.setdefault("n_workers", 1)
    options.setdefault("processes", True)
    options.setdefault("threads_per_worker", min(16, max(4, 2 * CPU_COUNT // max(1, workers))))
    if options["processes"]:
        # There are more task threads than cores, so each worker's own rule would take all cores.
        if WorkerOptions.from_config().torch_threads is None:
            threads = max(1, CPU_COUNT // max(1, workers))
            options["config"] = {
                "daskshare.worker.torch-threads": threads,
                **options.get("config", {}),
            }
        if hide_gpus:
            options["env"] = {**options.get("env", {}), "CUDA_VISIBLE_DEVICES": ""}
    return LocalCluster(**options)
