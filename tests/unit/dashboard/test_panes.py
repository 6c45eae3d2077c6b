"""What the figures hold; tests/browser looks at what is drawn."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from bokeh.document import Document

from daskshare.dashboard.cluster_panes import BatchPane, ThroughputPane
from daskshare.dashboard.gpu_panes import GpuPanes
from daskshare.dashboard.pages import PANES, page_doc, pane_doc
from daskshare.dashboard.snapshot import take_snapshot
from daskshare.dashboard.theme import LIGHT
from tests.unit.dashboard.reports import model, report


def snapshot(*reports, at=0.0):
    return take_snapshot(at, [(f"gpu{i}", f"tcp://{i}", r) for i, r in enumerate(reports)], {})


def gpu_panes(*reports):
    panes = GpuPanes(("time", "memory", "queue", "models"), LIGHT)
    panes.update(snapshot(*reports))
    return panes


def test_cells_tell_speed_from_loading_failed_and_absent():
    panes = gpu_panes(
        report("a", model(), model("n", state="loading"), rates={"key-of-m": 400.0}),
        report("b", model(), model("n", state="unloaded", load_error="gone")),
        report("c"),
    )
    value = panes._cells.data["value"].reshape(3, 2)
    assert 0.99 < value[0, 0] <= 1.0
    assert value[1, 0] == 0.0
    assert value[0, 1] > 1.0
    assert value[1, 1] < 0.0
    assert np.isnan(value[2]).all()
    assert panes._cells.data["state"][3] == "gone"
    assert panes._cells.data["text"][0] == "400"


def test_rows_follow_the_cluster_as_it_grows_and_shrinks():
    panes = gpu_panes(report("a", model()))
    one = panes._rows.start
    panes.update(snapshot(*(report(f"s{i}", model(), model("n")) for i in range(50))))
    assert len(panes._gpus.data["y"]) == 50
    assert {len(column) for column in panes._cells.data.values()} == {100}
    assert panes._rows.start > one
    # Labels of thin rows would overlap.
    assert len(panes._ticker.ticks) <= 40
    panes.update(snapshot())
    assert {len(column) for column in panes._gpus.data.values()} == {0}
    assert {len(column) for column in panes._cells.data.values()} == {0}


def test_time_of_a_device_fills_its_row():
    fractions = {"busy": 0.5, "decoding": 0.25, "input": 0.125, "scheduler": 0.125}
    panes = gpu_panes(report("a", time_fraction=fractions))
    data = panes._gpus.data
    states = ("busy", "loading", "decoding", "input", "scheduler")
    assert [float(data[s][0]) for s in states] == [0.5, 0.0, 0.25, 0.125, 0.125]
    assert data["busy_text"] == ["50%"]


def throughput(*history):
    feed = SimpleNamespace(history=[(float(i), rates) for i, rates in enumerate(history)])
    pane = ThroughputPane(feed, LIGHT)
    pane.update(snapshot(at=float(len(history) - 1)))
    return feed, pane


def test_throughput_is_banded_by_model():
    _, pane = throughput({"a": 1.0}, {"a": 2.0, "b": 4.0})
    data = pane._source.data
    np.testing.assert_array_equal(data["ago"], [-1.0, 0.0])
    np.testing.assert_array_equal(data["band0"], [0.0, 4.0])
    np.testing.assert_array_equal(data["band1"], [1.0, 2.0])
    assert pane._rate.end == pytest.approx(6 * 1.08)


def test_a_model_keeps_its_colour_and_the_smallest_are_together():
    names = "abcdefghij"
    feed, pane = throughput({name: 10.0 - i for i, name in enumerate(names)})
    bands = list(pane._bands)
    assert bands == list(names[: len(LIGHT.series)])
    others = pane._source.data[pane._fields[-1]]
    np.testing.assert_array_equal(others, [sum(10.0 - i for i in range(len(bands), 10))])
    # The order of speeds turns round; colours stay.
    feed.history.append((1.0, {name: 1000.0 * i for i, name in enumerate(names)}))
    pane.update(snapshot(at=1.0))
    assert pane._bands == bands
    # One goes out of sight, and the fastest of the others takes its colour.
    del feed.history[:]
    feed.history.append((2.0, {name: 1.0 + i for i, name in enumerate(names) if name != "c"}))
    pane.update(snapshot(at=2.0))
    assert pane._bands == [*bands[:2], "j", *bands[3:]]


def test_batches_are_shown_in_all_sizes_up_to_the_largest():
    one = report("a", batch_bins={"1": 1, "8": 3})
    one["recent"]["batch_bins"] = {"8": 2}
    pane = BatchPane(SimpleNamespace(), LIGHT)
    pane.update(snapshot(one))
    data = pane._source.data
    assert data["size"] == ["1", "2", "3-4", "5-8"]
    np.testing.assert_array_equal(data["all"], [0.25, 0, 0, 0.75])
    np.testing.assert_array_equal(data["recent"], [0, 0, 0, 1.0])


class Feed:
    interval_seconds = 1.0
    history = ((0.0, {}),)

    def __init__(self):
        self.looks = 0

    def snapshot(self):
        self.looks += 1
        return snapshot(report("a", model()))


@pytest.mark.parametrize("url", PANES)
def test_a_pane_has_one_timer_that_lives_as_long_as_its_document(url):
    feed, document = Feed(), Document()
    pane_doc(feed, url, document)
    [timer] = document.session_callbacks
    assert timer.period == 1000
    before = feed.looks
    timer.callback()
    assert feed.looks == before + 1
    [root] = document.roots
    assert root.name == "pane"
    document.components.clear()
    timer.callback()
    assert feed.looks == before + 1


def test_the_page_looks_once_a_time_for_all_its_panes():
    feed, document = Feed(), Document()
    page_doc(feed, {}, document)
    assert {root.name for root in document.roots} == {
        *("tiles", "gpus", "throughput", "batches", "models")
    }
    [timer] = document.session_callbacks
    before = feed.looks
    timer.callback()
    assert feed.looks == before + 1


def test_names_of_panes_are_what_dask_would_call_them():
    for url, (name, _) in PANES.items():
        assert url.startswith("/individual-")
        assert url.removeprefix("/individual-").replace("-", " ") == name.lower()
