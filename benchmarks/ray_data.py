"""The job of ``daskshare.detect`` written for Ray Data, beside it in one run.

Copies of a clip become Parquet of detections in two ways, each in a driver of its own. ``CPU
decode`` decodes with PyAV in tasks on all cores, letterboxes there, and hands blocks of small
frames to a GPU actor. ``NVDEC in actors`` decodes on the GPU in a few actors that have a copy of
the model each. Their network is daskshare's, as a user of torch would run it: ``torch.compile``
instead of the fused kernels, a CUDA graph, suppression on the GPU.

Ray is given its best figure: frames by the seconds from the last actor being ready, compiled, to
the end of ``write_parquet``. Ray Data is told to wait for its actors, so nothing is decoded before.
The whole call includes their start; a run on two files came before, so compiled code is cached.
Every driver has ``--timeout`` seconds for both.

Needs ``pip install "ray[data]==2.60.0"``. Without a GPU, a small run of ``CPU decode`` shows that
all works; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.ray_pipeline import run_pipeline
from benchmarks.report import Report, argument_parser
from benchmarks.video import make_clip, measure_daskshare
from daskshare.device import list_devices

GIB = 2**30


def object_store_bytes() -> int:
    """Ray's usual 30 % of the memory, but no more than the shared memory there is."""
    from distributed.system import MEMORY_LIMIT

    shared = int(0.9 * shutil.disk_usage("/dev/shm").free)
    wanted = int(0.3 * MEMORY_LIMIT)
    # Below that, Ray's own way out (a file in its folder) is the better one.
    return min(wanted, shared) if shared > 2 * GIB else wanted


def driver_main(settings: dict[str, Any]) -> None:
    """Measure one way in this process, which Ray takes over; writes a JSON file."""
    import pyarrow.dataset
    import ray
    from dask.system import CPU_COUNT

    scratch = Path(settings["scratch"])
    # Ray's sockets have long names, and paths of sockets must be short.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        ray.init(
            num_cpus=CPU_COUNT,
            num_gpus=int(settings["gpu"]),
            object_store_memory=object_store_bytes(),
            include_dashboard=False,
            logging_level="warning",
            _node_ip_address="127.0.0.1",
            _temp_dir=folder,
        )
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        # Otherwise files are decoded ahead while the actors compile, which would flatter Ray.
        context.wait_for_min_actors_s = 400
        if settings["gpu"]:
            run_pipeline(settings["way"], settings, settings["paths"][:2], scratch / "warm")
        output = scratch / "out"
        started = time.time()
        run_pipeline(settings["way"], settings, settings["paths"], output)
        stopped = time.time()
        ray.shutdown()
    logs = output.with_suffix(".logs").glob("*.log")
    said = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    ready = max(words["ready"] for words in said if "ready" in words)
    frames = int(sum(words.get("frames", 0) for words in said))
    measured = {
        "frames": frames,
        "frames_per_second": frames / (stopped - ready),
        "whole_call_per_second": frames / (stopped - started),
        "actors_start_seconds": ready - started,
        "detections": pyarrow.dataset.dataset(output, format="parquet").count_rows(),
    }
    (scratch / "measured.json").write_text(json.dumps(measured))


def measure_ray(way: str, actors: int, paths: list[str], settings: dict[str, Any]) -> Any:
    """Run a driver; what it measured, or None when it failed."""
    root = str(Path(__file__).parents[1])
    environment = {
        **os.environ,
        # Ray's workers take it over; without the token Ray would write one to the user's home.
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    with tempfile.TemporaryDirectory() as scratch:
        own = {**settings, "way": way, "actors": actors, "paths": paths, "scratch": scratch}
        command = [sys.executable, "-m", "benchmarks.ray_data", "--driver", json.dumps(own)]
        try:
            subprocess.run(
                command, env=environment, stdout=sys.stderr, timeout=settings["timeout"], check=True
            )
        except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
            print(f"Ray Data, {way}, {actors} actors: {type(error).__name__}", file=sys.stderr)
            return None
        return json.loads((Path(scratch) / "measured.json").read_text())


# --- the benchmark --------------------------------------------------------------------------------


def measure_daskshare_on_cpu(paths: list[str], scratch: Path, model: str) -> dict[str, Any]:
    """As ``measure_daskshare``, of the small run without a GPU."""
    from distributed import Client

    import daskshare

    cluster = daskshare.local_cluster(dashboard_address=":0")
    with cluster, Client(cluster) as client:
        shared = daskshare.yolov3(model)
        started = time.perf_counter()
        summary = daskshare.detect(paths, shared, scratch / "out", client=client, progress=False)
        seconds = time.perf_counter() - started
    return {
        "frames_per_second": summary.frames_per_second,
        "whole_call_per_second": summary.frames / seconds,
        "detections": summary.num_detections,
    }


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--copies", type=int, help="of the clip; default 48, or 2 without a GPU")
    parser.add_argument("--frames", type=int, help="of the clip; default 1500, or 250")
    parser.add_argument("--batch-size", type=int, default=64, help="of Ray's actors")
    parser.add_argument("--cpu-actors", default="1", help="that detect after CPU decode: 1,2")
    parser.add_argument("--nvdec-actors", default="4,8", help="that decode and detect")
    parser.add_argument("--threads", type=int, default=16, help="task threads of daskshare")
    parser.add_argument("--repeat", type=int, default=3, help="runs of daskshare")
    parser.add_argument("--timeout", type=float, default=240, help="seconds for a Ray driver")
    parser.add_argument("--driver", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.driver:
        driver_main(json.loads(arguments.driver))
        return 0
    if importlib.util.find_spec("ray") is None:
        parser.exit(0, 'benchmarks.ray_data needs: pip install "ray[data]==2.60.0"\n')
    import av

    gpu = bool(list_devices())
    arguments.model = "yolov3" if gpu else "yolov3-tiny"
    arguments.copies = arguments.copies or (48 if gpu else 2)
    arguments.frames = arguments.frames or (1500 if gpu else 250)
    report = Report("ray_data", settings={k: str(v) for k, v in vars(arguments).items()})
    ways = [("CPU decode", int(actors)) for actors in arguments.cpu_actors.split(",")]
    if gpu:
        ways += [("NVDEC in actors", int(actors)) for actors in arguments.nvdec_actors.split(",")]
    settings = {
        "gpu": gpu,
        "model": arguments.model,
        "batch_size": arguments.batch_size,
        "timeout": arguments.timeout,
    }
    best: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        first = scratch / "clip-00.mp4"
        make_clip(first, "h264", "1080p" if gpu else "720p", arguments.frames)
        paths = [str(first)] + [
            str(shutil.copy(first, scratch / f"clip-{number:02}.mp4"))
            for number in range(1, arguments.copies)
        ]
        with av.open(str(first)) as container:
            frames = arguments.copies * container.streams.video[0].frames
        for way, actors in ways:
            measured = measure_ray(way, actors, paths, settings)
            if measured is not None:
                if measured["frames"] != frames:
                    print(f"{way}: {measured['frames']} of {frames} frames", file=sys.stderr)
                best[way] = max(best.get(way, 0.0), measured["frames_per_second"])
                report.add_row(way=f"Ray Data, {way}", actors=actors, **measured)
        if gpu:
            ours = measure_daskshare(paths, scratch, arguments)
        else:
            ours = measure_daskshare_on_cpu(paths, scratch, arguments.model)
    report.add_row(
        way="daskshare.detect",
        frames=frames,
        frames_per_second=ours["frames_per_second"],
        whole_call_per_second=ours["whole_call_per_second"],
        detections=ours["detections"],
    )
    if gpu:
        for way in dict(ways):
            ratio = ours["frames_per_second"] / best[way] if way in best else None
            report.add_bar(f"daskshare.detect against Ray Data, {way}", ratio, "x", bound=3)
    return report.finish(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
