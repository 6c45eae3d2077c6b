"""The page and its panes in a real browser: they render under load and their numbers move."""

from __future__ import annotations

import re
import time
from urllib.parse import urlsplit

import numpy as np
import pytest
from distributed import Client, Event

import daskshare
from daskshare.client import SharedModel
from daskshare.dashboard.pages import PANES
from daskshare.dashboard.theme import DARK, LIGHT
from daskshare.testing import FakeSpec
from tests.browser.conftest import simulated
from tests.cluster.conftest import importable_by_subprocesses, start

__all__ = ["importable_by_subprocesses"]

CAR, PLATE = (
    SharedModel(FakeSpec(name=n, model_bytes=s)) for n, s in (("car", 9e8), ("plate", 3e8))
)


def keep_calling(model, stop_name):
    stop = Event(stop_name)
    while not stop.is_set():
        for _ in range(20):
            model(np.ones((5, 2)))
            # Leaves the browser some of a small machine.
            time.sleep(0.005)


@pytest.fixture(scope="module")
def loaded_url(importable_by_subprocesses):
    """Address of a dashboard whose cluster works on two models."""
    with start() as cluster, Client(cluster, set_as_default=False) as client:
        daskshare.install(client)
        stop = Event("stop", client=client)
        futures = client.map(keep_calling, [CAR, CAR, PLATE], stop_name="stop", pure=False)
        try:
            parts = urlsplit(client.dashboard_link)
            yield f"http://{parts.hostname}:{parts.port}"
        finally:
            stop.set()
            client.gather(futures)


@pytest.fixture(scope="module")
def large_url():
    with simulated(100, 20) as url:
        yield url


def frames(browser):
    """How many frames the page says were done; None before it says so."""
    found = re.search(r"([\d,]+) in all", browser.text())
    return int(found[1].replace(",", "")) if found else None


def wait_for_frames(browser, more_than=0):
    browser.wait(lambda: (frames(browser) or 0) > more_than, f"more than {more_than} frames")
    return frames(browser)


def test_the_page_shows_the_load_and_its_numbers_move(browser, loaded_url):
    browser.open(f"{loaded_url}/status")
    link = browser.driver.find_element("link text", "Daskshare")
    link.click()
    wait_for_frames(browser, wait_for_frames(browser))
    text = browser.text()
    for words in ("frames/s", "GPUs", "busy", "waiting for decoding", "car", "plate", "copies"):
        assert words in text, words
    browser.wait(
        lambda: {LIGHT.states["busy"], LIGHT.memory} <= browser.colours(), "bars of time and memory"
    )
    browser.screenshot("dashboard-light")


def test_light_and_dark(browser, loaded_url):
    def background():
        return browser.driver.execute_script(
            "return getComputedStyle(document.body).backgroundColor"
        )

    def as_css(color):
        return "rgb({}, {}, {})".format(*bytes.fromhex(color[1:]))

    browser.open(f"{loaded_url}/daskshare?theme=light")
    assert background() == as_css(LIGHT.page)
    browser.driver.find_element("id", "daskshare-theme").click()
    browser.wait(lambda: background() == as_css(DARK.page), "a dark page")
    wait_for_frames(browser)
    browser.wait(lambda: DARK.states["busy"] in browser.colours(), "bars in dark colours")
    assert LIGHT.card not in browser.colours()
    browser.screenshot("dashboard-dark")
    # It is remembered, on panes too.
    browser.open(f"{loaded_url}/individual-daskshare-gpu-time")
    browser.wait(lambda: background() == as_css(DARK.page), "a dark pane")
    browser.open(f"{loaded_url}/daskshare?theme=light")
    browser.wait(lambda: background() == as_css(LIGHT.page), "a light page")


@pytest.mark.parametrize("url", PANES)
def test_each_pane_alone(browser, loaded_url, url):
    browser.open(f"{loaded_url}{url}?theme=light")
    if url.endswith("-models"):
        browser.wait(lambda: "plate" in browser.text(), "the table of models")
    else:
        browser.wait(lambda: len(browser.colours() - {LIGHT.card, LIGHT.grid}) > 1, "a figure")


def test_a_hundred_gpus_and_twenty_models(browser, large_url):
    browser.open(f"{large_url}/daskshare?theme=light")
    wait_for_frames(browser, wait_for_frames(browser))
    text = browser.text()
    assert "100 GPUs" in text
    assert "of 20 models" in text
    for name in ("yolov3-tiny", "re-id"):
        assert name in text
    browser.wait(
        lambda: {LIGHT.states["busy"], LIGHT.states["decoding"]} <= browser.colours(), "rows"
    )
    browser.screenshot("dashboard-100-gpus")
    # All of it is within the window: nothing to scroll to on a second screen.
    height = browser.driver.execute_script(
        "return [document.documentElement.scrollHeight, window.innerHeight]"
    )
    assert height[0] <= height[1]
