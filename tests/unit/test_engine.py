from __future__ import annotations

import gc
import threading
import weakref
from collections import namedtuple
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait

import numpy as np
import pytest
import torch

from daskshare.config import EngineOptions
from daskshare.device import Device
from daskshare.engine import InferenceEngine
from daskshare.errors import (
    EngineClosedError,
    EngineDiedError,
    InferenceError,
    InvalidInputError,
    OutOfDeviceMemoryError,
)
from daskshare.models.spec import Prepared

TIMEOUT = 20.0


class FakeProgram:
    """Adds one to each item, remembers its batches; ``gate`` holds it inside ``forward``."""

    def __init__(self, *, max_batch_size=8, batch_sizes=(), item_shape=(2,), body=None):
        self.item_shape = item_shape
        self.max_batch_size = max_batch_size
        self.batch_sizes = batch_sizes
        self.model_bytes = 0
        self.graph_capturable = False
        self.body = body or (lambda batch: batch + 1)
        self.batches: list[torch.Tensor] = []
        self.addresses: list[int] = []
        self.threads: set[int] = set()
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)
        self.compiled = None

    def prepare(self, inputs):
        return Prepared(np.asarray(inputs), context="context")

    def forward(self, batch):
        self.threads.add(threading.get_ident())
        self.batches.append(batch.clone())
        self.addresses.append(batch.data_ptr())
        self.entered.release()
        assert self.gate.wait(TIMEOUT)
        return self.body(batch)

    def compile(self, batch_size):
        return self.compiled(batch_size) if self.compiled else None

    def finish(self, outputs, context):
        return context, outputs

    def sizes(self):
        return [len(batch) for batch in self.batches]


@pytest.fixture
def start():
    engines = []
    programs = []

    def start(program=None, *, activity=None, **options):
        program = program or FakeProgram()
        options.setdefault("max_wait_seconds", 0.0)
        engine = InferenceEngine(
            program,
            Device.cpu(),
            options=EngineOptions(**options),
            name="fake",
            activity=activity,
        )
        engines.append(engine)
        programs.append(program)
        return engine, program

    yield start
    for program in programs:
        program.gate.set()
    for engine in engines:
        engine.close(timeout_seconds=TIMEOUT)


def items(*values, width=2, dtype=np.float32):
    return np.repeat(np.asarray(values, dtype=dtype)[:, None], width, axis=1)


def submit(engine, *values, task=None):
    return engine.submit(Prepared(items(*values)), task=task)


def result(future):
    return future.result(TIMEOUT)


def hold(program, engine):
    """Occupy the engine's thread with one frame; later requests wait in the queue."""
    program.gate.clear()
    first = submit(engine, 0)
    assert program.entered.acquire(timeout=TIMEOUT)
    return first


# -- what comes back --


def test_infer_prepares_runs_and_finishes(start):
    engine, program = start()
    context, outputs = engine.infer(items(1, 2, 3))
    assert context == "context"
    np.testing.assert_array_equal(outputs, items(2, 3, 4))
    assert engine.alive
    assert program.threads != {threading.get_ident()}


Pair = namedtuple("Pair", "double index")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (lambda b: (b * 2, b[:, 0].long()), tuple),
        (lambda b: [b * 2, b[:, 0].long()], list),
        (lambda b: {"double": b * 2, "index": b[:, 0].long()}, dict),
        (lambda b: Pair(b * 2, b[:, 0].long()), Pair),
    ],
)
def test_outputs_keep_their_structure(start, body, expected):
    engine, _ = start(FakeProgram(body=body))
    got = result(submit(engine, 1, 2))
    assert type(got) is expected
    double, index = got.values() if expected is dict else got
    np.testing.assert_array_equal(double, items(2, 4))
    np.testing.assert_array_equal(index, [1, 2])
    assert index.dtype == np.int64
    empty = result(engine.submit(Prepared(items())))
    assert type(empty) is expected
    double, index = empty.values() if expected is dict else empty
    assert double.shape == (0, 2)
    assert index.shape == (0,)


def test_bfloat16_comes_as_float32(start):
    engine, _ = start(FakeProgram(body=lambda b: b.bfloat16()))
    got = result(submit(engine, 1, 2))
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, items(1, 2))


def test_results_are_the_callers_own(start):
    engine, _ = start(FakeProgram(body=lambda b: b))
    given = items(1, 2)
    got = result(engine.submit(Prepared(given)))
    got[:] = 7
    np.testing.assert_array_equal(given, items(1, 2))


def readonly(array):
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "given",
    [
        readonly(items(1, 2, 3)),
        items(1, 9, 2, 9, 3)[::2],
        items(3, 2, 1)[::-1],
        torch.from_numpy(items(1, 2, 3)),
        torch.from_numpy(items(1, 2, 3)).requires_grad_(),
        np.asfortranarray(items(1, 2, 3)),
    ],
    ids=["readonly", "strided", "reversed", "torch", "grad", "fortran"],
)
def test_kinds_of_host_items(start, given):
    engine, _ = start()
    np.testing.assert_array_equal(result(engine.submit(Prepared(given))), items(2, 3, 4))


@pytest.mark.parametrize(
    "given",
    [
        np.zeros((2, 3), np.float32),
        np.zeros(2, np.float32),
        np.float32(1),
        [1, 2],
        np.zeros((2, 2), object),
        np.zeros((2, 2), ">f4"),
        torch.zeros((2, 2), device="meta"),
    ],
    ids=["shape", "flat", "scalar", "list", "object", "byte order", "device"],
)
def test_wrong_items_are_refused(start, given):
    engine, program = start()
    with pytest.raises(InvalidInputError, match="fake"):
        engine.submit(Prepared(given))
    assert program.batches == []


def test_a_wrong_form_of_outputs_is_the_callers_error(start):
    engine, _ = start(FakeProgram(body=lambda b: b[:1].sum()))
    with pytest.raises(InferenceError, match="first axis"):
        result(submit(engine, 1))
    engine, _ = start(FakeProgram(body=lambda b: "text"))
    with pytest.raises(InferenceError, match="str; expected a tensor"):
        result(submit(engine, 1))
    assert engine.alive


# -- batching --


def test_one_request_is_run_without_copying(start):
    engine, program = start()
    given = items(1, 2, 3)
    result(engine.submit(Prepared(given)))
    assert program.addresses == [given.ctypes.data]


def test_frames_of_many_callers_share_a_batch(start):
    engine, program = start()
    first = hold(program, engine)
    futures = [submit(engine, 10 * i, 10 * i + 1, task=i) for i in range(4)]
    program.gate.set()
    for i, future in enumerate(futures):
        np.testing.assert_array_equal(result(future), items(10 * i + 1, 10 * i + 2))
    result(first)
    assert program.sizes() == [1, 8]
    stats = engine.stats()
    assert (stats.frames, stats.batches) == (9, 2)
    assert stats.batch_size_counts == {1: 1, 8: 1}
    assert stats.mean_batch_size == 4.5
    assert stats.queue_frames == 0
    assert stats.busy_seconds > 0
    assert stats.mode == "eager"


def test_batches_are_padded(start):
    engine, program = start(FakeProgram(batch_sizes=(2, 4)))
    np.testing.assert_array_equal(result(submit(engine, 1, 2, 3)), items(2, 3, 4))
    result(submit(engine, *range(8)))
    assert program.sizes() == [4, 8]


def test_options_bound_the_batch(start):
    engine, program = start(FakeProgram(), max_batch_size=3)
    np.testing.assert_array_equal(result(submit(engine, *range(7))), items(*range(1, 8)))
    assert max(program.sizes()) == 3
    assert engine.stats().ceiling == 3


def test_shapes_and_dtypes_do_not_mix(start):
    engine, program = start(FakeProgram(item_shape=None))
    first = hold(program, engine)
    wide = engine.submit(Prepared(items(1, 2, width=3)))
    integer = engine.submit(Prepared(items(1, 2, dtype=np.int32)))
    again = engine.submit(Prepared(items(3, width=3)))
    program.gate.set()
    np.testing.assert_array_equal(result(wide), items(2, 3, width=3))
    np.testing.assert_array_equal(result(integer), items(2, 3))
    assert result(integer).dtype == np.int32
    np.testing.assert_array_equal(result(again), items(4, width=3))
    result(first)
    assert sorted(tuple(b.shape) for b in program.batches) == [(1, 2), (2, 2), (3, 3)]


def test_a_request_larger_than_the_queue_is_split_and_rejoined(start):
    engine, program = start(queue_batches=1)
    values = list(range(100))
    np.testing.assert_array_equal(result(submit(engine, *values)), items(*range(1, 101)))
    assert sum(program.sizes()) == 100
    assert max(program.sizes()) <= 8


def test_many_threads(start):
    engine, program = start(FakeProgram(batch_sizes=(4, 8)), queue_batches=2)

    def task(i):
        for k in range(20):
            base = 1000 * i + 10 * k
            values = range(base, base + 1 + (i + k) % 10)
            got = engine.submit(Prepared(items(*values))).result(TIMEOUT)
            np.testing.assert_array_equal(got, items(*values) + 1)
        return True

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(task, range(16)))
    assert len(program.threads) == 1
    assert engine.stats().frames == sum(1 + (i + k) % 10 for i in range(16) for k in range(20))


def test_outputs_must_keep_their_form_within_a_request(start):
    calls = iter(range(1, 100))
    engine, _ = start(FakeProgram(body=lambda b: torch.zeros(len(b), next(calls))))
    with pytest.raises(InferenceError, match="differ between batches"):
        result(submit(engine, *range(20)))
    assert result(submit(engine, 1)).shape[0] == 1


# -- backpressure, cancelling --


def test_a_full_queue_blocks_the_caller_until_there_is_room(start):
    engine, program = start(queue_batches=1)
    first = hold(program, engine)
    full = submit(engine, *range(8))
    queued = threading.Event()

    def late():
        future = submit(engine, 100)
        queued.set()
        return future.result(TIMEOUT)

    with ThreadPoolExecutor(1) as pool:
        blocked = pool.submit(late)
        while not engine._queue._waiting:
            assert not blocked.done()
        assert engine.stats().queue_frames == 8
        assert not queued.is_set()
        program.gate.set()
        np.testing.assert_array_equal(blocked.result(TIMEOUT), items(101))
    wait([first, full])


def test_callers_get_room_in_order_of_arrival(start):
    engine, program = start(queue_batches=1)
    first = hold(program, engine)
    full = submit(engine, *range(8))
    with ThreadPoolExecutor(4) as pool:
        futures = []
        for i in range(4):
            # Each needs the whole queue, so that the next cannot come in beside it.
            futures.append(pool.submit(lambda i=i: result(submit(engine, *[100 + i] * 8))))
            while len(engine._queue._waiting) <= i:
                assert not futures[-1].done()
        program.gate.set()
        wait([first, full, *futures])
    assert [int(batch[0, 0]) for batch in program.batches[2:]] == [100, 101, 102, 103]


def test_a_cancelled_request_is_dropped(start):
    engine, program = start(queue_batches=1)
    first = hold(program, engine)
    cancelled = submit(engine, *range(100, 105))
    kept = submit(engine, 1)
    assert cancelled.cancel()
    assert engine.stats().queue_frames == 1
    # Its room is free at once: this would block otherwise.
    more = submit(engine, *range(7))
    program.gate.set()
    np.testing.assert_array_equal(result(kept), items(2))
    result(more)
    result(first)
    assert not any(100 in batch for batch in program.batches)
    with pytest.raises(CancelledError):
        cancelled.result(0)


def test_a_running_request_cannot_be_cancelled(start):
    engine, program = start()
    first = hold(program, engine)
    assert not first.cancel()
    program.gate.set()
    np.testing.assert_array_equal(result(first), items(1))


def test_delivery_overlaps_the_next_batch(start):
    engine, program = start(slots=2)
    first = submit(engine, 1)
    entered = threading.Event()
    leave = threading.Event()

    def callback(_):
        entered.set()
        assert leave.wait(TIMEOUT)

    # The collector is held in a caller's callback; the engine's thread goes on.
    first.add_done_callback(callback)
    assert entered.wait(TIMEOUT)
    before = len(program.batches)
    second = submit(engine, 2)
    for _ in range(before + 1):
        assert program.entered.acquire(timeout=TIMEOUT)
    assert not second.done()
    leave.set()
    np.testing.assert_array_equal(result(second), items(3))


# -- failures --


def failing_on(value, error):
    def body(batch):
        if (batch == value).any():
            raise error
        return batch + 1

    return body


def test_only_the_offending_frames_caller_gets_the_error(start):
    cause = ValueError("bad pixel")
    engine, program = start(FakeProgram(body=failing_on(42, cause), batch_sizes=(1, 4, 8)))
    first = hold(program, engine)
    futures = [
        submit(engine, 1, 2, task=0),
        submit(engine, 3, 42, 5, task=1),
        submit(engine, 6, 7, task=2),
    ]
    program.gate.set()
    np.testing.assert_array_equal(result(futures[0]), items(2, 3))
    np.testing.assert_array_equal(result(futures[2]), items(7, 8))
    with pytest.raises(InferenceError, match="bad pixel") as caught:
        result(futures[1])
    assert caught.value.model == "fake"
    assert caught.value.frame == 1
    assert caught.value.__cause__ is cause
    result(first)
    assert engine.stats().errors == 1
    np.testing.assert_array_equal(result(submit(engine, 9)), items(10))


def test_the_frame_is_counted_in_the_callers_whole_request(start):
    engine, _ = start(FakeProgram(body=failing_on(73, ValueError("bad"))), queue_batches=1)
    with pytest.raises(InferenceError) as caught:
        result(submit(engine, *range(100)))
    assert caught.value.frame == 73


def test_a_stale_row_in_the_padding_blames_nobody(start):
    engine, _ = start(
        FakeProgram(body=failing_on(42, ValueError("bad")), batch_sizes=(8,)), slots=1
    )
    with pytest.raises(InferenceError):
        result(submit(engine, 1, 42))
    np.testing.assert_array_equal(result(submit(engine, 5)), items(6))


def test_every_frame_bad(start):
    engine, _ = start(FakeProgram(body=failing_on(42, ValueError("bad"))))
    futures = [submit(engine, 42, 42) for _ in range(5)]
    for future in futures:
        with pytest.raises(InferenceError):
            result(future)
    assert engine.stats().errors == 5
    assert engine.alive


def fits_at_most(size):
    def body(batch):
        if len(batch) > size:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return batch + 1

    return body


def test_out_of_memory_lowers_the_ceiling_and_is_remembered(start):
    engine, program = start(FakeProgram(body=fits_at_most(3), batch_sizes=(1, 4, 8)))
    np.testing.assert_array_equal(result(submit(engine, *range(8))), items(*range(1, 9)))
    assert engine.stats().ceiling == 2
    program.batches.clear()
    np.testing.assert_array_equal(result(submit(engine, *range(8))), items(*range(1, 9)))
    assert set(program.sizes()) == {2}
    assert engine.stats().errors == 0


def test_out_of_memory_for_one_frame(start):
    engine, _ = start(FakeProgram(body=fits_at_most(0)))
    future = submit(engine, *range(5))
    with pytest.raises(OutOfDeviceMemoryError, match="one frame") as caught:
        result(future)
    assert caught.value.frame == 0
    assert engine.stats().ceiling == 1
    assert engine.alive


def test_a_dead_engine_says_so_to_everybody(start):
    program = FakeProgram(body=failing_on(42, SystemExit("gone")))
    engine, _ = start(program, queue_batches=1)
    first = hold(program, engine)
    killer = submit(engine, 42)
    waiting = submit(engine, *range(7))
    with ThreadPoolExecutor(1) as pool:
        blocked = pool.submit(submit, engine, 1)
        while not engine._queue._waiting:
            assert not blocked.done()
        program.gate.set()
        with pytest.raises(EngineDiedError, match="gone"):
            # It may have been let in just before the death.
            result(blocked.result(TIMEOUT))
    for future in (killer, waiting):
        with pytest.raises(EngineDiedError, match="gone") as caught:
            result(future)
        assert "SystemExit" in caught.value.reason
    assert first.done()
    assert not engine.alive
    with pytest.raises(EngineDiedError):
        submit(engine, 1)


def test_a_collector_that_dies_ends_the_engine(start, monkeypatch):
    engine, _ = start()

    def collect(flight):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(engine._runner, "collect", collect)
    with pytest.raises(EngineDiedError, match="illegal memory access"):
        result(submit(engine, 1))
    assert not engine.alive


def test_an_unusable_device_ends_the_engine(start, monkeypatch):
    engine, _ = start(FakeProgram(body=failing_on(42, RuntimeError("CUDA error"))))

    def check():
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(engine._runner, "check_device", check)
    with pytest.raises(EngineDiedError, match="device-side assert"):
        result(submit(engine, 1, 42))


# -- compiling --


def test_eager_until_compiled(start):
    release = threading.Event()
    compiled_batches = []

    def compile(batch_size):
        assert release.wait(TIMEOUT)

        def forward(batch):
            compiled_batches.append(len(batch))
            return batch + 1

        assert batch_size == 8
        forward.description = "made by hand"
        return forward

    program = FakeProgram(batch_sizes=(4, 8))
    program.compiled = compile
    engine, _ = start(program, compile=True)
    assert not engine.wait_compiled(0.0)
    np.testing.assert_array_equal(result(submit(engine, 1)), items(2))
    assert (engine.stats().mode, engine.stats().compiled_as) == ("eager", "")
    release.set()
    assert engine.wait_compiled(TIMEOUT)
    assert (engine.stats().mode, engine.stats().compiled_as) == ("compiled", "made by hand")
    eager = len(program.batches)
    np.testing.assert_array_equal(result(submit(engine, *range(8))), items(*range(1, 9)))
    result(submit(engine, 1))
    assert compiled_batches == [8]
    assert program.sizes()[eager:] == [4]


@pytest.mark.parametrize("auto", ["auto", False])
def test_the_cpu_compiles_only_when_told(start, auto):
    program = FakeProgram()
    program.compiled = lambda batch_size: pytest.fail("compiled")
    engine, _ = start(program, compile=auto)
    assert not engine.wait_compiled(TIMEOUT)


def test_a_model_that_cannot_be_compiled(start):
    engine, _ = start(FakeProgram(), compile=True)
    assert not engine.wait_compiled(TIMEOUT)
    assert engine.stats().compile_error == ""


def test_failing_to_compile_leaves_the_eager_model(start, caplog):
    def compile(batch_size):
        raise RuntimeError("no compiler")

    program = FakeProgram()
    program.compiled = compile
    engine, _ = start(program, compile=True)
    assert not engine.wait_compiled(TIMEOUT)
    np.testing.assert_array_equal(result(submit(engine, 1)), items(2))
    assert engine.stats().compile_error == "RuntimeError: no compiler"
    assert "no compiler" in caplog.text


def test_the_compiler_waits_for_the_first_result(start):
    compiled = threading.Event()
    program = FakeProgram()
    program.compiled = lambda batch_size: compiled.set()
    engine, _ = start(program, compile=True)
    first = hold(program, engine)
    assert not engine.wait_compiled(1.0)
    assert not compiled.is_set()
    program.gate.set()
    first.result(TIMEOUT)
    assert compiled.wait(TIMEOUT)


def test_an_engine_that_ends_early_compiles_nothing(start):
    program = FakeProgram()
    program.compiled = lambda batch_size: pytest.fail("compiled")
    engine, _ = start(program, compile=True)
    engine.close(timeout_seconds=TIMEOUT)
    assert engine.stats().compile_error == ""


def test_close_does_not_wait_for_a_compiler(start, caplog):
    begun, release = threading.Event(), threading.Event()

    def compile(batch_size):
        begun.set()
        release.wait(TIMEOUT)

    program = FakeProgram()
    program.compiled = compile
    engine, _ = start(program, compile=True)
    assert begun.wait(TIMEOUT)
    engine.close(timeout_seconds=0.05)
    assert "daskshare-compile-fake" in caplog.text
    release.set()


# -- the end --


def test_close_runs_what_is_queued(start):
    engine, program = start()
    first = hold(program, engine)
    queued = [submit(engine, i) for i in range(5)]
    with ThreadPoolExecutor(1) as pool:
        closed = pool.submit(engine.close, timeout_seconds=TIMEOUT)
        while engine.alive:
            assert not closed.done()
        with pytest.raises(EngineClosedError):
            submit(engine, 1)
        program.gate.set()
        closed.result(TIMEOUT)
    assert first.done()
    for i, future in enumerate(queued):
        np.testing.assert_array_equal(future.result(0), items(i + 1))
    assert not engine.alive
    engine.close()


def test_close_is_bounded_and_fails_who_still_waits(start, caplog):
    engine, program = start(queue_batches=1)
    first = hold(program, engine)
    queued = submit(engine, *range(8))
    with ThreadPoolExecutor(1) as pool:
        blocked = pool.submit(submit, engine, 1)
        while not engine._queue._waiting:
            assert not blocked.done()
        engine.close(timeout_seconds=0.05)
        with pytest.raises(EngineClosedError):
            blocked.result(TIMEOUT)
    for future in (first, queued):
        with pytest.raises(EngineClosedError, match="Lease the model again"):
            future.result(0)
    assert "daskshare-engine-fake" in caplog.text
    program.gate.set()


def test_a_closed_engine_leaves_nothing_behind(start):
    program = FakeProgram()
    engine = InferenceEngine(program, Device.cpu(), options=EngineOptions(), name="fake")
    future = submit(engine, 1)
    result(future)
    engine.close()
    gone = weakref.ref(program)
    del engine, program
    gc.collect()
    assert gone() is None
    assert future.done()


# -- what it says of itself --


def test_the_age_of_the_queue_is_that_of_its_oldest_frame(start):
    engine, program = start(slots=1)
    assert engine.stats().queue_age_seconds == 0.0
    first = hold(program, engine)
    # On the device, not in the queue.
    assert engine.stats().queue_age_seconds == 0.0
    older = submit(engine, 1)
    age = engine.stats().queue_age_seconds
    younger = submit(engine, 2)
    assert engine.stats().queue_age_seconds >= age > 0.0
    program.gate.set()
    for future in (first, older, younger):
        result(future)
    assert engine.stats().queue_age_seconds == 0.0


class Activity:
    """Counts the batches that are on the device as the engine tells it."""

    def __init__(self):
        self.log = []
        self.ended = threading.Semaphore(0)

    def begin(self, name):
        self.log.append(f"+{name}")

    def end(self, name):
        self.log.append(f"-{name}")
        self.ended.release()


def test_the_device_is_told_when_batches_run(start):
    activity = Activity()
    engine, program = start(activity=activity)
    first = hold(program, engine)
    assert activity.log == ["+busy"]
    program.gate.set()
    result(first)
    assert activity.ended.acquire(timeout=TIMEOUT)
    assert activity.log == ["+busy", "-busy"]


def test_a_batch_that_fails_leaves_the_device_idle(start):
    activity = Activity()
    engine, _ = start(FakeProgram(body=bad_frame_seven), activity=activity)
    with pytest.raises(InferenceError):
        result(submit(engine, 7))
    assert activity.ended.acquire(timeout=TIMEOUT)
    assert activity.log == ["+busy", "-busy"]


def bad_frame_seven(batch):
    if bool((batch == 7).any()):
        raise RuntimeError("seven")
    return batch


def test_an_engine_that_dies_leaves_the_device_idle(start):
    activity = Activity()

    def die(batch):
        raise SystemExit("gone")

    engine, _ = start(FakeProgram(body=die), activity=activity)
    with pytest.raises(EngineDiedError):
        result(submit(engine, 1))
    assert activity.ended.acquire(timeout=TIMEOUT)
    assert activity.log == ["+busy", "-busy"]
