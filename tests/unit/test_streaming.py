from __future__ import annotations

import contextlib
import threading
from concurrent.futures import Future
from contextlib import contextmanager

import numpy as np
import pytest

from daskshare._engine_activity import Switch
from daskshare.config import VideoOptions
from daskshare.device import Device
from daskshare.models.spec import FrameBatch, Prepared
from daskshare.streaming import stream, stream_counts

TIMEOUT = 20.0


class Frames:
    def __init__(self, source):
        self.source = source
        self.problem = ""
        self.decoder = ""

    def __iter__(self):
        source = self.source
        for i in range(source.num_batches):
            if i == source.fail_at:
                raise OSError("the disk is gone")
            source.decoded += 1
            frames = np.full((source.batch_frames, 2, 2, 3), i, np.uint8)
            first = i * source.batch_frames
            times = np.arange(first, first + source.batch_frames) / 10
            size = (9, 16) if source.input_size else None
            yield FrameBatch(frames, first_frame=first, pts_seconds=times, source_size=size)
        self.problem = source.problem_at_end
        self.decoder = "pyav"


class Source:
    """A video of made-up frames that counts what is decoded and whether it was closed."""

    video = "made-up.mp4"

    def __init__(self, num_batches=5, *, fail_at=None, problem="", error=""):
        self.num_batches = num_batches
        self.fail_at = fail_at
        self.problem_at_end = problem
        self.error = error
        self.decoded = 0
        self.opened = 0
        self.closed = 0
        self.device = "never asked"
        self.batch_frames = None

    @contextmanager
    def open_frames(self, *, device=None, batch_frames=None, input_size=None):
        self.opened += 1
        self.input_size = input_size
        self.device = device
        self.batch_frames = batch_frames
        try:
            yield Frames(self)
        finally:
            self.closed += 1


class Program:
    def prepare(self, inputs):
        return Prepared(inputs, context=len(inputs))

    def finish(self, outputs, context):
        assert len(outputs) == context
        return [f"frame of {value}" for value in outputs]


class Engine:
    device = "the engine's device"


class Lease:
    """Holds every request until the test answers it, or answers at once."""

    def __init__(self, *, at_once=True, fail_at=None):
        self.program = Program()
        self.engine = Engine()
        self.at_once = at_once
        self.fail_at = fail_at
        self.requests: list[tuple[Future, np.ndarray, str | None]] = []
        self.submitted = threading.Semaphore(0)
        self.activity = None

    def decoding(self):
        return Switch(self.activity, "decoding")

    def submit(self, prepared, *, task=None):
        future: Future = Future()
        self.requests.append((future, prepared.items, task))
        if self.at_once:
            self.answer(len(self.requests) - 1)
        self.submitted.release()
        return future

    def answer(self, index):
        future, items, _ = self.requests[index]
        if not future.set_running_or_notify_cancel():
            return
        if index == self.fail_at:
            future.set_exception(RuntimeError("bad frame"))
        else:
            future.set_result(items[:, 0, 0, 0].tolist())


def options(**changes):
    return VideoOptions(**{"frames_per_request": 2, "requests_in_flight": 3, **changes})


def changes(before):
    after = stream_counts()
    return {name: after[name] - before[name] for name in after if after[name] != before[name]}


def test_results_come_with_their_frames_in_order():
    lease, source = Lease(), Source(4)
    before = stream_counts()
    with stream(lease, source, options=options(), task="task-1") as batches:
        pairs = list(batches)
    assert [batch.first_frame for batch, _ in pairs] == [0, 2, 4, 6]
    assert [results for _, results in pairs] == [[f"frame of {i}"] * 2 for i in range(4)]
    assert [task for _, _, task in lease.requests] == ["task-1"] * 4
    assert (source.opened, source.closed) == (1, 1)
    assert (source.device, source.batch_frames) == ("the engine's device", 2)
    assert (batches.problem, batches.decoder, batches.num_frames) == ("", "pyav", 8)
    assert changes(before) == {"chunks": 1, "frames": 8, "decoder_pyav": 1}


@pytest.mark.parametrize(("is_cuda", "letterboxed"), [(True, True), (False, False)])
def test_a_decoder_on_the_gpu_may_letterbox_for_the_model(is_cuda, letterboxed):
    lease, source = Lease(), Source(2)
    lease.engine.device = Device("cuda", 0, "GPU-1", "made up", 1) if is_cuda else Device.cpu()
    lease.program.letterbox_size = (2, 2)
    sizes = []

    def prepare_letterboxed(frames, source_size):
        sizes.append(source_size)
        return Prepared(frames, context=len(frames))

    lease.program.prepare_letterboxed = prepare_letterboxed
    with stream(lease, source, options=options()) as batches:
        assert [results for _, results in batches] == [[f"frame of {i}"] * 2 for i in range(2)]
    assert source.input_size == ((2, 2) if letterboxed else None)
    assert sizes == [(9, 16)] * (2 if letterboxed else 0)


@pytest.mark.parametrize("in_flight", [1, 2, 4])
def test_decoding_runs_ahead_by_the_requests_in_flight_and_no_further(in_flight):
    lease, source = Lease(at_once=False), Source(10)
    firsts = []

    def consume():
        with stream(lease, source, options=options(requests_in_flight=in_flight)) as batches:
            firsts.extend(batch.first_frame for batch, _ in batches)

    thread = threading.Thread(target=consume)
    thread.start()
    for index in range(10):
        assert lease.submitted.acquire(timeout=TIMEOUT)
        # The reader is about to wait for an answer, so nothing moves until it comes.
        if index >= in_flight - 1:
            assert len(lease.requests) == index + 1
            assert source.decoded <= index + 2
            lease.answer(index - in_flight + 1)
    for index in range(10 - in_flight + 1, 10):
        lease.answer(index)
    thread.join(TIMEOUT)
    assert not thread.is_alive()
    assert firsts == list(range(0, 20, 2))


def test_the_first_result_is_there_before_the_video_is_decoded():
    lease, source = Lease(), Source(100)
    with stream(lease, source, options=options()) as batches:
        next(iter(batches))
        assert source.decoded <= 4


def test_a_failed_request_raises_and_closes_the_decoder():
    lease, source = Lease(fail_at=1), Source(5)
    before = stream_counts()
    seen = []
    with (
        pytest.raises(RuntimeError, match="bad frame"),
        stream(lease, source, options=options()) as batches,
    ):
        seen.extend(batch.first_frame for batch, _ in batches)
    assert seen == [0]
    assert source.closed == 1
    assert changes(before) == {"chunks_aborted": 1}


def test_a_failing_decoder_raises_and_is_closed():
    lease, source = Lease(), Source(5, fail_at=2)
    before = stream_counts()
    with (
        pytest.raises(OSError, match="the disk is gone"),
        stream(lease, source, options=options()) as batches,
    ):
        list(batches)
    assert source.closed == 1
    assert changes(before) == {"chunks_aborted": 1}


def test_leaving_early_closes_the_decoder_and_drops_what_waits():
    lease, source = Lease(at_once=False), Source(5)

    def read_one():
        with stream(lease, source, options=options()) as batches:
            next(iter(batches))

    thread = threading.Thread(target=read_one)
    thread.start()
    for _ in range(3):
        assert lease.submitted.acquire(timeout=TIMEOUT)
    lease.answer(0)
    thread.join(TIMEOUT)
    assert not thread.is_alive()
    assert source.closed == 1
    assert [future.cancelled() for future, _, _ in lease.requests] == [False, True, True]


def test_the_decoder_stays_open_while_the_engine_reads_its_frames():
    lease, source = Lease(at_once=False), Source(5)
    third_dropped = threading.Event()

    def read_one():
        with stream(lease, source, options=options()) as batches:
            next(iter(batches))

    thread = threading.Thread(target=read_one)
    thread.start()
    for _ in range(3):
        assert lease.submitted.acquire(timeout=TIMEOUT)
    second, third = lease.requests[1][0], lease.requests[2][0]
    second.set_running_or_notify_cancel()
    third.add_done_callback(lambda _: third_dropped.set())
    lease.answer(0)
    assert third_dropped.wait(TIMEOUT)
    # The reader has left its block; it must not get past the request that is being computed.
    thread.join(0.1)
    assert thread.is_alive()
    assert source.closed == 0
    second.set_result([1, 1])
    thread.join(TIMEOUT)
    assert not thread.is_alive()
    assert source.closed == 1


def test_an_unreadable_chunk_is_a_problem_not_an_exception(caplog):
    lease, source = Lease(), Source(error="no video stream")
    before = stream_counts()
    with stream(lease, source, options=options()) as batches:
        assert list(batches) == []
    assert source.opened == 0
    assert (batches.problem, batches.decoder) == ("no video stream", "")
    assert changes(before) == {"chunks": 1, "chunks_failed": 1}
    assert "made-up.mp4: no video stream" in caplog.text


def test_a_truncated_video_gives_its_frames_and_says_what_is_missing(caplog):
    lease, source = Lease(), Source(2, problem="10 of 14 frames are missing")
    before = stream_counts()
    with stream(lease, source, options=options()) as batches:
        assert len(list(batches)) == 2
    assert batches.problem == "10 of 14 frames are missing"
    assert changes(before) == {
        "chunks": 1,
        "frames": 4,
        "chunks_incomplete": 1,
        "decoder_pyav": 1,
    }
    assert "10 of 14 frames are missing" in caplog.text


def test_the_cpu_decoder_can_be_asked_for():
    source = Source(1)
    with stream(Lease(), source, options=options(decoder="pyav")) as batches:
        list(batches)
    assert source.device is None


def test_closing_is_idempotent_and_possible_before_the_start():
    source = Source(1)
    batches = stream(Lease(), source, options=options())
    batches.close()
    with batches:
        list(batches)
    batches.close()
    assert source.closed == 1


class Activity:
    """Keeps what is begun and ended."""

    def __init__(self):
        self.log = []

    def begin(self, name):
        self.log.append(f"+{name}")

    def end(self, name):
        self.log.append(f"-{name}")


def test_decoding_is_counted_as_such_but_not_waiting_for_results():
    lease, source = Lease(), Source(num_batches=3)
    lease.activity = Activity()
    submit, decoded_at_submit = lease.submit, []

    def watched_submit(prepared, *, task=None):
        decoded_at_submit.append(lease.activity.log[-1])
        return submit(prepared, task=task)

    lease.submit = watched_submit
    with stream(lease, source, options=options()) as batches:
        assert len(list(batches)) == 3
    assert decoded_at_submit == ["-decoding"] * 3
    # Once for each batch, and once to learn that there are no more.
    assert lease.activity.log == ["+decoding", "-decoding"] * 4


@pytest.mark.parametrize("leave_early", [False, True])
def test_decoding_ends_however_the_stream_ends(leave_early):
    lease = Lease()
    lease.activity = Activity()
    source = Source(num_batches=9, fail_at=None if leave_early else 1)
    with (
        contextlib.suppress(OSError) if not leave_early else contextlib.nullcontext(),
        stream(lease, source, options=options()) as batches,
    ):
        for _ in batches:
            if leave_early:
                break
    assert lease.activity.log.count("+decoding") == lease.activity.log.count("-decoding") > 0
