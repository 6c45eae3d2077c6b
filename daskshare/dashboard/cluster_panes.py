"""Figures about the whole cluster: tiles, throughput, batch sizes, models, queues."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from bokeh.layouts import column
from bokeh.models import (
    ColumnDataSource,
    CustomJSTickFormatter,
    Div,
    FactorRange,
    HoverTool,
    NumeralTickFormatter,
    Range1d,
)
from bokeh.plotting import figure

from daskshare.dashboard.feed import HISTORY_SECONDS
from daskshare.dashboard.markup import heading, models_table, tiles
from daskshare.dashboard.snapshot import Snapshot
from daskshare.dashboard.sources import send
from daskshare.dashboard.theme import Colors

if TYPE_CHECKING:
    from daskshare.dashboard.feed import Feed

__all__ = ["BatchPane", "ModelsPane", "ThroughputPane", "TilesPane"]

# A page that was opened just now would else look empty for minutes.
_LEAST_SECONDS = 60.0
# Text would otherwise be as wide as its words.
_WIDE = ".bk-clearfix { width: 100%; }"


class TilesPane:
    """The row of figures on top."""

    def __init__(self, feed: Feed, colors: Colors) -> None:
        self._colors = colors
        self.root = Div(text="", sizing_mode="stretch_both", stylesheets=[_WIDE])

    def update(self, snapshot: Snapshot) -> None:
        """Show a snapshot."""
        self.root.text = tiles(snapshot.totals, snapshot.gpus, self._colors)


class ModelsPane:
    """A table with a row a model."""

    def __init__(self, feed: Feed, colors: Colors) -> None:
        self._colors = colors
        self._table = Div(text="", sizing_mode="stretch_width", stylesheets=[_WIDE])
        self.root = column(
            Div(text=heading("Models", (), colors), sizing_mode="stretch_width"),
            self._table,
            sizing_mode="stretch_both",
        )

    def update(self, snapshot: Snapshot) -> None:
        """Show a snapshot."""
        self._table.text = models_table(snapshot.models, self._colors)


class ThroughputPane:
    """Frames a second over the last minutes, one band a model."""

    def __init__(self, feed: Feed, colors: Colors) -> None:
        self._feed = feed
        self._colors = colors
        # Which model has which band; the last band is all others.
        self._bands: list[str] = []
        self._names: dict[str, str] = {}
        self._fields = [f"band{i}" for i in range(len(colors.series) + 1)]
        self._source = ColumnDataSource({"ago": [], **{name: [] for name in self._fields}})
        self._legend = Div(text="", sizing_mode="stretch_width")
        self._rate = Range1d(0, 1)
        self._ago = Range1d(-_LEAST_SECONDS, 0)
        fig = figure(
            tools="",
            x_range=self._ago,
            y_range=self._rate,
            sizing_mode="stretch_both",
        )
        fig.varea_stack(
            self._fields,
            x="ago",
            color=[*colors.series, colors.other_series],
            alpha=0.85,
            source=self._source,
        )
        fig.xgrid.visible = False
        fig.yaxis.formatter = NumeralTickFormatter(format="0,0")
        fig.yaxis.ticker.desired_num_ticks = 4
        fig.xaxis.formatter = CustomJSTickFormatter(
            code="return tick == 0 ? 'now' : tick % 60 ? tick + ' s' : (tick / 60) + ' min'"
        )
        fig.xaxis.ticker = [*range(-int(HISTORY_SECONDS), 0, 60), -30, 0]
        self.root = column(self._legend, fig, sizing_mode="stretch_both")

    def update(self, snapshot: Snapshot) -> None:
        """Show the history up to a snapshot."""
        history = list(self._feed.history)
        self._assign({model["key"]: model["label"] for model in snapshot.models}, history)
        rates = np.zeros((len(self._fields), len(history)), np.float32)
        place = {key: i for i, key in enumerate(self._bands)}
        for j, (_, by_key) in enumerate(history):
            for key, rate in by_key.items():
                rates[place.get(key, -1), j] += rate
        ago = np.array([at - snapshot.time for at, _ in history], np.float32)
        send(self._source, {"ago": ago, **dict(zip(self._fields, rates, strict=True))})
        self._ago.start = min(-_LEAST_SECONDS, float(ago[0]))
        self._rate.end = max(1.0, 1.08 * float(rates.sum(axis=0).max(initial=0.0)))

    def _assign(self, names: dict[str, str], history: list[tuple[float, dict[str, float]]]) -> None:
        seen: Counter[str] = Counter()
        for _, by_key in history:
            seen.update(by_key)
        bands = [key if key in seen else "" for key in self._bands]
        for key, _ in seen.most_common():
            if key in bands:
                continue
            if "" in bands:
                bands[bands.index("")] = key
            elif len(bands) < len(self._colors.series):
                bands.append(key)
        # A model keeps its colour while it is in sight.
        self._names = {key: names.get(key, self._names.get(key, key[:8])) for key in seen}
        self._bands = bands
        swatches = [
            (color, self._names[key])
            for color, key in zip(self._colors.series, bands, strict=False)
            if key
        ]
        others = len(seen) - len(swatches)
        if others:
            swatches.append((self._colors.other_series, f"{others} others"))
        text = heading("Frames/s", swatches, self._colors)
        if text != self._legend.text:
            self._legend.text = text


class BatchPane:
    """How full batches are: in the last seconds, and since the start."""

    def __init__(self, feed: Feed, colors: Colors) -> None:
        self._colors = colors
        self._source = ColumnDataSource({"size": [], "recent": [], "all": []})
        self._sizes = FactorRange()
        self._legend = Div(text="", sizing_mode="stretch_width")
        fig = figure(
            tools="",
            x_range=self._sizes,
            y_range=Range1d(0, 1),
            sizing_mode="stretch_both",
        )
        fig.vbar(
            x="size", top="all", width=0.9, color=colors.past, line_color=None, source=self._source
        )
        fig.vbar(
            x="size",
            top="recent",
            width=0.5,
            color=colors.states["busy"],
            line_color=None,
            source=self._source,
        )
        fig.add_tools(
            HoverTool(
                tooltips=[
                    ("frames in a batch", "@size"),
                    ("of batches, last seconds", "@recent{0.0%}"),
                    ("of batches, since the start", "@all{0.0%}"),
                ],
                mode="vline",
            )
        )
        fig.xgrid.visible = False
        fig.yaxis.formatter = NumeralTickFormatter(format="0%")
        fig.yaxis.ticker = [0, 0.5, 1]
        self.root = column(self._legend, fig, sizing_mode="stretch_both")

    def update(self, snapshot: Snapshot) -> None:
        """Show a snapshot."""
        everything = _fractions(snapshot.batch_bins["all"])
        recent = _fractions(snapshot.batch_bins["recent"])
        # Sizes between are shown though no batch had them: a gap would look like none.
        largest = max(everything, default=0)
        sizes = [2**i for i in range(largest.bit_length())]
        names = [_bin_name(size) for size in sizes]
        if names != self._sizes.factors:
            self._sizes.factors = names
        send(
            self._source,
            {
                "size": names,
                "recent": np.array([recent.get(size, 0.0) for size in sizes], np.float32),
                "all": np.array([everything.get(size, 0.0) for size in sizes], np.float32),
            },
        )
        now, ever = (
            f": mean {snapshot.totals[name]:.1f}" if snapshot.totals[name] else ": none"
            for name in ("recent_mean_batch_size", "mean_batch_size")
        )
        swatches = [
            (self._colors.states["busy"], f"last seconds{now}"),
            (self._colors.past, f"since the start{ever}"),
        ]
        self._legend.text = heading("Frames in a batch", swatches, self._colors)


def _fractions(bins: Mapping[str, int]) -> dict[int, float]:
    total = sum(bins.values())
    return {int(size): count / total for size, count in bins.items()}


def _bin_name(largest: int) -> str:
    return str(largest) if largest <= 2 else f"{largest // 2 + 1}-{largest}"
