"""A real JupyterLab with Dask's extension lists the panes and shows them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from daskshare.dashboard.pages import PANES
from daskshare.dashboard.theme import LIGHT
from tests.browser.conftest import TIMEOUT, simulated

for _package in ("jupyterlab", "dask_labextension"):
    pytest.importorskip(_package, reason="needs the extra jupyter: pip install daskshare[jupyter]")


@pytest.fixture
def lab_url(tmp_path):
    """Address of a JupyterLab that has nothing to do with the user's own."""
    folders = {
        f"JUPYTER_{name}_DIR": str(tmp_path / name.lower()) for name in ("CONFIG", "RUNTIME")
    }
    options = {
        "ip": "127.0.0.1",
        "port": 0,
        "root_dir": tmp_path,
        # Whoever can reach the port is this machine.
        "token": "",
        "password": "",
        "open_browser": False,
        "allow_root": True,
        "log_level": "ERROR",
    }
    command = [sys.executable, "-m", "jupyterlab"]
    command += [f"--ServerApp.{name}={value}" for name, value in options.items()]
    # The extension is all that is to speak to anybody.
    command.append("--LabApp.news_url=")
    with subprocess.Popen(command, env={**os.environ, **folders}) as server:
        try:
            yield started(server, tmp_path / "runtime")
        finally:
            server.terminate()
            try:
                server.wait(TIMEOUT)
            finally:
                server.kill()


def started(server, folder):
    """The address that the server writes down once it listens."""
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        assert server.poll() is None, "JupyterLab ended at once"
        for path in folder.glob("jpserver-*.json"):
            try:
                return json.loads(path.read_text("utf-8"))["url"]
            except json.JSONDecodeError:
                continue
        time.sleep(0.1)
    raise AssertionError("JupyterLab did not start")


def test_the_extension_lists_the_panes_and_opens_them(browser, lab_url):
    from selenium.webdriver.common.keys import Keys

    driver = browser.driver
    with simulated(4, 3) as dashboard_url:
        driver.get(f"{lab_url}lab")
        tab = '.jp-SideBar [data-id="dask-dashboard-launcher"]'
        browser.wait(lambda: driver.find_elements("css selector", tab), "Dask's extension")
        driver.find_element("css selector", tab).click()
        browser.wait(
            lambda: driver.find_element("css selector", ".dask-URLInput input").is_displayed(),
            "the field for the dashboard's address",
        )
        address = driver.find_element("css selector", ".dask-URLInput input")
        address.clear()
        address.send_keys(f"{dashboard_url}/", Keys.ENTER)

        def listed():
            buttons = driver.find_elements("css selector", ".dask-DashboardListing-item button")
            return {button.get_attribute("value"): button for button in buttons}

        # The extension writes a pane's name as Dask lists it, without "Individual".
        names = {
            url.strip("/").replace("-", " ").title().removeprefix("Individual ") for url in PANES
        }
        browser.wait(lambda: names <= listed().keys(), "the panes")
        listed()["Daskshare Gpu Time"].click()
        browser.wait(lambda: driver.find_elements("css selector", "iframe"), "the pane")
        driver.switch_to.frame(driver.find_element("css selector", "iframe"))
        browser.wait(lambda: LIGHT.states["busy"] in browser.colours(), "bars in the pane")
        assert "waiting for decoding" in browser.text()
        driver.switch_to.default_content()
        browser.screenshot("jupyterlab")
        driver.get("about:blank")
    # JupyterLab asks its own server for files that need not exist.
    ours = [entry for entry in browser.errors() if dashboard_url in entry["message"]]
    assert ours == []
