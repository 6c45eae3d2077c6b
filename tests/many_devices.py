"""What has to hold on several devices, for stand-ins and for real GPUs: tests bring the cluster."""

from __future__ import annotations

import functools
import itertools
import os
import random
import signal
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
from distributed import Nanny, Scheduler, SpecCluster, as_completed, get_worker, wait

import daskshare
from daskshare.client import SharedModel
from daskshare.errors import ModelLoadError
from daskshare.testing import FakeSpec
from tests.cluster.stand_ins import books, decisions, double, until
from tests.reference import disagreements, reference_frames

TIMEOUT = 180
#: Steps of ``until``, 50 ms each.
STEPS = 20 * TIMEOUT

#: Name, width and factor of the networks that multiply; and tasks of each for one of the third.
MUCH, SOME = ("much", 512, 2.0, 10), ("some", 64, 3.0, 3)
DETECTIONS = "few"
NUM_REFERENCE_FRAMES = 25


def load_scaler(width: int, factor: float, device: Any) -> Any:
    """Make a network that multiplies; exact for small whole numbers, whatever computes it."""
    import torch

    network = torch.nn.Linear(width, width, bias=False)
    with torch.no_grad():
        network.weight.copy_(factor * torch.eye(width))
    return network


def here() -> tuple[str, str]:
    """Address and device's uuid of the worker that runs this."""
    from daskshare.worker_plugin import local_share

    return str(get_worker().address), local_share().device.uuid


def scale(model: SharedModel, width: int, number: int) -> tuple[Any, tuple[str, str]]:
    """Multiply a number, in two digits that every precision holds exactly."""
    # Take long enough that a worker's death finds something.
    time.sleep(0.05)
    items = np.zeros((1, width), np.float32)
    items[0, :2] = divmod(number, 256)
    high, low = np.asarray(model(items))[0, :2].tolist()
    return (high, low), here()


def detect_one(model: SharedModel, frame: np.ndarray) -> tuple[Any, tuple[str, str]]:
    return model(frame[None])[0], here()


def serve_unequal_demand(client: Any, *, rounds: int) -> None:
    """Three models of unequal size and demand over all devices; a worker dies half-way.

    One worker a device; nannies start workers anew. A round is every frame of the reference once.
    """
    before = {address: worker["device"] for address, worker in books(client)["workers"].items()}
    pids = client.run(os.getpid)
    models = {
        name: daskshare.share(
            functools.partial(load_scaler, width, factor), name=name, max_batch_size=32
        )
        for name, width, factor, _ in (MUCH, SOME)
    }
    models[DETECTIONS] = daskshare.yolov3("yolov3-tiny")
    # The pool need not find that so short a backlog pays for a load on every device. Where the
    # other two go is for it to say.
    ready = daskshare.load(client, models["much"], replicas=len(before), timeout_seconds=TIMEOUT)
    assert sorted(ready) == sorted(before)

    futures = _submit(client, models, rounds=rounds)
    with client.as_current():
        done = as_completed(list(futures.values()), with_results=True, timeout=TIMEOUT)
        early = [place for _, (_, place) in itertools.islice(done, (len(futures) + 1) // 2)]
    assert dict(early) == before
    workers = books(client)["workers"]
    victim = max(workers, key=lambda address: workers[address]["in_flight"])
    assert workers[victim]["in_flight"], "the worker dies idle: the tasks are too short"
    os.kill(pids[victim], signal.SIGKILL)
    answers = dict(zip(futures, _results(client, list(futures.values())), strict=True))
    _check(answers, rounds=rounds)
    # What only the dead worker held was done again, if need be by the others alone.
    assert set(before) - {victim} <= {address for _, (address, _) in answers.values()}

    # The nanny's next worker has another address and the same device, and serves all three.
    until(lambda: _is_replaced(client, victim, len(before)), client, steps=STEPS)
    now = books(client)["workers"]
    [new] = set(now) - set(before)
    assert now[new]["device"] == before[victim]
    again = {(name, 7): answers[name, 7][0] for name in models}
    for name, number in again:
        bound = _submit_one(client, models, name, number, workers=[new])
        value, place = bound.result(TIMEOUT)
        assert place == (new, before[victim])
        if name != DETECTIONS:
            assert value == again[name, number]
    _check_copies(client, models, new)
    until(lambda: books(client)["in_pool"] == 0, client)
    for device in books(client)["devices"].values():
        assert len(device["workers"]) == 1
        assert device["used_bytes"] <= device["budget_bytes"]


def _results(client: Any, futures: list[Any]) -> list[Any]:
    with client.as_current():
        wait(futures, timeout=TIMEOUT)
    return list(client.gather(futures))


def _submit_one(client: Any, models: dict[str, Any], name: str, number: int, **options: Any) -> Any:
    if name == DETECTIONS:
        frame = reference_frames()[number % NUM_REFERENCE_FRAMES]
        return client.submit(detect_one, models[name], frame, pure=False, **options)
    width = {name: width for name, width, *_ in (MUCH, SOME)}[name]
    return client.submit(scale, models[name], width, number, pure=False, **options)


def _submit(client: Any, models: dict[str, Any], *, rounds: int) -> dict[tuple[str, int], Any]:
    """All frames in one random order; the future of each by its model's name and its number."""
    shares = {MUCH[0]: MUCH[3], SOME[0]: SOME[3], DETECTIONS: 1}
    frames = [
        (name, number)
        for name, share in shares.items()
        for number in range(share * NUM_REFERENCE_FRAMES * rounds)
    ]
    random.Random(0).shuffle(frames)
    return {frame: _submit_one(client, models, *frame) for frame in frames}


def _check(answers: dict[tuple[str, int], Any], *, rounds: int) -> None:
    for name, _, factor, share in (MUCH, SOME):
        numbers = range(share * NUM_REFERENCE_FRAMES * rounds)
        got = [answers[name, number][0] for number in numbers]
        assert got == [tuple(factor * digit for digit in divmod(number, 256)) for number in numbers]
    for first in range(0, NUM_REFERENCE_FRAMES * rounds, NUM_REFERENCE_FRAMES):
        found = [answers[DETECTIONS, first + i][0] for i in range(NUM_REFERENCE_FRAMES)]
        assert disagreements(found, min_iou=0.90, max_confidence_error=0.05) == []


def _is_replaced(client: Any, victim: str, num_workers: int) -> bool:
    workers = books(client)["workers"]
    return victim not in workers and len(workers) == num_workers


def _check_copies(client: Any, models: dict[str, Any], new: str) -> None:
    """At most one copy of each model on each device, loaded once, and sizes that differ."""
    names = {model.key: name for name, model in models.items()}
    copies: Counter[tuple[str, str]] = Counter()
    sizes: dict[str, set[int]] = {name: set() for name in models}
    for address, report in daskshare.stats(client).items():
        for key, entry in report["models"].items():
            if key not in names or entry["state"] != "ready":
                continue
            copies[report["device"]["uuid"], names[key]] += 1
            sizes[names[key]].add(entry["model_bytes"])
            assert entry["loads"] == 1, (address, names[key])
    assert max(copies.values()) == 1
    device = daskshare.stats(client)[new]["device"]["uuid"]
    assert {name for uuid, name in copies if uuid == device} == set(models)
    assert sizes["much"] == {512 * 512 * 4}
    assert sizes["some"] == {64 * 64 * 4}
    [detector] = sizes[DETECTIONS]
    assert detector > 8 * 512 * 512 * 4


def pinned_workers(environments: dict[str, dict[str, str]]) -> SpecCluster:
    """Make a cluster of one worker process with each environment, by the workers' names."""
    return SpecCluster(
        scheduler={
            "cls": Scheduler,
            "options": {"host": "127.0.0.1", "port": 0, "dashboard_address": ":0"},
        },
        workers={
            name: {"cls": Nanny, "options": {"nthreads": 4, "memory_limit": 0, "env": environment}}
            for name, environment in environments.items()
        },
    )


def share_one_device(client: Any, names: dict[str, str], *, shared: str, other: str) -> None:
    """Two workers on the device ``shared`` and one on ``other``: two devices, three copies at most.

    A process keeps its own copy, so a device holds one for each; its budget bounds all of them.
    """
    there = books(client)
    places = {name: _address_of(client, name) for name in names}
    assert set(there["devices"]) == {shared, other}
    for uuid in (shared, other):
        mine = sorted(places[name] for name in names if names[name] == uuid)
        assert sorted(there["devices"][uuid]["workers"]) == mine
    reports = daskshare.stats(client)
    assert {name: reports[places[name]]["device"]["uuid"] for name in names} == names
    budget = there["devices"][shared]["budget_bytes"]
    assert {reports[places[name]]["budget_bytes"] for name in names if names[name] == shared} == {
        budget
    }

    model = SharedModel(FakeSpec(name="two-fifths", model_bytes=int(budget * 0.4)))
    ready = daskshare.load(client, model, replicas=3, timeout_seconds=TIMEOUT)
    assert sorted(ready) == sorted(places.values())
    futures = client.map(double, [model] * 90, range(90), pure=False)
    assert _results(client, futures) == [2.0 * i for i in range(90)]
    reports = daskshare.stats(client)
    held = Counter(
        reports[address]["device"]["uuid"]
        for address in places.values()
        if reports[address]["models"][model.key]["state"] == "ready"
    )
    assert held == {shared: 2, other: 1}
    assert {reports[address]["models"][model.key]["loads"] for address in ready} == {1}
    assert {d["worker"] for d in decisions(client, model)} == set(ready)
    used = {uuid: device["used_bytes"] for uuid, device in books(client)["devices"].items()}
    assert used == {shared: 2 * int(budget * 0.4), other: int(budget * 0.4)}

    # Another of the size does not fit beside the two, though each process alone would take it.
    second = SharedModel(FakeSpec(name="another", model_bytes=int(budget * 0.4)))
    with pytest.raises(ModelLoadError, match="ready on 0 workers"):
        daskshare.load(client, second, devices=[shared], timeout_seconds=5)
    assert daskshare.load(client, second, devices=[other]) == [
        next(places[name] for name in names if names[name] == other)
    ]
    daskshare.unload(client, second)
    daskshare.unload(client, model)


def _address_of(client: Any, name: str) -> str:
    workers = client.scheduler_info(n_workers=-1)["workers"]
    return next(address for address, info in workers.items() if str(info["name"]) == name)
