"""Memory while tasks of detect read frames much faster than the model takes them.

A part of ``python -m benchmarks.spark``. On CPUs the model is slow enough by itself.
"""

from __future__ import annotations

import multiprocessing
import time
from typing import Any

import numpy as np
import psutil

from benchmarks import workload
from benchmarks.report import Report
from daskshare.host import HostClient

_SIZE = 416
_ROW_BYTES = _SIZE * _SIZE * 3
_BATCH_ROWS = 32
_IN_FLIGHT = 4


def _spec(settings: dict[str, Any]) -> Any:
    from daskshare.models.yolov3 import yolov3_spec

    # Random weights are sure of nothing; here each frame must give rows.
    return yolov3_spec(
        settings["model"],
        weights=settings["weights"],
        input_size=_SIZE,
        confidence_threshold=0.01,
    )


def slow_main(settings: dict[str, Any], results: Any) -> None:
    """One task of detect, as Spark runs it, over frames that come at once."""
    import pyarrow as pa

    from daskshare.spark.columns import INPUT, Columns
    from daskshare.spark.partition import Partition

    rows = settings["rows"]
    pixels = np.random.default_rng(0).integers(0, 256, (_BATCH_ROWS, _ROW_BYTES), np.uint8)
    read, ahead, done = 0, 0, 0

    def batches() -> Any:
        nonlocal read, ahead
        for start in range(0, rows, _BATCH_ROWS):
            read += _BATCH_ROWS
            ahead = max(ahead, read - done)
            ids = pa.array(range(start, start + _BATCH_ROWS))
            yield pa.record_batch({"id": ids, INPUT: pa.array([p.tobytes() for p in pixels])})

    work = Partition(
        _spec(settings),
        Columns(kind="frames", keys=("id",), error=None),
        input_shape=(_SIZE, _SIZE, 3),
        chunk_seconds=None,
        rows_per_request=settings["request_frames"],
        requests_in_flight=_IN_FLIGHT,
        allow_code=False,
    )
    for batch in work(batches()):
        done = batch.column("id").to_pylist()[-1] + 1
    results.put((read, ahead))


def measure_backpressure(report: Report, settings: dict[str, Any]) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    tasks = [context.Process(target=slow_main, args=(settings, results)) for _ in range(2)]
    with HostClient(settings["device"]) as client:
        model = client.open(_spec(settings))
        model.infer(workload.host_frames(settings["request_frames"], _SIZE))
        pids = [client.host["pid"]]
        for task in tasks:
            task.start()
        pids += [task.pid for task in tasks]
        samples: list[int] = []
        while all(task.is_alive() for task in tasks):
            try:
                samples.append(workload.deviceless_pss_bytes(pids))
            except psutil.NoSuchProcess:
                break
            time.sleep(0.25)
        answers = [results.get(timeout=300) for _ in tasks]
        for task in tasks:
            task.join(30)
    # A third to start and to fill the windows, a third against the last third.
    third = len(samples) // 3
    middle, last = max(samples[third : 2 * third]), max(samples[2 * third :])
    held = _IN_FLIGHT * settings["request_frames"] + _BATCH_ROWS
    ahead = max(answer[1] for answer in answers)
    report.add_row(
        part="backpressure",
        variant="2 tasks of detect, a host",
        samples=len(samples),
        input_bytes=sum(answer[0] for answer in answers) * _ROW_BYTES,
        memory_bytes=last,
        memory_bytes_before=middle,
        rows_ahead=ahead,
    )
    report.add_bar("memory in the last third", last / middle, "x", bound=1.05, comparison="<=")
    report.add_bar("rows read ahead by a task", ahead, "rows", bound=held, comparison="<=")
