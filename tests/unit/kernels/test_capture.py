from __future__ import annotations

import threading
import weakref

import pytest

from daskshare.kernels.capture import CAPTURE_GATE, CaptureGate, undisturbed, was_disturbed

TIMEOUT = 20.0

INVALID = "CUDA error: operation failed due to a previous error during capture"
FORBIDDEN = "CUDA error: operation not permitted when stream is capturing"


def chained(*texts: str) -> BaseException:
    """The last text's exception, raised while the one before was handled, and so on."""
    error: BaseException | None = None
    for text in texts:
        outer = RuntimeError(text)
        outer.__context__ = error
        error = outer
    assert error is not None
    return error


@pytest.mark.parametrize(
    ("texts", "disturbed"),
    [
        ([INVALID], True),
        (["Search for `cudaErrorStreamCaptureInvalidated' in the manual"], True),
        (["cuDNN: execution failed", INVALID], True),
        (["CUDA error: invalid argument"], True),
        ([FORBIDDEN, INVALID], False),
        (["the model's outputs change their form"], False),
        ([FORBIDDEN], False),
    ],
)
def test_whose_fault_a_failed_capture_is(texts, disturbed):
    assert was_disturbed(chained(*texts)) is disturbed


def test_a_circle_of_causes_ends():
    error = chained("one", "two")
    error.__context__.__context__ = error
    assert not was_disturbed(error)


class Visitor:
    """A thread that holds a side of the gate until told to leave."""

    def __init__(self, enter):
        self.inside, self.leave = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._run, args=(enter,))
        self.thread.start()

    def _run(self, enter):
        with enter():
            self.inside.set()
            assert self.leave.wait(TIMEOUT)

    def end(self):
        self.leave.set()
        self.thread.join(TIMEOUT)


def test_captures_and_disturbers_keep_apart():
    gate = CaptureGate()
    disturbers = [Visitor(gate.disturbing) for _ in range(2)]
    for visitor in disturbers:
        assert visitor.inside.wait(TIMEOUT)
    capture = Visitor(gate.capturing)
    disturbers[0].end()
    assert not capture.inside.is_set()
    disturbers[1].end()
    assert capture.inside.wait(TIMEOUT)
    late, second = Visitor(gate.disturbing), Visitor(gate.capturing)
    assert not late.inside.is_set()
    assert not second.inside.is_set()
    capture.end()
    second.end()
    assert second.inside.is_set()
    assert late.inside.wait(TIMEOUT)
    late.end()


def test_a_disturber_may_enter_again_while_a_capture_waits():
    gate = CaptureGate()
    with gate.disturbing():
        capture = Visitor(gate.capturing)
        with gate.disturbing():
            assert not capture.inside.is_set()
    assert capture.inside.wait(TIMEOUT)
    capture.end()


def test_a_failure_inside_opens_the_gate():
    gate = CaptureGate()
    for enter in (gate.capturing, gate.disturbing):
        with pytest.raises(RuntimeError, match="failed"), enter():
            raise RuntimeError("failed")
    with gate.disturbing():
        pass
    with gate.capturing():
        pass


def test_disturbed_work_is_done_again_once_the_capture_has_ended():
    captured = threading.Event()
    capture = Visitor(CAPTURE_GATE.capturing)
    assert capture.inside.wait(TIMEOUT)
    tries = []

    def work():
        tries.append(captured.is_set())
        if len(tries) == 1:
            raise RuntimeError(INVALID)
        return "made"

    made = []
    thread = threading.Thread(target=lambda: made.append(undisturbed(work)))
    thread.start()
    while not tries:
        thread.join(0.01)
    captured.set()
    capture.leave.set()
    thread.join(TIMEOUT)
    assert made == ["made"]
    assert tries == [False, True]


@pytest.mark.parametrize(
    ("text", "tries"), [(INVALID, 6), (FORBIDDEN, 1), ("CUDA error: out of memory", 1)]
)
def test_what_keeps_failing_fails(text, tries):
    errors = [RuntimeError(text) for _ in range(10)]
    left = iter(errors)

    def work():
        raise next(left)

    with pytest.raises(RuntimeError) as caught:
        undisturbed(work)
    assert caught.value is errors[tries - 1]


def test_a_failed_try_keeps_nothing_alive():
    class Buffer:
        pass

    seen = []

    def work():
        if seen:
            return seen[0]()
        buffer = Buffer()
        seen.append(weakref.ref(buffer))
        error = RuntimeError(INVALID)
        # Somebody keeps the error, as a chain of exceptions does.
        kept.append(error)
        raise error

    kept: list = []
    assert undisturbed(work) is None
