"""Reading workers' reports."""

from __future__ import annotations

from daskshare._allocator_reports import SpeedMeter, WorkerFacts
from daskshare.config import EngineOptions, ShareOptions
from daskshare.share import ModelShare
from daskshare.testing import FakeDevice, FakeSpec


def test_a_real_report_is_understood():
    device = FakeDevice(kind="cpu", uuid="GPU-1", total_bytes=10_000, used_bytes=1_000)
    share = ModelShare(
        device, options=ShareOptions(memory_limit=0.5), engine_options=EngineOptions()
    )
    loaded, gone = FakeSpec(name="loaded"), FakeSpec(name="gone")
    try:
        share.load(loaded)
        share.load(gone)
        share.unload(gone.key)
        facts = WorkerFacts.from_report({"state": "ready", "share": "h:1", **share.report()})
    finally:
        share.close()
    assert facts == WorkerFacts(
        state="ready",
        reason="",
        process="h:1",
        device_uuid="GPU-1",
        is_gpu=False,
        budget_bytes=5_000,
        free_bytes=9_000,
        resident={loaded.key: 1000},
    )


def test_a_report_of_a_failure_is_understood():
    facts = WorkerFacts.from_report({"state": "failed", "reason": "no driver"})
    assert (facts.state, facts.reason, facts.device_uuid) == ("failed", "no driver", "")
    assert facts.resident == {}


def report(frames, busy_seconds):
    return {"models": {"m": {"engine": {"frames": frames, "busy_seconds": busy_seconds}}}}


def test_speed_is_measured_between_reports_while_busy():
    meter = SpeedMeter()
    assert meter.measure({"models": {"m": {"engine": None}}}) == {}
    assert meter.measure(report(10, 0.1)) == {}, "too short to tell"
    assert meter.measure(report(100, 1.0)) == {"m": 100.0}
    assert meter.measure(report(100, 1.0)) == {"m": 100.0}, "idle since"
    assert meter.measure(report(400, 2.0)) == {"m": 200.0}, "the mean of the last two"


def test_a_new_engine_counts_from_the_start():
    meter = SpeedMeter()
    meter.measure(report(1000, 10.0))
    assert meter.measure(report(50, 0.5)) == {"m": 100.0}
