"""Outputs' way through one block of memory, on a machine without a GPU."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from daskshare import _engine_buffers
from daskshare._engine_buffers import Buffers
from daskshare._engine_request import flatten


@pytest.fixture
def taken(monkeypatch):
    """From a model's outputs to what callers get, and the outputs' tensors."""
    empty = torch.empty

    def unpinned(*args, pin_memory=False, **options):
        return empty(*args, **options)

    def copy(target, source, num_bytes, stream):
        ctypes.memmove(target, source, num_bytes)

    monkeypatch.setattr(torch, "empty", unpinned)
    monkeypatch.setattr(_engine_buffers, "copy_async", copy)

    def taken(outputs):
        structure, leaves = flatten(outputs, 5)
        buffers = Buffers(structure, leaves, torch.device("cpu"))
        buffers.store(leaves)
        buffers.fetch(SimpleNamespace(cuda_stream=0))
        first = buffers.take()
        # The next batch does not touch what was taken.
        buffers.store([torch.zeros_like(leaf) for leaf in leaves])
        buffers.fetch(SimpleNamespace(cuda_stream=0))
        return first, leaves

    return taken


def test_outputs_of_several_kinds_and_sizes_come_out_as_they_went_in(taken):
    pixels = torch.arange(5 * 7, dtype=torch.float32).reshape(5, 7)
    outputs, leaves = taken(
        {
            "odd": pixels % 2 == 1,
            "half": (pixels / 4).to(torch.bfloat16),
            "first": pixels[:, 0].to(torch.int64) * 2**33,
            "nothing": pixels[:, :0],
            "pixels": pixels,
        }
    )
    assert [array.dtype for array in outputs.arrays] == [bool, "f4", "i8", "f4", "f4"]
    for array, leaf in zip(outputs.arrays, leaves, strict=True):
        np.testing.assert_array_equal(array, leaf.to(torch.float64).numpy())


def test_one_output_does_not_keep_another_in_memory(taken):
    outputs, _ = taken((torch.ones(5, 1), torch.ones(5, 10_000)))
    small = outputs.arrays[0]
    while small.base is not None:
        small = small.base
    assert outputs.owned
    assert small.nbytes == 5 * 4
