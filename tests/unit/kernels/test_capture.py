from __future__ import annotations

import threading

import pytest

from daskshare.kernels.capture import CaptureGate, was_disturbed

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
