"""What Spark's Python workers gain by a host: memory, loads, rows a second, and its transports.

Parts: ``udf`` runs pyspark's own predict_batch_udf and daskshare's on the same rows, each in a
driver of its own, and daskshare's with ``concurrent_calls``; ``transport`` moves batches to a host
through shared memory and to an endpoint by Arrow Flight; ``through`` does so inside Spark, beside a
mapInArrow that does nothing; ``host`` feeds one host from many processes, beside the same engine
fed by threads of its own process; ``backpressure`` is in a module of its own. ``udf`` and
``through`` need Java. Memory is resident host memory of Python processes (PSS).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import dask.config
import numpy as np
import psutil

from benchmarks import workload
from benchmarks.report import Report, argument_parser
from benchmarks.spark_backpressure import measure_backpressure
from daskshare.host import Call, HostClient, operation

SIZE = 416
ROW_BYTES = SIZE * SIZE * 3
GB = 1e9


@operation("benchmark-touch")
def touch(call: Call) -> int:
    """Look at every page of what came, and send back one number."""
    return int(call.value.reshape(-1)[::4096].sum(dtype=np.int64))


def make_spec(settings: dict[str, Any], *, confidence_threshold: float = 0.25) -> Any:
    from daskshare.models.yolov3 import yolov3_spec

    return yolov3_spec(
        settings["model"],
        weights=settings["weights"],
        input_size=SIZE,
        confidence_threshold=confidence_threshold,
    )


# --- udf: pyspark's predict_batch_udf and ours ----------------------------------------------------


def session(cores: int) -> Any:
    from pyspark.sql import SparkSession

    options = {
        "spark.driver.memory": "2g",
        "spark.ui.enabled": "false",
        "spark.driver.host": "127.0.0.1",
        "spark.sql.execution.arrow.maxRecordsPerBatch": "32",
    }
    builder = SparkSession.builder.master(f"local[{cores}]").appName("benchmark")
    for name, value in options.items():
        builder = builder.config(name, value)
    made = builder.getOrCreate()
    made.sparkContext.setLogLevel("ERROR")
    return made


def images(spark: Any, rows: int, partitions: int) -> Any:
    """A cached DataFrame of ids and raw images, made in the executors."""

    def fill(batches: Any) -> Any:
        import pyarrow as pa

        for batch in batches:
            ids = batch.column(0).to_pylist()
            pixels = [np.random.default_rng(i).bytes(ROW_BYTES) for i in ids]
            yield pa.record_batch({"id": batch.column(0), "image": pa.array(pixels)})

    df = spark.range(0, rows, 1, partitions).mapInArrow(fill, "id bigint, image binary").cache()
    df.count()
    return df


def make_predict_factory(settings: dict[str, Any], log: str) -> Any:
    def make_predict() -> Any:
        from benchmarks.workload import Eager

        with open(log, "a") as file:
            file.write("loaded\n")
        # Random weights are sure of nothing; without detections equal results would mean little.
        model = Eager(make_spec(settings, confidence_threshold=0.02))

        def predict(pixels: np.ndarray) -> np.ndarray:
            frames = [np.frombuffer(p, np.uint8).reshape(SIZE, SIZE, 3) for p in pixels]
            return np.array([len(found) for found in model(np.stack(frames))], np.int32)

        return predict

    return make_predict


def udf_main(variant: str, settings: dict[str, Any]) -> None:
    """Run a job of one variant for each line that comes in; print what was measured as JSON.

    ``watch`` is for memory, anything else for time: to add up the pages of large processes takes a
    core's time, too.
    """
    from pyspark.sql.types import IntegerType

    if variant == "pyspark":
        from pyspark.ml.functions import predict_batch_udf
    else:
        from daskshare.spark import predict_batch_udf
    calls = {"concurrent_calls": settings["calls"]} if variant == "several calls" else {}
    with tempfile.TemporaryDirectory(prefix="ds-") as folder:
        os.environ["DASK_DASKSHARE__HOST__DIRECTORY"] = folder
        spark = session(settings["tasks"])
        df = images(spark, settings["rows"], settings["tasks"])
        log = f"{folder}/loads"
        factory = make_predict_factory(settings, log)
        udf = predict_batch_udf(factory, return_type=IntegerType(), batch_size=16, **calls)
        seconds: list[float] = []
        memory = Memory(folder)
        for line in sys.stdin:
            watched = line.strip() == "watch"
            with memory if watched else contextlib.nullcontext():
                started = time.perf_counter()
                total = df.select(udf("image").alias("n")).groupBy().sum("n").first()[0]
                if not watched:
                    seconds.append(time.perf_counter() - started)
            print("DONE", flush=True)
        loads = len(Path(log).read_text().splitlines())
        spark.stop()
    measured = {
        "loads": loads,
        "memory_bytes": memory.most_bytes,
        "rows_per_second": settings["rows"] / median(seconds),
        "jobs_seconds": seconds,
        "detections": int(total),
    }
    print("RESULT " + json.dumps(measured), flush=True)


class Memory:
    """The most that this process's Python descendants and the folder's hosts held at once."""

    def __init__(self, folder: str) -> None:
        self.most_bytes = 0
        self._folder = folder

    def __enter__(self) -> Memory:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory")
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.5):
            pids = set()
            for process in psutil.process_iter(["cmdline"]):
                if self._folder in (process.info["cmdline"] or []):
                    pids.add(process.pid)
            for child in psutil.Process().children(recursive=True):
                try:
                    if "python" in child.name():
                        pids.add(child.pid)
                except psutil.NoSuchProcess:
                    continue
            try:
                now = workload.deviceless_pss_bytes(sorted(pids))
            except psutil.NoSuchProcess:
                continue
            self.most_bytes = max(self.most_bytes, now)


def said_by(driver: Any, prefix: str) -> str:
    """The rest of the next line that begins so."""
    for line in driver.stdout:
        if line.startswith(prefix):
            return str(line.removeprefix(prefix))
    raise RuntimeError(f"a driver ended with status {driver.wait()} and said no {prefix!r}")


def measure_udf(report: Report, settings: dict[str, Any]) -> None:
    found: dict[str, dict[str, Any]] = {}
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYSPARK_PYTHON": sys.executable}
    environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
    drivers = {}
    for variant in ("pyspark", "daskshare", "several calls"):
        command = [sys.executable, "-m", "benchmarks.spark", "--variant", variant]
        drivers[variant] = subprocess.Popen(
            [*command, "--settings", json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
    # In turns, so that what else the machine does falls on all alike. In one order: Spark ends a
    # Python worker that had nothing to do for a minute, and its model with it.
    for turn in ("watch", *["time"] * settings["repeats"], "watch"):
        for driver in drivers.values():
            driver.stdin.write(f"{turn}\n")
            driver.stdin.flush()
            said_by(driver, "DONE")
    for variant, driver in drivers.items():
        driver.stdin.close()
        found[variant] = json.loads(said_by(driver, "RESULT "))
        driver.wait(60)
        shown = {k: v for k, v in found[variant].items() if k != "jobs_seconds"}
        report.add_row(part="udf", variant=variant, **shown)
    stock = found["pyspark"]
    for variant, name in (("daskshare", ""), ("several calls", ", concurrent_calls")):
        ours = found[variant]
        report.add_bar(f"loads{name}", ours["loads"], "loads", bound=1, comparison="<=")
        ratio = ours["memory_bytes"] / stock["memory_bytes"]
        report.add_bar(f"memory against pyspark's{name}", ratio, "x", bound=0.5, comparison="<=")
        turns = zip(stock["jobs_seconds"], ours["jobs_seconds"], strict=True)
        ratio = median(theirs / own for theirs, own in turns)
        report.add_bar(f"rows/s against pyspark's{name}", ratio, "x", bound=1.0)
        same = float(stock["detections"] == ours["detections"] > 0)
        report.add_bar(f"same detections{name}", same, "(1: yes)", bound=1)


# --- transport ------------------------------------------------------------------------------------


def endpoint_main(locations: Any, stop: Any) -> None:
    """A process with an Arrow Flight endpoint, as a Dask worker has it."""
    from daskshare.config import EngineOptions, FlightOptions, HostOptions, ShareOptions
    from daskshare.device import Device
    from daskshare.flight import FlightEndpoint
    from daskshare.share import ModelShare

    share = ModelShare(Device.cpu(), options=ShareOptions(), engine_options=EngineOptions())
    endpoint = FlightEndpoint(share, FlightOptions(port=0), HostOptions(), host="127.0.0.1")
    locations.put(endpoint.location)
    stop.wait()


def move(client: HostClient, array: np.ndarray, seconds: float, window: int) -> float:
    """Bytes a second that a client moves with some requests in flight."""
    waiting: list[int] = []
    for _ in range(2 * window):
        client.call("benchmark-touch", value=array)
    started = time.perf_counter()
    moved = 0
    while time.perf_counter() - started < seconds or waiting:
        if time.perf_counter() - started < seconds:
            waiting.append(client.submit("benchmark-touch", value=array))
        if len(waiting) >= window or time.perf_counter() - started >= seconds:
            client.result(waiting.pop(0))
            moved += array.nbytes
    return moved / (time.perf_counter() - started)


def measure_transport(report: Report, settings: dict[str, Any]) -> None:
    from daskshare.flight import connect_flight

    context = multiprocessing.get_context("spawn")
    locations, stop = context.Queue(), context.Event()
    process = context.Process(target=endpoint_main, args=(locations, stop))
    process.start()
    try:
        location = locations.get(timeout=60)
        best = {"shared memory": 0.0, "Arrow Flight": 0.0}
        with (
            HostClient("cpu") as local,
            connect_flight(lambda: [location], "benchmark") as remote,
        ):
            for rows in (4, 16, 32):
                array = np.random.default_rng(0).integers(0, 256, (rows, ROW_BYTES), np.uint8)
                for name, client in (("shared memory", local), ("Arrow Flight", remote)):
                    rate = move(client, array, settings["seconds"], 4) / GB
                    report.add_row(
                        part="transport", variant=name, batch_rows=rows, gigabytes_per_second=rate
                    )
                    best[name] = max(best[name], rate)
    finally:
        stop.set()
        process.join(20)
    report.add_bar("shared memory", best["shared memory"], "GB/s", bound=3.0)
    report.add_bar("Arrow Flight", best["Arrow Flight"], "GB/s", bound=0.7)


def measure_through(report: Report, settings: dict[str, Any]) -> None:
    """Rows a second of mapInArrow that does nothing, and of one that hands the rows to a host."""

    def nothing(batches: Any) -> Any:
        import pyarrow as pa

        for batch in batches:
            yield pa.record_batch({"id": batch.column(0)})

    def to_host(batches: Any) -> Any:
        from collections import deque

        import pyarrow as pa

        from daskshare.host import HostClient
        from daskshare.spark.partition import binary_values

        waiting: Any = deque()
        with HostClient("cpu") as client:
            for batch in batches:
                data, _ = binary_values(batch.column(1))
                waiting.append((client.submit("benchmark-touch", value=data), batch.column(0)))
                if len(waiting) >= 4:
                    request, ids = waiting.popleft()
                    client.result(request)
                    yield pa.record_batch({"id": ids})
            for request, ids in waiting:
                client.result(request)
                yield pa.record_batch({"id": ids})

    os.environ["PYSPARK_PYTHON"] = sys.executable
    spark = session(settings["tasks"])
    try:
        df = images(spark, settings["rows"], settings["tasks"])
        rates: dict[str, float] = {"nothing": 0.0, "to a host": 0.0}
        for _ in range(1 + settings["repeats"]):
            for name, function in (("nothing", nothing), ("to a host", to_host)):
                started = time.perf_counter()
                df.mapInArrow(function, "id bigint").write.format("noop").mode("overwrite").save()
                rate = settings["rows"] / (time.perf_counter() - started)
                rates[name] = max(rates[name], rate)
    finally:
        spark.stop()
    for name, rate in rates.items():
        report.add_row(part="through", variant=name, rows_per_second=rate)
    ratio = rates["to a host"] / rates["nothing"]
    report.add_bar("through Spark against a mapInArrow of nothing", ratio, "x", bound=0.75)


# --- host: many processes feed one engine ---------------------------------------------------------


def client_main(settings: dict[str, Any], barrier: Any, results: Any) -> None:
    """One process that feeds the host, as a Python worker of Spark does."""
    frames = workload.host_frames(settings["request_frames"], SIZE, seed=os.getpid())
    with HostClient(settings["device"]) as client:
        model = client.open(make_spec(settings))
        for _ in range(3):
            model.infer(frames)
        barrier.wait()
        waiting: list[int] = []
        done, started = 0, time.time()
        while time.time() - started < settings["seconds"]:
            waiting.append(client.submit("infer", value=frames, model=model))
            if len(waiting) >= 3:
                client.result(waiting.pop(0))
                done += len(frames)
        for request in waiting:
            client.result(request)
            done += len(frames)
        stopped = time.time()
        report = client.report()
        memory = workload.gpu_used_bytes() if settings["gpu"] else 0
        results.put((done, started, stopped, report["models"], memory))


def measure_host(report: Report, settings: dict[str, Any]) -> None:
    context = multiprocessing.get_context("spawn")
    count = settings["clients"]
    barrier, results = context.Barrier(count), context.Queue()
    processes = [
        context.Process(target=client_main, args=(settings, barrier, results)) for _ in range(count)
    ]
    with HostClient(settings["device"]) as client:
        # Compiled before anything is measured.
        model = client.open(make_spec(settings))
        frames = workload.host_frames(settings["request_frames"], SIZE)
        started = time.time()
        while time.time() - started < settings["warm_up_seconds"]:
            model.infer(frames)
        for process in processes:
            process.start()
        answers = [results.get(timeout=300) for _ in processes]
        for process in processes:
            process.join(30)
        through_host = workload.rate([answer[:3] for answer in answers])
        loads = max(m["loads"] for answer in answers for m in answer[3].values())
        memory = max(answer[4] for answer in answers)
    report.add_row(
        part="host",
        variant=f"{count} processes through a host",
        frames_per_second=through_host,
        loads=loads,
        device_memory_bytes=memory,
    )
    alone = engine_rate(settings)
    report.add_row(
        part="host", variant=f"{count} threads, engine in process", frames_per_second=alone
    )
    report.add_bar("host against the engine in process", through_host / alone, "x", bound=0.9)
    report.add_bar("loads in the host", loads, "loads", bound=1, comparison="<=")


def engine_rate(settings: dict[str, Any]) -> float:
    """Frames a second of the engine in this process, fed by as many threads."""
    from daskshare.config import EngineOptions, ShareOptions
    from daskshare.device import current_device
    from daskshare.share import ModelShare

    share = ModelShare(
        current_device(), options=ShareOptions(), engine_options=EngineOptions.from_config()
    )
    count = settings["clients"]
    barrier = threading.Barrier(count)

    def feed(number: int) -> tuple[int, float, float]:
        frames = workload.host_frames(settings["request_frames"], SIZE, seed=number)
        program = lease.program
        barrier.wait()
        waiting: list[Any] = []
        done, started = 0, time.time()
        while time.time() - started < settings["seconds"]:
            prepared = program.prepare(frames)
            waiting.append((lease.submit(prepared), prepared.context))
            if len(waiting) >= 3:
                future, context = waiting.pop(0)
                program.finish(future.result(), context)
                done += len(frames)
        for future, context in waiting:
            program.finish(future.result(), context)
            done += len(frames)
        return done, started, time.time()

    with share.lease(make_spec(settings)) as lease, ThreadPoolExecutor(count) as pool:
        lease.engine.wait_compiled(settings["warm_up_seconds"])
        rate = workload.rate(list(pool.map(feed, range(count))))
    share.close()
    return rate


PARTS = {
    "transport": measure_transport,
    "host": measure_host,
    "udf": measure_udf,
    "through": measure_through,
    "backpressure": measure_backpressure,
}


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--rows", type=int, default=512, help="images of a Spark job")
    parser.add_argument("--tasks", type=int, default=4, help="of Spark at once")
    parser.add_argument("--repeats", type=int, default=2, help="of each Spark job")
    parser.add_argument("--seconds", type=float, default=4.0, help="of the other measurements")
    parser.add_argument("--clients", type=int, help="processes; default 16 on a GPU, 4 without")
    parser.add_argument("--request-frames", type=int, default=16)
    parser.add_argument("--only", default="", help=f"comma list of: {','.join(PARTS)}")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--settings", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant:
        udf_main(arguments.variant, json.loads(arguments.settings))
        return 0
    settings = make_settings(arguments)
    report = Report("spark", settings=settings)
    chosen = [name for name in arguments.only.split(",") if name] or list(PARTS)
    root = str(Path(__file__).parents[1])
    if root not in sys.path:
        sys.path.insert(0, root)
    with tempfile.TemporaryDirectory(prefix="ds-") as folder:
        options = {
            "directory": folder,
            "idle-timeout": "5s",
            "extensions": ["daskshare.results.hosted", "benchmarks.spark"],
        }
        os.environ["DASK_DASKSHARE__HOST__DIRECTORY"] = folder
        os.environ["DASK_DASKSHARE__HOST__EXTENSIONS"] = repr(options["extensions"])
        with dask.config.set({f"daskshare.host.{name}": value for name, value in options.items()}):
            for name in chosen:
                PARTS[name](report, settings)
    return report.finish(arguments)


def make_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    from daskshare.host import local_devices

    device = local_devices()[0]
    gpu = device != "cpu"
    model = "yolov3" if gpu else "yolov3-tiny"
    return {
        "device": device,
        "gpu": gpu,
        "model": model,
        "weights": str(workload.random_weights(model)),
        "rows": arguments.rows,
        "tasks": arguments.tasks,
        "repeats": arguments.repeats,
        "seconds": arguments.seconds,
        "calls": os.cpu_count() or 1,
        "clients": arguments.clients or (16 if gpu else 4),
        "request_frames": arguments.request_frames,
        "warm_up_seconds": 60.0 if gpu else 2.0,
    }


if __name__ == "__main__":
    # As the module that hosts import, so that there is one of it.
    from benchmarks.spark import main as main_of_module

    raise SystemExit(main_of_module())
