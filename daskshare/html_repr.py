"""Tables for notebooks. Every text is escaped; colours are the page's own, light or dark."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["format_bytes", "properties", "table"]

# JupyterLab's border colour, which follows its theme; elsewhere a grey that shows on both.
_LINE = "1px solid var(--jp-border-color2, rgba(128, 128, 128, 0.45))"
_TABLE = "border-collapse: collapse; color: inherit; background: transparent; margin: 0.3em 0"
_CELL = f"padding: 0.2em 0.8em; border: none; border-bottom: {_LINE}; background: transparent"


def format_bytes(num_bytes: int) -> str:
    """Bytes with a decimal unit, such as ``35.4 MB``."""
    amount = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:,.0f} B" if unit == "B" else f"{amount:,.1f} {unit}"
        amount /= 1000
    return f"{amount:,.1f} TB"


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.2f}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value))
    return str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _cell(value: Any, tag: str = "td", *, right: bool = False) -> str:
    align = "right" if right else "left"
    style = f"{_CELL}; text-align: {align}; vertical-align: top"
    return f'<{tag} style="{style}">{html.escape(_text(value))}</{tag}>'


def _row(cells: Iterable[str]) -> str:
    return f'<tr style="background: transparent">{"".join(cells)}</tr>'


def _frame(title: str, rows: Iterable[str], note: str) -> str:
    head = f'<div style="font-weight: 600">{html.escape(title)}</div>' if title else ""
    foot = f'<div style="opacity: 0.75">{html.escape(note)}</div>' if note else ""
    return f'<div>{head}<table style="{_TABLE}">{"".join(rows)}</table>{foot}</div>'


def properties(title: str, pairs: Iterable[tuple[str, Any]], *, note: str = "") -> str:
    """Make a two-column table; pairs whose value is ``None`` or ``""`` are left out.

    Parameters
    ----------
    title : str
        Above it.
    pairs : iterable of (str, object)
        Label and value; numbers get thousands separators.
    note : str
        Below it.

    Returns
    -------
    str
        HTML; everything given is escaped.
    """
    rows = [
        _row((_cell(label, "th"), _cell(_text(value))))
        for label, value in pairs
        if value is not None and value != ""
    ]
    return _frame(title, rows, note)


def table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    max_rows: int = 30,
    note: str = "",
) -> str:
    """Make a table with a line of headings.

    Parameters
    ----------
    title : str
        Above it.
    columns : sequence of str
        Headings.
    rows : sequence of sequences
        Values; columns whose first value is a number are set to the right.
    max_rows : int
        More are counted, not shown.
    note : str
        Below it.

    Returns
    -------
    str
        HTML; everything given is escaped.
    """
    right = [_is_number(value) for value in rows[0]] if rows else [False] * len(columns)
    shown = [
        _row(_cell(value, right=at) for value, at in zip(row, right, strict=True))
        for row in rows[:max_rows]
    ]
    left = len(rows) - len(shown)
    if left:
        note = f"and {left:,} more. {note}".strip()
    heads = [_cell(name, "th", right=at) for name, at in zip(columns, right, strict=True)]
    return _frame(title, [_row(heads), *shown], note)
