"""How near one engine comes to what the GPU can do: tasks' threads, one model, no Dask.

Threads hand over a few host frames at a time. Beside it, measured in the same run: the network by
``torch.compile`` in a hand-written loop, and the roofline: for every convolution the larger of its
operations at the rate of a large matrix product and its bytes at the rate of a large copy.
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
    from daskshare.config import EngineOptions
    from daskshare.device import current_device
    from daskshare.engine import InferenceEngine

    device = current_device()
    spec = sharing.make_spec({**settings, "input_size": size}, settings["precision"])
    options = EngineOptions(max_batch_size=settings["batch"])
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


def loop_main(settings: dict[str, Any], size: int, replies: Any) -> None:
    """``torch.compile`` and eager, a hand-written loop with copies in and out beside the work."""
    import torch

    from daskshare.device import current_device
    from daskshare.models.network import compile_network

    device = current_device()
    program = sharing.make_spec({**settings, "input_size": size}, settings["precision"]).load(
        device
    )
    batch = settings["batch"] or program.max_batch_size
    source = torch.from_numpy(workload.host_frames(batch, size))
    result: dict[str, Any] = {}
    with torch.inference_mode():
        if not settings["gpu"]:
            result["eager"] = cpu_loop(program.forward, source, settings)
        else:
            network, target = program._network, device.torch_device()
            compiled = compile_network(network)

            def forward(frames: Any) -> Any:
                return program._suppress(*compiled(frames))

            pinned = source.pin_memory()
            for name, run in (("torch.compile", forward), ("eager", program.forward)):
                rates = sharing.cuda_loop(torch, run, pinned, target, settings["seconds"])
                result[name] = statistics.median(rates)
            del compiled
            torch.cuda.empty_cache()
            copy, product = ceilings(torch)
            limit = roofline_seconds(network.plan, copy, product)
            result["roofline"] = 1 / limit
            result["copy_terabytes_per_second"] = copy / 1e12
            result["product_teraflops"] = product / 1e12
            result["device"] = torch.cuda.get_device_name(target)
    replies.put(result)


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
    idle = sharing.memory_bytes(settings, [])
    ours = in_process(engine_main, settings, size)
    # Again, now that choices lie on disk: the first process may have measured them.
    if settings["gpu"]:
        again = in_process(engine_main, {**settings, "repeats": 0, "seconds": 0.5}, size)
        ours["ready_again_seconds"] = again["ready_seconds"]
    others = in_process(loop_main, settings, size)
    rate = statistics.median(ours.pop("rates"))
    memory = (ours.pop("memory") - idle) / 2**30
    limit = others.pop("roofline", None)
    rates = {"daskshare engine": rate}
    rates |= {
        f"{name}, hand-written loop": others.pop(name)
        for name in ("torch.compile", "eager")
        if name in others
    }
    if limit is not None:
        rates["roofline, layer by layer"] = limit
    details = {
        "daskshare engine": {"memory_gib": memory, **ours},
        "roofline, layer by layer": others,
    }
    for way, value in rates.items():
        row = {"frames_per_second": value}
        if limit is not None:
            row["of_roofline"] = value / limit
        row |= details.get(way, {})
        rounded = {k: v if isinstance(v, str) else round(float(v), 3) for k, v in row.items()}
        report.add_row(input_size=size, way=way, **rounded)
    for entry in report.rows[-4:]:
        print(entry, file=sys.stderr)
    if not settings["gpu"]:
        loop = rates["eager, hand-written loop"]
        report.add_bar(f"engine at {size} over a loop", rate / loop, "x", bound=0.9)
        return
    if size in BOUNDS:
        report.add_bar(f"engine at {size}", rate, "frames/s", bound=BOUNDS[size])
    compiled = rates["torch.compile, hand-written loop"]
    report.add_bar(f"engine at {size} over torch.compile", rate / compiled, "x", bound=1.2)
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
    }


if __name__ == "__main__":
    raise SystemExit(main())
