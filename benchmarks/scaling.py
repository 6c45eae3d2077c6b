"""How frames a second grow with the GPUs of one host, and what the host pays for it.

For 1, 2, 4, 8, ... GPUs (as many as there are) a LocalCUDACluster runs two jobs: tasks that hand
over frames from host memory (the engine alone; the median of several turns), and
``daskshare.detect`` on copies of a 1080p clip. Efficiency is the rate over that of one GPU times
the number of GPUs. Without GPUs it runs on CPU workers, which divide the cores between them: that
tries the program, and says nothing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from benchmarks import workload
from benchmarks.report import Report, argument_parser
from benchmarks.sharing import task, wait_ready
from benchmarks.video import make_clip


def cluster_of(count: int, arguments: argparse.Namespace) -> Any:
    """A cluster of ``count`` workers, one a GPU."""
    import daskshare

    if arguments.device == "cpu":
        return daskshare.local_cluster(
            device="cpu", n_workers=count, threads_per_worker=4, dashboard_address=":0"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    devices = visible.split(",") if visible else list(range(count))
    return daskshare.local_cluster(
        CUDA_VISIBLE_DEVICES=devices[:count],
        threads_per_worker=arguments.threads,
        dashboard_address=":0",
    )


class Load:
    """Host CPU and scheduler time over a ``with`` block; cores."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self.host_cores = self.scheduler_cores = 0.0

    def _scheduler_seconds(self) -> float:
        return float(self._client.run_on_scheduler(time.process_time))

    def __enter__(self) -> Load:
        psutil.cpu_percent()
        self._started = time.perf_counter()
        self._scheduler = self._scheduler_seconds()
        return self

    def __exit__(self, *exc_info: object) -> None:
        seconds = time.perf_counter() - self._started
        self.host_cores = psutil.cpu_percent() / 100 * (psutil.cpu_count() or 1)
        self.scheduler_cores = (self._scheduler_seconds() - self._scheduler) / seconds


def engine_rate(
    client: Any, model: Any, arguments: argparse.Namespace
) -> tuple[float, dict[str, float]]:
    """Frames a second of tasks that hand over host frames, as many on each worker as threads."""
    settings = {"request_frames": 8, "input_size": arguments.input_size}
    rates = []
    for _ in range(arguments.repeat):
        tasks = [
            client.submit(
                task, model, place, settings, arguments.seconds, workers=[address], pure=False
            )
            for address, threads in client.nthreads().items()
            for place in range(threads)
        ]
        rates.append(workload.rate(client.gather(tasks)))
        print(f"engine: {rates[-1]:.0f} frames/s", file=sys.stderr, flush=True)
    return median(rates), {}


def video_rate(
    client: Any, model: Any, paths: list[str], scratch: Path
) -> tuple[float, dict[str, float]]:
    """Frames a second of ``daskshare.detect`` over the files, and from the first task to the last.

    The whole call also reads the files' indexes and writes the table of chunks.
    """
    import daskshare

    started = time.perf_counter()
    summary = daskshare.detect(paths, model, scratch, client=client, progress=False)
    if summary.failed:
        raise RuntimeError(f"{len(summary.failed)} chunks failed: {summary.failed[0]}")
    rate = summary.frames / (time.perf_counter() - started)
    return rate, {"task_frames_per_second": round(summary.frames_per_second, 1)}


def measure(
    report: Report, count: int, clip: Path, scratch: Path, arguments: argparse.Namespace
) -> dict[str, float]:
    """Both jobs on ``count`` workers; returns their rates."""
    from distributed import Client

    import daskshare

    weights = None
    if arguments.model != "yolov3-tiny":
        weights = workload.random_weights(arguments.model)
    copies = [
        str(shutil.copy(clip, scratch / f"clip-{count}-{number:03}.mp4"))
        for number in range(arguments.copies * count)
    ]
    rates = {}
    with cluster_of(count, arguments) as cluster, Client(cluster) as client:
        daskshare.install(client)
        client.wait_for_workers(count)
        model = daskshare.yolov3(arguments.model, weights=weights, input_size=arguments.input_size)
        workers = list(client.nthreads())
        # Each worker loads its one copy and compiles it before anything is timed.
        ready = [client.submit(wait_ready, model, 300, workers=[w], pure=False) for w in workers]
        client.gather(ready)
        jobs = {
            "engine, frames from host memory": lambda: engine_rate(client, model, arguments),
            "detect, 1080p H.264": lambda: video_rate(
                client, model, copies, scratch / f"out-{count}"
            ),
        }
        for way, job in jobs.items():
            with Load(client) as load:
                rates[way], further = job()
            stats = daskshare.stats(client)
            copies_of_model = sum(
                entry["model_bytes"] > 0 for w in stats.values() for entry in w["models"].values()
            )
            report.add_row(
                way=way,
                gpus=count,
                frames_per_second=round(rates[way], 1),
                **further,
                copies=copies_of_model,
                devices=len({w["device"]["uuid"] for w in stats.values()}),
                host_cores=round(load.host_cores, 2),
                scheduler_cores=round(load.scheduler_cores, 3),
            )
            print(f"{count} x {way}: {rates[way]:.0f} frames/s", file=sys.stderr)
    for path in copies:
        Path(path).unlink()
    return rates


def plot(report: Report, path: Path) -> None:
    """Rates over the number of GPUs, beside straight lines through the first."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for way in dict.fromkeys(row["way"] for row in report.rows):
        rows = [row for row in report.rows if row["way"] == way]
        counts = [row["gpus"] for row in rows]
        (line,) = axes.plot(counts, [row["frames_per_second"] for row in rows], "o-", label=way)
        first = rows[0]["frames_per_second"] / rows[0]["gpus"]
        axes.plot(counts, [first * count for count in counts], "--", color=line.get_color(), lw=1)
    axes.set(xlabel="GPUs", ylabel="frames/s", ylim=(0, None))
    axes.set_xticks(sorted({row["gpus"] for row in report.rows}))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--counts", default="1,2,4,8", help="of GPUs; those there are")
    parser.add_argument("--model", help="default: yolov3 on GPUs, yolov3-tiny without")
    parser.add_argument("--input-size", type=int, default=416)
    parser.add_argument("--threads", type=int, default=16, help="task threads of a worker")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--repeat", type=int, default=3, help="turns of the engine's job")
    parser.add_argument("--copies", type=int, default=24, help="of the clip, for each GPU")
    parser.add_argument("--frames", type=int, default=1500, help="of the clip")
    parser.add_argument("--device", choices=["auto", "cpu"], default="auto")
    parser.add_argument("--plot", type=Path, metavar="PNG")
    arguments = parser.parse_args()
    from daskshare.cluster import count_gpus

    gpus = count_gpus()
    if not gpus:
        arguments.device = "cpu"
        arguments.copies, arguments.frames = 1, min(arguments.frames, 50)
    arguments.model = arguments.model or ("yolov3" if gpus else "yolov3-tiny")
    counts = [int(count) for count in arguments.counts.split(",")]
    counts = [count for count in counts if count <= (gpus or 2)]
    report = Report("scaling", settings={k: str(v) for k, v in vars(arguments).items()})
    rates = {}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        clip = scratch / "clip.mp4"
        make_clip(clip, "h264", "1080p" if gpus else "720p", arguments.frames)
        for count in counts:
            rates[count] = measure(report, count, clip, scratch, arguments)
    least, most = min(counts), max(counts)
    for row in report.rows:
        first = rates[least][row["way"]] / least
        row["efficiency"] = round(row["frames_per_second"] / row["gpus"] / first, 3)
    if gpus and most > least:
        for way, bound in zip(rates[most], (0.95, 0.90), strict=True):
            value = rates[most][way] / most / (rates[least][way] / least)
            report.add_bar(f"efficiency to {most} GPUs: {way}", value, "x", bound=bound)
    if arguments.plot:
        plot(report, arguments.plot)
    return report.finish(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
