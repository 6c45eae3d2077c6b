from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from daskshare.kernels.streams import StreamPool


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


def test_streams_are_shared_when_torch_has_no_more(torch_streams):
    pool = StreamPool()
    taken = [pool.take(0, "decode").cuda_stream for _ in range(6)]
    assert len(set(taken)) == 4
