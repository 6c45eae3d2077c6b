"""How long after a process's start the first detection is there, and when full speed is.

A process loads the model, serves one frame, and waits for the compiled forward pass. Cold means
that every cache on disk is empty (kernels, compilers, what was measured), warm that a process
before has filled them. Beside it, a process that loads the same network and calls it eagerly.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from statistics import median
from typing import Any

from benchmarks import workload
from benchmarks.report import Report, argument_parser
from daskshare.device import list_devices

#: Seconds to the first detection that are allowed.
BOUNDS = {"cold": 10, "warm": 5}

_CACHES = {
    "CUDA_CACHE_PATH": "cuda",
    "CUPY_CACHE_DIR": "cupy",
    "DASK_DASKSHARE__MODELS__CACHE_DIRECTORY": "daskshare",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
}


def child(arguments: argparse.Namespace) -> None:
    """Print the seconds since ``arguments.child`` (wall clock) at each step, as JSON."""
    laps: dict[str, float] = {}

    def lap(name: str) -> None:
        laps[name] = time.time() - arguments.child

    lap("interpreter")
    from daskshare.config import EngineOptions
    from daskshare.device import current_device
    from daskshare.engine import InferenceEngine
    from daskshare.models.yolov3 import yolov3_spec

    lap("imports")
    device = current_device()
    spec = yolov3_spec(
        arguments.model,
        weights=arguments.weights,
        input_size=arguments.input_size,
        precision=arguments.precision,
    )
    lap("device")
    frames = workload.host_frames(1, arguments.input_size)
    if arguments.way == "eager":
        model = workload.Eager(spec)
        lap("loaded")
        model(frames)
        lap("first detection")
    else:
        program = spec.load(device)
        lap("loaded")
        engine = InferenceEngine(program, device, options=EngineOptions(), name=spec.name)
        engine.infer(frames)
        lap("first detection")
        if engine.wait_compiled(240):
            lap("full speed")
        engine.close()
    print(json.dumps(laps))


def run(arguments: argparse.Namespace, way: str, folder: str) -> dict[str, float]:
    """Start a process and return its laps."""
    caches = {name: os.path.join(folder, part) for name, part in _CACHES.items()}
    command = [sys.executable, "-m", "benchmarks.startup", "--way", way]
    for name in ("model", "weights", "precision"):
        if getattr(arguments, name) is not None:
            command += [f"--{name}", str(getattr(arguments, name))]
    command += ["--input-size", str(arguments.input_size), "--child", repr(time.time())]
    answer = subprocess.run(
        command, env={**os.environ, **caches}, check=True, stdout=subprocess.PIPE, text=True
    )
    laps: dict[str, float] = json.loads(answer.stdout.splitlines()[-1])
    return laps


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--model", help="default: yolov3 on a GPU, yolov3-tiny without")
    parser.add_argument("--weights")
    parser.add_argument("--precision")
    parser.add_argument("--input-size", type=int, default=416)
    parser.add_argument("--repeat", type=int, default=3, help="warm processes")
    parser.add_argument("--caches", help="empty folder in which daskshare's caches are left")
    parser.add_argument("--way", choices=["daskshare", "eager"], help=argparse.SUPPRESS)
    parser.add_argument("--child", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        child(arguments)
        return 0
    if list_devices():
        arguments.model = arguments.model or "yolov3"
        arguments.precision = arguments.precision or "fp16"
    arguments.model = arguments.model or "yolov3-tiny"
    if arguments.weights is None and arguments.model != "yolov3-tiny":
        arguments.weights = workload.random_weights(arguments.model)
    report = Report("startup", settings={k: str(v) for k, v in vars(arguments).items()})
    for way in ("daskshare", "eager"):
        with contextlib.ExitStack() as stack:
            folder = arguments.caches if way == "daskshare" else None
            folder = folder or stack.enter_context(tempfile.TemporaryDirectory())
            runs: dict[str, list[dict[str, Any]]] = {"cold": [run(arguments, way, folder)]}
            runs["warm"] = [run(arguments, way, folder) for _ in range(arguments.repeat)]
        for kind, laps in runs.items():
            seconds = {name: round(median(lap[name] for lap in laps), 2) for name in laps[0]}
            report.add_row(way=way, caches=kind, **seconds)
            print(way, kind, seconds, file=sys.stderr, flush=True)
            if way == "daskshare":
                report.add_bar(
                    f"first detection, {kind}",
                    seconds["first detection"],
                    "s",
                    bound=BOUNDS[kind],
                    comparison="<=",
                )
    return report.finish(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
