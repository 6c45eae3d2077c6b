"""Figures with a row for each GPU: its time, its memory, its queue, its models."""

from __future__ import annotations

from typing import Any

import numpy as np
from bokeh.core.properties import field
from bokeh.layouts import column, row
from bokeh.models import (
    BasicTicker,
    ColumnDataSource,
    Div,
    FixedTicker,
    HoverTool,
    LinearColorMapper,
    NumeralTickFormatter,
    Range1d,
)
from bokeh.plotting import figure

from daskshare.dashboard.markup import (
    LEGEND,
    STATE_TEXTS,
    format_rate,
    format_seconds,
    heading,
)
from daskshare.dashboard.snapshot import CELL_STATES, Snapshot
from daskshare.dashboard.sources import send
from daskshare.dashboard.theme import Colors

__all__ = ["GpuPanes"]

# With more, a row is too thin for words.
_MOST_ROWS_WITH_TEXT = 32
_MOST_NAMED_COLUMNS = 4

_READY = CELL_STATES.index("ready")
# Above the scale of speeds, below it, or nothing; a ready model has its speed.
_CELL_VALUES = np.array(
    [{"loading": 2.0, "unloading": 2.0, "failed": -1.0}.get(s, np.nan) for s in CELL_STATES]
)


class GpuPanes:
    """One or more of the figures, side by side, with common rows.

    Parameters
    ----------
    figures : sequence of {"time", "memory", "queue", "models"}
        Which.
    colors : Colors
        Light or dark.
    least_rows : int
        With fewer GPUs rows are not thicker, and space remains below.

    Attributes
    ----------
    root : bokeh.models.LayoutDOM
        The figures under a legend.
    """

    def __init__(self, figures: tuple[str, ...], colors: Colors, *, least_rows: int = 12) -> None:
        self._colors = colors
        self._least_rows = least_rows
        self._rows = Range1d(least_rows - 0.5, -0.5)
        self._columns = Range1d(-0.5, 0.5)
        self._memory = Range1d(0, 1)
        self._queue = Range1d(0, 1)
        self._ticker = FixedTicker(ticks=[])
        self._column_ticker = FixedTicker(ticks=[])
        self._gpus = ColumnDataSource({"y": [], "name": [], "about": []})
        self._cells = ColumnDataSource({"x": [], "y": []})
        self._names: list[str] = []
        self._labels: list[str] = []
        self._cell_shape: tuple[list[str], list[str]] | None = None
        self._cell_states = np.zeros((0, 0), np.int8)
        make = {
            "time": self._time_figure,
            "memory": self._memory_figure,
            "queue": self._queue_figure,
            "models": self._models_figure,
        }
        self._figures = {name: make[name]() for name in figures}
        for i, one in enumerate(self._figures.values()):
            one.yaxis.visible = i == 0
        swatches = []
        if "time" in figures:
            swatches += [(colors.states[s], text) for s, text in LEGEND.items()]
        if "models" in figures:
            swatches += [
                (colors.load[0], "model: idle"),
                (colors.load[-1], "fast"),
                (colors.failed, "failed"),
            ]
            swatches += [] if "time" in figures else [(colors.loading, "loading")]
        if "memory" in figures:
            swatches += [(colors.memory, "one copy"), (colors.unshared, "copy per task")]
        legend = Div(text=heading("GPUs", swatches, colors), sizing_mode="stretch_width")
        self.root = column(
            legend,
            row(*self._figures.values(), sizing_mode="stretch_both", spacing=4),
            sizing_mode="stretch_both",
        )

    def update(self, snapshot: Snapshot) -> None:
        """Show a snapshot."""
        self._set_rows([gpu["name"] for gpu in snapshot.gpus])
        if "models" in self._figures:
            self._set_columns([model["label"] for model in snapshot.models])
            self._send_cells(snapshot)
        if self._figures.keys() - {"models"}:
            self._send_gpus(snapshot.gpus)

    # -- figures --

    def _figure(
        self, title: str, x_range: Range1d, tips: list[tuple[str, str]], **options: Any
    ) -> Any:
        fig = figure(
            title=title,
            tools="",
            x_range=x_range,
            y_range=self._rows,
            **{
                "sizing_mode": "stretch_both",
                # The same above and below, so that rows of all figures are level.
                "min_border_top": 42,
                "min_border_bottom": 24,
                "min_border_right": 20,
                **options,
            },
        )
        fig.yaxis.ticker = self._ticker
        fig.ygrid.visible = False
        fig.add_tools(HoverTool(tooltips=tips, point_policy="follow_mouse"))
        return fig

    def _time_figure(self) -> Any:
        tips = [("GPU", "@name"), ("", "@about")]
        tips += [(text, f"@{state}{{0.0%}}") for state, text in STATE_TEXTS.items()]
        fig = self._figure("Time", Range1d(0, 1), tips)
        fig.hbar_stack(
            list(STATE_TEXTS),
            y="y",
            height=0.86,
            color=[self._colors.states[state] for state in STATE_TEXTS],
            line_color=None,
            source=self._gpus,
        )
        self._text(fig, 0.006, "busy_text", self._colors.card)
        fig.xaxis.formatter = NumeralTickFormatter(format="0%")
        fig.xaxis.ticker = [0, 0.25, 0.5, 0.75, 1]
        return fig

    def _memory_figure(self) -> Any:
        tips = [
            ("GPU", "@name"),
            ("models", "@memory{0.0 ib}"),
            ("a copy per task", "@unshared{0.0 ib}"),
            ("may take", "@budget{0.0 ib}"),
            ("of", "@total{0.0 ib}"),
        ]
        fig = self._figure(
            "Memory",
            self._memory,
            tips,
            **self._narrow(120),
        )
        fig.hbar(
            y="y",
            right="unshared",
            height=0.86,
            color=self._colors.unshared,
            line_color=None,
            source=self._gpus,
        )
        fig.hbar(
            y="y",
            right="memory",
            height=0.86,
            color=self._colors.memory,
            line_color=None,
            source=self._gpus,
        )
        fig.xaxis.formatter = NumeralTickFormatter(format="0 ib")
        fig.xaxis.ticker = BasicTicker(
            base=1024, mantissas=[2**i for i in range(10)], desired_num_ticks=2
        )
        return fig

    def _queue_figure(self) -> Any:
        tips = [("GPU", "@name"), ("waiting", "@queue{0,0} frames"), ("oldest", "@age{0.000} s")]
        fig = self._figure("Queue", self._queue, tips, **self._narrow(105))
        mapper = LinearColorMapper(
            palette=[self._colors.queue, self._colors.loading, self._colors.old], low=0.0, high=3.0
        )
        fig.hbar(
            y="y",
            right="queue",
            height=0.86,
            color={"field": "age", "transform": mapper},
            line_color=None,
            source=self._gpus,
        )
        self._text(fig, 0.0, "age_text", self._colors.text)
        fig.xaxis.ticker.desired_num_ticks = 3
        return fig

    def _models_figure(self) -> Any:
        tips = [
            ("GPU", "@gpu"),
            ("model", "@model"),
            ("", "@state"),
            ("size", "@bytes{0.0 ib}"),
            ("frames/s", "@rate{0,0}"),
        ]
        fig = self._figure("Models (frames/s)", self._columns, tips, x_axis_location="above")
        mapper = LinearColorMapper(
            palette=list(self._colors.load),
            low=0.0,
            high=1.0,
            low_color=self._colors.failed,
            high_color=self._colors.loading,
            nan_color=(0, 0, 0, 0),
        )
        words = LinearColorMapper(
            palette=[self._colors.text, self._colors.on_load], low=0.0, high=1.0
        )
        fig.rect(
            "x",
            "y",
            width=0.9,
            height=0.86,
            color={"field": "value", "transform": mapper},
            line_color=None,
            source=self._cells,
        )
        fig.text(
            "x",
            "y",
            text=field("text"),
            text_align="center",
            text_baseline="middle",
            text_font_size="11px",
            text_color={"field": "value", "transform": words},
            source=self._cells,
        )
        fig.xgrid.visible = False
        fig.xaxis.ticker = self._column_ticker
        return fig

    def _narrow(self, width: int) -> dict[str, Any]:
        return {"sizing_mode": "stretch_height", "width": width}

    def _text(self, fig: Any, x: float, name: str, color: str) -> None:
        fig.text(
            x,
            "y",
            text=field(name),
            x_offset=4,
            text_baseline="middle",
            text_font_size="11px",
            text_color=color,
            source=self._gpus,
        )

    # -- data --

    def _set_rows(self, names: list[str]) -> None:
        if names == self._names:
            return
        self._names = names
        self._rows.start = max(len(names), self._least_rows) - 0.5
        step = len(names) // 40 + 1
        ticks = list(range(0, len(names), step))
        # An axis must know a tick's label before the tick.
        for fig in self._figures.values():
            fig.yaxis.major_label_overrides = {i: _short(names[i]) for i in ticks}
        self._ticker.ticks = ticks

    def _set_columns(self, labels: list[str]) -> None:
        if labels == self._labels:
            return
        self._labels = labels
        named = len(labels) <= _MOST_NAMED_COLUMNS
        fig = self._figures["models"]
        fig.xaxis.major_label_overrides = {
            i: _short(label, 13) if named else str(i + 1) for i, label in enumerate(labels)
        }
        self._column_ticker.ticks = list(range(len(labels)))
        self._columns.end = max(len(labels), 1) - 0.5
        if len(self._figures) > 1:
            fig.sizing_mode = "stretch_height"
            fig.width = 20 + (84 if named else 18) * max(len(labels), 1)

    def _send_gpus(self, gpus: list[dict[str, Any]]) -> None:
        count = len(gpus)
        worded = count <= _MOST_ROWS_WITH_TEXT
        fractions = np.array(
            [[gpu["time_fraction"][state] for state in STATE_TEXTS] for gpu in gpus], np.float32
        ).reshape(count, len(STATE_TEXTS))
        numbers = np.array(
            [
                (
                    gpu["model_bytes"],
                    gpu["unshared_bytes"],
                    gpu["budget_bytes"],
                    gpu["total_bytes"],
                    gpu["queue_frames"],
                    gpu["queue_age_seconds"],
                )
                for gpu in gpus
            ],
            np.float64,
        ).reshape(count, 6)
        send(
            self._gpus,
            {
                "y": list(range(count)),
                "name": self._names,
                "about": [
                    gpu["reason"] or f"{gpu['device']} ({gpu['workers'][0]})" for gpu in gpus
                ],
                "busy_text": [_percent(f) if worded else "" for f in fractions[:, 0]],
                "age_text": [
                    f"{gpu['queue_frames']:,}, {format_seconds(gpu['queue_age_seconds'])}"
                    if worded and gpu["queue_frames"]
                    else ""
                    for gpu in gpus
                ],
                **{state: fractions[:, i] for i, state in enumerate(STATE_TEXTS)},
                "memory": numbers[:, 0],
                "unshared": numbers[:, 1],
                "budget": numbers[:, 2],
                "total": numbers[:, 3],
                "queue": numbers[:, 4],
                "age": numbers[:, 5],
            },
        )
        if count:
            self._memory.end = max(1.0, float(numbers[:, :2].max()) * 1.05)
            self._queue.end = max(1.0, float(numbers[:, 4].max()) * 1.05)

    def _send_cells(self, snapshot: Snapshot) -> None:
        rate, state = snapshot.cell("frames_per_second"), snapshot.cell("state").astype(np.int8)
        num_gpus, num_models = rate.shape
        speed = np.sqrt(rate / max(rate.max(initial=0.0), 1e-9)) * 0.999
        value = np.where(state == _READY, speed, _CELL_VALUES[state]).astype(np.float32)
        data: dict[str, Any] = {
            "value": value.ravel(),
            "rate": rate.astype(np.float32).ravel(),
            "bytes": snapshot.cell("bytes").ravel(),
        }
        # Words are dear to send, and seldom change.
        shape = (self._names, self._labels)
        if shape != self._cell_shape:
            self._cell_shape = ([*self._names], [*self._labels])
            data["x"] = list(range(num_models)) * num_gpus
            data["y"] = [i for i in range(num_gpus) for _ in range(num_models)]
            data["gpu"] = [name for name in self._names for _ in range(num_models)]
            data["model"] = self._labels * num_gpus
        if "x" in data or not np.array_equal(state, self._cell_states):
            self._cell_states = state
            words = [CELL_STATES[index] for index in state.ravel().tolist()]
            for (i, j), error in snapshot.errors.items():
                words[i * num_models + j] = error
            data["state"] = words
        worded = num_gpus <= _MOST_ROWS_WITH_TEXT and num_models <= _MOST_NAMED_COLUMNS
        if worded:
            data["text"] = [format_rate(one) for one in rate.ravel().tolist()]
        elif "x" in data:
            data["text"] = [""] * rate.size
        send(self._cells, data)


def _percent(fraction: float) -> str:
    return f"{fraction:.0%}" if fraction >= 0.05 else ""


def _short(text: str, limit: int = 16) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
