"""How near one engine comes to what the GPU can do: tasks' threads, one model, no Dask.

Threads hand over a few host frames at a time. Beside it, measured in the same run: the network by
``torch.compile`` in a hand-written loop, and the roofline: for every convolution the larger of its
operations at the rate of a large matrix product and its bytes at the rate of a large copy. A first
run takes a minute more, as it measures which kernels to take; ``ready_seconds`` says so.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks import sharing, workload
from benchmarks.report import Report, argument_parser

#: Frames a second that fused kernels must reach on one H200, by input size.
BOUNDS = {416: 7200, 608: 3400}
MEMORY_GIB = 3


# --- what the device can do -----------------------------------------------------------------------


def ceilings(torch: Any) -> tuple[float, float]:
    """Bytes a second of a large copy, read and written, and operations a second of a product."""
    source = torch.randint(256, (2**31,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = median_seconds(torch, lambda: target.copy_(source))
    a, b = (torch.randn(8192, 8192, device="cuda").half() for _ in range(2))
    product = median_seconds(torch, lambda: a @ b)
    return 2 * 2**31 / copy, 2 * 8192**3 / product


def median_seconds(torch: Any, run: Any, *, runs: int = 12) -> float:
    times = []
    for number in range(runs + 3):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        if number >= 3:
            times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times)


def roofline_seconds(plan: Any, bytes_per_second: float, operations_per_second: float) -> float:
    """Least time for one frame: every convolution reads its input once and writes its output."""
    total = 0.0
    for layer in plan.convolutions:
        pixels = layer.height * layer.width
        inputs = layer.in_channels * layer.height * layer.width * layer.stride**2
        value_bytes = 2
        moved = value_bytes * (inputs + layer.channels * pixels)
        if layer.index == 0:
            moved = inputs + value_bytes * layer.channels * pixels
        operations = 2 * pixels * layer.channels * layer.weight_shape[1] * layer.size**2
        total += max(moved / bytes_per_second, operations / operations_per_second)
    return total


# --- the engine -----------------------------------------------------------------------------------


def engine_main(settings: dict[str, Any], size: int, replies: Any) -> None:
    """In a process of its own: ready times, frames a second of each run, memory, statistics."""
    started = time.monotonic()
    import dask

    from daskshare.config import EngineOptions
    from daskshare.device import current_device
    from daskshare.engine import InferenceEngine

    device = current_device()
    spec = sharing.make_spec({**settings, "input_size": size}, settings["precision"])
    options = EngineOptions(max_batch_size=settings["batch"])
    dask.config.set({"daskshare.models.fused-kernels": "auto"})
    engine = InferenceEngine(spec.load(device), device, options=options, name=spec.name)
    frames = [
        workload.host_frames(settings["request_frames"], size, seed=i)
        for i in range(settings["threads"])
    ]
    try:
        engine.infer(frames[0])
        first_seconds = time.monotonic() - started
        engine.wait_compiled(timeout_seconds=settings["compile_seconds"])
        ready_seconds = time.monotonic() - started
        rates = []
        with ThreadPoolExecutor(settings["threads"]) as pool:
            for _ in range(settings["repeats"] + 1):
                barrier = threading.Barrier(settings["threads"])
                jobs = [
                    pool.submit(workload.run_for, engine.infer, own, settings["seconds"], barrier)
                    for own in frames
                ]
                rates.append(workload.rate([job.result() for job in jobs]))
        stats = engine.stats()
        memory = sharing.memory_bytes(settings, [os.getpid()])
    finally:
        engine.close()
    replies.put(
        {
            # The first run warms up.
            "rates": rates[1:],
            "memory": memory,
            "first_seconds": first_seconds,
            "ready_seconds": ready_seconds,
            "mode": stats.mode,
            "compiled_as": stats.compiled_as or stats.compile_error,
            "mean_batch_size": stats.mean_batch_size,
            "graphs": stats.graphs,
        }
    )


# --- baselines ------------------------------------------------------------------------------------


def loop_main(settings: dict[str, Any], size: int, name: str, replies: Any) -> None:
    """One process that hands batches over by itself, with copies in and out beside the work."""
    import dask
    import torch

    from daskshare.device import current_device

    device = current_device()
    spec = sharing.make_spec({**settings, "input_size": size}, settings["precision"])
    program = spec.load(device)
    batch = settings["batch"] or program.max_batch_size
    source = torch.from_numpy(workload.host_frames(batch, size))
    forward = program.forward
    if name == "compile":
        with dask.config.set({"daskshare.models.fused-kernels": False}):
            forward = program.compile(batch)
    with torch.inference_mode():
        if settings["gpu"]:
            target = device.torch_device()
            rates = sharing.cuda_loop(
                torch, forward, source.pin_memory(), target, settings["seconds"]
            )
        else:
            rates = [cpu_loop(forward, source, settings) for _ in range(settings["repeats"])]
    replies.put(statistics.median(rates))


def roofline_main(settings: dict[str, Any], size: int, replies: Any) -> None:
    import torch

    spec = sharing.make_spec({**settings, "input_size": size}, settings["precision"])
    copy, product = ceilings(torch)
    replies.put(
        {
            "frames_per_second": 1 / roofline_seconds(spec.plan(), copy, product),
            "copy_terabytes_per_second": copy / 1e12,
            "product_teraflops": product / 1e12,
            "device": torch.cuda.get_device_name(),
        }
    )


def cpu_loop(forward: Any, source: Any, settings: dict[str, Any]) -> float:
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < settings["seconds"]:
        workload.to_host(forward(source))
        done += len(source)
    return done / (time.perf_counter() - started)


# --- all together ---------------------------------------------------------------------------------


def in_process(main: Any, *arguments: Any) -> Any:
    context = multiprocessing.get_context("spawn")
    replies = context.Queue()
    process = context.Process(target=main, args=(*arguments, replies))
    process.start()
    reply = sharing.receive(replies, process)
    process.join()
    return reply


def measure(report: Report, settings: dict[str, Any], size: int) -> None:
    """One row a way, printed as it is measured."""
    rates: dict[str, float] = {}
    limit: float | None = None

    def add(way: str, rate: float, **details: Any) -> None:
        rates[way] = rate
        row: dict[str, Any] = {"frames_per_second": rate, **details}
        if limit is not None:
            row["of_roofline"] = rate / limit
        rounded = {k: v if isinstance(v, str) else round(float(v), 3) for k, v in row.items()}
        report.add_row(input_size=size, way=way, **rounded)
        print({"input_size": size, "way": way, **rounded}, file=sys.stderr, flush=True)

    memory = float("nan")
    if settings["gpu"] and "roofline" in settings["only"]:
        found = in_process(roofline_main, settings, size)
        limit = found.pop("frames_per_second")
        add("roofline, layer by layer", limit, **found)
    if "engine" in settings["only"]:
        idle = sharing.memory_bytes(settings, [])
        ours = in_process(engine_main, settings, size)
        memory = (ours.pop("memory") - idle) / 2**30
        add("daskshare engine", statistics.median(ours.pop("rates")), memory_gib=memory, **ours)
    for name in ("compile", "eager"):
        if name in settings["only"]:
            add(f"{name}, hand-written loop", in_process(loop_main, settings, size, name))
    set_bars(report, settings, size, rates, memory)


def set_bars(
    report: Report, settings: dict[str, Any], size: int, rates: dict[str, float], memory: float
) -> None:
    if "engine" not in settings["only"]:
        return
    rate = rates["daskshare engine"]
    for name, bound in (("compile", 1.2), ("eager", 0.9)):
        other = rates.get(f"{name}, hand-written loop")
        if other is not None:
            report.add_bar(f"engine at {size} over {name}", rate / other, "x", bound=bound)
    if settings["gpu"]:
        if size in BOUNDS:
            report.add_bar(f"engine at {size}", rate, "frames/s", bound=BOUNDS[size])
        report.add_bar(f"GPU memory at {size}", memory, "GiB", bound=MEMORY_GIB, comparison="<=")


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--model", help="default: yolov3 on a GPU, yolov3-tiny without")
    parser.add_argument("--sizes", default=None, help="default: 416,608 on a GPU, 416 without")
    parser.add_argument("--precision", default=None, help="default: fp16 on a GPU, fp32 without")
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--request-frames", type=int, default=8)
    parser.add_argument("--batch", type=int, help="largest batch")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each run")
    parser.add_argument("--repeats", type=int, default=3, help="runs, of which the median counts")
    parser.add_argument(
        "--only", help="comma list of: roofline,engine,compile,eager (default: what the device has)"
    )
    arguments = parser.parse_args()
    settings = make_settings(arguments)
    report = Report("engine", settings=settings)
    for size in settings["sizes"]:
        measure(report, settings, size)
    return report.finish(arguments)


def make_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    from daskshare.device import list_devices

    gpu = bool(list_devices())
    model = arguments.model or ("yolov3" if gpu else "yolov3-tiny")
    weights = None if model == "yolov3-tiny" else str(workload.random_weights(model))
    sizes = arguments.sizes or ("416,608" if gpu else "416")
    return {
        "gpu": gpu,
        "model": model,
        "weights": weights,
        "sizes": [int(size) for size in sizes.split(",")],
        "precision": arguments.precision or ("fp16" if gpu else "fp32"),
        "threads": arguments.threads,
        "request_frames": arguments.request_frames,
        "batch": arguments.batch,
        "seconds": arguments.seconds,
        "repeats": arguments.repeats,
        "compile_seconds": 600,
        "only": (arguments.only or ("roofline,engine,compile" if gpu else "engine,eager")).split(
            ","
        ),
    }


if __name__ == "__main__":
    raise SystemExit(main())
