"""Memory that nobody uses goes back to the system, where it is worth the time."""

from __future__ import annotations

import ctypes

import numpy as np
import pyarrow as pa
import pytest

pytest.importorskip("pyspark")

from daskshare.spark import predict as predict_module
from daskshare.spark.connection import SharedClient
from daskshare.spark.memory import release_unused

MB = 10**6


def anonymous_bytes():
    with open("/proc/self/smaps_rollup") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is no glibc"
)
def test_holes_between_what_is_used_are_given_back():
    # Below what malloc takes from the system one by one; every tenth stays.
    blocks = [bytearray(b"x" * 100_000) for _ in range(1000)]
    kept = blocks[::10]
    del blocks
    before = anonymous_bytes()
    release_unused()
    assert anonymous_bytes() < before - 60 * MB
    assert all(block == b"x" * 100_000 for block in kept)


def test_arrows_pool_is_asked_too(monkeypatch):
    asked = []

    class Pool:
        def release_unused(self):
            asked.append(1)

    monkeypatch.setattr(pa, "default_memory_pool", Pool)
    release_unused()
    assert asked == [1]


RELEASES = ["submit", "release", "result"]
KEEPS = ["submit", "result"]


@pytest.mark.parametrize(
    ("num_bytes", "wait_seconds", "expected"),
    [
        (10, 5.0, [*KEEPS, *KEEPS]),
        (2 * MB, 5.0, [*RELEASES, *RELEASES]),
        # How long it waits it knows from the last time.
        (2 * MB, 0.01, [*RELEASES, *KEEPS]),
    ],
)
def test_a_worker_gives_memory_back_before_each_long_wait(
    monkeypatch, num_bytes, wait_seconds, expected
):
    steps = []
    now = [0.0]

    class Client:
        num_pending_bytes = num_bytes

        def open(self, spec):
            steps.append("open")
            return type("Model", (), {"info": {"parameters": 1}})

        def submit(self, op, *, value, model):
            steps.append("submit")
            self.value = value
            return 7

        def result(self, request):
            assert request == 7
            steps.append("result")
            now[0] += wait_seconds
            return self.value[0] * 2

    shared = SharedClient(Client(), 1)
    monkeypatch.setattr(predict_module, "task_device", lambda: "cpu")
    monkeypatch.setattr(predict_module, "client_of_process", lambda device, allow_code: shared)
    monkeypatch.setattr(predict_module, "release_unused", lambda: steps.append("release"))
    monkeypatch.setattr(predict_module, "monotonic", lambda: now[0])
    predict = predict_module._RemotePredict("mine", "k", b"", 8, 1)()
    assert predict(np.arange(2)).tolist() == [0, 2]
    assert predict(np.arange(3)).tolist() == [0, 2, 4]
    assert steps == ["release", "open", *expected]
