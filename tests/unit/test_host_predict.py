"""The engine of a caller's function: whose rows make a call, and how results come back."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from daskshare._host_predict import PredictEngine
from daskshare.errors import EngineClosedError

TIMEOUT = 20.0


def test_rows_of_several_callers_never_exceed_the_functions_batch_size():
    sizes, go = [], threading.Event()

    def predict(x):
        assert go.wait(TIMEOUT)
        sizes.append(len(x))
        return x

    engine = PredictEngine(predict, max_batch_size=5, name="mine")
    with ThreadPoolExecutor(6) as pool:
        calls = [pool.submit(engine.infer, [np.full(2, i)]) for i in range(6)]
        go.set()
        assert [call.result(TIMEOUT).tolist() for call in calls] == [[i, i] for i in range(6)]
    engine.close()
    assert sum(sizes) == 12
    assert max(sizes) <= 5


@pytest.mark.parametrize(
    ("predict", "expected"),
    [
        (lambda x: {"a": x, "b": x[:, None]}, lambda i: {"a": [i, i], "b": [[i], [i]]}),
        (lambda x: [{"a": v} for v in x], lambda i: [{"a": i}, {"a": i}]),
    ],
)
def test_results_of_every_form_are_told_apart(predict, expected):
    gate = threading.Event()

    def gated(x):
        assert gate.wait(TIMEOUT)
        return predict(x)

    engine = PredictEngine(gated, max_batch_size=100, name="mine")
    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(engine.infer, [np.full(2, float(i))]) for i in range(3)]
        gate.set()
        results = [call.result(TIMEOUT) for call in calls]
    engine.close()

    def plain(value):
        return {k: v.tolist() for k, v in value.items()} if isinstance(value, dict) else value

    assert [plain(result) for result in results] == [expected(float(i)) for i in range(3)]


def test_only_the_caller_whose_rows_fail_gets_the_error():
    gate = threading.Event()

    def predict(x):
        assert gate.wait(TIMEOUT)
        if (x == 1).any():
            raise ValueError("no ones")
        x += 10
        return x

    engine = PredictEngine(predict, max_batch_size=100, name="mine")
    inputs = [np.full(2, i) for i in range(3)]
    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(engine.infer, [array]) for array in inputs]
        gate.set()
        with pytest.raises(ValueError, match="no ones"):
            calls[1].result(TIMEOUT)
        assert calls[0].result(TIMEOUT).tolist() == [10, 10]
        assert calls[2].result(TIMEOUT).tolist() == [12, 12]
    engine.close()
    assert [array.tolist() for array in inputs] == [[0, 0], [1, 1], [2, 2]]


def test_as_many_calls_run_at_once_as_were_asked_for_with_the_cores_divided():
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(6)
    together, threads = threading.Barrier(3), set()

    def predict(x):
        # Passed only while three calls run.
        together.wait(TIMEOUT)
        threads.add((threading.current_thread().name, torch.get_num_threads()))
        return x

    engine = PredictEngine(
        predict, max_batch_size=2, name="mine", concurrent_calls=3, share_cores=True
    )
    try:
        with ThreadPoolExecutor(6) as pool:
            calls = [pool.submit(engine.infer, [np.full(2, i)]) for i in range(6)]
            assert [call.result(TIMEOUT).tolist() for call in calls] == [[i, i] for i in range(6)]
        assert threads == {(f"daskshare-engine-mine{end}", 2) for end in ("", "-2", "-3")}
        assert torch.get_num_threads() == 6
        with ThreadPoolExecutor(1) as pool:
            # Who comes later is not concerned.
            assert pool.submit(torch.get_num_threads).result(TIMEOUT) == 6
        assert engine.stats().frames == 12
    finally:
        torch.set_num_threads(before)
        engine.close()


def divided(predict, **options):
    return PredictEngine(
        predict, max_batch_size=8, name="mine", concurrent_calls=2, share_cores=True, **options
    )


def test_calls_that_share_the_cores_also_share_the_rows_of_a_batch():
    together, sizes = threading.Barrier(2), []

    def predict(x):
        # Passed only while two calls run.
        together.wait(TIMEOUT)
        sizes.append(len(x))
        return {"twice": 2 * x, "text": [str(value) for value in x.tolist()]}

    engine = divided(predict)
    try:
        result = engine.infer([np.arange(7)])
        assert result["twice"].tolist() == [0, 2, 4, 6, 8, 10, 12]
        assert result["text"] == ["0", "1", "2", "3", "4", "5", "6"]
        assert sorted(sizes) == [3, 4]
        assert (engine.stats().frames, engine.stats().batches) == (7, 2)
    finally:
        engine.close()


def test_rows_of_several_callers_still_fill_the_calls_among_which_a_batch_is_divided():
    inside, go, sizes = threading.Semaphore(0), threading.Event(), []

    def predict(x):
        inside.release()
        assert go.wait(TIMEOUT)
        sizes.append(len(x))
        return x

    engine = divided(predict)
    try:
        with ThreadPoolExecutor(6) as pool:
            first = pool.submit(engine.infer, [np.full(8, 9)])
            for _ in range(2):
                assert inside.acquire(timeout=TIMEOUT)
            others = [pool.submit(engine.infer, [np.full(2, i)]) for i in range(4)]
            while engine.stats().queue_frames < 8:
                assert not first.done()
            go.set()
            assert first.result(TIMEOUT).tolist() == [9] * 8
            assert [call.result(TIMEOUT).tolist() for call in others] == [[i, i] for i in range(4)]
        assert sorted(sizes) == [4, 4, 4, 4]
    finally:
        engine.close()


def test_a_function_that_fails_with_a_part_of_the_rows_gets_all_of_them():
    sizes = []

    def predict(x):
        sizes.append(len(x))
        if len(x) < 8:
            raise ValueError("all eight, please")
        return x

    engine = divided(predict)
    try:
        assert engine.infer([np.arange(8)]).tolist() == list(range(8))
        assert sorted(sizes) == [4, 4, 8]
        assert engine.stats().errors == 0
        # What is no part of more is the caller's own error.
        with pytest.raises(ValueError, match="all eight"):
            engine.infer([np.arange(3)])
        assert engine.stats().errors == 1
    finally:
        engine.close()


@pytest.mark.parametrize(
    "predict",
    [
        lambda x: x if x[0] == 0 else {"a": x},
        lambda x: x[:1],
        lambda x: np.float64(1.5),
        lambda x: x if len(x) == 8 else np.zeros((len(x), int(x[0]) + 1)),
    ],
)
def test_results_of_parts_that_do_not_fit_together_are_left_to_one_call(predict):
    engine = divided(predict)
    try:
        whole = np.arange(8.0)
        assert np.array_equal(engine.infer([whole]), predict(whole))
    finally:
        engine.close()


def test_closing_tells_a_caller_whose_rows_are_divided():
    inside, go = threading.Semaphore(0), threading.Event()

    def predict(x):
        inside.release()
        assert go.wait(TIMEOUT)
        return x

    engine = divided(predict)
    with ThreadPoolExecutor(3) as pool:
        running = pool.submit(engine.infer, [np.arange(8)])
        for _ in range(2):
            assert inside.acquire(timeout=TIMEOUT)
        waiting = pool.submit(engine.infer, [np.arange(8)])
        while engine.stats().queue_frames < 8:
            assert not running.done()
        closing = pool.submit(engine.close)
        with pytest.raises(EngineClosedError):
            waiting.result(TIMEOUT)
        go.set()
        closing.result(TIMEOUT)
        assert running.result(TIMEOUT).tolist() == list(range(8))
