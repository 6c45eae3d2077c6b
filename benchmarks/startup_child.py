"""The process that benchmarks.startup times; it imports only what such a process needs."""

from __future__ import annotations

import json
import time
from typing import Any

__all__ = ["first_detection"]


def first_detection(way: str, started: float, model: str, options: dict[str, Any]) -> None:
    """Print the seconds since ``started`` (wall clock) at each step, as JSON.

    Parameters
    ----------
    way : {"daskshare", "eager"}
    started : float
        When the process was started, seconds since the epoch.
    model : str
        Of the YOLO-v3 family.
    options : dict
        For :func:`daskshare.models.yolov3.yolov3_spec`; with ``input_size``.
    """
    laps: dict[str, float] = {}

    def lap(name: str) -> None:
        laps[name] = time.time() - started

    lap("interpreter")
    import numpy as np

    from daskshare.device import current_device
    from daskshare.models.yolov3 import yolov3_spec

    spec = yolov3_spec(model, **options)
    lap("model described")
    device = current_device()
    lap("device")
    size = options["input_size"]
    frames = np.random.default_rng(0).integers(0, 256, (1, size, size, 3), np.uint8)
    if way == "eager":
        from benchmarks.workload import Eager

        program = Eager(spec)
        lap("loaded")
        program(frames)
        lap("first detection")
    else:
        loaded = spec.load(device)
        lap("loaded")
        from daskshare.config import EngineOptions
        from daskshare.engine import InferenceEngine

        engine = InferenceEngine(loaded, device, options=EngineOptions(), name=spec.name)
        engine.infer(frames)
        lap("first detection")
        if engine.wait_compiled(240):
            lap("full speed")
        engine.close()
    print(json.dumps(laps))
