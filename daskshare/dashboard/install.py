"""Puts page, panes and JSON route into a scheduler's running dashboard."""

from __future__ import annotations

import functools
import logging
import sys
import weakref
from typing import TYPE_CHECKING, Any

from distributed.http.utils import RequestHandler

from daskshare.dashboard.feed import Feed

if TYPE_CHECKING:
    from bokeh.server.tornado import BokehTornado
    from distributed import Scheduler

__all__ = ["JSON_ROUTE", "PAGE", "install_dashboard"]

logger = logging.getLogger("daskshare.dashboard")

PAGE = "daskshare"
JSON_ROUTE = "json/daskshare.json"

_installed: weakref.WeakSet[Scheduler] = weakref.WeakSet()


class SnapshotJSON(RequestHandler):
    """Answers with a :class:`daskshare.dashboard.snapshot.Snapshot`."""

    def get(self) -> None:
        """Write the snapshot."""
        feed: Feed = self.extra["feed"]
        self.set_header("Content-Type", "application/json; charset=UTF-8")
        self.write(feed.snapshot().json)


def install_dashboard(scheduler: Scheduler, feed: Feed) -> None:
    """Add everything to the HTTP server of a running scheduler; again is nothing.

    Parameters
    ----------
    scheduler : distributed.Scheduler
        Its HTTP server runs, as it does before a preload script is called.
    feed : Feed
        Of this scheduler.

    Notes
    -----
    Runs on the scheduler's event loop. Without a dashboard (``dashboard=False``, or no Bokeh) the
    JSON route remains. A page that cannot be added is logged and left out: a model is served
    without it as well.
    """
    if scheduler in _installed:
        return
    _installed.add(scheduler)
    try:
        bokeh = _bokeh_of(scheduler)
        prefix = bokeh.prefix if bokeh is not None else ""
        scheduler.http_application.add_handlers(
            r".*$", [(f"{prefix}/{JSON_ROUTE}", SnapshotJSON, {"extra": {"feed": feed}})]
        )
        if bokeh is not None:
            _add_pages(scheduler, bokeh, feed)
    except Exception:
        logger.warning("The page of daskshare could not join Dask's dashboard", exc_info=True)


def _bokeh_of(scheduler: Scheduler) -> BokehTornado | None:
    # Importing it takes a third of a second: whoever has a dashboard has done so already.
    module = sys.modules.get("bokeh.server.tornado")
    if module is None:
        return None
    # Dask lists plots of the first one only.
    for application in scheduler.http_application.applications:
        if isinstance(application, module.BokehTornado):
            return application
    return None


def _add_pages(scheduler: Scheduler, bokeh: BokehTornado, feed: Feed) -> None:
    from distributed.dashboard.scheduler import template_variables

    from daskshare.dashboard.pages import PANES, page_doc, pane_doc

    variables: dict[str, Any] = template_variables(scheduler)
    extra = {"prefix": bokeh.prefix, **variables}
    _add_page(bokeh, f"/{PAGE}", functools.partial(page_doc, feed, extra))
    for url in PANES:
        _add_page(bokeh, url, functools.partial(pane_doc, feed, url))
    # All pages share these two lists, so every page's menu has the new entries.
    if PAGE not in variables["pages"]:
        after = variables["pages"].index("info") if "info" in variables["pages"] else None
        variables["pages"].insert(len(variables["pages"]) if after is None else after, PAGE)
        variables["plots"].extend({"url": u.strip("/"), "name": n} for u, (n, _) in PANES.items())
        variables["plots"].sort(key=lambda plot: plot["name"])


def _add_page(bokeh: BokehTornado, url: str, make_document: Any) -> None:
    from bokeh.application import Application
    from bokeh.application.handlers.function import FunctionHandler
    from bokeh.server.contexts import ApplicationContext
    from bokeh.server.urls import per_app_patterns
    from bokeh.server.views.ws import WSHandler

    # Bokeh knows its applications when it starts; this is what it does then for each of them.
    context = ApplicationContext(Application(FunctionHandler(make_document)), url=url)
    context._loop = bokeh._loop
    bokeh._applications[url] = context
    routes: list[Any] = []
    for pattern, handler, *_ in per_app_patterns:
        path = f"{bokeh.prefix}{url}"
        options: dict[str, Any] = {
            "application_context": context,
            "bokeh_websocket_path": f"{path}/ws",
        }
        if issubclass(handler, WSHandler):
            options |= {"compression_level": None, "mem_level": None}
        routes.append((f"{path}{pattern}", handler, options))
    bokeh.add_handlers(r".*$", routes)
    bokeh._loop.add_callback(context.run_load_hook)
