"""Finding the model that a task carries; tests/cluster has the graphs of real collections."""

from __future__ import annotations

import functools
from collections import namedtuple

import cloudpickle
import dask.bag as db
import numpy as np
import pytest
from dask._task_spec import Alias, DataNode, Dict, List, Task, TaskRef, convert_legacy_task

from daskshare._allocator_recognise import ModelFinder, annotated_model
from daskshare.client import SharedModel
from daskshare.testing import FakeSpec

MODEL = SharedModel(FakeSpec(name="found"))
Pair = namedtuple("Pair", "left right")


def call(data, model=None, *, keyword=None):
    return data


def names_a_global(data):
    return MODEL(data)


class Pipeline:
    def __init__(self, model):
        self.model = model

    def __call__(self, data):
        return self.model(data)

    def run(self, data):
        return self.model(data)


def by_value(function):
    """As a function of a notebook arrives on the scheduler."""
    return cloudpickle.loads(cloudpickle.dumps(function))


def closure():
    model = SharedModel(FakeSpec(name="found"))
    return lambda data: [model(part) for part in data]


def default(data, model=MODEL):
    return model(data)


def nested(depth):
    value = MODEL
    for _ in range(depth):
        value = [value]
    return value


CARRIERS = {
    "function": Task("k", MODEL, 1),
    "argument": Task("k", call, 1, MODEL),
    "keyword": Task("k", call, 1, keyword=MODEL),
    "partial": Task("k", functools.partial(call, model=MODEL), 1),
    "partial in partial": Task("k", functools.partial(functools.partial(call, MODEL)), 1),
    "list": Task("k", call, [1, MODEL]),
    "tuple in list": Task("k", call, [(1, MODEL)]),
    "set": Task("k", call, {MODEL}),
    "dict": Task("k", call, {"a": {"b": MODEL}}),
    "named tuple": Task("k", call, Pair(1, MODEL)),
    "nested task": Task("k", call, Task(None, MODEL, TaskRef("x"))),
    "dask list": Task("k", call, List(TaskRef("x"), MODEL)),
    "dask dict": Task("k", call, Dict({"a": TaskRef("x"), "b": MODEL})),
    "data": DataNode("k", [MODEL]),
    "fused": Task.fuse(Task("x", call, 1), Task("k", MODEL, TaskRef("x"))),
    "legacy": convert_legacy_task("k", (call, (MODEL, 1)), ()),
    "bound method": Task("k", Pipeline(MODEL).run, 1),
    "callable object": Task("k", Pipeline(MODEL), 1),
    "method of the model": Task("k", MODEL.__call__, 1),
    "closure": Task("k", closure(), 1),
    "default": Task("k", default, 1),
    "global": Task("k", names_a_global, 1),
    "deep": Task("k", call, nested(20)),
}


@pytest.mark.parametrize("task", CARRIERS.values(), ids=CARRIERS)
def test_a_model_is_found_wherever_it_is(task):
    assert ModelFinder().find(task) == MODEL


@pytest.mark.parametrize("task", CARRIERS.values(), ids=CARRIERS)
def test_a_model_is_found_after_a_journey(task):
    assert ModelFinder().find(by_value(task)) == MODEL


NOTHING = {
    "plain": Task("k", call, 1, "model", keyword=[1.0, None, b"", slice(3)]),
    "reference": Task("k", call, TaskRef("x")),
    "alias": Alias("k", "x"),
    "array": Task("k", np.sum, np.ones((3, 3), object)),
    "class": Task("k", call, SharedModel),
    "spec": Task("k", call, MODEL.spec),
    "unbound cell": Task("k", lambda: later, 1),
}
if False:
    later = None


@pytest.mark.parametrize("task", NOTHING.values(), ids=NOTHING)
def test_other_tasks_carry_none(task):
    assert ModelFinder().find(task) is None


def test_a_structure_that_contains_itself_ends():
    ring = [1]
    ring.append(ring)
    table = {"again": ring}
    ring.append(table)
    assert ModelFinder().find(Task("k", call, ring)) is None

    def recursive(n):
        return recursive(n - 1)

    assert ModelFinder().find(Task("k", recursive, 1)) is None


def test_what_tasks_share_is_looked_into_once():
    class Counting(dict):
        looks = 0

        def values(self):
            Counting.looks += 1
            return super().values()

    shared = functools.partial(call, model=Counting(a=1))
    finder = ModelFinder()
    assert [finder.find(Task(f"k{i}", shared, i)) for i in range(100)] == [None] * 100
    assert Counting.looks == 1


def test_an_optimised_bag_keeps_its_models():
    bag = db.from_sequence(range(6), npartitions=3).map(lambda i: i + 1).map_partitions(MODEL)
    graph = bag.__dask_optimize__(bag.__dask_graph__(), bag.__dask_keys__())
    tasks = [convert_legacy_task(key, task, ()) for key, task in dict(graph).items()]
    finder = ModelFinder()
    assert sum(finder.find(task) == MODEL for task in tasks) == 3


def test_annotations_name_a_model_by_key_or_handle():
    assert annotated_model("a key") == ("a key", None)
    assert annotated_model(MODEL) == (MODEL.key, MODEL)
    assert annotated_model(3) == (None, None)
