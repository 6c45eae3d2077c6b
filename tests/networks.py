"""Small networks with random weights, made for tests."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from daskshare.models.darknet import parse_cfg
from daskshare.models.plan import NetworkPlan

#: Two classes, not square, every kind of layer; stride 8.
SMALL_CFG = """
[net]
width=64
height=48
channels=3

[convolutional]
batch_normalize=1
filters=8
size=3
stride=2
pad=1
activation=leaky

[convolutional]
batch_normalize=1
filters=8
size=1
stride=1
pad=1
activation=leaky

[shortcut]
from=-2
activation=linear

[maxpool]
size=2
stride=2

[convolutional]
filters=16
size=3
stride=1
pad=1
groups=2
activation=relu

[maxpool]
size=2
stride=1

[maxpool]
size=5
stride=1

[maxpool]
size=3
stride=2

[route]
layers=-1
groups=2
group_id=1

[convolutional]
filters=21
size=1
stride=1
pad=1
activation=linear

[yolo]
mask=1,2,0
anchors=8,8, 12,20, 30,24
classes=2

[route]
layers=-3

[upsample]
stride=2

[route]
layers=-1, 5

[convolutional]
filters=14
size=1
stride=1
pad=1
activation=linear

[yolo]
mask=0,1
anchors=8,8, 12,20, 30,24
classes=2
scale_x_y=1.1
"""


def small_plan(cfg: str = SMALL_CFG) -> NetworkPlan:
    return parse_cfg(cfg, path="small.cfg")


def random_floats(plan: NetworkPlan, *, seed: int = 0) -> np.ndarray:
    """Numbers of a Darknet file, in its order: lively outputs, variances above zero."""
    rng = np.random.default_rng(seed)
    parts = []
    for layer in plan.convolutions:
        n = layer.channels
        parts.append(rng.normal(0, 0.5, n))
        if layer.batch_normalize:
            parts += [rng.uniform(0.5, 2, n), rng.normal(0, 0.2, n), rng.uniform(0.2, 2, n)]
        fan_in = np.prod(layer.weight_shape[1:])
        # Heads stay small: saturated sigmoids would tie, and the order of ties is not defined.
        spread = (1.5 if layer.batch_normalize else 0.5) / np.sqrt(fan_in)
        parts.append(rng.normal(0, spread, np.prod(layer.weight_shape)))
    return np.concatenate(parts).astype("<f4")


def write_darknet(
    path: Path, floats: np.ndarray, *, version: tuple[int, int, int] = (0, 2, 5), seen: int = 32_013
) -> Path:
    """Write a Darknet weights file with the header of the given version."""
    long_count = version[0] * 10 + version[1] >= 2
    header = struct.pack("<3i", *version) + struct.pack("<q" if long_count else "<i", seen)
    path.write_bytes(header + floats.tobytes())
    return path
