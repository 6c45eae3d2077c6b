"""A report for people and for programs."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from daskshare.doctor.checks import exit_status, worst
from daskshare.doctor.findings import Check, Status

__all__ = ["as_json", "render"]

_MARKS = {Status.OK: "ok", Status.ABSENT: "-", Status.WARNING: "warning", Status.ERROR: "ERROR"}


def _groups(report: Mapping[str, Sequence[Check]]) -> list[tuple[list[str], Sequence[Check]]]:
    """Sections with equal checks together: a hundred equal workers are told once."""
    groups: list[tuple[list[str], Sequence[Check]]] = []
    for name, checks in report.items():
        same = next((names for names, others in groups if list(others) == list(checks)), None)
        if same is None:
            groups.append(([name], checks))
        else:
            same.append(name)
    return groups


def render(
    report: Mapping[str, Sequence[Check]],
    *,
    width: int = 100,
    style: Callable[[str, Status], str] = lambda text, status: text,
) -> str:
    """Lay a report out as text.

    Parameters
    ----------
    report : mapping of str to sequence of Check
        By what was examined.
    width : int
        Columns.
    style : callable
        ``style(text, status)`` returns the text, coloured perhaps.

    Returns
    -------
    str
        One line a check, its fix below it, and a closing line.
    """
    lines = []
    for names, checks in _groups(report):
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        lines.append(f"{len(names)} workers alike: {shown}" if len(names) > 1 else shown)
        for check in checks:
            mark = style(f"{_MARKS[check.status]:>9}", check.status)
            text = _wrap(f"{check.name}: {check.found}", width)
            lines.append(f"{mark}  {text}")
            if check.fix:
                lines.append(f"{'':>11}{_wrap(f'-> {check.fix}', width)}")
        lines.append("")
    every = list(itertools.chain.from_iterable(report.values()))
    counts = {status: sum(check.status is status for check in every) for status in Status}
    verdict = {
        Status.ERROR: "Something will fail: correct the errors above.",
        Status.WARNING: "It works, with less than it could: see the warnings above.",
    }.get(worst(every), "All is well.")
    told = f"{counts[Status.ERROR]} errors, {counts[Status.WARNING]} warnings"
    lines.append(style(f"{verdict} ({told})", worst(every)))
    return "\n".join(lines)


def _wrap(text: str, width: int) -> str:
    # Long words are commands and paths that people copy.
    return textwrap.fill(
        text,
        max(40, width - 11),
        subsequent_indent=" " * 11,
        break_long_words=False,
        break_on_hyphens=False,
    )


def as_json(report: Mapping[str, Sequence[Check]], *, strict: bool = False) -> dict[str, Any]:
    """JSON-able form: ``status``, ``exit_status`` and, by section, the checks."""
    every = list(itertools.chain.from_iterable(report.values()))
    return {
        "status": str(worst(every)),
        "exit_status": exit_status(every, strict=strict),
        "checks": {name: [check.as_dict() for check in checks] for name, checks in report.items()},
    }
