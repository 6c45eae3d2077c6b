"""What the shell offers after an option of ``daskshare``. Runs at each press of the tab key."""

from __future__ import annotations

from pathlib import Path

import click
from click.shell_completion import CompletionItem

__all__ = ["complete_classes", "complete_models"]


def complete_models(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Models that are known by name."""
    from daskshare.models.fetch import KNOWN_WEIGHTS

    return [CompletionItem(name) for name in KNOWN_WEIGHTS if name.startswith(incomplete)]


def complete_classes(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Class names after the last comma: of ``--names``' file, else of COCO."""
    import importlib.resources

    given = ctx.params.get("names")
    if given:
        path = Path(given).expanduser()
        # A tab key must not end in a traceback; the command itself will name the wrong path.
        lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    else:
        data = importlib.resources.files("daskshare").joinpath("data", "coco.names")
        lines = data.read_text("utf-8").splitlines()
    before, comma, last = incomplete.rpartition(",")
    chosen = set(before.split(","))
    return [
        CompletionItem(f"{before}{comma}{name}")
        for name in filter(None, map(str.strip, lines))
        if name.startswith(last) and name not in chosen
    ]
