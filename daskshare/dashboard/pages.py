"""The documents that browsers open: the page, and each pane by itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distributed.dashboard.components import add_periodic_callback
from distributed.http.utils import dirname
from jinja2 import ChoiceLoader, Environment, FileSystemLoader

from daskshare.dashboard.cluster_panes import BatchPane, ModelsPane, ThroughputPane, TilesPane
from daskshare.dashboard.gpu_panes import GpuPanes
from daskshare.dashboard.theme import DARK, LIGHT, Colors, bokeh_theme

if TYPE_CHECKING:
    from bokeh.document import Document

    from daskshare.dashboard.feed import Feed

__all__ = ["PANES", "page_doc", "pane_doc"]

_templates = Environment(
    loader=ChoiceLoader(
        [
            FileSystemLoader(str(Path(__file__).parent)),
            # Dask's frame of a page, with the menu.
            FileSystemLoader(str(Path(dirname) / "templates")),
        ]
    )
)

# With so many GPUs there is room below them for the throughput.
_FEW = 10

_Make = Callable[["Feed", Colors], Any]


def _gpus(*figures: str) -> _Make:
    return lambda feed, colors: GpuPanes(figures, colors)


#: What JupyterLab's Dask extension and the menu "More" list: name and maker by URL.
PANES: dict[str, tuple[str, _Make]] = {
    "/individual-daskshare-models-on-gpus": ("Daskshare Models On GPUs", _gpus("models")),
    "/individual-daskshare-gpu-time": ("Daskshare GPU Time", _gpus("time")),
    "/individual-daskshare-gpu-memory": ("Daskshare GPU Memory", _gpus("memory")),
    "/individual-daskshare-queues": ("Daskshare Queues", _gpus("queue")),
    "/individual-daskshare-throughput": ("Daskshare Throughput", ThroughputPane),
    "/individual-daskshare-batch-sizes": ("Daskshare Batch Sizes", BatchPane),
    "/individual-daskshare-models": ("Daskshare Models", ModelsPane),
}


class _Panes:
    """All panes of one open document; lives as long as the document."""

    def __init__(self, feed: Feed, panes: dict[str, Any]) -> None:
        self._feed = feed
        self.panes = panes

    def update(self) -> None:
        snapshot = self._feed.snapshot()
        for pane in self.panes.values():
            pane.update(snapshot)


def page_doc(feed: Feed, extra: dict[str, Any], doc: Document) -> None:
    """Fill the document of the page.

    Parameters
    ----------
    feed : Feed
        Of the scheduler.
    extra : dict
        Dask's variables of page templates.
    doc : bokeh.document.Document
        Empty.
    """
    colors = _colors(doc)
    num_gpus = len(feed.snapshot().gpus)
    few = num_gpus <= _FEW
    panes = {
        "tiles": TilesPane(feed, colors),
        "gpus": GpuPanes(
            ("time", "memory", "queue", "models"), colors, least_rows=1 if few else 12
        ),
        "throughput": ThroughputPane(feed, colors),
        "batches": BatchPane(feed, colors),
        "models": ModelsPane(feed, colors),
    }
    _fill(doc, feed, panes, colors)
    doc.title = "Dask: daskshare"
    doc.template = _templates.get_template("page.html")
    doc.template_variables.update(
        extra, colors=colors, dark=colors is DARK, few=few, num_gpus=max(num_gpus, 1)
    )


def pane_doc(feed: Feed, url: str, doc: Document) -> None:
    """Fill the document of one pane."""
    colors = _colors(doc)
    name, make = PANES[url]
    _fill(doc, feed, {"pane": make(feed, colors)}, colors)
    doc.title = f"Dask: {name}"
    doc.template = _templates.get_template("pane.html")
    doc.template_variables.update(colors=colors, dark=colors is DARK)


def _fill(doc: Document, feed: Feed, panes: dict[str, Any], colors: Colors) -> None:
    component = _Panes(feed, panes)
    component.update()
    for name, pane in panes.items():
        pane.root.name = name
        doc.add_root(pane.root)
    doc.theme = bokeh_theme(colors)
    # Stops with the document, so nothing is sent while nobody looks.
    add_periodic_callback(doc, component, int(1000 * feed.interval_seconds))


def _colors(doc: Document) -> Colors:
    context = doc.session_context
    request = context.request if context is not None else None
    wanted = (request.arguments.get("theme") or [b""])[0] if request is not None else b""
    return DARK if wanted == b"dark" else LIGHT
