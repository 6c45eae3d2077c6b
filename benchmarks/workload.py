"""What several benchmarks run: a YOLO-v3 that needs no download, frames, and memory readings."""

from __future__ import annotations

import importlib.resources
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
import psutil

__all__ = [
    "Every",
    "deviceless_pss_bytes",
    "gpu_used_bytes",
    "host_frames",
    "random_weights",
    "rate",
]


#: Of the last convolutions: a frame of traffic then has some five boxes above the threshold.
_OBJECTNESS_BIAS = -7.0


def random_weights(network: str, folder: Path | None = None, *, seed: int = 0) -> Path:
    """Write a Darknet weights file with random values that keep activations in a sane range.

    Speed does not depend on the values, but the number of candidates does: the objectness biases
    are low, so that a frame has a handful of detections, as in traffic.

    Parameters
    ----------
    network : str
        ``"yolov3"``, ``"yolov3-spp"`` or ``"yolov3-tiny"``.
    folder : Path, optional
        Where to; a folder of the machine's temporary ones by default.
    seed : int
        Of the generator.

    Returns
    -------
    Path
        The file.
    """
    from daskshare.models.plan import Shortcut

    folder = folder or Path(tempfile.gettempdir())
    path = folder / f"{network}-random-{seed}-bias{_OBJECTNESS_BIAS:g}.weights"
    if path.exists():
        return path
    random = np.random.default_rng(seed)
    partial = path.with_suffix(f".{os.getpid()}.part")
    with partial.open("wb") as out:
        np.array([0, 2, 0], np.int32).tofile(out)
        np.array([0], np.int64).tofile(out)
        plan = plan_of(network)
        shortcuts = {layer.index for layer in plan.layers if isinstance(layer, Shortcut)}
        for layer in plan.convolutions:
            bias = np.zeros(layer.channels, np.float32)
            if layer.batch_normalize:
                bias.tofile(out)
                np.ones(layer.channels, np.float32).tofile(out)  # scale
                np.zeros(layer.channels, np.float32).tofile(out)  # rolling mean
                np.ones(layer.channels, np.float32).tofile(out)  # rolling variance
            else:
                bias.reshape(3, -1)[:, 4] = _OBJECTNESS_BIAS
                bias.tofile(out)
            fan_in = int(np.prod(layer.weight_shape[1:]))
            # Each branch of a residual adds little, or activations would grow without bound.
            gain = np.float32(np.sqrt((0.05 if layer.index + 1 in shortcuts else 2.0) / fan_in))
            (random.standard_normal(layer.weight_shape, np.float32) * gain).tofile(out)
    partial.replace(path)
    return path


def plan_of(network: str) -> Any:
    """Layers of a packaged network."""
    from daskshare.models.darknet import parse_cfg

    name = f"{network}.cfg"
    text = importlib.resources.files("daskshare").joinpath("data", name).read_text("utf-8")
    return parse_cfg(text, path=name)


def host_frames(num_frames: int, size: int, *, seed: int = 0) -> np.ndarray:
    """Random frames, uint8 (n, size, size, 3), in ordinary host memory."""
    return np.random.default_rng(seed).integers(0, 256, (num_frames, size, size, 3), np.uint8)


def gpu_used_bytes() -> int:
    """Bytes in use on the first GPU by every process, contexts included, as the driver says."""
    import pynvml

    pynvml.nvmlInit()
    try:
        return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).used)
    finally:
        pynvml.nvmlShutdown()


def deviceless_pss_bytes(pids: list[int]) -> int:
    """Resident bytes of processes, pages that they share counted once between them."""
    return sum(int(psutil.Process(pid).memory_full_info().pss) for pid in pids)


def rate(results: list[tuple[int, float, float]]) -> float:
    """Frames a second over all of ``(frames, started_seconds, stopped_seconds)``."""
    started = min(start for _, start, _ in results)
    stopped = max(stop for _, _, stop in results)
    return sum(frames for frames, _, _ in results) / (stopped - started)


class Eager:
    """The network as a careful user would call it without daskshare: eager, batch by batch."""

    def __init__(self, spec: Any) -> None:
        import torch

        from daskshare.device import current_device

        self.device = current_device()
        self.program = spec.load(self.device)
        self.torch_device = self.device.torch_device()
        self.torch = torch

    def __call__(self, frames: np.ndarray) -> Any:
        torch = self.torch
        with torch.inference_mode():
            prepared = self.program.prepare(frames)
            batch = torch.from_numpy(np.ascontiguousarray(prepared.items)).to(self.torch_device)
            outputs = to_host(self.program.forward(batch))
        return self.program.finish(outputs, prepared.context)


def to_host(outputs: Any) -> Any:
    """Copy a structure of tensors into host arrays."""
    if isinstance(outputs, dict):
        return {name: to_host(value) for name, value in outputs.items()}
    if isinstance(outputs, tuple | list):
        return type(outputs)(to_host(value) for value in outputs)
    return outputs.cpu().numpy()


class Every:
    """Does some work again and again, in a thread of its own, while a ``with`` block runs.

    Parameters
    ----------
    seconds : float
        From the end of one time to the next; the first waits as long.
    work : callable
        Without arguments. What it raises ends the thread, and is raised at the block's end.
    """

    def __init__(self, seconds: float, work: Callable[[], None]) -> None:
        self._seconds = seconds
        self._work = work
        self._error: Exception | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            while not self._stop.wait(self._seconds):
                self._work()
        except Exception as error:
            self._error = error

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._error is not None and kind is None:
            raise self._error


def run_for(
    call: Any, frames: np.ndarray, seconds: float, barrier: threading.Barrier | None = None
) -> tuple[int, float, float]:
    """Call ``call(frames)`` until ``seconds`` have passed; frames done, start and stop times."""
    if barrier is not None:
        barrier.wait()
    started = time.time()  # wall clock: comparable between processes
    done = 0
    while time.time() - started < seconds:
        call(frames)
        done += len(frames)
    return done, started, time.time()
