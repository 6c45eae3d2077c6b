"""Colours and Bokeh themes, light and dark. Imports Bokeh only where a theme is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bokeh.themes import Theme

__all__ = ["DARK", "LIGHT", "Colors", "bokeh_theme"]

_FONT = "Helvetica, Arial, sans-serif"
#: Told apart by people with any colour vision, on both backgrounds.
_SERIES = (
    "#4c9be8",
    "#f0a030",
    "#2fae8a",
    "#c77dca",
    "#e0685c",
    "#a8a23c",
)


@dataclass(frozen=True)
class Colors:
    """What has which colour.

    Parameters
    ----------
    page, card, text, faint_text, grid : str
        Of the page and of figures.
    on_load : str
        Of words on a fast model's cell.
    states : dict of str to str
        Of a device's time (:data:`daskshare.timesplit.STATES`).
    load : tuple of str
        A model's cell from idle to the fastest.
    loading, failed : str
        A model's cell that is so.
    memory, unshared, queue, old, past : str
        Bars: memory in use, memory that copies would take, waiting frames, ones that wait long,
        what was before the last seconds.
    series : tuple of str
        Of models.
    other_series : str
        Of all models beyond those.
    """

    page: str
    card: str
    text: str
    faint_text: str
    grid: str
    on_load: str
    states: dict[str, str]
    load: tuple[str, ...]
    loading: str
    failed: str
    memory: str
    unshared: str
    queue: str
    old: str
    past: str
    series: tuple[str, ...] = _SERIES
    other_series: str = "#8c9299"


LIGHT = Colors(
    page="#f4f5f7",
    card="#ffffff",
    text="#2b3036",
    faint_text="#6d747c",
    grid="#e6e8eb",
    on_load="#ffffff",
    states={
        "busy": "#1f9d78",
        "loading": "#e0a52b",
        "decoding": "#5b8fe0",
        "input": "#b58bd6",
        "scheduler": "#d8dce0",
    },
    load=("#d6ece4", "#b2dccd", "#8bcab4", "#63b89b", "#3ca583", "#1f916d", "#0d7a59", "#04634a"),
    loading="#e0a52b",
    failed="#d2465a",
    memory="#4c7fb8",
    unshared="#cfdced",
    queue="#8a93a0",
    old="#d2465a",
    past="#c3c9d0",
)

DARK = Colors(
    page="#14171a",
    card="#1d2125",
    text="#dfe3e7",
    faint_text="#98a1aa",
    grid="#30363c",
    on_load="#14171a",
    states={
        "busy": "#2fbf93",
        "loading": "#e3ae3d",
        "decoding": "#6a9df0",
        "input": "#b48ee0",
        "scheduler": "#3d454d",
    },
    load=("#21443b", "#23574a", "#246b5a", "#25806a", "#28967b", "#2fad8e", "#3fc5a2", "#5fddb9"),
    loading="#e3ae3d",
    failed="#ef5f72",
    memory="#5f93cf",
    unshared="#32445a",
    queue="#7d8894",
    old="#ef5f72",
    past="#4a525b",
)


def bokeh_theme(colors: Colors) -> Theme:
    """Make the Bokeh theme of a set of colours."""
    from bokeh.themes import Theme

    return Theme(
        json={
            "attrs": {
                "Plot": {
                    "background_fill_color": colors.card,
                    "border_fill_color": colors.card,
                    "outline_line_color": None,
                    "min_border_left": 4,
                    "min_border_right": 8,
                    "min_border_top": 2,
                    "min_border_bottom": 2,
                    "toolbar_location": None,
                },
                "Axis": {
                    "axis_line_color": None,
                    "major_tick_line_color": None,
                    "minor_tick_line_color": None,
                    "major_label_text_color": colors.faint_text,
                    "major_label_text_font": _FONT,
                    "major_label_text_font_size": "11px",
                    "axis_label_text_color": colors.faint_text,
                    "axis_label_text_font": _FONT,
                    "axis_label_text_font_size": "11px",
                    "axis_label_text_font_style": "normal",
                },
                "Grid": {"grid_line_color": colors.grid},
                "Title": {
                    "text_color": colors.text,
                    "text_font": _FONT,
                    "text_font_size": "12px",
                    "text_font_style": "bold",
                },
            }
        }
    )
