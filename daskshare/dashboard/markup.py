"""The parts of the page that are text: tiles of figures, legends, the table of models. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from dask.utils import format_bytes

from daskshare.dashboard.theme import Colors

__all__ = [
    "LEGEND",
    "STATE_TEXTS",
    "format_rate",
    "format_seconds",
    "heading",
    "models_table",
    "tiles",
]

#: What a device does, as people say it.
STATE_TEXTS = {
    "busy": "busy",
    "loading": "loading a model",
    "decoding": "waiting for decoding",
    "input": "waiting for input",
    "scheduler": "waiting for the scheduler",
}


#: The same side by side.
LEGEND = {
    **STATE_TEXTS,
    "loading": "loading",
    "input": "… for input",
    "scheduler": "… for the scheduler",
}


def format_rate(per_second: float) -> str:
    """Write a rate in as many digits as help: "0.5", "9.8", "5,204"; nothing when it is none."""
    if not per_second:
        return ""
    return f"{per_second:.1f}" if per_second < 10 else f"{per_second:,.0f}"


def format_seconds(seconds: float) -> str:
    """Write a short time as people read it: "0 ms", "340 ms", "3.2 s", "4 min"."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def heading(title: str, swatches: Iterable[tuple[str, str]], colors: Colors, note: str = "") -> str:
    """Return a figure's title with a legend of (colour, text)."""
    legend = "".join(
        f'<span style="white-space:nowrap;margin-right:12px">'
        f'<span style="display:inline-block;width:10px;height:10px;border-radius:2px;'
        f'margin-right:5px;background:{color}"></span>{escape(text)}</span>'
        for color, text in swatches
    )
    return (
        f'<div style="font:12px Helvetica,Arial,sans-serif;color:{colors.faint_text};'
        f'line-height:18px"><b style="color:{colors.text};font-size:13px;margin-right:14px">'
        f"{escape(title)}</b>{legend}{escape(note)}</div>"
    )


def tiles(totals: Mapping[str, Any], gpus: Sequence[Mapping[str, Any]], colors: Colors) -> str:
    """Return the row of figures that says how the cluster is doing."""
    kinds = {gpu["device_kind"] for gpu in gpus}
    device = "GPU" if kinds <= {"cuda", ""} else "device"
    saved = totals["saved_bytes"]
    problems = [f"{totals[name]} {name}" for name in ("loading", "failed") if totals[name]]
    cells = [
        (
            format_rate(totals["frames_per_second"]) or "0",
            "frames/s",
            f"{totals['frames']:,} in all",
            False,
        ),
        (
            f"{totals['gpus_ready']}",
            _plural(device, totals["gpus_ready"]),
            f"{totals['gpus_failed']} could not start" if totals["gpus_failed"] else "ready",
            bool(totals["gpus_failed"]),
        ),
        (f"{totals['busy_fraction']:.0%}", "busy", _idle_reason(gpus), False),
        (
            f"{totals['queue_frames']:,}",
            "frames waiting",
            f"the oldest for {format_seconds(totals['queue_age_seconds'])}",
            False,
        ),
        (
            f"{totals['tasks']:,}",
            f"{_plural('task', totals['tasks'])} using a model",
            f"{totals['held_tasks']:,} held for a GPU",
            False,
        ),
        (
            f"{totals['copies']:,}",
            f"{_plural('copy', totals['copies'])} of {totals['models']:,} "
            f"{_plural('model', totals['models'])}",
            ", ".join(problems) or "none loading or failed",
            bool(totals["failed"]),
        ),
        (
            format_bytes(totals["model_bytes"]),
            "of weights",
            f"{format_bytes(saved)} saved by sharing" if saved else "one task a copy",
            False,
        ),
    ]
    return (
        '<div style="display:grid;grid-template-columns:repeat(7,1fr);gap:8px;'
        'font-family:Helvetica,Arial,sans-serif">'
        + "".join(_tile(*cell, colors) for cell in cells)
        + "</div>"
    )


def _plural(word: str, count: int) -> str:
    if count == 1:
        return word
    return f"{word[:-1]}ies" if word.endswith("y") else f"{word}s"


def _tile(figure: str, unit: str, note: str, alarming: bool, colors: Colors) -> str:
    return (
        f'<div style="background:{colors.card};border-radius:6px;padding:8px 12px;'
        f'overflow:hidden;white-space:nowrap;color:{colors.text}">'
        f'<div style="line-height:26px"><span style="font-size:22px;font-weight:bold">'
        f"{escape(figure)}</span>"
        f'<span style="font-size:13px;color:{colors.faint_text}"> {escape(unit)}</span></div>'
        f'<div style="font-size:12px;line-height:16px;text-overflow:ellipsis;overflow:hidden;'
        f'color:{colors.failed if alarming else colors.faint_text}">{escape(note)}</div></div>'
    )


def _idle_reason(gpus: Sequence[Mapping[str, Any]]) -> str:
    idle = dict.fromkeys((state for state in STATE_TEXTS if state != "busy"), 0.0)
    for gpu in gpus:
        for state in idle:
            idle[state] += gpu["time_fraction"].get(state, 0.0)
    reason = max(idle, key=lambda state: idle[state])
    if idle[reason] > 0:
        return f"idle: {STATE_TEXTS[reason]}"
    return "never idle" if any(gpu["time_fraction"].get("busy") for gpu in gpus) else "no figures"


_COLUMNS = (
    ("", "left"),
    ("model", "left"),
    ("copies", "right"),
    ("size", "right"),
    ("saved", "right"),
    ("frames/s", "right"),
    ("batch", "right"),
    ("queue", "right"),
    ("oldest", "right"),
    ("tasks", "right"),
    ("held", "right"),
)


def models_table(models: Iterable[Mapping[str, Any]], colors: Colors) -> str:
    """Return a table with a row a model; its first column numbers the columns of the GPUs."""
    head = "".join(
        f'<th style="text-align:{side};font-weight:normal;color:{colors.faint_text};'
        f'padding:1px 4px">{text}</th>'
        for text, side in _COLUMNS
    )
    rows = "".join(_row(i, model, colors) for i, model in enumerate(models, 1))
    return (
        f'<table style="width:100%;border-collapse:collapse;color:{colors.text};'
        f'font:11.5px/15px Helvetica,Arial,sans-serif;font-variant-numeric:tabular-nums">'
        f"<tr>{head}</tr>{rows}</table>"
    )


def _row(number: int, model: Mapping[str, Any], colors: Colors) -> str:
    copies = f"{model['copies']:,}"
    if model["loading"]:
        copies += (
            f' <span style="color:{colors.loading}" title="loading">+{model["loading"]}</span>'
        )
    if model["failed"]:
        copies += (
            f' <span style="color:{colors.failed}" title="{escape(model["error"])}">'
            f"&times;{model['failed']}</span>"
        )
    each = model["bytes"] / model["copies"] if model["copies"] else 0
    batch = f"{model['mean_batch_size']:.1f}" if model["batches"] else ""
    cells = (
        str(number),
        f'<span title="{escape(model["key"])}">{escape(_short(model["label"]))}</span>',
        copies,
        format_bytes(int(each)) if each else "",
        format_bytes(model["saved_bytes"]) if model["saved_bytes"] else "",
        format_rate(model["frames_per_second"]),
        f"{batch} of {model['max_batch_size']}" if batch and model["max_batch_size"] else batch,
        f"{model['queue_frames']:,}" if model["queue_frames"] else "",
        format_seconds(model["queue_age_seconds"]) if model["queue_frames"] else "",
        f"{model['tasks']:,}" if model["tasks"] else "",
        f"{model['held_tasks']:,}" if model["held_tasks"] else "",
    )
    return (
        f'<tr style="border-top:1px solid {colors.grid}">'
        + "".join(
            f'<td style="text-align:{side};padding:1px 4px;white-space:nowrap">{cell}</td>'
            for cell, (_, side) in zip(cells, _COLUMNS, strict=True)
        )
        + "</tr>"
    )


def _short(text: str, limit: int = 28) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
