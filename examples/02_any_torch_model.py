"""Any torch model through the same door: a small classifier shared by all tasks of a cluster.

    python examples/02_any_torch_model.py

Trains a network to tell circles, squares and crosses apart (a few seconds on two CPU cores), saves
its weights, and lets the tasks of a Dask cluster classify 4,000 pictures with one copy of it on
each worker. Needs nothing but daskshare.
"""

import functools
import hashlib
import tempfile
from pathlib import Path

import dask.array as da
import numpy as np
import torch
from distributed import Client
from torch import nn

import daskshare
from daskshare.testing import check_loader

NAMES = ("circle", "square", "cross")
SIZE = 32


def draw(count, seed):
    """Return noisy pictures, uint8 (count, 32, 32), and what they show, (count,)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIZE, :SIZE]
    labels = rng.integers(len(NAMES), size=count)
    pictures = rng.integers(0, 90, (count, SIZE, SIZE), dtype=np.uint8)
    for picture, label in zip(pictures, labels, strict=True):
        dx, dy = x - rng.integers(10, 22), y - rng.integers(10, 22)
        radius = rng.integers(5, 10)
        shapes = (
            np.hypot(dx, dy) < radius,
            np.maximum(abs(dx), abs(dy)) < radius,
            (np.minimum(abs(dx), abs(dy)) < 2) & (np.maximum(abs(dx), abs(dy)) < radius),
        )
        picture[shapes[label]] += 110
    return pictures, labels


def make_network():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 8 * 8, len(NAMES)),
    )


def train(path):
    torch.manual_seed(0)
    # Batches this small gain nothing from more threads, and wait for each other on a busy machine.
    torch.set_num_threads(1)
    network = make_network()
    pictures, labels = draw(3000, seed=1)
    inputs = torch.from_numpy(pictures)[:, None] / 255
    targets = torch.from_numpy(labels)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for _ in range(12):
        for rows in torch.randperm(len(inputs)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(inputs[rows]), targets[rows]).backward()
            optimizer.step()
    torch.save(network.state_dict(), path)


def load(path, device):
    """Called once on each worker, with the worker's GPU or CPU."""
    network = make_network()
    network.load_state_dict(torch.load(path, map_location=device, weights_only=True))
    network.to(device).eval()

    # Pictures travel and wait as bytes; the device makes floats of them.
    def classify(batch):
        probabilities = network(batch[:, None].float() / 255).softmax(dim=1)
        confidence, label = probabilities.max(dim=1)
        return {"label": label, "confidence": confidence}

    return classify


def label_of(pictures, model):
    """What a task does: hand its pictures over, take the answers."""
    return model(pictures)["label"]


def main():
    with tempfile.TemporaryDirectory() as folder:
        # On a cluster of several machines: a path that all of them see.
        weights = Path(folder) / "shapes.pt"
        train(weights)
        loader = functools.partial(load, str(weights))
        print("checked:", check_loader(loader, draw(8, seed=2)[0]))

        version = hashlib.sha256(weights.read_bytes()).hexdigest()
        model = daskshare.share(loader, name="shapes", max_batch_size=64, version=version)

        pictures, labels = draw(4000, seed=3)
        with daskshare.local_cluster() as cluster, Client(cluster) as client:
            daskshare.install(client)
            blocks = da.from_array(pictures, chunks=(50, SIZE, SIZE))
            found = blocks.map_blocks(label_of, model, dtype="int64", drop_axis=[1, 2]).compute()
            for worker, stats in daskshare.stats(client).items():
                print(
                    f"{worker}: {blocks.npartitions} tasks shared {stats['loads']} copy of "
                    f"{stats['model_bytes'] / 1000:.0f} kB, {stats['frames']} pictures in "
                    f"{stats['batches']} batches ({stats['mean_batch_size']:.1f} each)"
                )
    for index, name in enumerate(NAMES):
        print(f"{name}: {np.sum(found == index)} found, {np.sum(labels == index)} drawn")
    print(f"right: {np.mean(found == labels):.1%}")


if __name__ == "__main__":
    main()
