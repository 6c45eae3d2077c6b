from __future__ import annotations

import json

import numpy as np

from daskshare.dashboard.snapshot import CELL_STATES, take_snapshot
from tests.unit.dashboard.reports import model, report


def take(*reports, held=None):
    return take_snapshot(
        1e9,
        [(f"gpu{i}", f"tcp://{i}", one) for i, one in enumerate(reports)],
        held or {},
    )


def test_an_empty_cluster():
    snapshot = take()
    assert (snapshot.gpus, snapshot.models) == ([], [])
    assert snapshot.totals["gpus"] == 0
    assert snapshot.totals["busy_fraction"] == 0.0
    json.dumps(snapshot.as_dict())


def test_a_worker_that_has_not_reported_is_starting():
    [gpu] = take({}).gpus
    assert (gpu["state"], gpu["model_bytes"], gpu["queue_age_seconds"]) == ("starting", 0, 0.0)


def test_models_are_added_up_over_devices():
    snapshot = take(
        report(
            "a",
            model(frames=30, batches=10, leases=2, peak_leases=4, errors=1),
            rates={"key-of-m": 12.5},
        ),
        report(
            "b",
            model(
                frames=10,
                batches=10,
                leases=1,
                model_bytes=150,
                engine={"queue_frames": 7, "queue_age_seconds": 0.5, "ceiling": 4},
            ),
            model("n", state="unloaded", model_bytes=0),
            rates={"key-of-m": 2.5},
        ),
    )
    m, n = snapshot.models
    assert {k: m[k] for k in ("copies", "frames", "batches", "tasks", "errors", "bytes")} == {
        "copies": 2,
        "frames": 40,
        "batches": 20,
        "tasks": 3,
        "errors": 1,
        "bytes": 250,
    }
    assert (m["frames_per_second"], m["mean_batch_size"]) == (15.0, 2.0)
    assert (m["queue_frames"], m["queue_age_seconds"], m["max_batch_size"]) == (7, 0.5, 8)
    assert (n["copies"], n["loading"], n["failed"]) == (0, 0, 0)
    assert snapshot.totals["frames_per_second"] == 15.0
    assert snapshot.gpus[1]["queue_frames"] == 7


def test_memory_saved_is_against_one_copy_for_each_of_the_most_tasks_at_once():
    snapshot = take(
        report("a", model(peak_leases=5), model("n", peak_leases=0, model_bytes=70)),
        report("b", model(peak_leases=1)),
    )
    a, b = snapshot.gpus
    assert (a["model_bytes"], a["unshared_bytes"]) == (170, 5 * 100 + 70)
    assert (b["model_bytes"], b["unshared_bytes"]) == (100, 100)
    assert [m["saved_bytes"] for m in snapshot.models] == [400, 0]
    assert snapshot.totals["saved_bytes"] == 400


def test_states_and_reasons():
    snapshot = take(
        report("a", model(), model("n", state="loading", model_bytes=0)),
        report("b", model(state="unloaded", load_error="no such file"), model("n")),
        report("c", state="failed", reason="no driver", models={}),
    )
    m, n = snapshot.models
    assert (m["copies"], m["loading"], m["failed"], m["error"]) == (1, 0, 1, "no such file")
    assert (n["copies"], n["loading"], n["failed"], n["error"]) == (1, 1, 0, "")
    states = [[CELL_STATES[int(s)] for s in row] for row in snapshot.cell("state")]
    assert states == [["ready", "loading"], ["failed", "ready"], ["absent", "absent"]]
    assert (snapshot.gpus[2]["state"], snapshot.gpus[2]["reason"]) == ("failed", "no driver")
    totals = snapshot.totals
    assert (totals["gpus_ready"], totals["gpus_failed"]) == (2, 1)
    assert (totals["copies"], totals["loading"], totals["failed"]) == (2, 1, 1)


def test_workers_of_one_process_count_once():
    same = report("a", model(frames=5))
    snapshot = take(same, same)
    [gpu] = snapshot.gpus
    assert gpu["workers"] == ["tcp://0", "tcp://1"]
    assert snapshot.models[0]["frames"] == 5


def test_devices_are_in_natural_order():
    names = ["gpu10", "gpu2", "9", "10", "tcp://x"]
    reports = [(name, name, report(name)) for name in names]
    assert [gpu["name"] for gpu in take_snapshot(0.0, reports, {}).gpus] == [
        *("9", "10", "gpu2", "gpu10", "tcp://x")
    ]


def test_equal_names_are_told_apart_by_their_keys():
    one, two = model(key="aaaa1"), model(key="bbbb2")
    assert [m["label"] for m in take(report("a", one, two)).models] == ["m (aaaa)", "m (bbbb)"]
    assert [m["label"] for m in take(report("a", one)).models] == ["m"]


def test_held_tasks_show_though_no_worker_knows_the_model():
    snapshot = take(report("a", model()), held={"key-of-m": 3, "0123456789": 4})
    unknown, known = snapshot.models
    assert (known["name"], known["held_tasks"], known["copies"]) == ("m", 3, 1)
    assert (unknown["name"], unknown["held_tasks"], unknown["copies"]) == ("01234567", 4, 0)
    assert snapshot.totals["held_tasks"] == 7


def test_batches_and_time_of_all():
    one = report("a", time_fraction={"busy": 1.0}, batch_bins={"8": 2, "1": 1})
    one["recent"] |= {"frames": 30, "batches": 4, "batch_bins": {"8": 4}}
    two = report("b", time_fraction={"decoding": 0.5, "busy": 0.5}, batch_bins={"16": 1, "8": 1})
    snapshot = take(one, two, {})
    assert list(snapshot.batch_bins["all"].items()) == [("1", 1), ("8", 3), ("16", 1)]
    assert snapshot.batch_bins["recent"] == {"8": 4}
    assert snapshot.totals["recent_mean_batch_size"] == 7.5
    # The third is not ready, so it is not idle either.
    assert snapshot.totals["busy_fraction"] == 0.75
    assert snapshot.gpus[1]["time_fraction"] == {
        "busy": 0.5,
        "loading": 0.0,
        "decoding": 0.5,
        "input": 0.0,
        "scheduler": 0.0,
    }


def test_as_dict_is_plain_and_lists_models_by_device():
    snapshot = take(
        report("a", model(frames=3), rates={"key-of-m": 1.5}),
        report("b", model("n", state="unloaded", load_error="gone", model_bytes=0)),
    )
    plain = json.loads(snapshot.json)
    assert snapshot.json is snapshot.json
    first, second = plain["gpus"]
    assert list(first["models"]) == ["key-of-m"]
    assert first["models"]["key-of-m"]["frames"] == 3
    assert first["models"]["key-of-m"]["frames_per_second"] == 1.5
    assert second["models"]["key-of-n"]["state"] == "failed"
    assert second["models"]["key-of-n"]["error"] == "gone"
    assert isinstance(snapshot.cell("bytes"), np.ndarray)
    assert snapshot.cell("bytes").shape == (2, 2)
