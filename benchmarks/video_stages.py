"""Where the time goes between compressed video and boxes: each stage alone, then added up.

One process, no Dask. Threads take chunks of a clip's copies from one list and decode them; decode
them and run the model; do that and write part files. Beside the rate, the interpreter's lock: how
long a thread that wants nothing but the lock waits for it, and how much of the time of one core
the process computes.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks import workload
from benchmarks.report import Report, argument_parser
from benchmarks.video import make_clip
from daskshare.device import current_device, list_devices


class LockWatch(workload.Every):
    """Waits for the interpreter's lock again and again, and remembers how long."""

    def __init__(self) -> None:
        super().__init__(0.002, self._ask)
        self.waits_seconds: list[float] = []

    def _ask(self) -> None:
        started = time.perf_counter()
        time.sleep(0)  # gives the lock away and takes it again
        self.waits_seconds.append(time.perf_counter() - started)


def measure(
    report: Report, stage: str, threads: int, items: list[Any], work: Callable[[Any], int]
) -> None:
    """Run ``work`` on all items in so many threads, and add a row."""
    import torch

    torch.cuda.reset_peak_memory_stats()
    with LockWatch() as watch, ThreadPoolExecutor(threads) as pool:
        started, busy = time.perf_counter(), time.process_time()
        frames = sum(pool.map(work, items))
        seconds, busy = time.perf_counter() - started, time.process_time() - busy
    waits = watch.waits_seconds or [0.0]
    row = {
        "stage": stage,
        "threads": threads,
        "frames_per_second": round(frames / seconds, 1),
        "cores": round(busy / seconds, 2),
        "cpu_microseconds_per_frame": round(busy / frames * 1e6, 1),
        "lock_wait_microseconds": round(median(waits) * 1e6, 1),
        "mean_lock_wait_microseconds": round(mean(waits) * 1e6, 1),
        "gpu_mib": round(workload.gpu_used_bytes() / 2**20),
        "torch_peak_mib": round(torch.cuda.max_memory_allocated() / 2**20),
        "torch_peak_reserved_mib": round(torch.cuda.max_memory_reserved() / 2**20),
    }
    report.add_row(**row)
    print(row, flush=True)


def print_memory() -> None:
    """Print who holds the GPU's memory: torch's pools by stream, and all else."""
    import torch

    pools: dict[tuple[Any, int], list[int]] = {}
    for segment in torch.cuda.memory_snapshot():
        sizes = pools.setdefault((segment["segment_pool_id"], segment["stream"]), [0, 0])
        sizes[0] += segment["total_size"]
        sizes[1] += segment["allocated_size"]
    for (pool, stream), (reserved, allocated) in sorted(pools.items(), key=lambda x: -x[1][0]):
        print(
            f"pool {pool} stream {stream:#x}: {reserved / 2**20:.0f} MiB reserved, "
            f"{allocated / 2**20:.0f} in use",
            flush=True,
        )
    rest = workload.gpu_used_bytes() - torch.cuda.memory_reserved()
    print(f"outside of torch's pools: {rest / 2**20:.0f} MiB", flush=True)


def run_stages(report: Report, chunks: list[Any], arguments: argparse.Namespace) -> None:
    """Measure the stages one after the other."""
    import dask
    import torch

    from daskshare.config import EngineOptions, ShareOptions, VideoOptions
    from daskshare.models.yolov3 import yolov3_spec
    from daskshare.results.collect import FrameCollector
    from daskshare.results.parquet import ChunkRecord, PartWriter
    from daskshare.share import ModelShare
    from daskshare.streaming import stream

    device = current_device()
    options = VideoOptions.from_config()
    size = arguments.input_size
    spec = yolov3_spec(
        arguments.model,
        weights=workload.random_weights(arguments.model),
        input_size=size,
        precision="fp16",
    )
    stages = arguments.stages.split(",")
    numbers = [int(number) for number in arguments.threads.split(",")]

    def decode(chunk: Any) -> int:
        with chunk.open_frames(
            device=device, batch_frames=options.frames_per_request, input_size=(size, size)
        ) as frames:
            return sum(len(batch.pts_seconds) for batch in frames)

    if "decode" in stages:
        for threads in numbers:
            measure(report, "decode", threads, chunks, decode)
    share = ModelShare(
        device, options=ShareOptions.from_config(), engine_options=EngineOptions.from_config()
    )
    try:
        with share.lease(spec) as lease, tempfile.TemporaryDirectory() as folder:
            with stream(lease, chunks[0], options=options) as results:
                for _ in results:
                    pass
            lease.engine.wait_compiled(240)
            print("compiled as", lease.engine.stats().compiled_as, flush=True)

            def infer(number: int) -> int:
                frames = torch.zeros(
                    (options.frames_per_request, size, size, 3),
                    dtype=torch.uint8,
                    device=device.torch_device(),
                )
                waiting: list[Any] = []
                for _ in range(arguments.requests):
                    prepared = lease.program.prepare_letterboxed(frames, (1080, 1920))
                    waiting.append((prepared, lease.submit(prepared, task=number)))
                    if len(waiting) == options.requests_in_flight:
                        prepared, future = waiting.pop(0)
                        lease.program.finish(future.result(), prepared.context)
                for prepared, future in waiting:
                    lease.program.finish(future.result(), prepared.context)
                return arguments.requests * len(frames)

            def through(chunk: Any) -> int:
                with stream(lease, chunk, options=options) as results:
                    return sum(len(detections) for _, detections in results)

            def write(chunk: Any) -> int:
                name = f"{Path(chunk.video).stem}-{chunk.index}.parquet"
                frames = 0
                with PartWriter(Path(folder) / name) as part:
                    rows = FrameCollector(chunk.video, part.write)
                    with stream(lease, chunk, options=options) as results:
                        for batch, detections in results:
                            rows.add(batch.first_frame, batch.pts_seconds, detections)
                            frames += len(detections)
                    rows.flush()
                    part.finish(
                        ChunkRecord(
                            video=chunk.video,
                            chunk=chunk.index,
                            first_frame=chunk.first_frame,
                            num_frames=frames,
                            num_detections=part.num_rows,
                            status="ok",
                        )
                    )
                return frames

            for threads in numbers:
                if "infer" in stages:
                    measure(report, "infer", threads, list(range(threads)), infer)
                for sessions in map(int, arguments.sessions.split(",")):
                    with dask.config.set({"daskshare.video.decoder-sessions": sessions or None}):
                        suffix = f", {sessions} sessions" if sessions else ""
                        if "stream" in stages:
                            measure(report, f"decode, infer{suffix}", threads, chunks, through)
                        if "write" in stages:
                            measure(report, f"decode, infer, write{suffix}", threads, chunks, write)
            print_memory()
            print("graphs", lease.engine.stats().graphs, lease.engine.stats().graph_error)
    finally:
        share.close()


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--model", default="yolov3")
    parser.add_argument("--input-size", type=int, default=416)
    parser.add_argument("--case", default="h264-1080p")
    parser.add_argument("--copies", type=int, default=16)
    parser.add_argument("--frames", type=int, default=1500, help="of the clip")
    parser.add_argument("--threads", default="8,16")
    parser.add_argument("--sessions", default="0", help="decoder sessions; 0: as configured")
    parser.add_argument("--requests", type=int, default=100, help="of each thread that only infers")
    parser.add_argument("--stages", default="decode,infer,stream,write")
    arguments = parser.parse_args()
    if not list_devices():
        parser.exit(0, "benchmarks.video_stages needs an NVIDIA GPU; nothing was measured.\n")
    from daskshare.video.probe import probe_videos

    report = Report("video_stages", settings={k: str(v) for k, v in vars(arguments).items()})
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        first = scratch / "clip-00.mp4"
        make_clip(first, *arguments.case.split("-"), arguments.frames)
        paths = [str(first)] + [
            str(shutil.copy(first, scratch / f"clip-{number:02}.mp4"))
            for number in range(1, arguments.copies)
        ]
        run_stages(report, probe_videos(paths), arguments)
    return report.finish(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
