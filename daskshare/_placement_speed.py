"""How fast a device runs a model: measured, or estimated from what was measured elsewhere."""

from __future__ import annotations

import math
from collections import defaultdict

from daskshare._placement_books import Device, Model

__all__ = ["Speeds", "speed_class"]

#: Frames/s of a GPU before anything was measured; only ratios matter then.
DEFAULT_RATE = 500.0
#: A CPU's speed in GPUs while only one of the two kinds was measured.
CPU_IN_GPUS = 0.05
#: Weight of the newest measurement: of a worker's own, and of one task's duration.
SMOOTHING = 0.5
TASK_SMOOTHING = 0.2


def speed_class(rate: float) -> int:
    """Number of the class of about equal speeds (28 % wide)."""
    return round(4.0 * math.log(rate))


class Speeds:
    """Mean frames/s of each model over the devices of a kind, and each device's factor on it."""

    def __init__(self) -> None:
        # By kind (is it a GPU): model key -> [sum of rates, number of devices].
        self._means: dict[bool, dict[str, list[float]]] = {
            kind: defaultdict(lambda: [0.0, 0.0]) for kind in (True, False)
        }

    def report(self, device: Device, model: Model, rate: float) -> None:
        """Take in frames/s that a worker measured with a model while busy."""
        # Without any task of known frames, the frames that are booked are no real ones.
        if model.frames_count:
            device.reported.add(model.key)
            self._measure(device, model.key, rate, SMOOTHING)

    def observe(self, device: Device, model: Model, frames: float, seconds: float) -> bool:
        """Take in how long a task was in flight, divided by how many were; False: not needed."""
        if seconds <= 0 or (model.frames_count and model.key in device.reported):
            return False
        self._measure(device, model.key, frames / seconds, TASK_SMOOTHING)
        return True

    def _measure(self, device: Device, model_key: str, rate: float, smoothing: float) -> None:
        mean = self._means[device.is_gpu][model_key]
        old = device.rates.get(model_key)
        if old is None:
            mean[1] += 1
            new = rate
        else:
            new = old + smoothing * (rate - old)
            mean[0] -= old
        mean[0] += new
        device.rates[model_key] = new

    def forget(self, device: Device) -> None:
        """Leave a device out of the means."""
        for model_key, rate in device.rates.items():
            mean = self._means[device.is_gpu][model_key]
            mean[0] -= rate
            mean[1] -= 1
            if mean[1] < 1:
                del self._means[device.is_gpu][model_key]
        device.rates.clear()
        device.reported.clear()

    def estimate(self, device: Device, model: Model) -> float:
        """Frames/s to expect; above 0."""
        measured = device.rates.get(model.key)
        if measured is not None:
            return measured
        return self._mean(device.is_gpu, model.key) * self._factor(device)

    def _factor(self, device: Device) -> float:
        ratios = [rate / self._mean(device.is_gpu, key) for key, rate in device.rates.items()]
        return sum(ratios) / len(ratios) if ratios else 1.0

    def _mean(self, is_gpu: bool, model_key: str) -> float:
        for kind in (is_gpu, not is_gpu):
            means = self._means[kind]
            scale = 1.0 if kind == is_gpu else (1 / CPU_IN_GPUS if is_gpu else CPU_IN_GPUS)
            if model_key in means:
                total, count = means[model_key]
                return scale * total / count
        for kind in (is_gpu, not is_gpu):
            means = self._means[kind]
            scale = 1.0 if kind == is_gpu else (1 / CPU_IN_GPUS if is_gpu else CPU_IN_GPUS)
            if means:
                return scale * sum(total / count for total, count in means.values()) / len(means)
        return DEFAULT_RATE * (1.0 if is_gpu else CPU_IN_GPUS)
