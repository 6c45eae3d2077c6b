"""``daskshare detect`` on the traffic clip beside a hand-written loop that does the same job.

Both are whole commands, start-up included: read the clip, find objects with the packaged
yolov3-tiny, write Parquet. The loop is what a careful user would write for one file: decode a
batch, run the model, append rows. Runs alternate, so that a busy moment of the machine hits both.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.report import Report, argument_parser


def loop(video: str, output: str) -> None:
    """The hand-written job: one process, one thread of ours, one file."""
    import av
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch

    from daskshare.device import current_device
    from daskshare.models.yolov3 import yolov3_spec

    device = current_device()
    program = yolov3_spec("yolov3-tiny").load(device)
    started = time.perf_counter()
    columns: dict[str, list[Any]] = {
        name: [] for name in ("frame", "class_id", "confidence", "box")
    }
    first, frames = 0, []

    def infer() -> None:
        nonlocal first
        with torch.inference_mode():
            prepared = program.prepare(np.stack(frames))
            outputs = program.forward(torch.as_tensor(prepared.items, device=device.torch_device()))
        from benchmarks.workload import to_host

        for offset, found in enumerate(program.finish(to_host(outputs), prepared.context)):
            columns["frame"] += [first + offset] * len(found)
            columns["class_id"] += found.class_id.tolist()
            columns["confidence"] += found.confidence.tolist()
            columns["box"] += found.xyxy.tolist()
        first += len(frames)
        frames.clear()

    with av.open(video) as container:
        container.streams.video[0].thread_type = "AUTO"
        for frame in container.decode(video=0):
            frames.append(frame.to_ndarray(format="rgb24"))
            if len(frames) == program.max_batch_size:
                infer()
    if frames:
        infer()
    pq.write_table(pa.table(columns), output)
    job_seconds = time.perf_counter() - started
    print(json.dumps({"frames": first, "detections": len(columns["frame"]), "job": job_seconds}))


def timed(command: list[str]) -> tuple[float, str]:
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} gave {done.returncode}:\n{done.stderr}")
    return seconds, done.stdout


def run_daskshare(video: str, folder: Path) -> dict[str, Any]:
    import pyarrow.parquet as pq

    seconds, _ = timed(
        [
            *(sys.executable, "-m", "daskshare", "detect", video, "--output", str(folder)),
            *("--model", "yolov3-tiny", "--no-progress"),
        ]
    )
    chunks = pq.read_table(folder / "chunks.parquet")
    return {
        "seconds": seconds,
        "frames": sum(chunks["num_frames"].to_pylist()),
        "detections": sum(chunks["num_detections"].to_pylist()),
    }


def run_loop(video: str, folder: Path) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.clip",
        "--loop",
        video,
        str(folder / "loop.parquet"),
    ]
    seconds, printed = timed(command)
    return {"seconds": seconds, **json.loads(printed.splitlines()[-1])}


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--loop", nargs=2, metavar=("VIDEO", "OUT"), help="run the loop alone")
    parser.add_argument("--video", help="default: the demo's clip")
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.loop:
        loop(*arguments.loop)
        return 0
    from daskshare.demo import demo_clip

    video = arguments.video or str(demo_clip())
    report = Report("clip", settings={"video": Path(video).name, "repeat": arguments.repeat})
    ways = {"hand-written loop": run_loop, "daskshare detect": run_daskshare}
    results: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as scratch:
        for index in range(arguments.repeat):
            for way, run in ways.items():
                folder = Path(scratch, way.replace(" ", "-"), str(index))
                folder.mkdir(parents=True)
                results[way].append(run(video, folder))
                print(way, results[way][-1], file=sys.stderr)
    rates = {}
    for way, runs in results.items():
        seconds = statistics.median(run["seconds"] for run in runs)
        rates[way] = runs[0]["frames"] / seconds
        report.add_row(
            way=way,
            seconds=round(seconds, 3),
            frames_per_second=round(rates[way], 2),
            frames=runs[0]["frames"],
            detections=runs[0]["detections"],
        )
    ratio = rates["daskshare detect"] / rates["hand-written loop"]
    report.add_bar("of the hand-written loop, whole commands", ratio, "x", bound=0.90)
    return report.finish(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
