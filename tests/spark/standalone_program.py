"""A driver of a standalone cluster, for test_standalone: prints one line of JSON.

Each scenario runs one job, in which somebody is killed or late: frames go through
predict_batch_udf and detect and into Parquet files.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import dask.config
import numpy as np
import psutil
from pyspark import TaskContext
from pyspark.sql import SparkSession
from pyspark.sql.types import LongType

import daskshare
from daskshare.host import HostClient
from daskshare.spark import detect, predict_batch_udf

SIZE = (48, 64, 3)
ROWS = 48
PARTITIONS = 8
#: Bound of every wait, in polls of 50 ms.
POLLS = 1200
OPTIONS = {
    "spark.ui.enabled": "false",
    "spark.driver.memory": "512m",
    "spark.driver.host": "127.0.0.1",
    "spark.driver.bindAddress": "127.0.0.1",
    "spark.executor.memory": "512m",
    "spark.executor.cores": "2",
    # Without it Spark does not know how many executors it waits for.
    "spark.cores.max": "4",
    "spark.python.daemon.module": "tests.spark.daemon",
    "spark.sql.shuffle.partitions": "2",
    "spark.sql.execution.arrow.maxRecordsPerBatch": "2",
    "spark.scheduler.minRegisteredResourcesRatio": "1.0",
    "spark.scheduler.maxRegisteredResourcesWaitingTime": "240s",
    "spark.speculation": "true",
    "spark.speculation.interval": "100ms",
    "spark.speculation.quantile": "0.5",
    "spark.speculation.minTaskRuntime": "100ms",
}


def make_double():
    return lambda ids: ids * 2


def make_frames(batches):
    """Ids to ids and frames, the same for each attempt."""
    import pyarrow as pa

    for batch in batches:
        ids = batch.column(0).to_pylist()
        frames = [np.random.default_rng(i).bytes(int(np.prod(SIZE))) for i in ids]
        yield pa.record_batch({"id": batch.column(0), "pixels": pa.array(frames)})


def wait_until(condition: Callable[[], bool], what: str) -> None:
    never = threading.Event()
    for _ in range(POLLS):
        if condition():
            return
        never.wait(0.05)
    raise TimeoutError(f"waited too long for {what}")


def kill_python_workers() -> None:
    """SIGKILL all Python workers of this executor, the caller too."""
    for worker in psutil.Process(os.getppid()).children():
        os.kill(worker.pid, signal.SIGKILL)


def kill_executor() -> None:
    os.kill(psutil.Process(os.getppid()).ppid(), signal.SIGKILL)


def kill_host() -> None:
    """SIGKILL whoever serves the device: a host of its own, or the Dask worker."""
    with HostClient("cpu") as client:
        os.kill(client.host["pid"], signal.SIGKILL)


def once(flag: str, act: Callable[[], None]) -> Callable:
    """Act when the job's first rows have come, while the other tasks run."""

    def run(batches):
        for batch in batches:
            try:
                os.close(os.open(flag, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                yield batch
                continue
            act()
            yield batch

    return run


def until_copied(flag: str) -> Callable:
    """Let the first attempt at one partition wait for Spark's speculative copy of it."""

    def run(batches):
        context = TaskContext.get()
        if context.partitionId() == 0:
            if context.attemptNumber() > 0:
                Path(flag).touch()
            wait_until(lambda: os.path.exists(flag), "the speculative copy")
        yield from batches

    return run


def meeting(folder: Path) -> Callable:
    """Each task leaves the process that forked its Python worker, one for each executor, and waits
    until two of them were there: a quick executor cannot do the work of a slow one."""

    def run(batches):
        (folder / str(os.getppid())).touch()
        wait_until(lambda: len(os.listdir(folder)) > 1, "a task on the other executor")
        yield from batches

    return run


def main(master: str, folder: Path) -> None:
    builder = SparkSession.builder.master(master).appName("standalone")
    for name, value in OPTIONS.items():
        builder = builder.config(name, value)
    spark = builder.getOrCreate()
    spark.sparkContext.setLogLevel("OFF")
    yolo = daskshare.yolov3(
        cfg=folder / "small.cfg",
        weights=folder / "small.weights",
        names=["left", "right"],
        confidence_threshold=0.3,
    )
    double = predict_batch_udf(make_double, return_type=LongType(), batch_size=4)
    ids = spark.range(0, ROWS, 1, PARTITIONS)
    frames = ids.mapInArrow(make_frames, "id bigint, pixels binary")
    doubled = frames.select("id", "pixels", double("id").alias("twice"))

    def run(name: str, disturb: Callable | None, **options: object) -> list[list[int]]:
        found = detect(
            doubled, yolo, input_col="pixels", input_shape=SIZE, rows_per_request=1, **options
        ).select("id", "twice", "class_id", "confidence")
        if disturb is not None:
            found = found.mapInArrow(disturb, found.schema)
        found.write.parquet(f"{folder}/out-{name}")
        written = spark.read.parquet(f"{folder}/out-{name}").groupBy("id", "twice").count()
        return sorted([*row] for row in written.collect())

    executors = folder / "executors"
    executors.mkdir()
    ids.mapInArrow(meeting(executors), ids.schema).count()
    results = {"executors": len(os.listdir(executors))}
    results["quiet"] = run("quiet", None)
    for name, act in (
        ("python", kill_python_workers),
        ("executor", kill_executor),
        ("host", kill_host),
    ):
        results[name] = run(name, once(f"{folder}/{name}", act))
    results["speculation"] = run("speculation", until_copied(f"{folder}/copied"))
    results["dask"] = run_with_dask(folder, run)
    results["acted"] = sorted(
        name
        for name in ("python", "executor", "host", "copied", "dask")
        if (folder / name).exists()
    )
    spark.stop()
    print("FOUND " + json.dumps(results))


def run_with_dask(folder: Path, run: Callable) -> list[list[int]]:
    """The same where two Dask workers do the work, of which one is killed."""
    from distributed import Client, LocalCluster

    options = {"n_workers": 2, "threads_per_worker": 2, "dashboard_address": ":0"}
    with (
        dask.config.set({"daskshare.flight.port": 0}),
        LocalCluster(**options) as cluster,
        Client(cluster) as client,
    ):
        daskshare.install(client)
        owner: list[str] = []

        def served() -> bool:
            with HostClient("cpu") as host:
                owner.append(host.host["owner"])
            return owner[-1] == "worker"

        wait_until(served, "the Dask worker to be the host")
        address = cluster.scheduler_address
        rows = run("dask", once(f"{folder}/dask", kill_host), scheduler=address)

        # A cluster does not like to be closed while it restarts a worker.
        wait_until(lambda: len(client.scheduler_info()["workers"]) == 2, "the nanny's new worker")
        return rows


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
