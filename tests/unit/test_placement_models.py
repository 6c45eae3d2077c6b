"""Which model goes on which device, and when it leaves."""

from __future__ import annotations

from collections import Counter

import pytest

from daskshare.placement import Dispatch, Fail, Load, Unload
from tests.placement_world import World, kinds, tasks_of


def loads(decisions):
    return sorted((d.worker, d.model_key) for d in decisions if isinstance(d, Load))


def test_a_single_task_loads_its_model_once():
    world = World(instant=False)
    for n in range(10):
        world.gpu(f"w{n}")
    world.model("m")
    world.task("t", frames=1e6)
    for _ in range(20):
        world.step(1.0)
    assert len(kinds(world.log, Load)) == 1


def test_replicas_follow_the_backlog_up_and_down():
    world = World(idle_unload_seconds=60.0)
    for n in range(4):
        world.gpu(f"w{n}")
        world.model("m")
    for n in range(200):
        world.task(n, frames=3000)
    world.serve(60.0)
    assert not world.at
    assert {d.worker for d in kinds(world.log, Load)} == {f"w{n}" for n in range(4)}
    assert kinds(world.log, Unload) == []
    # Nothing happens, but it asks to be woken.
    world.serve(200.0)
    assert world.pool.snapshot()["models"]["m"]["replicas"] == {"ready": 1}
    assert world.pool.next_wake_seconds() is None


def test_a_short_backlog_opens_no_further_replica():
    world = World()
    for n in range(4):
        world.gpu(f"w{n}", slots=2)
    world.model("m")
    world.pool.report_worker("w0", resident={"m": 10}, now_seconds=0.0)
    for n in range(10):
        world.task(n, frames=50)
    world.serve(60.0, task_seconds=0.1)
    assert kinds(world.log, Load) == []


def test_spread_goes_wherever_it_fits():
    world = World(mode="spread")
    for n in range(3):
        world.gpu(f"w{n}", budget_bytes=15)
    world.model("a", 10)
    world.model("b", 5)
    world.model("c", 10)
    world.task("ta", "a")
    world.task("tb", "b")
    world.step()
    assert loads(world.log) == [(f"w{n}", key) for n in range(3) for key in "ab"]


def test_pack_fills_one_device_before_the_next():
    world = World(mode="pack")
    for n in range(3):
        world.gpu(f"w{n}", budget_bytes=20, slots=8)
    for key in "abc":
        world.model(key, 10)
        world.task(key, key)
        world.step(1.0)
    assert len({worker for worker, _ in loads(world.log)}) == 2
    assert [worker for worker, _ in loads(world.log)].count("w0") == 2


def test_an_idle_model_leaves_before_anything_is_refused():
    world = World()
    world.gpu("w", budget_bytes=25)
    for key in "abc":
        world.model(key, 10)
    world.task("t1", "a")
    world.step()
    world.task("t2", "b")
    world.step(1.0)
    world.finish("t1", "t2")
    world.step(100.0)
    world.task("t3", "c")
    # "a" was used longer ago.
    decisions = world.step(1.0)
    assert [(type(d), d.model_key) for d in decisions] == [
        (Unload, "a"),
        (Load, "c"),
        (Dispatch, "c"),
    ]


def test_a_model_in_use_leaves_only_after_its_tasks():
    world = World()
    world.gpu("w", budget_bytes=10, slots=1)
    world.model("a", 10)
    world.model("b", 10)
    for n in range(4):
        world.task(("a", n), "a")
    world.step()
    world.task("late", "b")
    assert world.step(5.0) == []
    assert "in use or has just been loaded" in world.pool.why("late")
    assert world.step(100.0) == []
    assert "room is being made" in world.pool.why("late")
    world.finish(*world.at)
    assert [type(d) for d in world.step()][:2] == [Unload, Load]
    assert world.at == {"late": "w"}


def test_two_models_that_do_not_fit_together_take_turns_of_bounded_number():
    world = World(min_residency_seconds=10.0, load_amortisation=4.0)
    world.gpu("w", budget_bytes=10, slots=2)
    world.model("a", 10)
    world.model("b", 10)
    began = Counter()
    number = 0

    def refill(key):
        nonlocal number
        number += 1
        world.task((key[0], "again", number), key[0])

    for key in "ab":
        for n in range(50):
            world.task((key, n), key)
    began.update(key[0] for key in world.serve(1000.0, load_seconds=5.0, refill=refill))
    # A model stays for four load times (20 s) before it makes room: about 1000 / 27 switches.
    number_of_loads = len(kinds(world.log, Load))
    assert 20 <= number_of_loads <= 40
    assert min(began.values()) > 0.35 * sum(began.values())


def test_tasks_that_alternate_one_by_one_do_not_thrash_either():
    world = World(min_residency_seconds=10.0)
    world.gpu("w", budget_bytes=10, slots=1)
    world.model("a", 10)
    world.model("b", 10)
    for n in range(200):
        world.task(n, "ab"[n % 2])
        world.serve(world.now + 1.0, load_seconds=2.0, task_seconds=0.2)
    world.serve(world.now + 100.0, load_seconds=2.0, task_seconds=0.2)
    assert len(world.pool) == 0
    assert len(kinds(world.log, Load)) <= 32


def test_a_flood_of_one_model_does_not_hold_up_another():
    world = World()
    world.gpu("w", slots=4)
    world.model("flood")
    world.model("b")
    for n in range(1000):
        world.task(n, "flood", frames=100)
    world.step()
    for n in range(5):
        world.task(("b", n), "b", frames=100)
    world.step(10.0)
    order = []
    while len([k for k in order if isinstance(k, tuple)]) < 5:
        world.finish(next(iter(world.at)))
        order += tasks_of(world.step())
    assert len(order) <= 11


def test_time_without_work_gives_no_right_to_catch_up():
    world = World()
    world.gpu("w", slots=8)
    world.model("old")
    world.model("new")
    world.task("first", "new", frames=100)
    world.step()
    world.finish("first")
    for n in range(100):
        world.task(n, "old", frames=100)
        world.step()
        world.finish(n)
    world.step()
    for n in range(9):
        world.task(("new", n), "new", frames=100)
        world.task(("old", n), "old", frames=100)
    got = Counter(key[0] for key in tasks_of(world.step()))
    assert sorted(got.values()) == [4, 5]


def test_weights_are_shares():
    world = World()
    world.gpu("w", slots=4)
    world.model("one")
    world.model("three", weight=3.0)
    for n in range(400):
        world.task(("one", n), "one", frames=100)
        world.task(("three", n), "three", frames=100)
    world.step(1.0)
    world.step(1.0)
    got = Counter()
    for _ in range(200):
        world.finish(next(iter(world.at)))
        got.update(key[0] for key in tasks_of(world.step()))
    assert got["three"] == pytest.approx(3 * got["one"], rel=0.1)


def test_a_flood_on_all_devices_makes_room_for_another_model():
    world = World()
    for n in range(4):
        world.gpu(f"w{n}", budget_bytes=10, slots=2)
    world.model("flood", 10)
    world.model("b", 10)
    for n in range(2000):
        world.task(n, "flood")
    world.serve(30.0)
    world.task("late", "b")
    began = world.serve(60.0)
    assert began["late"] < 45.0
    assert world.pool.snapshot()["models"]["flood"]["replicas"]["ready"] >= 2


def test_pinned_models_stay_where_they_are_pinned():
    world = World()
    for n in range(3):
        world.gpu(f"w{n}", budget_bytes=10)
    world.model("a", 10)
    world.model("b", 10)
    world.pool.pin_model("a", ["GPU-w1", "GPU-later"], now_seconds=0.0)
    world.step()
    assert loads(world.log) == [("w1", "a")]
    for n in range(50):
        world.task(("a", n), "a")
        world.task(("b", n), "b")
    world.serve(500.0)
    assert {worker for worker, key in loads(world.log) if key == "a"} == {"w1"}
    assert {worker for worker, key in loads(world.log) if key == "b"} == {"w0", "w2"}
    world.gpu("w3", uuid="GPU-later", budget_bytes=10)
    world.step(10.0)
    assert ("w3", "a") in loads(world.log)
    world.pool.pin_model("a", [], now_seconds=world.now)
    world.step(1000.0)
    assert world.pool.snapshot()["models"]["a"]["replicas"] == {"ready": 1}


@pytest.mark.parametrize("wish", ["pin", "replicas"])
def test_what_the_user_wants_to_stay_is_never_evicted(wish):
    world = World()
    world.gpu("w", budget_bytes=10)
    world.model("a", 10)
    world.model("b", 10)
    if wish == "pin":
        world.pool.pin_model("a", ["GPU-w"], now_seconds=0.0)
    else:
        world.pool.request_replicas("a", 1, now_seconds=0.0)
    world.step()
    world.task("t", "b")
    for _ in range(20):
        assert world.step(100.0) == []
    assert world.models_on("w") == {"a": "ready"}
    world.pool.pin_model("a", (), now_seconds=world.now)
    world.pool.request_replicas("a", None, now_seconds=world.now)
    world.step(1.0)
    assert world.at == {"t": "w"}


def test_a_sibling_in_the_process_does_not_load_what_is_leaving():
    world = World(instant=False)
    world.gpu("w0", uuid="GPU-0", process="p", slots=1)
    world.model("m")
    world.task("t", workers=["w0"])
    world.step()
    world.loaded("w0")
    world.step()
    world.pool.unload_model("m", now_seconds=0.0)
    world.gpu("w1", uuid="GPU-0", process="p", slots=1)
    world.task("u", workers=["w1"])
    assert world.step(1.0) == []
    world.finish("t")
    assert [type(d) for d in world.step(1.0)] == [Unload]
    world.pool.unload_finished("w0", "m", now_seconds=world.now)
    assert loads(world.step(1.0)) == [("w1", "m")]


def test_pinning_to_absent_devices_waits_for_them():
    world = World()
    world.gpu("w")
    world.model("m")
    world.pool.pin_model("m", ["GPU-x"], now_seconds=0.0)
    world.task("t")
    world.step(10.0)
    assert "pinned to devices of which none is connected" in world.pool.why("t")


def test_a_number_of_replicas_is_kept():
    world = World(idle_unload_seconds=10.0)
    for n in range(4):
        world.gpu(f"w{n}")
    world.model("m")
    world.pool.request_replicas("m", 3, now_seconds=0.0)
    world.step()
    world.step(100.0)
    assert len(loads(world.log)) == 3
    assert kinds(world.log, Unload) == []
    world.pool.remove_worker("w0", now_seconds=world.now)
    world.step(1.0)
    assert world.pool.snapshot()["models"]["m"]["replicas"] == {"ready": 3}
    world.pool.request_replicas("m", 1, now_seconds=world.now)
    world.step(1.0)
    assert world.pool.snapshot()["models"]["m"]["replicas"] == {"ready": 1}


def test_unload_by_the_user_waits_for_tasks_and_takes_the_waiting_ones_up_again():
    world = World(instant=False)
    world.gpu("w", slots=1)
    world.model("m")
    for n in range(4):
        world.task(n)
    world.step()
    world.pool.unload_model("m", now_seconds=0.0)
    assert world.step() == []
    world.loaded("w")
    # It was still loading: what is loaded leaves again.
    assert [type(d) for d in world.step()] == [Unload]
    world.pool.unload_failed("w", "m", reason="still leased", now_seconds=1.0)
    assert tasks_of(world.step()) == [0, 1]
    world.pool.unload_model("m", now_seconds=1.0)
    world.finish(0)
    assert world.step() == []
    world.finish(1)
    assert [type(d) for d in world.step()] == [Unload]
    world.pool.unload_finished("w", "m", now_seconds=2.0)
    assert [type(d) for d in world.step(2.0)] == [Load]


def test_models_larger_than_said_push_idle_ones_out():
    world = World(instant=False)
    world.gpu("w", budget_bytes=20)
    world.model("a", 10)
    world.model("b", 10)
    world.task("ta", "a")
    world.task("tb", "b")
    world.step()
    world.loaded("w", "a", 10)
    world.loaded("w", "b", 15)
    world.step()
    world.finish("ta")
    decisions = world.step(10.0)
    assert [(type(d), d.model_key) for d in decisions] == [(Unload, "a")]
    world.pool.unload_finished("w", "a", now_seconds=10.0)
    world.pool.validate()


# -- new versions --


@pytest.mark.parametrize("redirect", [False, True])
def test_a_new_version_comes_beside_the_old_one_and_takes_over(redirect):
    world = World(instant=False)
    for n in range(2):
        world.gpu(f"w{n}", slots=1, budget_bytes=20)
    world.model("v1", 10)
    world.model("v2", 10)
    for n in range(8):
        world.task(n, "v1", frames=10_000)
    for address in ("w0", "w1"):
        world.pool.report_worker(address, resident={"v1": 10}, now_seconds=0.0)
    assert len(tasks_of(world.step())) == 4
    world.pool.supersede_model("v1", "v2", redirect_waiting=redirect, now_seconds=0.0)
    assert loads(world.step()) == [("w0", "v2"), ("w1", "v2")]
    world.loaded("w0", "v2")
    world.finish(0)
    # Until both replicas are there, the old version serves.
    assert [d.model_key for d in world.step()] == ["v1"]
    world.loaded("w1", "v2")
    world.task("new", "v2")
    seen = []
    while world.at:
        world.finish(next(iter(world.at)))
        seen += world.step(1.0)
    assert {d.model_key for d in seen if isinstance(d, Dispatch)} == (
        {"v2"} if redirect else {"v1", "v2"}
    )
    assert {(d.worker, d.model_key) for d in kinds(seen, Unload)} == {("w0", "v1"), ("w1", "v1")}
    assert kinds(world.log, Fail) == []
    assert len(world.pool) == 0


def test_a_new_version_that_does_not_fit_beside_takes_the_old_ones_place():
    world = World()
    world.gpu("w", slots=1, budget_bytes=10)
    world.model("v1", 10)
    world.model("v2", 10)
    for n in range(20):
        world.task(n, "v1")
    world.serve(5.0)
    world.pool.supersede_model("v1", "v2", redirect_waiting=True, now_seconds=world.now)
    world.serve(100.0)
    assert len(world.pool) == 0
    assert world.models_on("w") == {"v2": "ready"}
    assert kinds(world.log, Fail) == []


def test_a_new_version_that_does_not_load_leaves_the_old_one_in_service():
    world = World(instant=False)
    world.gpu("w", slots=1, budget_bytes=20)
    world.model("v1", 10)
    world.model("v2", 10)
    world.pool.report_worker("w", resident={"v1": 10}, now_seconds=0.0)
    for n in range(6):
        world.task(n, "v1")
    world.task("new", "v2")
    world.step()
    world.pool.supersede_model("v1", "v2", now_seconds=0.0)
    world.pool.load_failed("w", "v2", reason="bad weights", now_seconds=0.0)
    (failed,) = kinds(world.step(1.0), Fail)
    assert (failed.task, failed.kind, failed.model_key) == ("new", "load", "v2")
    while world.at:
        world.finish(next(iter(world.at)))
        world.step(1.0)
    assert len(world.pool) == 0
    assert world.models_on("w") == {"v1": "ready"}


def test_back_to_the_version_before():
    world = World()
    world.gpu("w", budget_bytes=20)
    for key in ("v1", "v2"):
        world.model(key, 10)
    world.task("t", "v1")
    world.step()
    world.pool.supersede_model("v1", "v2", redirect_waiting=True, now_seconds=0.0)
    world.finish("t")
    world.step(1.0)
    assert world.models_on("w") == {"v2": "ready"}
    world.pool.supersede_model("v2", "v1", redirect_waiting=True, now_seconds=world.now)
    world.step(1.0)
    world.task("u", "v1")
    world.task("v", "v2")
    assert {d.model_key for d in kinds(world.step(1.0), Dispatch)} == {"v1"}


# -- failures --


def test_after_a_failed_load_others_take_over_and_the_device_backs_off():
    world = World(instant=False, load_backoff_seconds=5.0)
    for n in range(2):
        world.gpu(f"w{n}")
    world.model("m")
    world.task("t")
    (first,) = world.step()
    world.pool.load_failed(first.worker, "m", reason="no memory", now_seconds=0.0)
    (second,) = world.step()
    assert second.worker != first.worker
    world.loaded(second.worker)
    world.step()
    assert world.at == {"t": second.worker}


def test_a_model_that_loads_nowhere_fails_its_tasks_with_the_reason():
    world = World(instant=False, retry_failed_seconds=30.0)
    for n in range(2):
        world.gpu(f"w{n}")
    world.model("m")
    for n in range(3):
        world.task(n)
    for _ in range(2):
        for load in kinds(world.step(), Load):
            world.pool.load_failed(load.worker, "m", reason="no such file", now_seconds=world.now)
    failed = kinds(world.step(), Fail)
    assert [d.task for d in failed] == [0, 1, 2]
    assert {d.kind for d in failed} == {"load"}
    assert "no such file" in failed[0].reason
    assert len(world.pool) == 0
    # For a while others fail at once, without a load; then it is tried again.
    world.task("soon")
    assert [type(d) for d in world.step(1.0)] == [Fail]
    world.now = 60.0
    world.task("later")
    assert [type(d) for d in world.step()] == [Load]


def test_a_failure_before_a_later_success_is_history():
    world = World(instant=False, load_backoff_seconds=5.0)
    for n in range(2):
        world.gpu(f"w{n}")
    world.model("m")
    world.task("t")
    (first,) = world.step()
    world.pool.load_failed(first.worker, "m", reason="no memory", now_seconds=0.0)
    (second,) = world.step()
    world.loaded(second.worker)
    world.step()
    world.pool.remove_worker(second.worker, now_seconds=1.0)
    assert world.step(1.0) == []
    assert "the next attempt is in 4 s" in world.pool.why("t")
    assert [type(d) for d in world.step(5.0)] == [Load]


def test_attempts_are_bounded_on_many_devices():
    world = World(instant=False, max_load_attempts=8)
    for n in range(100):
        world.gpu(f"w{n}", slots=1)
    world.model("m")
    world.task("t")
    attempts = 0
    while not kinds(world.log, Fail):
        for load in kinds(world.step(1.0), Load):
            attempts += 1
            world.pool.load_failed(load.worker, "m", reason="boom", now_seconds=world.now)
    assert attempts == 8


def test_several_tries_wait_in_between():
    world = World(instant=False, load_tries_per_device=2, load_backoff_seconds=5.0)
    world.gpu("w")
    world.model("m")
    world.task("t")
    world.step()
    world.pool.load_failed("w", "m", reason="busy", now_seconds=0.0)
    assert world.step(1.0) == []
    assert "failed to load (busy); the next attempt is in 4 s" in world.pool.why("t")
    wake = world.pool.next_wake_seconds()
    assert wake is not None
    assert [type(d) for d in world.step(5.0)] == [Load]
    world.loaded("w")
    assert tasks_of(world.step()) == ["t"]


def test_a_model_too_large_for_every_device_is_refused():
    world = World()
    world.gpu("w", budget_bytes=10)
    world.model("m", 11)
    world.task("t")
    (failed,) = world.step()
    assert (failed.task, failed.kind) == ("t", "too_large")
    assert "11 bytes" in failed.reason


def test_tasks_restricted_to_a_device_that_cannot_load_fail_though_others_can():
    world = World(instant=False)
    for address in "ab":
        world.gpu(address)
    world.model("m")
    world.task("anywhere")
    world.task("here", workers=["a"])
    for load in kinds(world.step(), Load):
        if load.worker == "b":
            world.loaded("b")
        else:
            world.pool.load_failed("a", "m", reason="driver", now_seconds=0.0)
    for load in kinds(world.step(1.0), Load):
        assert load.worker == "b" or not kinds(world.log, Fail)
        world.loaded("b")
    world.step(1.0)
    assert [d.task for d in kinds(world.log, Fail)] == ["here"]
    assert world.at == {"anywhere": "b"}


def test_a_paused_worker_that_could_hold_a_model_keeps_its_tasks_waiting():
    world = World()
    world.gpu("small", budget_bytes=10)
    world.gpu("large", budget_bytes=100)
    world.model("m", 50)
    world.pool.set_worker_accepting("large", False, now_seconds=0.0)
    world.task("t")
    assert world.step(1.0) == []
    world.pool.set_worker_accepting("large", True, now_seconds=1.0)
    world.step(1.0)
    assert world.at == {"t": "large"}


def test_a_model_that_is_there_after_all_serves_at_once():
    world = World(instant=False)
    world.gpu("w")
    world.model("m")
    world.task("t")
    world.step()
    world.pool.load_failed("w", "m", reason="busy", now_seconds=0.0)
    assert [type(d) for d in world.step()] == [Fail]
    world.pool.report_worker("w", resident={"m": 10}, now_seconds=1.0)
    world.task("u")
    assert tasks_of(world.step(1.0)) == ["u"]


def test_late_answers_of_gone_workers_are_no_error():
    world = World(instant=False)
    world.gpu("w")
    world.model("m")
    world.task("t")
    world.step()
    world.pool.remove_worker("w", now_seconds=0.0)
    world.loaded("w")
    world.pool.load_failed("w", "m", reason="gone", now_seconds=0.0)
    world.pool.unload_finished("w", "m", now_seconds=0.0)
    world.pool.unload_failed("w", "m", reason="gone", now_seconds=0.0)
    world.pool.set_worker_accepting("w", True, now_seconds=0.0)
    world.pool.validate()
    assert "t" in world.pool
