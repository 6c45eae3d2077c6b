from __future__ import annotations

import json
import pickle

import pytest

from daskshare.errors import ConfigurationError, InvalidInputError, PlacementError
from daskshare.placement import Dispatch, Fail, Load, PlacementOptions, Unload
from tests.placement_world import World, kinds, tasks_of


def ready_everywhere(world, model="m"):
    """Have a model loaded on every worker, as reports say."""
    workers = world.pool.snapshot()["workers"]
    for address in workers:
        world.pool.report_worker(address, resident={model: 10}, now_seconds=world.now)


# -- where a task goes --


def test_first_task_loads_the_model_and_then_runs():
    world = World(instant=False)
    world.gpu("a")
    world.model("m")
    world.task("t")
    assert world.step() == [Load("a", "m", "its tasks wait")]
    assert world.step() == []
    assert "loading on 1" in world.pool.why("t")
    world.loaded("a")
    (dispatch,) = world.step()
    assert (dispatch.task, dispatch.worker, dispatch.model_key) == ("t", "a", "m")
    assert "a slot came free there" in world.pool.why("t")
    assert world.pool.busy_workers() == {"a"}
    world.finish("t")
    assert world.step() == []
    assert len(world.pool) == 0
    assert "is not with the allocator" in world.pool.why("t")


def test_waiting_tasks_are_counted_by_model():
    world = World(instant=False)
    world.gpu("a", slots=2)
    for model in ("m", "n"):
        world.model(model)
    for n in range(30):
        world.task(n)
    assert world.pool.waiting_tasks() == {"m": 30}
    world.step()
    world.loaded("a")
    dispatched = len(world.step())
    assert 0 < dispatched < 30
    assert world.pool.waiting_tasks() == {"m": 30 - dispatched}


def test_tasks_go_where_they_finish_first():
    world = World()
    world.gpu("slow", slots=8)
    world.gpu("fast", slots=8)
    world.model("m")
    world.task("known", frames=100)
    ready_everywhere(world)
    for address, rate in (("slow", 100.0), ("fast", 400.0)):
        world.pool.report_worker(
            address, resident={"m": 10}, frames_per_second={"m": rate}, now_seconds=0.0
        )
    for n in range(4):
        world.task(n, frames=100)
    world.step()
    # 1/4 s each on the fast one; the fifth would end after 1.25 s there and after 1 s here.
    assert sorted(world.at.values()) == ["fast"] * 4 + ["slow"]


def test_an_unmeasured_device_counts_as_the_mean_of_the_measured():
    world = World()
    for address in ("a", "b", "new"):
        world.gpu(address, slots=8)
    world.model("m")
    world.task("first", frames=100)
    ready_everywhere(world)
    for address, rate in (("a", 100.0), ("b", 300.0)):
        world.pool.report_worker(
            address, resident={"m": 10}, frames_per_second={"m": rate}, now_seconds=0.0
        )
    for n in range(26):
        world.task(n, frames=100)
    world.step()
    world.step(10.0)
    for key in [key for key, worker in world.at.items() if worker == "new"]:
        world.pool.forget_task(key, now_seconds=world.now)
    rates = {d.worker: d.frames_per_second for d in kinds(world.step(), Dispatch)}
    assert rates == {"new": pytest.approx(200.0)}


def test_a_workers_tasks_in_flight_are_bounded():
    world = World(surplus_fraction=0.25)
    world.gpu("a", slots=8)
    world.model("m")
    for n in range(30):
        world.task(n, priority=(n,))
    world.step()
    assert len(world.at) == 10
    world.finish(0, 1)
    assert tasks_of(world.step()) == [10, 11]
    assert "all 1 workers that hold model m are full" in world.pool.why(29)


def test_priorities_order_the_tasks_of_a_model():
    world = World()
    world.gpu("a")
    world.model("m")
    for n, priority in enumerate([(0, 5), (0, 1), (-1, 9), (0, 3)]):
        world.task(n, priority=priority)
    order = []
    for _ in range(4):
        order += tasks_of(world.step())
        world.finish(next(iter(world.at)))
    assert order == [2, 1, 3, 0]


def test_lost_task_goes_first_again():
    world = World()
    world.gpu("a")
    world.model("m")
    for n in range(5):
        world.task(n)
    assert tasks_of(world.step()) == [0, 1]
    assert world.pool.lose_task(1, now_seconds=0.0)
    assert world.pool.lose_task(4, now_seconds=0.0)
    assert not world.pool.lose_task("unknown", now_seconds=0.0)
    assert tasks_of(world.step()) == [1]


def test_the_users_workers_are_honoured():
    world = World()
    for address in "abc":
        world.gpu(address)
    world.model("m")
    for n in range(4):
        world.task(n, workers=["b"])
    world.task("elsewhere", workers=["x"])
    world.step()
    assert set(world.at.values()) == {"b"}
    assert len(world.at) == 2
    # The model goes nowhere else for tasks that may not run there.
    world.step(100.0)
    assert [d.worker for d in kinds(world.log, Load)] == ["b"]
    assert "it may run on x only" in world.pool.why("elsewhere")
    world.gpu("x")
    world.step(10.0)
    assert world.at["elsewhere"] == "x"


@pytest.mark.parametrize("restriction", [{"workers": ["a"]}, {"resources": {"R": 1}}])
def test_restricted_tasks_start_at_once_when_their_slot_comes_free(restriction):
    world = World()
    world.gpu("a", slots=1, resources={"R": 2})
    world.model("m")
    for n in range(3):
        world.task(n, **restriction)
    assert tasks_of(world.step()) == [0, 1]
    world.finish(0)
    assert tasks_of(world.step()) == [2]


def test_resources_are_reserved():
    world = World()
    world.gpu("a", slots=8)
    world.gpu("b", slots=8, resources={"TOKEN": 2})
    world.model("m")
    ready_everywhere(world)
    for n in range(3):
        world.task(n, resources={"TOKEN": 1})
    world.task("greedy", resources={"TOKEN": 5})
    assert tasks_of(world.step()) == [0, 1]
    assert set(world.at.values()) == {"b"}
    world.finish(0)
    assert tasks_of(world.step()) == [2]
    assert "no worker offers" in world.pool.why("greedy")


def test_large_dependencies_draw_a_task_to_them():
    world = World()
    for address in "ab":
        world.gpu(address, slots=4)
    world.model("m")
    ready_everywhere(world)
    world.task("near b", frames=1, dependency_bytes={"b": 10**9})
    world.task("small", frames=1, dependency_bytes={"b": 10})
    world.step()
    assert world.at == {"near b": "b", "small": "a"}


def test_among_equals_a_free_slot_takes_the_task_whose_data_are_there():
    world = World()
    world.gpu("a")
    world.model("m")
    for n in range(4):
        world.task(n, priority=(0, n), dependency_bytes={"b": 10**9})
    world.task("here", priority=(0, 9), dependency_bytes={"a": 10**9})
    world.task("later", priority=(1, 0), dependency_bytes={"a": 10**9})
    assert tasks_of(world.step()) == ["here", 0]


def test_near_the_end_a_slow_gpu_gets_nothing_that_a_fast_one_finishes_sooner():
    world = World()
    for address in ("slow", "fast"):
        world.gpu(address, slots=2)
    world.model("m")
    world.task("t0", frames=100)
    ready_everywhere(world)
    for address, rate in (("slow", 1.0), ("fast", 100.0)):
        world.pool.report_worker(
            address, resident={"m": 10}, frames_per_second={"m": rate}, now_seconds=0.0
        )
    for n in range(1, 4):
        world.task(f"t{n}", frames=100)
    world.step()
    assert set(world.at.values()) == {"fast"}
    assert len(world.at) == 3
    assert "a faster worker" in world.pool.why("t3")
    # When the fast one leaves, the slow one does it all.
    world.pool.remove_worker("fast", now_seconds=1.0)
    world.step(1.0)
    assert set(world.at.values()) == {"slow"}


def test_nobody_leaves_a_task_to_a_worker_that_would_not_take_it():
    world = World()
    world.model("m")
    world.task("known", frames=100.0)
    world.pool.forget_task("known", now_seconds=0.0)
    for address, rate in (("slow", 60.0), ("fast", 240.0)):
        world.gpu(address)
        world.pool.report_worker(
            address, resident={"m": 10}, frames_per_second={"m": rate}, now_seconds=0.0
        )
    # Its data lie on the slow one, which is left alone near the end, and no event will come.
    world.task("far", frames=200.0, dependency_bytes={"slow": 5 * 10**9})
    world.task("behind", frames=200.0, priority=(0, 1))
    world.step()
    assert world.at == {"far": "fast", "behind": "fast"}


def test_gpu_tasks_keep_off_workers_without_a_gpu():
    world = World()
    world.gpu("cpu", is_gpu=False)
    world.gpu("never", accepts_models=False)
    world.model("m")
    world.model("small", needs_gpu=False)
    world.task("big")
    world.task("tiny", "small")
    world.step(100.0)
    assert world.at == {"tiny": "cpu"}
    assert "needs a GPU worker" in world.pool.why("big")
    world.gpu("gpu")
    world.step(100.0)
    assert world.at["big"] == "gpu"


def test_a_task_that_must_run_alone_gets_a_worker_emptied():
    world = World()
    world.gpu("a", slots=2)
    world.model("m")
    for n in range(6):
        world.task(n)
    world.step()
    world.task("suspect", alone=True)
    assert world.step() == []
    assert "must run alone" in world.pool.why("suspect")
    world.finish(0, 1)
    assert world.step() == []
    world.finish(2)
    assert tasks_of(world.step()) == ["suspect"]
    assert world.step(5.0) == []
    world.finish("suspect")
    assert tasks_of(world.step()) == [3, 4, 5]


def test_a_task_that_must_run_alone_starts_as_soon_as_its_model_is_there():
    world = World()
    world.gpu("a", slots=2)
    world.model("m")
    world.task("suspect", alone=True)
    world.task("other")
    assert len(tasks_of(world.step())) == 1
    world.finish(*world.at)
    assert len(tasks_of(world.step())) == 1


def test_forgetting_a_suspect_gives_its_worker_back():
    world = World()
    world.gpu("a", slots=1)
    world.model("m")
    for n in range(3):
        world.task(n)
    world.step()
    world.task("suspect", alone=True)
    world.step()
    world.pool.forget_task("suspect", now_seconds=0.0)
    world.finish(0)
    assert tasks_of(world.step()) == [2]


# -- devices --


def test_two_workers_on_one_device_share_its_budget():
    world = World(min_residency_seconds=1000.0)
    world.gpu("a", uuid="GPU-0", budget_bytes=15)
    world.gpu("b", uuid="GPU-0", budget_bytes=15)
    for n in range(4):
        world.model(f"m{n}", 10)
        world.task(n, f"m{n}")
    world.step(10.0)
    assert len(kinds(world.log, Load)) == 1
    assert world.pool.snapshot()["devices"]["GPU-0"]["used_bytes"] == 10


def test_mig_slices_are_devices():
    world = World()
    world.gpu("a", uuid="MIG-0", budget_bytes=10)
    world.gpu("b", uuid="MIG-1", budget_bytes=10)
    for n in range(2):
        world.model(f"m{n}", 10)
        world.task(n, f"m{n}")
    world.step()
    assert sorted(world.at.values()) == ["a", "b"]


def test_workers_of_one_process_share_one_copy():
    world = World()
    for address in "ab":
        world.gpu(address, uuid="GPU-0", budget_bytes=15, process="host:1")
    world.model("m", 10)
    for n in range(4):
        world.task(n, frames=10_000)
    world.step(5.0)
    world.step(5.0)
    assert sorted(world.at.values()) == ["a", "a", "b", "b"]
    assert world.pool.snapshot()["devices"]["GPU-0"]["used_bytes"] == 10
    world.pool.unload_model("m", now_seconds=world.now)
    world.finish(*[k for k, worker in world.at.items() if worker == "a"])
    assert kinds(world.step(), Unload) == []
    world.finish(*world.at)
    assert {d.worker for d in kinds(world.step(), Unload)} == {"a", "b"}
    assert world.pool.snapshot()["devices"]["GPU-0"]["used_bytes"] == 0


def test_the_process_keeps_its_copy_when_one_of_its_workers_leaves():
    world = World()
    for address in "ab":
        world.gpu(address, uuid="GPU-0", process="host:1")
        world.model("m")
        world.pool.report_worker(address, resident={"m": 10}, now_seconds=0.0)
    world.pool.remove_worker("a", now_seconds=0.0)
    world.pool.validate()
    assert world.pool.snapshot()["devices"]["GPU-0"]["used_bytes"] == 10


def test_removed_workers_tasks_wait_again_and_go_elsewhere():
    world = World()
    world.gpu("a", slots=3)
    world.model("m")
    for n in range(3):
        world.task(n)
    world.step()
    assert world.pool.remove_worker("a", now_seconds=1.0) == [0, 1, 2]
    assert world.pool.remove_worker("a", now_seconds=1.0) == []
    world.pool.validate()
    assert "none is connected" in world.pool.why(0)
    world.gpu("a-again", uuid="GPU-a", slots=3)
    world.step(1.0)
    assert world.at == dict.fromkeys(range(3), "a-again")


def test_a_paused_worker_gets_nothing_and_keeps_what_it_has():
    world = World()
    world.gpu("a", slots=1)
    world.model("m")
    for n in range(4):
        world.task(n)
    world.step()
    world.pool.set_worker_accepting("a", False, now_seconds=0.0)
    world.finish(0)
    assert world.step(10.0) == []
    assert "paused or leaving" in world.pool.why(3)
    world.finish(1)
    world.pool.set_worker_accepting("a", True, now_seconds=10.0)
    assert tasks_of(world.step()) == [2, 3]


def test_reports_are_believed():
    world = World()
    world.gpu("a", budget_bytes=20)
    world.model("m", 10)
    world.pool.report_worker("a", resident={"m": 12, "stranger": 5}, now_seconds=0.0)
    world.task("t")
    assert [type(d) for d in world.step()] == [Dispatch]
    # In use, it is not struck out; idle and missing twice, it is.
    for _ in range(3):
        world.pool.report_worker("a", resident={}, now_seconds=1.0)
    assert world.models_on("a") == {"m": "ready"}
    world.finish("t")
    world.pool.report_worker("a", resident={}, now_seconds=2.0)
    assert world.models_on("a") == {}
    world.pool.report_worker("nobody", resident={"m": 1}, now_seconds=2.0)


def test_memory_taken_by_others_leaves_no_room():
    world = World()
    world.gpu("a", budget_bytes=100)
    world.model("m", 10)
    world.pool.report_worker("a", resident={}, free_bytes=5, now_seconds=0.0)
    world.task("t")
    assert world.step(1.0) == []
    world.pool.report_worker("a", resident={}, free_bytes=50, now_seconds=1.0)
    world.step(1.0)
    assert world.at == {"t": "a"}


def test_speed_is_learnt_from_durations_where_none_is_reported():
    world = World()
    world.gpu("a", slots=1)
    world.gpu("b", slots=1)
    world.model("m")
    ready_everywhere(world)
    for n in range(40):
        world.task(n)
    world.step()
    for _ in range(30):
        world.now += 0.1
        done = [key for key, worker in world.at.items() if worker == "a"][:1]
        if round(world.now, 1) % 1 == 0:
            done += [key for key, worker in world.at.items() if worker == "b"][:1]
        world.finish(*done)
        world.step()
    rates = {
        d: next(iter(v["frames_per_second"].values()))
        for d, v in world.pool.snapshot()["devices"].items()
    }
    assert rates["GPU-a"] > 4 * rates["GPU-b"]


def test_bad_input_is_refused_and_changes_nothing():
    world = World()
    world.gpu("a")
    world.model("m")
    world.task("t")
    with pytest.raises(InvalidInputError, match="'t'"):
        world.task("t")
    with pytest.raises(InvalidInputError, match="not registered"):
        world.task("u", "unknown")
    with pytest.raises(InvalidInputError, match="frames"):
        world.task("u", frames=float("nan"))
    with pytest.raises(InvalidInputError, match="'a'"):
        world.gpu("a")
    with pytest.raises(InvalidInputError, match="slots=0"):
        world.gpu("b", slots=0)
    with pytest.raises(InvalidInputError, match="at least 1"):
        world.pool.request_replicas("m", 0, now_seconds=0.0)
    with pytest.raises(InvalidInputError, match="two models"):
        world.pool.supersede_model("m", "m", now_seconds=0.0)
    with pytest.raises(InvalidInputError, match="weight"):
        world.model("n", weight=0)
    world.pool.validate()
    assert "t" in world.pool
    assert len(world.pool) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "random"},
        {"min_residency_seconds": -1},
        {"max_load_attempts": 0},
        {"transfer_bytes_per_second": 0},
        {"idle_unload_seconds": float("inf")},
    ],
)
def test_wrong_options(options):
    with pytest.raises(ConfigurationError, match="expected"):
        PlacementOptions(**options)


def test_validate_names_every_contradiction():
    world = World()
    world.gpu("a")
    world.model("m")
    world.task("t")
    world.step()
    world.pool._books.workers["a"].limit = 0
    world.pool._books.devices["GPU-a"].used_bytes += 1
    with pytest.raises(PlacementError, match="wrong in 2 ways") as caught:
        world.pool.validate()
    copy = pickle.loads(pickle.dumps(caught.value))  # noqa: S301
    assert len(copy.problems) == 2


def test_snapshot_is_plain_data():
    world = World()
    world.gpu("a")
    world.model("m")
    world.task("t")
    world.task("u", workers=["x"])
    world.step()
    snapshot = json.loads(json.dumps(world.pool.snapshot()))
    assert snapshot["counts"] | {"looks": 0} == {
        "waiting": 1,
        "in_flight": 1,
        "dispatched": 1,
        "loads": 1,
        "unloads": 0,
        "looks": 0,
    }
    assert snapshot["models"]["m"]["replicas"] == {"ready": 1}
    assert snapshot["workers"]["a"]["in_flight"] == 1


def test_nothing_to_do_needs_no_wake():
    world = World()
    world.gpu("a")
    world.step()
    assert world.pool.next_wake_seconds() is None
    world.model("m")
    world.task("t")
    world.step()
    world.finish("t")
    world.step(1.0)
    assert world.pool.next_wake_seconds() is None


def test_equal_events_give_equal_decisions():
    def run():
        world = World()
        for n in range(5):
            world.gpu(f"w{n}", slots=2, budget_bytes=25)
            world.model(f"m{n}", 10)
        for n in range(60):
            world.task(n, f"m{n % 5}", priority=(n % 3, n))
            if n % 7 == 0:
                world.step(1.0)
            if n % 11 == 0 and world.at:
                world.finish(next(iter(world.at)))
        world.step(1.0)
        return world.log

    assert run() == run()
    assert isinstance(run()[0], Load)
    assert Fail not in {type(d) for d in run()}
