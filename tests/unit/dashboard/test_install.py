"""What can go wrong when joining a dashboard; tests/cluster has real ones."""

from __future__ import annotations

import logging
import subprocess
import sys

from daskshare.dashboard.install import install_dashboard


class Application:
    def __init__(self):
        self.applications = []
        self.added = []

    def add_handlers(self, host, handlers):
        self.added += [path for path, *_ in handlers]


class Scheduler:
    def __init__(self):
        self.http_application = Application()


def test_without_pages_the_route_remains_and_is_added_once():
    scheduler = Scheduler()
    install_dashboard(scheduler, object())
    install_dashboard(scheduler, object())
    assert scheduler.http_application.added == ["/json/daskshare.json"]


def test_a_page_that_cannot_join_is_logged_and_nothing_else_fails(caplog):
    scheduler = Scheduler()
    del scheduler.http_application
    with caplog.at_level(logging.WARNING, "daskshare.dashboard"):
        install_dashboard(scheduler, object())
    [record] = caplog.records
    assert "could not join Dask's dashboard" in record.message
    assert record.exc_info is not None


def test_the_scheduler_needs_neither_torch_nor_bokeh_for_it():
    code = (
        "import sys, daskshare.scheduler_plugin;"
        "print({'torch', 'bokeh', 'cv2', 'av'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
