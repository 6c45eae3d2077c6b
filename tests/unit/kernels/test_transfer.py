"""What the driver is handed, with a stand-in in its place."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from daskshare._engine_runner import is_out_of_memory
from daskshare.kernels import transfer
from daskshare.kernels.launch import LaunchError
from daskshare.kernels.transfer import Event, copy_async, stream_is_idle, wait_event


@pytest.fixture
def calls(monkeypatch):
    """What the stand-in was called with; its answer is ``calls.answer``."""
    found = SimpleNamespace(made=[], answer=0)

    def function(name):
        def call(*arguments):
            found.made.append((name, *arguments))
            return found.answer

        return call

    names = (
        *("cuMemcpyAsync", "cuStreamWaitEvent"),
        *("cuStreamQuery", "cuEventRecord", "cuEventQuery"),
    )
    driver = SimpleNamespace(**{name: function(name) for name in names})
    monkeypatch.setattr(transfer, "_driver", lambda: driver)
    return found


def test_arguments_reach_the_driver(calls):
    copy_async(2**40, 7, 64, 9)
    wait_event(9, 2**41)
    assert calls.made == [("cuMemcpyAsync", 2**40, 7, 64, 9), ("cuStreamWaitEvent", 9, 2**41, 0)]


def test_nothing_is_not_copied(calls):
    copy_async(0, 0, 0, 9)
    assert calls.made == []


@pytest.mark.parametrize(
    ("call", "name"),
    [(lambda: copy_async(1, 2, 3, 4), "cuMemcpyAsync"), (lambda: wait_event(1, 2), "cuStreamWait")],
)
def test_a_refusal_is_an_error(calls, call, name):
    calls.answer = 700
    with pytest.raises(LaunchError, match=f"{name}.* returned 700"):
        call()


def test_memory_that_ran_out_is_known_as_such(calls):
    calls.answer = 2
    with pytest.raises(LaunchError, match="cuMemcpyAsync") as caught:
        copy_async(1, 2, 3, 4)
    assert is_out_of_memory(caught.value)


class TorchEvent:
    """Torch's event, which is made when it is recorded for the first time."""

    def __init__(self, *, blocking):
        self.blocking, self.cuda_event, self.recorded, self.waits = blocking, 0, [], 0

    def record(self, stream):
        self.cuda_event = 77
        self.recorded.append(stream)

    def synchronize(self):
        self.waits += 1


@pytest.fixture
def torch_events(monkeypatch):
    made = []

    def make(**options):
        made.append(TorchEvent(**options))
        return made[-1]

    monkeypatch.setattr(transfer.torch.cuda, "Event", make)
    return made


def test_torch_makes_an_event_and_the_driver_records_it_again(calls, torch_events):
    stream = SimpleNamespace(cuda_stream=9)
    event = Event(blocking=True)
    event.record(stream)
    event.record(stream)
    event.hold(stream)
    (made,) = torch_events
    assert made.blocking
    assert made.recorded == [stream]
    assert calls.made == [("cuEventRecord", 77, 9), ("cuStreamWaitEvent", 9, 77, 0)]
    calls.answer = 400
    with pytest.raises(LaunchError, match="cuEventRecord returned 400"):
        event.record(stream)


@pytest.mark.parametrize(("answer", "waits"), [(0, 0), (600, 1)])
def test_torch_waits_for_what_is_not_done(calls, torch_events, answer, waits):
    event = Event()
    event.record(SimpleNamespace(cuda_stream=9))
    calls.answer = answer
    event.synchronize()
    assert torch_events[0].waits == waits
    assert calls.made == [("cuEventQuery", 77)]


@pytest.mark.parametrize(("answer", "idle"), [(0, True), (600, False), (201, False)])
def test_a_stream_is_idle_only_when_the_driver_says_so(calls, answer, idle):
    calls.answer = answer
    assert stream_is_idle(9) is idle
