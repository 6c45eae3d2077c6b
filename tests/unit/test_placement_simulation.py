"""The simulation behind docs/placement.md, at a size that takes a second."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import placement_simulation
from benchmarks.simulated_cluster import Cluster, Gpu, ModelKind, TaskSpec


def test_policies_meet_the_same_events_and_ours_comes_near_the_bound(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    size = ["--gpus", "12", "--tasks", "4000", "--models", "6", "--slots", "4", "--lost", "0.1"]
    figure = tmp_path / "figure.svg"
    arguments = ["--order", "random", "--json", str(path), "--plot", str(figure)]
    monkeypatch.setattr(sys, "argv", ["placement_simulation", *size, *arguments])
    placement_simulation.main()
    report = json.loads(path.read_text("utf-8"))
    rows = {row["policy"]: row for row in report["rows"]}
    assert len(rows) == 3
    for row in rows.values():
        assert row["makespan_seconds"] > row["lower_bound_seconds"]
        assert row["gpus_lost"] == 1
    assert rows["daskshare"]["over_lower_bound"] < 1.1
    assert rows["daskshare"]["makespan_seconds"] < rows["earliest start"]["makespan_seconds"]
    assert rows["earliest start"]["makespan_seconds"] < rows["round robin"]["makespan_seconds"]
    assert rows["daskshare"]["loads"] < rows["earliest start"]["loads"]
    assert figure.stat().st_size > 0


class Watcher:
    """A policy that hands tasks out as it is told and notes what it hears."""

    def __init__(self):
        self.cluster = Cluster(self, load_failure_rate=0.0, seed=0)
        self.log: list = []

    def on_worker_joined(self, worker):
        self.log.append(("joined", worker.address))

    def on_worker_lost(self, worker, tasks):
        self.log.append(("lost", sorted(task.key for task in tasks)))

    def on_task_done(self, worker, task):
        self.log.append((task.key, round(self.cluster.now, 6)))

    def on_loaded(self, worker, model, ok):
        self.log.append((model.key, round(self.cluster.now, 6)))


def test_tasks_share_a_gpu_and_wait_for_their_model():
    watcher = Watcher()
    cluster = watcher.cluster
    cluster.join("w", Gpu("g", 2.0, 10), 2)
    model = ModelKind("m", 10, 5.0, 100.0)
    other = ModelKind("n", 10, 5.0, 100.0)
    worker = cluster.workers["w"]
    for key, frames, kind in ((0, 200, model), (1, 400, model), (2, 200, other)):
        cluster.send(worker, TaskSpec(key, kind, frames))
    cluster.run(3)
    # Loaded at 5 s; 1 s and 2 s of the GPU at half speed each: 7 s, then alone: 8 s. Only then is
    # there room for the other model.
    assert watcher.log == [("joined", "w"), ("m", 5.0), (0, 7.0), (1, 8.0), ("n", 13.0), (2, 14.0)]


def test_the_bound_counts_speed_only_while_it_is_there():
    watcher = Watcher()
    cluster = watcher.cluster
    cluster.join("a", Gpu("a", 1.0, 10), 1)
    cluster.join("b", Gpu("b", 3.0, 10), 1)
    cluster.at(10.0, cluster.replace, "b", "b2", 5.0)
    model = ModelKind("m", 10, 1.0, 1.0)
    cluster.at(0.0, cluster.send, cluster.workers["a"], TaskSpec(0, model, 30))
    cluster.run(1)
    assert ("lost", []) in watcher.log
    # 40 by 10 s, 45 by 15 s, then 4 a second.
    assert cluster.lower_bound_seconds(40.0) == pytest.approx(10.0)
    assert cluster.lower_bound_seconds(43.0) == pytest.approx(13.0)
    assert cluster.lower_bound_seconds(49.0) == pytest.approx(16.0)
