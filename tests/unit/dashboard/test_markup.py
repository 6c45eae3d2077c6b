from __future__ import annotations

import re

import pytest

from daskshare.dashboard.markup import format_rate, format_seconds, heading, models_table, tiles
from daskshare.dashboard.snapshot import take_snapshot
from daskshare.dashboard.theme import DARK, LIGHT
from tests.unit.dashboard.reports import model, report


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 ms"), (0.34, "340 ms"), (0.9996, "1.0 s"), (3.21, "3.2 s"), (240, "4 min")],
)
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("rate", "text"), [(0, ""), (0.04, "0.0"), (2.94, "2.9"), (12.6, "13"), (5204.4, "5,204")]
)
def test_format_rate(rate, text):
    assert format_rate(rate) == text


def words(html):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", html))


def snapshot(*reports, held=None):
    named = [(f"gpu{i}", f"tcp://{i}", one) for i, one in enumerate(reports)]
    return take_snapshot(0.0, named, held or {})


def shown(taken, colors=LIGHT):
    return words(tiles(taken.totals, taken.gpus, colors))


def test_tiles_say_why_devices_idle():
    fractions = {"busy": 0.2, "decoding": 0.5, "scheduler": 0.3}
    text = shown(snapshot(report("a", model(frames=1234), time_fraction=fractions)))
    assert "20% busy" in text
    assert "idle: waiting for decoding" in text
    assert "1,234 in all" in text
    assert "1 GPU ready" in text


def test_tiles_of_devices_that_are_never_idle_or_have_no_figures():
    assert "never idle" in shown(snapshot(report("a", time_fraction={"busy": 1.0})))
    assert "no figures" in shown(snapshot({}))


def test_tiles_name_what_is_wrong_in_the_colour_for_it():
    taken = snapshot(
        report("a", model(state="unloaded", load_error="gone")),
        report("b", models={}, state="failed", reason="no driver"),
    )
    html = tiles(taken.totals, taken.gpus, DARK)
    assert "1 could not start" in html
    assert "1 failed" in html
    assert html.count(DARK.failed) == 2
    assert DARK.failed not in tiles(snapshot().totals, [], DARK)


def test_tiles_without_gpus_speak_of_devices():
    cpu = report("a")
    cpu["device"]["kind"] = "cpu"
    assert "1 device ready" in shown(snapshot(cpu))
    assert "0 GPUs" in shown(snapshot())


def test_memory_saved():
    assert "saved by sharing" in shown(snapshot(report("a", model(peak_leases=3))))
    assert "one task a copy" in shown(snapshot(report("a", model())))


def test_the_table_numbers_models_as_the_columns_are():
    taken = snapshot(
        report(
            "a",
            model(frames=20, batches=8, engine={"queue_frames": 5, "queue_age_seconds": 1.5}),
            model("other", state="loading", model_bytes=0),
        ),
        held={"key-of-m": 12},
    )
    text = words(models_table(taken.models, LIGHT))
    assert re.search(r"1 m 1 100 B .*2\.5 of 8 5 1\.5 s 12", text)
    assert re.search(r"2 other 0 \+1", text)


def test_names_and_errors_cannot_break_out_of_the_page():
    evil = '<script>alert("x")</script>'
    taken = snapshot(report("a", model(evil, state="unloaded", load_error=evil)))
    for html in (
        models_table(taken.models, LIGHT),
        heading("t", [("#000000", evil)], LIGHT, evil),
    ):
        assert "<script" not in html
        assert "&lt;script&gt;" in html
