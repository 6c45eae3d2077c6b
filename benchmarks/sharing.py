"""How many frames a second concurrent tasks get from one GPU, by who holds the model.

At each concurrency, tasks hand over a few host frames at a time to: a model loaded in every task;
a copy per process; a copy per thread; one copy that threads share without batching; and daskshare
through Dask. A hand-written loop of one process (compiled on a GPU) is the ceiling. Memory is the
GPU's as the driver counts it, or resident host memory where there is no GPU.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import queue
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import workload
from benchmarks.report import Report, argument_parser

MIB = 2**20


def make_spec(settings: dict[str, Any], precision: str | None) -> Any:
    from daskshare.models.yolov3 import yolov3_spec

    return yolov3_spec(
        settings["model"],
        weights=settings["weights"],
        input_size=settings["input_size"],
        precision=precision,
    )


# --- copies in processes --------------------------------------------------------------------------


def process_main(
    settings: dict[str, Any], precision: str | None, commands: Any, replies: Any
) -> None:
    """A task's own process: waits for ("run", seconds, reload each task?) and answers."""
    import torch

    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    frames = workload.host_frames(
        settings["request_frames"], settings["input_size"], seed=os.getpid()
    )
    spec = make_spec(settings, precision)
    model = workload.Eager(spec)
    model(frames)
    replies.put(("ready", os.getpid()))
    while (command := commands.get()) is not None:
        kind, seconds, task_frames = command
        if kind == "copy":
            model = model or workload.Eager(spec)
            model(frames)
            replies.put(("done", (*workload.run_for(model, frames, seconds), 0)))
            continue
        model = None
        started, done, loads = time.time(), 0, 0
        while time.time() - started < seconds:
            own = workload.Eager(spec)
            loads += 1
            for _ in range(0, task_frames, len(frames)):
                own(frames)
                done += len(frames)
            del own
        replies.put(("done", (done, started, time.time(), loads)))


class Processes:
    """Processes with a copy each, started as the concurrency grows."""

    def __init__(self, settings: dict[str, Any], precision: str | None) -> None:
        self.settings, self.precision = settings, precision
        self.context = multiprocessing.get_context("spawn")
        self.replies = self.context.Queue()
        self.members: list[tuple[Any, Any]] = []

    def grow(self, count: int) -> None:
        new = count - len(self.members)
        for _ in range(new):
            commands = self.context.Queue()
            arguments = (self.settings, self.precision, commands, self.replies)
            process = self.context.Process(target=process_main, args=arguments, daemon=True)
            process.start()
            self.members.append((process, commands))
        for _ in range(new):
            kind, _ = self.receive()
            assert kind == "ready"

    def receive(self) -> Any:
        while True:
            try:
                return self.replies.get(timeout=5)
            except queue.Empty:
                dead = [p for p, _ in self.members if not p.is_alive()]
                if dead:
                    raise RuntimeError(
                        f"{len(dead)} processes died, exit {dead[0].exitcode}"
                    ) from None

    def run(self, kind: str, seconds: float) -> list[tuple[int, float, float, int]]:
        for _, commands in self.members:
            commands.put((kind, seconds, self.settings["task_frames"]))
        return [self.receive()[1] for _ in self.members]

    def close(self) -> None:
        for _, commands in self.members:
            commands.put(None)
        for process, _ in self.members:
            process.join(30)
            if process.is_alive():
                process.kill()

    def pids(self) -> list[int]:
        return [process.pid for process, _ in self.members]


def measure_processes(
    report: Report, settings: dict[str, Any], way: str, kind: str, precision: str | None
) -> None:
    processes = Processes(settings, precision)
    baseline = memory_bytes(settings, [])
    try:
        for concurrency in settings["concurrency"]:
            processes.grow(concurrency)
            results = processes.run(kind, settings["seconds"])
            used = memory_bytes(settings, processes.pids()) - baseline
            loads = sum(r[3] for r in results) or concurrency
            add(report, way, concurrency, workload.rate([r[:3] for r in results]), used, loads)
    finally:
        processes.close()


# --- copies, or one copy, in threads --------------------------------------------------------------


def threads_main(settings: dict[str, Any], way: str, replies: Any) -> None:
    spec = make_spec(settings, settings["precision"])
    shared = workload.Eager(spec)
    models: list[Any] = []
    frames = [
        workload.host_frames(settings["request_frames"], settings["input_size"], seed=i)
        for i in range(max(settings["concurrency"]))
    ]
    for concurrency in settings["concurrency"]:
        while len(models) < concurrency:
            own = shared if way == "shared" or not models else workload.Eager(spec)
            own(frames[len(models)])
            models.append(own)
        barrier = threading.Barrier(concurrency)
        with ThreadPoolExecutor(concurrency) as pool:
            jobs = [
                pool.submit(workload.run_for, models[i], frames[i], settings["seconds"], barrier)
                for i in range(concurrency)
            ]
            rate = workload.rate([job.result() for job in jobs])
        used = memory_bytes(settings, [os.getpid()])
        replies.put((concurrency, rate, used, 1 if way == "shared" else concurrency))
    replies.put(None)


def measure_threads(report: Report, settings: dict[str, Any], way: str, label: str) -> None:
    context = multiprocessing.get_context("spawn")
    replies = context.Queue()
    baseline = memory_bytes(settings, [])
    process = context.Process(target=threads_main, args=(settings, way, replies), daemon=True)
    process.start()
    while (row := receive(replies, process)) is not None:
        concurrency, rate, used, loads = row
        add(report, label, concurrency, rate, used - baseline, loads)
    process.join()


# --- the ceiling: one process, no tasks -----------------------------------------------------------


def loop_main(settings: dict[str, Any], replies: Any) -> None:
    """Batches from pinned memory, copied in while the last one computes; no Dask, no tasks."""
    import torch

    from daskshare.device import current_device

    device = current_device()
    target = device.torch_device()
    program = make_spec(settings, settings["precision"]).load(device)
    size = settings["loop_batch"] or program.max_batch_size
    forward = program.compile(size) or program.forward
    source = torch.from_numpy(workload.host_frames(size, settings["input_size"]))
    cuda = target.type == "cuda"
    with torch.inference_mode():
        if not cuda:
            forward(source)
            rates = []
            for _ in range(3):
                done, started = 0, time.perf_counter()
                while time.perf_counter() - started < settings["seconds"]:
                    workload.to_host(forward(source))
                    done += size
                rates.append(done / (time.perf_counter() - started))
        else:
            rates = cuda_loop(torch, forward, source.pin_memory(), target, settings["seconds"])
    replies.put((float(np.median(rates)), memory_bytes(settings, [os.getpid()])))
    replies.put(None)


def cuda_loop(torch: Any, forward: Any, source: Any, target: Any, seconds: float) -> list[float]:
    copies, compute = torch.cuda.Stream(), torch.cuda.Stream()
    slots = [torch.empty_like(source, device=target) for _ in range(2)]
    arrived = [torch.cuda.Event() for _ in slots]
    rates = []
    with torch.cuda.stream(compute):
        for slot in slots:
            slot.copy_(source)
            workload.to_host(forward(slot))
    for _ in range(3):
        done, turn, pending = 0, 0, None
        started = time.perf_counter()
        while time.perf_counter() - started < seconds:
            slot = slots[turn % 2]
            with torch.cuda.stream(copies):
                slot.copy_(source, non_blocking=True)
                arrived[turn % 2].record()
            with torch.cuda.stream(compute):
                arrived[turn % 2].wait()
                outputs = forward(slot)
                on_host = [t.to("cpu", non_blocking=True) for t in tensors(outputs)]
                finished = torch.cuda.Event()
                finished.record()
            if pending is not None:
                pending[0].synchronize()
                done += len(source)
            pending = (finished, on_host)
            turn += 1
        torch.cuda.synchronize()
        rates.append((done + len(source)) / (time.perf_counter() - started))
    return rates


def tensors(outputs: Any) -> list[Any]:
    if isinstance(outputs, dict):
        outputs = tuple(outputs.values())
    return list(outputs) if isinstance(outputs, tuple | list) else [outputs]


def measure_loop(report: Report, settings: dict[str, Any]) -> float:
    context = multiprocessing.get_context("spawn")
    replies = context.Queue()
    baseline = memory_bytes(settings, [])
    process = context.Process(target=loop_main, args=(settings, replies))
    process.start()
    rate, used = receive(replies, process)
    process.join()
    add(report, "hand-written loop, no tasks", 1, rate, used - baseline, 1)
    return float(rate)


def receive(replies: Any, process: Any) -> Any:
    """The next reply; an error when the process died without one."""
    while True:
        try:
            return replies.get(timeout=5)
        except queue.Empty:
            if not process.is_alive():
                raise RuntimeError(f"a benchmark process died, exit {process.exitcode}") from None


# --- daskshare ------------------------------------------------------------------------------------


def task(
    model: Any, index: int, settings: dict[str, Any], seconds: float
) -> tuple[int, float, float]:
    """What one Dask task does: hand frames over until the time is up."""
    frames = workload.host_frames(settings["request_frames"], settings["input_size"], seed=index)
    return workload.run_for(model, frames, seconds)


def wait_ready(model: Any, seconds: float) -> str:
    """Runs on the worker: wait until the compiled forward serves, where there is one."""
    from daskshare.worker_plugin import local_share

    with local_share().lease(model.spec) as lease:
        lease.engine.wait_compiled(timeout_seconds=seconds)
        return str(lease.engine.stats().mode)


def measure_daskshare(report: Report, settings: dict[str, Any]) -> dict[str, Any]:
    import dask
    from distributed import Client

    import daskshare

    baseline = memory_bytes(settings, [])
    threads = max(settings["concurrency"])
    dask.config.set({"daskshare.engine.max-batch-size": settings["batch"]})
    cluster = daskshare.local_cluster(threads_per_worker=threads, dashboard_address=":0")
    with cluster, Client(cluster) as client:
        daskshare.install(client)
        model = daskshare.SharedModel(make_spec(settings, settings["precision"]))
        client.submit(task, model, 0, settings, 0.5, pure=False).result()
        mode = client.submit(wait_ready, model, 240, pure=False).result()
        print(f"daskshare serves {mode}", file=sys.stderr)
        before = (0, 0)
        for concurrency in settings["concurrency"]:
            tasks = [
                client.submit(task, model, i, settings, settings["seconds"], pure=False)
                for i in range(concurrency)
            ]
            rate = workload.rate(client.gather(tasks))
            del tasks
            pids = [int(p) for p in client.run(os.getpid).values()]
            used = memory_bytes(settings, pids) - baseline
            (worker,) = daskshare.stats(client).values()
            (entry,) = worker["models"].values()
            add(report, "daskshare through Dask", concurrency, rate, used, entry["loads"])
            frames, batches = entry["frames"] - before[0], entry["batches"] - before[1]
            report.rows[-1]["mean_batch_size"] = round(frames / batches, 1)
            before = (entry["frames"], entry["batches"])
        return dict(entry)


# --- all together ---------------------------------------------------------------------------------


def memory_bytes(settings: dict[str, Any], pids: list[int]) -> int:
    if settings["gpu"]:
        return workload.gpu_used_bytes()
    return workload.deviceless_pss_bytes(pids)


def add(report: Report, way: str, concurrency: int, rate: float, used: int, loads: int) -> None:
    report.add_row(
        way=way,
        concurrency=concurrency,
        frames_per_second=round(rate, 1),
        memory_mib=round(used / MIB, 1),
        loads=loads,
    )
    print(f"{way:40} {concurrency:3} {rate:10.1f} frames/s {used / MIB:9.1f} MiB", file=sys.stderr)


def figure(report: Report, way: str, concurrency: int, name: str = "frames_per_second") -> float:
    for row in report.rows:
        if row["way"] == way and row["concurrency"] == concurrency:
            return float(row[name])
    return float("nan")


def set_bars(report: Report, settings: dict[str, Any], ceiling: float) -> None:
    most, least = max(settings["concurrency"]), min(settings["concurrency"])
    ours = figure(report, "daskshare through Dask", most)
    memory = [figure(report, "daskshare through Dask", c, "memory_mib") for c in (least, most)]
    per_task = (memory[1] - memory[0]) * MIB / 1e6 / max(1, most - least)
    loads = figure(report, "daskshare through Dask", most, "loads")
    report.add_bar("loads for all tasks", loads, "loads", bound=1, comparison="<=")
    if settings["gpu"]:
        fp16 = figure(report, "a copy per process, fp16", most)
        fp32 = figure(report, "a copy per process, fp32", most)
        report.add_bar("frames/s with most tasks", ours, "frames/s", bound=5200)
        report.add_bar("over fp16 copies per process", ours / fp16, "x", bound=2.2)
        report.add_bar("over fp32 copies per process", ours / fp32, "x", bound=3.3)
        report.add_bar("of the hand-written compiled loop", ours / ceiling, "x", bound=0.95)
        report.add_bar("GPU memory a further task", per_task, "MB", bound=50, comparison="<")
    else:
        frames = settings["request_frames"] * settings["input_size"] ** 2 * 3 / 1e6
        name = "host memory a further task, beyond its frames"
        report.add_bar(name, per_task - frames, "MB", bound=10, comparison="<")
        report.add_bar("of the hand-written loop", ours / ceiling, "x", bound=0.9)


def plot(report: Report, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure_, (speed, memory) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for way in dict.fromkeys(row["way"] for row in report.rows):
        rows = [row for row in report.rows if row["way"] == way]
        if len(rows) == 1:
            speed.axhline(rows[0]["frames_per_second"], ls="--", color="0.5", label=way)
            continue
        x = [row["concurrency"] for row in rows]
        style = {"lw": 3} if way.startswith("daskshare") else {"lw": 1.3}
        speed.plot(x, [row["frames_per_second"] for row in rows], "o-", label=way, **style)
        memory.plot(x, [row["memory_mib"] / 1024 for row in rows], "o-", **style)
    for axes, title in ((speed, "frames/s"), (memory, "memory, GiB")):
        axes.set(xlabel="concurrent tasks", ylabel=title, ylim=(0, None))
        axes.set_xscale("log", base=2)
        axes.set_xticks(report.settings["concurrency"], report.settings["concurrency"])
        axes.grid(alpha=0.3)
    figure_.legend(loc="outside lower center", ncols=3, fontsize=8)
    figure_.savefig(path, dpi=150)


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--model", help="default: yolov3 on a GPU, yolov3-tiny without")
    parser.add_argument("--weights", help="default: random ones; the speed is the same")
    parser.add_argument("--input-size", type=int, default=416)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--concurrency", default="1,2,4,8,16")
    parser.add_argument("--request-frames", type=int, default=8)
    parser.add_argument("--batch", type=int, help="largest batch of daskshare's engine")
    parser.add_argument(
        "--only", default="", help="comma list of: task,process,thread,loop,daskshare"
    )
    parser.add_argument("--plot", type=Path, metavar="PNG")
    arguments = parser.parse_args()
    settings = make_settings(arguments)
    report = Report("sharing", settings=settings)
    only = set(filter(None, arguments.only.split(",")))
    gpu = settings["gpu"]
    ceiling = float("nan")
    if not only or "loop" in only:
        ceiling = measure_loop(report, settings)
    if not only or "daskshare" in only:
        measure_daskshare(report, settings)
    if not only or "process" in only:
        for precision in ("fp16", "fp32") if gpu else ("fp32",):
            label = f"a copy per process, {precision}"
            measure_processes(report, settings, label, "copy", precision)
    if not only or "thread" in only:
        measure_threads(report, settings, "copies", "a copy per thread")
        measure_threads(report, settings, "shared", "one copy, no batching")
    if not only or "task" in only:
        measure_processes(report, settings, "load in every task", "task", settings["precision"])
    set_bars(report, settings, ceiling)
    if arguments.plot:
        plot(report, arguments.plot)
    return report.finish(arguments)


def make_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    from daskshare.device import list_devices

    gpu = bool(list_devices())
    model = arguments.model or ("yolov3" if gpu else "yolov3-tiny")
    weights = arguments.weights
    if weights is None and model != "yolov3-tiny":
        weights = str(workload.random_weights(model))
    return {
        "gpu": gpu,
        "model": model,
        "weights": weights,
        "input_size": arguments.input_size,
        "precision": "fp16" if gpu else "fp32",
        "request_frames": arguments.request_frames,
        "task_frames": 256 if gpu else 16,
        "concurrency": [int(c) for c in arguments.concurrency.split(",")],
        "seconds": arguments.seconds,
        "batch": arguments.batch,
        "loop_batch": arguments.batch,
    }


if __name__ == "__main__":
    raise SystemExit(main())
