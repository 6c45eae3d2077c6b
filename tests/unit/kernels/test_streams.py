from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from daskshare.kernels.streams import CurrentStream, StreamPool, pending_work, wait_for_current


@pytest.fixture
def torch_streams(monkeypatch):
    """Torch's way to hand out streams, of which it has four here, in turn."""
    made = []

    def stream(device_index):
        made.append(device_index)
        number = made.count(device_index) % 4
        return SimpleNamespace(cuda_stream=100 * device_index + number, device_index=device_index)

    monkeypatch.setattr(torch.cuda, "Stream", stream)
    return made


def test_a_stream_in_use_is_not_handed_out_again(torch_streams):
    pool = StreamPool()
    first = [pool.take(0, "decode") for _ in range(3)]
    torch.cuda.Stream(0)  # somebody else's turn
    more = pool.take(0, "compute")
    assert len({stream.cuda_stream for stream in [*first, more]}) == 4


def test_a_purpose_gets_its_own_stream_back(torch_streams):
    pool = StreamPool()
    decode, compute = pool.take(0, "decode"), pool.take(0, "compute")
    pool.give_back(decode, "decode")
    pool.give_back(compute, "compute")
    assert pool.take(0, "compute") is compute
    assert pool.take(1, "decode") is not decode
    assert pool.take(0, "decode") is decode


def test_idle_streams_of_another_purpose_come_before_shared_ones(torch_streams):
    pool = StreamPool()
    decode = [pool.take(0, "decode") for _ in range(4)]
    pool.give_back(decode[2], "decode")
    assert pool.take(0, "compute") is decode[2]


def test_streams_are_shared_evenly_when_torch_has_no_more(torch_streams):
    pool = StreamPool()
    taken = [pool.take(0, "decode") for _ in range(8)]
    users = Counter(stream.cuda_stream for stream in taken)
    assert set(users.values()) == {2}
    # One that somebody still uses is not handed out as if it were idle.
    pool.give_back(taken[0], "decode")
    assert pool.take(0, "compute") is taken[0]
    for stream in taken:
        pool.give_back(stream, "decode")
    assert len({pool.take(0, "decode").cuda_stream for _ in range(3)}) == 3


@pytest.fixture
def current(monkeypatch):
    """What is current in the calling thread, as torch says it."""
    state = SimpleNamespace(device=0, streams={0: stream_of(0, 10), 1: stream_of(1, 11)}, idle=True)

    def set_stream(stream):
        state.device = stream.device_index
        state.streams[stream.device_index] = stream

    monkeypatch.setattr(torch.cuda, "current_device", lambda: state.device)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: setattr(state, "device", index))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: state.streams[index])
    monkeypatch.setattr(torch.cuda, "set_stream", set_stream)
    monkeypatch.setattr("daskshare.kernels.streams.stream_is_idle", lambda handle: state.idle)
    return state


def stream_of(device_index, handle):
    waits = []
    return SimpleNamespace(
        device_index=device_index,
        cuda_stream=handle,
        record_event=lambda: f"the end of {handle}",
        wait_event=waits.append,
        waits=waits,
    )


@pytest.mark.parametrize("index", [0, 1])
def test_a_stream_and_its_device_are_current_within_a_block(current, index):
    before = dict(current.streams)
    mine = stream_of(index, 99)
    with CurrentStream(mine):
        assert current.device == index
        assert current.streams[index] is mine
    assert current.device == 0
    assert current.streams == before


@pytest.mark.parametrize(
    ("index", "idle", "pending"),
    [(0, True, None), (0, False, "the end of 10"), (1, True, "the end of 11")],
)
def test_work_that_may_be_under_way_is_waited_for(current, index, idle, pending):
    current.idle = idle
    assert pending_work(index) == pending
    mine = stream_of(index, 99)
    wait_for_current(mine)
    assert mine.waits == ([] if pending is None else [pending])
