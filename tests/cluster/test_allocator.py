"""Which tasks the allocator takes over and where it sends them: two workers with GPUs, one without.

The GPUs are stand-ins. tests/cluster/test_allocator_failures.py has what goes wrong.
"""

from __future__ import annotations

import dask
import dask.array as da
import dask.bag as db
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from distributed import Client, wait

import daskshare
from daskshare.client import SharedModel
from daskshare.errors import ConfigurationError, ModelLoadError, ModelTooLargeError
from tests.cluster.conftest import TIMEOUT, start
from tests.cluster.stand_ins import (
    GIB,
    PickySpec,
    books,
    decisions,
    double,
    fake,
    frames,
    no_hook_fails,
    open_gate,
    set_status,
    start_stand_ins,
    until,
    wait_at_gate,
    where,
)

GPUS = {0: "GPU-0", 1: "GPU-1"}


@pytest.fixture(scope="module")
def cluster(importable_by_subprocesses):
    with (
        dask.config.set({"distributed.scheduler.validate": True}),
        start(n_workers=3, threads_per_worker=2) as cluster,
        Client(cluster, set_as_default=False) as client,
        no_hook_fails(),
    ):
        start_stand_ins(client, GPUS)
        # The allocator knows all devices, so that no test depends on who is first.
        daskshare.load(client, fake("warm"), devices=["GPU-0", "GPU-1"])
        daskshare.unload(client, fake("warm"))
        yield cluster


@pytest.fixture
def client(cluster):
    with Client(cluster, set_as_default=False) as client, client.as_current():
        yield client


@pytest.fixture
def addresses(cluster):
    """Addresses of the workers by name."""
    return {ws.name: address for address, ws in cluster.scheduler.workers.items()}


def through_bag(model):
    bag = db.from_sequence(range(8), npartitions=4).map(frames).map_partitions(rows_of, model)
    return bag.compute(), 4


def rows_of(parts, model):
    return [float(model(part)[0, 0]) for part in parts]


def through_bag_and_fused(model):
    bag = db.from_sequence(range(6), npartitions=3).map(frames).map(model).map(first)
    return bag.compute(), 3


def first(output):
    return float(np.asarray(output)[0, 0])


def through_delayed(model):
    parts = [dask.delayed(first)(dask.delayed(model)(frames(i))) for i in range(3)]
    return list(dask.compute(*parts)), 3


def through_submit(model):
    client = Client.current()
    futures = [client.submit(double, model, i) for i in range(3)]
    return client.gather(futures), 3


def through_submit_in_keyword_and_list(model):
    client = Client.current()
    return [client.submit(sum_of, {"models": [model, None]}, values=[0, 1]).result()], 1


def sum_of(options, values):
    return sum(double(options["models"][0], value) for value in values)


def through_map(model):
    return [first(o) for o in Client.current().gather(Client.current().map(model, FRAMES))], 4


FRAMES = [frames(i) for i in range(4)]


def through_map_of_a_closure(model):
    futures = Client.current().map(lambda i: float(model(np.full((1, 2), i))[0, 0]), range(4))
    return Client.current().gather(futures), 4


def through_map_blocks(model):
    array = da.from_array(np.arange(6, dtype=np.float32).reshape(6, 1), chunks=(2, 1))
    return (array + 0).map_blocks(model, dtype=np.float32).compute().ravel().tolist(), 3


def through_dataframe(model):
    table = dd.from_pandas(pd.DataFrame({"a": np.arange(6.0)}), npartitions=3)
    out = (table + 0).map_partitions(in_table, model, meta={"a": float})
    return out.compute()["a"].tolist(), 3


def in_table(part, model):
    return pd.DataFrame({"a": np.asarray(model(part[["a"]].to_numpy()))[:, 0].astype(float)})


def through_from_delayed(model):
    parts = [dask.delayed(in_table)(pd.DataFrame({"a": [float(i)]}), model) for i in range(3)]
    return dd.from_delayed(parts, meta={"a": float}).compute()["a"].tolist(), 3


def through_bag_to_dataframe(model):
    bag = db.from_sequence(range(4), npartitions=2).map(frames).map_partitions(records_of, model)
    return bag.to_dataframe(meta={"a": float}).compute()["a"].tolist(), 2


def records_of(parts, model):
    return [{"a": row} for row in rows_of(parts, model)]


def through_annotated_handle(model):
    name, factor = model.name, model.spec.factor
    with dask.annotate(model=model):
        futures = Client.current().map(by_name, range(3), name=name, factor=factor, pure=False)
    return Client.current().gather(futures), 3


def through_annotated_key_in_delayed(model):
    with dask.annotate(model=model.key):
        parts = [dask.delayed(by_name)(i, model.name, model.spec.factor) for i in range(3)]
    return list(dask.compute(*parts, optimize_graph=False)), 3


def by_name(value, name, factor):
    """Makes its model itself, so that nothing in its task tells."""
    return double(fake(name, factor=factor), value)


WAYS = [value for name, value in dict(globals()).items() if name.startswith("through_")]


@pytest.mark.parametrize("through", WAYS, ids=lambda way: way.__name__.removeprefix("through_"))
def test_tasks_are_recognised_whatever_built_them(client, addresses, through):
    model = fake(through.__name__, factor=3)
    got, num_tasks = through(model)
    flat = [v[0] if isinstance(v, list) else v for v in got]
    want = 3.0 if len(flat) == 1 else [3.0 * i for i in range(len(flat))]
    assert flat == (want if isinstance(want, list) else [want])
    sent = decisions(client, model)
    assert len(sent) == num_tasks
    assert {d["worker"] for d in sent} <= {addresses[0], addresses[1]}
    assert all(d["reason"] for d in sent)


def test_the_way_back_from_an_annotation_is_the_models_key(client):
    model = fake("annotated-and-seen")
    with dask.annotate(model=model):
        future = client.submit(annotations_of_this_task)
    assert future.result(TIMEOUT) == {"model": model.key}


def annotations_of_this_task():
    from distributed import get_worker

    worker = get_worker()
    return dict(worker.state.tasks[worker.get_current_task()].annotations)


def test_tasks_without_a_model_are_daskss_own(client, addresses):
    plain = client.map(double_plain, range(20), pure=False)
    assert client.gather(plain) == [2 * i for i in range(20)]
    there = client.submit(double_plain, 4, workers=[addresses[2]], pure=False)
    assert there.result(TIMEOUT) == 8
    assert books(client)["held"] == 0

    # Dask's own state of them is untouched.
    async def restrictions(dask_scheduler):
        return [ts.worker_restrictions for ts in dask_scheduler.tasks.values()]

    assert client.run_on_scheduler(restrictions).count({addresses[2]}) == 1
    assert "no model" in daskshare.why(client, there)


def double_plain(value):
    return 2 * value


def test_preprocessing_runs_without_a_gpu_and_models_only_on_gpus(client, addresses):
    model = fake("after-preprocessing")
    data = client.map(frames, range(20), pure=False, workers=[addresses[2]])
    results = client.map(model, data)
    assert [first(r) for r in client.gather(results)] == [2.0 * i for i in range(20)]
    used = {d["worker"] for d in decisions(client, model)}
    assert used <= {addresses[0], addresses[1]}


@pytest.mark.parametrize("name", [0, 1])
def test_the_users_workers_are_kept(client, addresses, name):
    futures = client.map(where, [fake(f"bound-{name}")] * 6, workers=[addresses[name]], pure=False)
    assert set(client.gather(futures)) == {addresses[name]}


def test_a_worker_named_by_its_alias_is_kept(client, addresses):
    futures = client.map(where, [fake("alias")] * 4, workers=[1], pure=False)
    assert set(client.gather(futures)) == {addresses[1]}


def test_workers_that_are_only_preferred_may_be_others(client, addresses):
    future = client.submit(
        where,
        fake("preferred"),
        workers=["tcp://127.0.0.1:1"],
        allow_other_workers=True,
        pure=False,
    )
    assert future.result(TIMEOUT) in {addresses[0], addresses[1]}


def test_a_task_for_a_worker_that_is_not_there_waits_and_says_so(client):
    future = client.submit(where, fake("nowhere"), workers=["tcp://127.0.0.1:1"], pure=False)
    wait(client.submit(where, fake("elsewhere"), pure=False), timeout=TIMEOUT)
    assert not future.done()
    assert "tcp://127.0.0.1:1" in daskshare.why(client, future)


def test_cancelled_tasks_leave_the_books(client, addresses):
    model = fake("cancelled")
    blocked = [
        client.submit(wait_at_gate, model, "cancel", workers=[w], pure=False)
        for w in (addresses[0], addresses[1])
        for _ in range(2)
    ]
    waiting = client.map(where, [model] * 50, pure=False)
    done = client.submit(double, fake("beside"), 1.0, pure=False)
    client.cancel(waiting)
    client.run(open_gate, "cancel")
    wait(blocked, timeout=TIMEOUT)
    assert done.result(TIMEOUT) == 2.0
    del blocked, waiting, done
    until(lambda: books(client)["held"] == 0, client)
    assert books(client)["in_pool"] == 0


def test_load_ahead_and_unload(client, addresses):
    model = fake("ahead")
    ready = daskshare.load(client, model, replicas=2)
    assert set(ready) == {addresses[0], addresses[1]}
    stats = daskshare.stats(client)
    assert {w for w, s in stats.items() if model.key in s["models"]} == set(ready)
    assert {len(decisions(client, model, "load"))} == {2}
    assert daskshare.load(client, model, replicas=2) == ready
    assert sorted(daskshare.unload(client, model)) == sorted(ready)
    states = {s["models"][model.key]["state"] for s in map(daskshare.stats(client).get, ready)}
    assert states == {"unloaded"}
    assert daskshare.unload(client, model) == []
    assert client.submit(double, model, 4.0).result(TIMEOUT) == 8.0


def test_a_pinned_model_runs_where_it_is_pinned(client, addresses):
    model = fake("pinned")
    assert daskshare.load(client, model, devices=["GPU-1"]) == [addresses[1]]
    futures = client.map(where, [model] * 12, pure=False)
    assert set(client.gather(futures)) == {addresses[1]}
    assert daskshare.load(client, model, devices=[addresses[0]]) == [addresses[0]]
    daskshare.unload(client, model)


def test_what_cannot_be_loaded_is_an_error_of_load(client):
    with pytest.raises(ModelLoadError, match="no weights"):
        daskshare.load(client, fake("unloadable", load_error="no weights"))
    with pytest.raises(ModelTooLargeError, match="largest budget"):
        daskshare.load(client, fake("whale", model_bytes=11 * GIB))
    with pytest.raises(ConfigurationError, match="GPU-7"):
        daskshare.load(client, fake("no-such-device"), devices=["GPU-7"])
    with pytest.raises(ModelLoadError, match="expected 3"):
        daskshare.load(client, fake("three"), replicas=3, timeout_seconds=0.5)
    daskshare.unload(client, fake("three"))


def test_a_model_that_fails_on_one_gpu_is_served_by_the_other(client, addresses):
    model = SharedModel(PickySpec(name="picky-device", bad_device="GPU-0"))
    futures = client.map(where, [model] * 10, pure=False)
    assert set(client.gather(futures)) == {addresses[1]}


def test_a_task_whose_model_fits_nowhere_fails_at_once(client):
    future = client.submit(double, fake("too-large", model_bytes=11 * GIB), 1.0)
    with pytest.raises(ModelTooLargeError):
        future.result(TIMEOUT)


def test_new_weights_take_over_under_load(client):
    old, new = fake("v1", factor=2), fake("v2", factor=5)
    daskshare.load(client, old, replicas=2)
    running = client.map(double, [old] * 40, range(40), pure=False)
    ready = daskshare.load(client, new, replaces=old)
    assert ready
    later = client.map(double, [new] * 40, range(40), pure=False)
    assert client.gather(running) == [2.0 * i for i in range(40)]
    assert client.gather(later) == [5.0 * i for i in range(40)]
    until(lambda: not books(client)["models"][old.key]["replicas"], client)
    stats = daskshare.stats(client).values()
    assert {s["models"][old.key]["state"] for s in stats if old.key in s["models"]} == {"unloaded"}
    daskshare.unload(client, new)


def test_why_and_stats_name_reasons(client, addresses):
    model, others = fake("reasons"), fake("others")
    # Elsewhere than behind the gates.
    daskshare.load(client, others, devices=["GPU-1"])
    gates = [
        client.submit(wait_at_gate, model, "reasons", workers=[addresses[0]], pure=False)
        for _ in range(3)
    ]
    extra = client.map(where, [model] * 6, workers=[addresses[0]], pure=False)
    client.submit(double, others, 1.0, pure=False).result(TIMEOUT)
    sentence = daskshare.why(client, extra[-1])
    assert sentence.startswith(f"Task {extra[-1].key!r} waits")
    assert sentence.endswith(".")
    assert addresses[0] in daskshare.why(client, gates[0])
    client.run(open_gate, "reasons")
    client.gather(extra)
    assert "finished" in daskshare.why(client, gates[0]) or "memory" in daskshare.why(
        client, gates[0]
    )
    assert "knows no task" in daskshare.why(client, "nobody")
    placement = daskshare.stats(client)[addresses[0]]["placement"]
    assert placement["failure"] == ""
    kinds = {d["kind"] for d in placement["decisions"]}
    assert "dispatch" in kinds
    assert all(d["reason"] for d in placement["decisions"])


def test_a_task_that_secedes_gives_its_place_to_those_it_waits_for(client, addresses):
    model = fake("seceding")
    # As many as a worker holds, and each waits for another one there.
    futures = [client.submit(outer, model, i, workers=[addresses[0]], pure=False) for i in range(6)]
    assert client.gather(futures) == [2.0 * i for i in range(6)]


def outer(model, value):
    from distributed import get_worker, worker_client

    with worker_client() as client:
        inner = client.submit(double, model, value, workers=[get_worker().address], pure=False)
        return inner.result(TIMEOUT)


def test_priorities_order_the_tasks_of_a_model(client, addresses):
    model = fake("urgent")
    bound = {"workers": [addresses[0]], "pure": False}
    gates = client.map(wait_at_gate, [model] * 3, gate="priorities", **bound)
    until(lambda: books(client)["workers"][addresses[0]]["in_flight"] == 3, client)
    low = client.map(where, [model] * 3, priority=-5, **bound)
    until(lambda: books(client)["in_pool"] == 6, client)
    high = client.map(where, [model] * 3, priority=5, **bound)
    until(lambda: books(client)["in_pool"] == 9, client)
    client.run(open_gate, "priorities")
    client.gather(gates + low + high)
    sent = [d["task"] for d in decisions(client, model)]
    assert set(sent[3:6]) == {f.key for f in high}
    assert set(sent[6:]) == {f.key for f in low}


def test_a_paused_worker_gets_nothing_until_it_goes_on(client, addresses):
    model = fake("pausing")
    daskshare.load(client, model, replicas=2)
    paused = addresses[0]
    set_status(client, paused, "paused")
    try:
        bound = client.submit(where, model, workers=[paused], pure=False)
        futures = client.map(where, [model] * 12, pure=False)
        assert set(client.gather(futures)) == {addresses[1]}
        assert "paused" in daskshare.why(client, bound)
    finally:
        set_status(client, paused, "running")
    assert bound.result(TIMEOUT) == paused
    daskshare.unload(client, model)


def test_busy_workers_are_not_scaled_away(client, addresses):
    gate = client.submit(wait_at_gate, fake("busy"), "scaling", workers=[addresses[0]], pure=False)
    until(lambda: books(client)["workers"][addresses[0]]["in_flight"] == 1, client)

    async def closable(dask_scheduler):
        return dask_scheduler.workers_to_close(n=3)

    assert set(client.run_on_scheduler(closable)) == {addresses[1], addresses[2]}
    client.run(open_gate, "scaling")
    gate.result(TIMEOUT)


def test_tasks_in_a_long_backlog_are_not_taken_for_ones_that_no_worker_may_run(client, addresses):
    model = fake("patient")
    gates = client.map(
        wait_at_gate, [model] * 3, gate="patience", workers=[addresses[0]], pure=False
    )
    waiting = client.map(where, [model] * 5, workers=[addresses[0]], pure=False)
    until(lambda: books(client)["workers"][addresses[0]]["in_flight"] == 3, client)

    async def check_after_a_long_time(dask_scheduler):
        dask_scheduler.no_workers_timeout = 1000
        try:
            parked = dask_scheduler.unrunnable
            assert len(parked) >= 4
            for ts in parked:
                parked[ts] -= 2000
            dask_scheduler.plugins["daskshare"].allocator._spare_from_timeout()
            dask_scheduler._check_no_workers()
        finally:
            dask_scheduler.no_workers_timeout = None

    client.run_on_scheduler(check_after_a_long_time)
    client.run(open_gate, "patience")
    assert set(client.gather(gates + waiting)) == {addresses[0]}


def test_nothing_is_left_at_the_end(client):
    left = books(client)
    assert (left["held"], left["in_pool"], left["deaths"]) == (0, 0, 0)
