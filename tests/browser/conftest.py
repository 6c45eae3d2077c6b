"""A headless Chromium. Without one, tests are skipped; in CI (CI=true) they fail instead."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
import threading
from pathlib import Path

import pytest

from benchmarks.dashboard_cost import simulated_cluster

ROOT = Path(__file__).parents[2]
#: Bound of every wait.
TIMEOUT = 60
#: Screenshots are kept here, for people and as an artefact of CI.
OUTPUT = ROOT / "test-output"

# Text within Bokeh's widgets lies in nested shadow trees, where the driver does not look.
_TEXT = """
const found = [];
(function walk(node) {
  if (node.nodeType === Node.TEXT_NODE) found.push(node.textContent);
  if (node.shadowRoot) walk(node.shadowRoot);
  if (!["STYLE", "SCRIPT"].includes(node.nodeName)) node.childNodes.forEach(walk);
})(document.body);
return found.join(" ").replace(/\\s+/g, " ");
"""
# How many different colours the figures' canvases hold together, of a grid of their pixels.
_COLOURS = """
const colours = new Set();
(function walk(node) {
  if (node.nodeName === "CANVAS" && node.width && node.height) {
    const pixels = node.getContext("2d").getImageData(0, 0, node.width, node.height).data;
    for (let i = 0; i < pixels.length; i += 4 * 7) {
      if (pixels[i + 3] === 255) colours.add(pixels.slice(i, i + 3).join());
    }
  }
  if (node.shadowRoot) walk(node.shadowRoot);
  node.childNodes.forEach(walk);
})(document.body);
return Array.from(colours);
"""


@contextlib.contextmanager
def simulated(num_gpus, num_models):
    """Address of a dashboard whose GPUs and models are simulated, all of them."""
    ready, stop = threading.Event(), threading.Event()
    port = []

    async def run():
        async with simulated_cluster(num_gpus, num_models) as scheduler:
            port.append(scheduler.http_server.port)
            ready.set()
            await asyncio.to_thread(stop.wait)

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    try:
        assert ready.wait(TIMEOUT)
        yield f"http://127.0.0.1:{port[0]}"
    finally:
        stop.set()
        thread.join(TIMEOUT)


class Browser:
    """What the tests do with a browser; ``driver`` is selenium's."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, url):
        self.driver.get(url)

    def text(self):
        return self.driver.execute_script(_TEXT)

    def colours(self):
        return {
            "#" + "".join(f"{int(c):02x}" for c in colour.split(","))
            for colour in self.driver.execute_script(_COLOURS)
        }

    def wait(self, condition, message):
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, TIMEOUT, 0.2).until(lambda _: condition(), message)

    def errors(self):
        """What the page complained of since the last call."""
        return [entry for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    def screenshot(self, name):
        OUTPUT.mkdir(exist_ok=True)
        path = OUTPUT / f"{name}.png"
        assert self.driver.save_screenshot(str(path))
        return path


def find(*names):
    return next((path for name in names if (path := shutil.which(name))), None)


@pytest.fixture(scope="session")
def browser():
    chromium = find("chromium", "chromium-browser", "google-chrome")
    driver_path = find("chromedriver")
    if chromium is None or driver_path is None:
        say = "needs chromium and chromedriver (Debian's packages chromium and chromium-driver)"
        if os.environ.get("CI") == "true":
            pytest.fail(say, pytrace=False)
        pytest.skip(say)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    with tempfile.TemporaryDirectory(prefix="daskshare-chromium-") as profile:
        for argument in (
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--force-device-scale-factor=1",
            "--hide-scrollbars",
            f"--user-data-dir={profile}",
        ):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options=options, service=Service(driver_path))
        try:
            # What headless Chromium calls the window includes a frame that it does not draw.
            driver.set_window_size(1920, 1080)
            inner = driver.execute_script("return window.innerHeight")
            driver.set_window_size(1920, 1080 + 1080 - inner)
            yield Browser(driver)
        finally:
            driver.quit()


@pytest.fixture(autouse=True)
def no_page_error(browser):
    """Fail a test whose page wrote an error to the console."""
    browser.errors()
    yield
    errors = browser.errors()
    # A page that stays open goes on drawing while the next test starts and clusters close.
    browser.open("about:blank")
    assert errors == []
