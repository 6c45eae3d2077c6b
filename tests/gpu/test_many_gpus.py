"""All GPUs of a host at once, some of them, and two workers on one; needs two GPUs or more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import dask
import numpy as np
import pyarrow.parquet as pq
import pytest
from distributed import Client

import daskshare
from daskshare.device import list_devices
from daskshare.errors import ConfigurationError
from daskshare.results.parquet import read_detections
from tests.clip import traffic_clip
from tests.cluster.stand_ins import books, decisions, no_hook_fails, until
from tests.many_devices import STEPS, pinned_workers, serve_unequal_demand, share_one_device
from tests.reference import overlap

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
TIMEOUT = 180
CLIP_FRAMES = 250


@pytest.fixture(autouse=True, scope="module")
def gpus():
    """The GPUs that this process may use, two at least; after tests/conftest.py's own checks."""
    devices = list_devices()
    if len(devices) < 2:
        pytest.skip(f"needs two or more GPUs; this process sees {len(devices)}")
    return devices


@pytest.fixture(autouse=True)
def configuration():
    with dask.config.set(
        {
            # Compiling on each GPU would take most of the tests.
            "daskshare.engine.compile": False,
            "distributed.scheduler.validate": True,
            # A local cluster gives up a worker that dies twice in this time.
            "distributed.deploy.lost-worker-timeout": "1h",
        }
    ):
        yield


@pytest.fixture(scope="module")
def driver():
    """Uuid and name of each GPU of the machine as nvidia-smi tells them."""
    command = ["nvidia-smi", "--query-gpu=uuid,name", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT)
    return [tuple(line.split(", ", 1)) for line in answer.stdout.splitlines()]


def install(client, num_workers):
    client.wait_for_workers(num_workers, timeout=TIMEOUT)
    daskshare.install(client)
    until(lambda: len(books(client)["workers"]) == num_workers, client, steps=STEPS)


def test_unequal_demand_on_all_gpus_while_a_worker_dies(gpus):
    with (
        daskshare.local_cluster(dashboard_address=":0") as cluster,
        Client(cluster, set_as_default=False) as client,
        no_hook_fails(),
    ):
        install(client, len(gpus))
        assert set(books(client)["devices"]) == {gpu.uuid for gpu in gpus}
        serve_unequal_demand(client, rounds=len(gpus))


def short(uuid, uuids):
    """As few letters as name the GPU."""
    return next(
        uuid[:length]
        for length in range(len("GPU-") + 1, len(uuid) + 1)
        if sum(other.startswith(uuid[:length]) for other in uuids) == 1
    )


def ask(variable, *arguments):
    """What daskshare and CUDA make of a value of CUDA_VISIBLE_DEVICES, in a process of its own."""
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": variable,
        # nvidia-smi's order.
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    answer = subprocess.run(
        [sys.executable, "-m", "tests.gpu.visible_program", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=TIMEOUT,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout.splitlines()[-1])


#: The variable for the machine's uuids, and what it has to give.
SUBSETS = {
    "the last by number": lambda uuids: (str(len(uuids) - 1), uuids[-1:]),
    "the last by uuid": lambda uuids: (uuids[-1], uuids[-1:]),
    "the last by short uuid": lambda uuids: (short(uuids[-1], uuids), uuids[-1:]),
    "numbers, reversed": lambda uuids: (
        ",".join(str(i) for i in reversed(range(len(uuids)))),
        uuids[::-1],
    ),
    "short uuids, reversed": lambda uuids: (
        ",".join(short(uuid, uuids) for uuid in reversed(uuids)),
        uuids[::-1],
    ),
    "ended by -1": lambda uuids: ("1,-1,0", uuids[1:2]),
}


@pytest.mark.parametrize("subset", SUBSETS.values(), ids=SUBSETS)
def test_a_local_cluster_has_a_worker_on_each_visible_gpu_and_on_no_other(driver, subset):
    variable, expected = subset([uuid for uuid, _ in driver])
    answer = ask(variable, "--cluster")
    assert answer["count"] == len(expected)
    assert answer["local_devices"] == expected
    names = dict(driver)
    want = [{"kind": "cuda", "uuid": uuid, "name": names[uuid]} for uuid in sorted(expected)]
    assert sorted(answer["workers"], key=lambda worker: worker["uuid"]) == want
    assert answer["cuda"] == [{"uuid": uuid, "name": names[uuid]} for uuid in expected]


def test_a_local_cluster_leaves_hidden_gpus_alone():
    answer = ask("-1", "--cluster")
    assert answer["count"] == 0
    assert [worker["kind"] for worker in answer["workers"]] == ["cpu"]
    assert answer["cuda"] == []


#: No cluster: whether CUDA reads it as daskshare does.
READINGS = {
    "spaces": lambda uuids: (" 1 , 0 ", uuids[1::-1]),
    "a number that is none": lambda uuids: (f"1,{len(uuids)},0", uuids[1:2]),
    "a comma at the end": lambda uuids: ("1,", uuids[1:2]),
    "a uuid after a number": lambda uuids: (f"1,{uuids[0]}", uuids[1:2]),
    "a number after a uuid": lambda uuids: (f"{uuids[1]},0", uuids[1:2]),
    "any uuid": lambda uuids: ("GPU-", []),
    "one twice": lambda uuids: ("0,0", []),
    "one twice by uuid": lambda uuids: (f"{uuids[0]},{short(uuids[0], uuids)}", []),
    "none": lambda uuids: ("-1", []),
}


@pytest.mark.parametrize("reading", READINGS.values(), ids=READINGS)
def test_the_variable_means_the_same_to_cuda(driver, reading):
    variable, expected = reading([uuid for uuid, _ in driver])
    answer = ask(variable)
    assert [device["uuid"] for device in answer["cuda"]] == expected
    assert answer["local_devices"] == (expected or ["cpu"])
    assert answer["count"] == len(expected)


def test_two_workers_on_one_gpu_beside_one_on_another(gpus):
    # The smaller one is shared: what is three fifths too much for it fits the other.
    one, other = sorted(gpus, key=lambda gpu: gpu.total_bytes)[:2]
    devices = {"first": one.uuid, "second": one.uuid, "third": other.uuid}
    with (
        pinned_workers(
            {name: {"CUDA_VISIBLE_DEVICES": uuid} for name, uuid in devices.items()}
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
        no_hook_fails(),
    ):
        install(client, 3)
        share_one_device(client, devices, shared=one.uuid, other=other.uuid)


def test_a_local_cluster_takes_a_gpu_once(driver):
    uuids = [uuid for uuid, _ in driver]
    for twice in ("0,0", [uuids[0], short(uuids[0], uuids)]):
        with pytest.raises(ConfigurationError, match="each once"):
            daskshare.local_cluster(CUDA_VISIBLE_DEVICES=twice)


def detect(clips, output, gpus):
    """The main job on some GPUs, each with a copy of the model; its tables and who ran it."""
    model = daskshare.yolov3("yolov3-tiny", confidence_threshold=0.3)
    with (
        daskshare.local_cluster(
            CUDA_VISIBLE_DEVICES=[gpu.uuid for gpu in gpus], dashboard_address=":0"
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
        no_hook_fails(),
    ):
        install(client, len(gpus))
        daskshare.load(client, model, replicas=len(gpus), timeout_seconds=TIMEOUT)
        summary = daskshare.detect(
            clips, model, output, client=client, chunk_seconds=1, progress=False
        )
        devices = {address: w["device"] for address, w in books(client)["workers"].items()}
        used = {devices[d["worker"]] for d in decisions(client, model)}
    assert summary.failed == summary.truncated == ()
    assert summary.decoders == {"nvdec": CLIP_FRAMES * len(clips)}
    assert used == {gpu.uuid for gpu in gpus}
    assert summary.model_copies == summary.model_loads == len(gpus)
    return pq.read_table(summary.chunks_path), read_detections(output)


def frames_of(chunks):
    """Numbers of each video's frames, from the table of chunks."""
    numbers = {}
    for row in chunks.sort_by([("video", "ascending"), ("first_frame", "ascending")]).to_pylist():
        frames = range(row["first_frame"], row["first_frame"] + row["num_frames"])
        numbers.setdefault(row["video"], []).extend(frames)
    return numbers


def by_frame(table):
    rows = {}
    for row in table.to_pylist():
        rows.setdefault((row["video"], row["frame"]), []).append(row)
    return rows


def unmatched(found, others):
    """Those of ``found`` that have no partner, though they are well above the threshold."""
    left = []
    for place, rows in found.items():
        free = list(others.get(place, ()))
        for row in sorted(rows, key=lambda row: -row["confidence"]):
            partner = next((other for other in free if alike(row, other)), None)
            if partner is not None:
                free.remove(partner)
            elif row["confidence"] >= 0.35:
                left.append(row)
    return left


def alike(a, b):
    boxes = [np.array([r["x_min"], r["y_min"], r["x_max"], r["y_max"]]) for r in (a, b)]
    return (
        a["class_id"] == b["class_id"]
        and abs(a["confidence"] - b["confidence"]) <= 0.05
        and overlap(*boxes) >= 0.90
    )


def test_the_main_job_on_all_gpus_gives_what_it_gives_on_one(gpus, tmp_path):
    clips = [tmp_path / f"camera{number}.mp4" for number in range(4 * len(gpus))]
    for clip in clips:
        clip.symlink_to(traffic_clip())
    many_chunks, many = detect(clips, tmp_path / "many", gpus)
    one_chunks, one = detect(clips, tmp_path / "one", gpus[:1])

    every_frame = {str(clip): list(range(CLIP_FRAMES)) for clip in clips}
    assert frames_of(many_chunks) == frames_of(one_chunks) == every_frame
    found, alone = by_frame(many), by_frame(one)
    counts = Counter(video for video, _ in found)
    assert set(counts) == set(every_frame)
    strong = sum(row["confidence"] >= 0.35 for rows in found.values() for row in rows)
    assert strong > 100 * len(clips)
    # Batches differ, and with them the last bits: of two boxes on one object suppression may keep
    # the other. One chunk's detections are more than this.
    missing, extra = unmatched(alone, found), unmatched(found, alone)
    assert len(missing) <= 0.005 * strong, missing[:5]
    assert len(extra) <= 0.005 * strong, extra[:5]
