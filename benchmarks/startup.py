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


def run(arguments: argparse.Namespace, way: str, folder: str) -> dict[str, float]:
    """Start a process and return its laps."""
    caches = {name: os.path.join(folder, part) for name, part in _CACHES.items()}
    options: dict[str, Any] = {"input_size": arguments.input_size}
    for name in ("weights", "precision"):
        if getattr(arguments, name) is not None:
            options[name] = str(getattr(arguments, name))
    values = (way, time.time(), arguments.model, options)
    program = f"from benchmarks.startup_child import first_detection as f; f(*{values!r})"
    command = [sys.executable, "-c", program]
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
    arguments = parser.parse_args()
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
