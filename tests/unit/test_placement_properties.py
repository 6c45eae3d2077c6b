"""Any sequence of events: books that agree, no task lost or twice, nobody starves."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from daskshare._placement_books import Model
from daskshare._placement_tasks import Task
from daskshare.errors import InvalidInputError
from daskshare.placement import Dispatch, Fail, GpuPool, Load, PlacementOptions, Unload

ADDRESSES = [f"w{n}" for n in range(6)]
MODELS = [f"m{n}" for n in range(4)]
addresses = st.sampled_from(ADDRESSES)
models = st.sampled_from(MODELS)


class PoolMachine(RuleBasedStateMachine):
    """A pool, and beside it a plain account of what is where; each answer comes at any time."""

    def __init__(self):
        super().__init__()
        self.now = 0.0
        self.num_tasks = 0
        self.device: dict[str, str] = {}
        self.paused: set[str] = set()
        self.waiting: dict[int, dict] = {}
        self.running: dict[int, str] = {}
        self.running_with: dict[int, str] = {}
        self.asked: dict[int, dict] = {}
        # What each worker really holds: loading, ready, unloading.
        self.held: dict[tuple[str, str], str] = {}
        self.successor: dict[str, str] = {}

    @initialize(mode=st.sampled_from(["auto", "spread", "pack"]), tries=st.integers(1, 2))
    def start(self, mode, tries):
        self.pool = GpuPool(
            PlacementOptions(
                mode=mode,
                load_tries_per_device=tries,
                idle_unload_seconds=20.0,
                min_residency_seconds=3.0,
                load_amortisation=1.0,
            )
        )
        for n, model in enumerate(MODELS):
            self.pool.add_model(
                model, name=model, estimated_bytes=3 + n, needs_gpu=n != 0, now_seconds=0.0
            )

    # -- events --

    @precondition(lambda self: len(self.device) < len(ADDRESSES))
    @rule(
        data=st.data(),
        device=st.integers(0, 3),
        slots=st.integers(1, 3),
        budget=st.integers(4, 12),
        process=st.sampled_from([None, "p"]),
        offers=st.booleans(),
    )
    def join(self, data, device, slots, budget, process, offers):
        address = data.draw(st.sampled_from([a for a in ADDRESSES if a not in self.device]))
        # The last device is a machine's CPU.
        self.pool.add_worker(
            address,
            device_uuid=f"d{device}",
            budget_bytes=budget,
            slots=slots,
            is_gpu=device != 3,
            process=process,
            resources={"R": 2} if offers else None,
            now_seconds=self.now,
        )
        self.device[address] = f"d{device}"

    @precondition(lambda self: self.device)
    @rule(data=st.data())
    def die(self, data):
        address = data.draw(st.sampled_from(sorted(self.device)))
        lost = self.pool.remove_worker(address, now_seconds=self.now)
        assert sorted(lost) == sorted(k for k, a in self.running.items() if a == address)
        for key in lost:
            del self.running[key]
            self.waiting[key] = self.asked[key]
        del self.device[address]
        self.paused.discard(address)
        self.held = {k: v for k, v in self.held.items() if k[0] != address}

    @precondition(lambda self: self.device)
    @rule(data=st.data(), accepting=st.booleans())
    def pause(self, data, accepting):
        address = data.draw(st.sampled_from(sorted(self.device)))
        self.pool.set_worker_accepting(address, accepting, now_seconds=self.now)
        (self.paused.discard if accepting else self.paused.add)(address)

    @rule(
        model=models,
        urgency=st.integers(0, 2),
        frames=st.sampled_from([None, 10, 1000, 100_000]),
        workers=st.one_of(st.none(), st.none(), st.frozensets(addresses, min_size=1, max_size=2)),
        resources=st.sampled_from([None, None, None, {"R": 1}]),
        data_at=st.one_of(st.none(), addresses),
        alone=st.sampled_from([False] * 7 + [True]),
        number=st.integers(1, 4),
    )
    def arrive(self, model, urgency, frames, workers, resources, data_at, alone, number):
        for _ in range(number):
            key = self.num_tasks
            self.num_tasks += 1
            self.pool.add_task(
                key,
                model,
                priority=(urgency, key),
                frames=frames,
                workers=workers,
                resources=resources,
                dependency_bytes={data_at: 10**9} if data_at else None,
                alone=alone,
                now_seconds=self.now,
            )
            self.asked[key] = {"model": model, "workers": workers, "alone": alone}
            self.waiting[key] = self.asked[key]
        self.decide()

    @precondition(lambda self: self.running)
    @rule(data=st.data(), ok=st.booleans())
    def finish(self, data, ok):
        key = data.draw(st.sampled_from(sorted(self.running)))
        assert self.pool.finish_task(key, ok=ok, now_seconds=self.now)
        del self.running[key]
        self.decide()

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def refuse(self, data):
        key = data.draw(st.sampled_from(sorted(self.running)))
        assert self.pool.lose_task(key, now_seconds=self.now)
        del self.running[key]
        self.waiting[key] = self.asked[key]

    @precondition(lambda self: self.running or self.waiting)
    @rule(data=st.data())
    def cancel(self, data):
        key = data.draw(st.sampled_from(sorted({**self.running, **self.waiting})))
        assert self.pool.forget_task(key, now_seconds=self.now)
        self.running.pop(key, None)
        self.waiting.pop(key, None)
        assert not self.pool.forget_task(key, now_seconds=self.now)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), ok=st.sampled_from([True, True, True, False]), size=st.integers(1, 7))
    def answer(self, data, ok, size):
        due = sorted(k for k, v in self.held.items() if v != "ready")
        if not due:
            return
        address, model = data.draw(st.sampled_from(due))
        state = self.held[address, model]
        event = {"now_seconds": self.now}
        if state == "loading" and ok:
            self.pool.load_finished(address, model, model_bytes=size, **event)
            self.held[address, model] = "ready"
        elif state == "loading":
            self.pool.load_failed(address, model, reason="drawn", **event)
            del self.held[address, model]
        elif ok:
            self.pool.unload_finished(address, model, **event)
            del self.held[address, model]
        else:
            self.pool.unload_failed(address, model, reason="drawn", **event)
            self.held[address, model] = "ready"
        self.decide()

    @precondition(lambda self: self.device)
    @rule(data=st.data(), rate=st.sampled_from([0, 50, 500]), free=st.sampled_from([None, 2, 12]))
    def report(self, data, rate, free):
        address = data.draw(st.sampled_from(sorted(self.device)))
        here = [
            m for (a, m), v in self.held.items() if a == address and v in ("ready", "unloading")
        ]
        self.pool.report_worker(
            address,
            resident=dict.fromkeys(here, 4),
            frames_per_second=dict.fromkeys(here, rate),
            free_bytes=free,
            now_seconds=self.now,
        )

    @rule(model=models, number=st.sampled_from([None, 1, 2]))
    def want(self, model, number):
        self.pool.request_replicas(model, number, now_seconds=self.now)

    @rule(model=models, devices=st.sampled_from([(), (), ("d0",), ("d1", "d2")]))
    def pin(self, model, devices):
        self.pool.pin_model(model, devices, now_seconds=self.now)

    @rule(model=models)
    def unload(self, model):
        self.pool.unload_model(model, now_seconds=self.now)

    @rule(old=models, new=models, redirect=st.booleans())
    def supersede(self, old, new, redirect):
        if old != new:
            self.pool.supersede_model(old, new, redirect_waiting=redirect, now_seconds=self.now)

    @rule(seconds=st.sampled_from([0.1, 1.0, 10.0]))
    def pass_time(self, seconds):
        self.now += seconds
        self.decide()

    # -- decisions --

    @rule()
    def decide(self):
        for decision in self.pool.decide(self.now):
            match decision:
                case Dispatch(task=key, worker=address, model_key=model):
                    asked = self.waiting.pop(key)
                    assert address in self.device
                    assert address not in self.paused
                    assert asked["workers"] is None or address in asked["workers"]
                    assert self.held[address, model] == "ready"
                    self.running[key] = address
                    self.running_with[key] = model
                    assert decision.reason
                case Load(worker=address, model_key=model):
                    assert address in self.device
                    assert address not in self.paused
                    assert (address, model) not in self.held
                    self.held[address, model] = "loading"
                case Unload(worker=address, model_key=model):
                    assert self.held[address, model] == "ready"
                    users = [k for k, a in self.running.items() if a == address]
                    assert all(self.running_with[k] != model for k in users)
                    self.held[address, model] = "unloading"
                case Fail(task=key):
                    del self.waiting[key]
                    assert key not in self.pool

    @invariant()
    def books_agree(self):
        if not hasattr(self, "pool"):
            return
        self.pool.validate()
        assert len(self.pool) == len(self.waiting) + len(self.running)
        for key in (*self.waiting, *self.running):
            assert key in self.pool
            assert self.pool.why(key).endswith(".")

    def teardown(self):
        """Heal everything: then every task that can run does, within bounded time."""
        if not hasattr(self, "pool"):
            return
        for model in MODELS:
            self.pool.pin_model(model, (), now_seconds=self.now)
            self.pool.request_replicas(model, None, now_seconds=self.now)
        for address in self.device:
            self.pool.set_worker_accepting(address, True, now_seconds=self.now)
        self.paused.clear()
        for n, address in enumerate(a for a in ADDRESSES if a not in self.device):
            self.pool.add_worker(
                address,
                device_uuid=f"healed-{n}",
                budget_bytes=20,
                slots=2,
                resources={"R": 2},
                now_seconds=self.now,
            )
            self.device[address] = f"healed-{n}"
        self.pool.add_worker(
            "last", device_uuid="last", budget_bytes=20, slots=2, resources={"R": 2},
            now_seconds=self.now,
        )  # fmt: skip
        self.device["last"] = "last"
        for address in self.device:
            here = [m for (a, m), v in self.held.items() if a == address and v != "loading"]
            for _ in range(2):
                self.pool.report_worker(
                    address, resident=dict.fromkeys(here, 4), now_seconds=self.now
                )
        stuck = {}
        for _ in range(600):
            self.decide()
            for address, model in [k for k, v in self.held.items() if v == "loading"]:
                self.pool.load_finished(address, model, model_bytes=4, now_seconds=self.now)
                self.held[address, model] = "ready"
            for address, model in [k for k, v in self.held.items() if v == "unloading"]:
                self.pool.unload_finished(address, model, now_seconds=self.now)
                del self.held[address, model]
            for key in list(self.running):
                self.pool.finish_task(key, now_seconds=self.now)
                del self.running[key]
            self.books_agree()
            able = self.able_to_run()
            if not able:
                break
            self.now += 5.0
        else:
            stuck = {key: self.pool.why(key) for key in able}
        assert stuck == {}

    def able_to_run(self):
        """Waiting tasks that nothing about the cluster forbids for ever."""
        sentences = ("it may run on", "no worker offers", "needs a GPU worker", "is connected")
        return [k for k in self.waiting if not any(s in self.pool.why(k) for s in sentences)]


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=120, stateful_step_count=50, deadline=None)


@given(
    num_models=st.integers(2, 5),
    slots=st.integers(1, 4),
    flood=st.integers(1, 50),
    frames=st.integers(1, 1000),
)
@settings(max_examples=40, deadline=None)
def test_a_task_starts_within_a_bounded_number_of_dispatches_in_any_flood(
    num_models, slots, flood, frames
):
    pool = GpuPool()
    pool.add_worker("w", device_uuid="d", budget_bytes=100, slots=slots, now_seconds=0.0)
    keys = [f"m{n}" for n in range(num_models)]
    for key in keys:
        pool.add_model(key, name=key, estimated_bytes=1, now_seconds=0.0)
    pool.report_worker("w", resident=dict.fromkeys(keys, 1), now_seconds=0.0)
    running = []
    number = 0

    def fill():
        nonlocal number
        for key in keys[1:]:
            while pool.snapshot()["models"][key]["waiting"] < flood:
                pool.add_task(number, key, frames=frames, now_seconds=0.0)
                number += 1

    def decide():
        running.extend(d.task for d in pool.decide(0.0) if isinstance(d, Dispatch))

    fill()
    decide()
    for _ in range(20):
        pool.finish_task(running.pop(0), now_seconds=0.0)
        fill()
        decide()
    pool.add_task("victim", keys[0], frames=frames, now_seconds=0.0)
    # A turn of each other model, and no more.
    for _ in range(num_models):
        pool.finish_task(running.pop(0), now_seconds=0.0)
        fill()
        decide()
        if "victim" in running:
            break
    assert "victim" in running


@given(
    rates=st.lists(st.floats(1.0, 1000.0), min_size=1, max_size=5),
    frames=st.lists(st.floats(1.0, 1e4), min_size=1, max_size=30),
    slots=st.integers(1, 3),
)
# The second is taken over with its own speed, not with the first one's.
@example(rates=[71.0, 77.0], frames=[5.0, 5.0, 1.0], slots=1)
@settings(max_examples=60, deadline=None)
def test_tasks_go_one_by_one_to_the_device_that_ends_them_first(rates, frames, slots):
    pool = GpuPool()
    pool.add_model("m", name="m", estimated_bytes=1, now_seconds=0.0)
    pool.add_task("known", "m", frames=1.0, now_seconds=0.0)
    pool.forget_task("known", now_seconds=0.0)
    for n, rate in enumerate(rates):
        pool.add_worker(f"w{n}", device_uuid=f"d{n}", budget_bytes=9, slots=slots, now_seconds=0.0)
        pool.report_worker(
            f"w{n}", resident={"m": 1}, frames_per_second={"m": rate}, now_seconds=0.0
        )
    pool.decide(0.0)
    busy = [0.0] * len(rates)
    held = [0] * len(rates)
    for key, work in enumerate(frames):
        pool.add_task(key, "m", frames=work, now_seconds=0.0)
        ends = [
            busy[n] + work / rate if held[n] < slots + 1 else math.inf
            for n, rate in enumerate(rates)
        ]
        sent = [d for d in pool.decide(0.0) if isinstance(d, Dispatch)]
        if not sent:
            # Kept back: a faster device, though full, ends it before the free ones do.
            assert all(e == math.inf for e in ends) or len(set(rates)) > 1
            break
        chosen = int(sent[0].worker[1:])
        # Speeds within 28 % are one class, in which the least loaded counts.
        assert ends[chosen] <= min(ends) + 0.4 * work / rates[chosen]
        busy[chosen] += work / rates[chosen]
        held[chosen] += 1


@pytest.mark.parametrize("num_devices", [1, 3])
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_loads_are_bounded_however_models_alternate(num_devices, data):
    pool = GpuPool(PlacementOptions(min_residency_seconds=10.0, load_amortisation=4.0))
    for n in range(num_devices):
        pool.add_worker(f"w{n}", device_uuid=f"d{n}", budget_bytes=1, slots=1, now_seconds=0.0)
    for key in "abc":
        pool.add_model(key, name=key, estimated_bytes=1, now_seconds=0.0)
    order = data.draw(st.lists(st.sampled_from("abc"), min_size=20, max_size=60))
    loads = 0
    now = 0.0
    for key, model in enumerate(order):
        pool.add_task(key, model, now_seconds=now)
        for _ in range(2):
            for decision in pool.decide(now):
                match decision:
                    case Load(worker=address, model_key=loaded):
                        loads += 1
                        pool.load_finished(address, loaded, now_seconds=now)
                    case Unload(worker=address, model_key=left):
                        pool.unload_finished(address, left, now_seconds=now)
                    case Dispatch(task=task):
                        pool.finish_task(task, now_seconds=now)
        now += 1.0
    # A model that came stays 10 s: so often can each device change, and once at the start.
    assert loads <= num_devices * (now / 10.0 + 1)


@given(
    rates=st.lists(st.sampled_from([30.0, 60.0, 240.0, 1000.0]), min_size=1, max_size=4),
    tasks=st.lists(
        st.tuples(
            st.one_of(st.none(), st.floats(1.0, 1e4)),
            st.dictionaries(st.sampled_from(ADDRESSES), st.integers(0, 10**10), max_size=3),
        ),
        max_size=20,
    ),
    slots=st.integers(1, 3),
)
@example(rates=[60.0, 240.0], tasks=[(200.0, {"w0": 5 * 10**9}), (200.0, {})], slots=1)
@settings(max_examples=80, deadline=None)
def test_whatever_lies_where_everything_is_done(rates, tasks, slots):
    pool = GpuPool()
    pool.add_model("m", name="m", estimated_bytes=1, now_seconds=0.0)
    # Only from then on reported speeds count.
    pool.add_task("known", "m", frames=100.0, now_seconds=0.0)
    pool.forget_task("known", now_seconds=0.0)
    for address, rate in zip(ADDRESSES, rates, strict=False):
        pool.add_worker(address, device_uuid=address, budget_bytes=9, slots=slots, now_seconds=0.0)
        pool.report_worker(
            address, resident={"m": 1}, frames_per_second={"m": rate}, now_seconds=0.0
        )
    for key, (frames, where) in enumerate(tasks):
        pool.add_task(key, "m", frames=frames, dependency_bytes=where, now_seconds=0.0)
    done = []
    while len(done) < len(tasks):
        sent = [d.task for d in pool.decide(0.0) if isinstance(d, Dispatch)]
        # Nothing is in flight here, so nothing else would ever make it decide otherwise.
        assert sent
        for key in sent:
            pool.finish_task(key, now_seconds=0.0)
        done += sent
    assert sorted(done) == list(range(len(tasks)))


few = st.integers(0, 2)
events = st.one_of(
    st.tuples(
        st.just("come"),
        st.integers(1, 30),
        st.sampled_from([None, None, None, 50.0]),
        st.sampled_from([None, None, None, 10**6, 10**9]),
        st.booleans(),
    ),
    st.tuples(st.just("end"), st.integers(1, 12), st.integers(0, 4), st.booleans()),
    st.tuples(st.just("end"), st.integers(1, 12), st.integers(0, 4), st.booleans()),
    st.tuples(st.just("lose"), st.integers(0, 9)),
    st.tuples(st.just("report"), few, st.sampled_from([30.0, 100.0, 1000.0])),
    st.tuples(st.just("accept"), few, st.booleans()),
)


@given(
    num_models=st.sampled_from([1, 1, 2]),
    slots=st.lists(st.integers(1, 8), min_size=1, max_size=3),
    one_device=st.booleans(),
    steps=st.lists(
        st.tuples(events, st.sampled_from([0.0, 0.001, 0.1]), st.booleans()), max_size=60
    ),
)
# Of three with free slots, two are alike and the third has more to do.
@example(
    num_models=1,
    slots=[2, 2, 2],
    one_device=False,
    steps=[(("come", 30, None, None, True), 0.0, True), (("end", 5, 0, False), 0.0, True)],
)
# Of two that would be done at the same time, the second has the data.
@example(
    num_models=1,
    slots=[2, 2],
    one_device=False,
    steps=[(("come", 30, None, 10**6, True), 0.0, True), (("end", 6, 0, False), 0.0, True)],
)
@settings(max_examples=200, deadline=None)
def test_many_tasks_at_once_are_decided_on_as_one_by_one(num_models, slots, one_device, steps):
    at_once, one_by_one = pools = GpuPool(), GpuPool()
    # This one chooses anew for each task.
    one_by_one._books._book_alike = lambda *_: False
    keys = MODELS[:num_models]
    for pool in pools:
        for key in keys:
            pool.add_model(key, name=key, estimated_bytes=1, now_seconds=0.0)
        for n, number in enumerate(slots):
            device = "d" if one_device else f"d{n}"
            pool.add_worker(
                f"w{n}", device_uuid=device, budget_bytes=9, slots=number, now_seconds=0.0
            )
            # The last has them all.
            here = keys if n == len(slots) - 1 else keys[:1]
            pool.report_worker(f"w{n}", resident=dict.fromkeys(here, 1), now_seconds=0.0)
    now = 0.0
    num_tasks = 0
    running = []
    for (what, *details), seconds, decides in steps:
        now += seconds
        if what == "come":
            number, frames, num_bytes, last = details
            model = keys[-1] if last else keys[0]
            tasks = []
            for key in range(num_tasks, num_tasks + number):
                task = Task(key)
                task.priority = (0, key)
                # Neither all of a kind nor each of its own.
                task.frames = frames if key % 2 else None
                task.dependencies = {f"w{key % 4}": num_bytes} if num_bytes else None
                tasks.append(task)
                one_by_one.add_task(
                    key,
                    model,
                    priority=task.priority,
                    frames=task.frames,
                    dependency_bytes=task.dependencies,
                    now_seconds=now,
                )
            at_once.add_tasks(tasks, model, now_seconds=now)
            num_tasks += number
        elif what == "end":
            number, begin, ok = details
            ended = [*running[begin : begin + number], "unknown"]
            del running[begin : begin + number]
            at_once.finish_tasks(ended, ok=ok, now_seconds=now)
            for key in ended:
                one_by_one.finish_task(key, ok=ok, now_seconds=now)
        elif what == "lose" and details[0] < len(running):
            key = running.pop(details[0])
            for pool in pools:
                pool.lose_task(key, now_seconds=now)
        elif what == "report" and details[0] < len(slots):
            n, rate = details
            for pool in pools:
                pool.report_worker(
                    f"w{n}",
                    resident={keys[0]: 1},
                    frames_per_second={keys[0]: rate},
                    now_seconds=now,
                )
        elif what == "accept":
            for pool in pools:
                pool.set_worker_accepting(f"w{details[0]}", details[1], now_seconds=now)
        if decides:
            decisions = at_once.decide(now)
            assert decisions == one_by_one.decide(now)
            running += [d.task for d in decisions if isinstance(d, Dispatch)]
        assert at_once.snapshot() == one_by_one.snapshot()
    at_once.validate()


def test_of_many_tasks_none_is_taken_in_when_one_is_wrong():
    pool = GpuPool()
    pool.add_model("m", name="m", estimated_bytes=1, now_seconds=0.0)
    pool.add_task("known", "m", now_seconds=0.0)
    good, twice, known, odd = Task("good"), Task("good"), Task("known"), Task("odd")
    odd.frames = math.nan
    for wrong in (twice, known, odd):
        with pytest.raises(InvalidInputError, match=str(wrong.key)):
            pool.add_tasks([good, wrong], "m", now_seconds=0.0)
        assert len(pool) == 1
    with pytest.raises(InvalidInputError, match="not registered"):
        pool.add_tasks([good], "other", now_seconds=0.0)
    assert "good" not in pool
    pool.validate()


priorities = st.tuples(st.integers(-1, 1), st.integers(0, 4))


@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("push"), st.integers(0, 9), priorities, st.booleans()),
            st.tuples(st.just("take"), st.integers(0, 9)),
            st.tuples(st.just("next")),
        ),
        max_size=300,
    )
)
@example(
    steps=[
        ("push", 0, (0, 0), False),
        ("push", 1, (0, 2), False),
        ("push", 2, (0, 3), False),
        ("take", 2),
        ("push", 2, (0, 1), False),
        ("next",),
        ("next",),
    ]
)
@settings(max_examples=100, deadline=None)
def test_a_queue_is_in_order_though_its_tasks_come_back_with_other_priorities(steps):
    queue = Model("m").unrestricted
    tasks = [Task(n) for n in range(10)]
    waiting = {}
    for number, (what, *details) in enumerate(steps, 1):
        if what == "push" and details[0] not in waiting:
            key, priority, again = details
            tasks[key].priority = priority
            order = (priority, -number if again else number)
            queue.push(tasks[key], order[1], None)
            waiting[key] = order
        elif what == "take" and details[0] in waiting:
            queue.discard(tasks[details[0]])
            del waiting[details[0]]
        elif what == "next" and waiting:
            key = min(waiting, key=waiting.__getitem__)
            assert queue.head() is tasks[key]
            queue.discard(tasks[key])
            del waiting[key]
        assert sorted(task.key for task in queue.tasks()) == sorted(waiting)
        assert queue.num_waiting == len(waiting)


def test_a_line_that_emptied_begins_anew():
    queue = Model("m").unrestricted
    tasks = [Task(n) for n in range(20)]
    for number, task in enumerate(tasks):
        task.priority = (0, number) if number else (5, 0)
        queue.push(task, number, None)
        if number == 1:
            queue.discard(tasks[0])
    assert (len(queue.line), len(queue.heap)) == (18, 1)
