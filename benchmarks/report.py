"""What every benchmark hands in: the machine, the versions, rows of figures, and bars to clear.

A benchmark makes a :class:`Report`, adds rows and bars as it measures, and ends with
``raise SystemExit(report.finish(arguments))``. ``python -m benchmarks.report FILE...`` prints
finished reports as Markdown tables.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import operator
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from dask.system import CPU_COUNT
from distributed.system import MEMORY_LIMIT
from tabulate import tabulate

__all__ = ["Bar", "Report", "argument_parser", "bars_table", "machine", "versions"]

_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    ">": operator.gt,
    "<=": operator.le,
    "<": operator.lt,
}

_DISTRIBUTIONS = (
    "daskshare",
    "torch",
    "dask",
    "distributed",
    "dask-cuda",
    "numpy",
    "pandas",
    "pyarrow",
    "opencv-python-headless",
    "av",
    "PyNvVideoCodec",
    "cupy-cuda13x",
    "cupy-cuda12x",
    "nvidia-cudnn-frontend",
    "triton",
    "pyspark",
    "ray",
)


@dataclass(frozen=True, slots=True)
class Bar:
    """A figure that a benchmark must reach.

    Parameters
    ----------
    name : str
        What was measured.
    value : float or None
        The figure; ``None`` (or NaN) when it could not be measured, and then the bar does not hold.
    unit : str
        ``"frames/s"``, ``"MB"``, ``"x"``, ...
    bound : float
        What ``value`` is compared with, in the same unit.
    comparison : {">=", ">", "<=", "<"}
        How: the bar holds when ``value comparison bound``.
    """

    name: str
    value: float | None
    unit: str
    bound: float
    comparison: Literal[">=", ">", "<=", "<"] = ">="

    def __post_init__(self) -> None:
        if self.comparison not in _COMPARISONS:
            raise ValueError(f"comparison is {self.comparison!r}; expected one of >=, >, <=, <")
        if not math.isfinite(self.bound):
            raise ValueError(f"bound of {self.name!r} is {self.bound!r}; expected a finite number")

    @property
    def holds(self) -> bool:
        """Whether the bar is cleared."""
        if self.value is None or not math.isfinite(self.value):
            return False
        return bool(_COMPARISONS[self.comparison](self.value, self.bound))

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON: name, value, unit, comparison, bound, holds."""
        return {
            "name": self.name,
            "value": _plain(self.value),
            "unit": self.unit,
            "comparison": self.comparison,
            "bound": _plain(self.bound),
            "holds": self.holds,
        }


class Report:
    """Collects what one benchmark measured.

    Parameters
    ----------
    benchmark : str
        Its module's name, ``"sharing"`` for ``benchmarks/sharing.py``.
    settings : mapping, optional
        What the run was asked to do (model, batch size, seconds, ...); JSON-able values.

    Notes
    -----
    Not safe to use from several threads at once. Collecting the machine does not initialise CUDA,
    so a benchmark may make a report first and fork or pick devices afterwards.
    """

    def __init__(self, benchmark: str, *, settings: Mapping[str, Any] | None = None) -> None:
        self.benchmark = benchmark
        self.settings = dict(settings or {})
        self.rows: list[dict[str, Any]] = []
        self.bars: list[Bar] = []

    def add_row(self, **cells: Any) -> None:
        """Add a row of figures; keys carry units (``frames_per_second``, ``memory_bytes``)."""
        self.rows.append(cells)

    def add_bar(
        self,
        name: str,
        value: float | None,
        unit: str,
        *,
        bound: float,
        comparison: Literal[">=", ">", "<=", "<"] = ">=",
    ) -> Bar:
        """Add and return a :class:`Bar`."""
        bar = Bar(name, value, unit, bound, comparison)
        self.bars.append(bar)
        return bar

    @property
    def holds(self) -> bool:
        """Whether every bar holds."""
        return all(bar.holds for bar in self.bars)

    def as_dict(self) -> dict[str, Any]:
        """The whole report as plain values for JSON."""
        return {
            "benchmark": self.benchmark,
            "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": " ".join(["python", *sys.orig_argv[1:]]),
            "settings": _plain(self.settings),
            "machine": machine(),
            "versions": versions(),
            "rows": _plain(self.rows),
            "bars": [bar.as_dict() for bar in self.bars],
        }

    def write(self, path: str | Path) -> Path:
        """Write the report as JSON to ``path``; missing folders are made."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.as_dict(), indent=2, allow_nan=False)
        path.write_text(text + "\n", encoding="utf-8")
        return path

    def finish(self, arguments: argparse.Namespace) -> int:
        """Print the tables, write the JSON that ``--json`` asked for, and give the exit status.

        Parameters
        ----------
        arguments : argparse.Namespace
            From :func:`argument_parser`: ``json`` and ``strict``.

        Returns
        -------
        int
            1 when ``--strict`` was given and a bar does not hold, else 0.
        """
        print(render(self.as_dict()))
        if arguments.json is not None:
            print(f"\nwritten: {self.write(arguments.json)}")
        return int(arguments.strict and not self.holds)


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """Command line that every benchmark has; add your own arguments to it.

    Parameters
    ----------
    description : str or None
        Usually the benchmark's ``__doc__``.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report here")
    parser.add_argument(
        "--strict", action="store_true", help="exit with status 1 when a bar does not hold"
    )
    return parser


def machine() -> dict[str, Any]:
    """Describe this machine: CPU, cores and memory that this process may use, and the GPUs."""
    return {
        "cpu": _cpu_model(),
        "cpu_cores": CPU_COUNT,
        "memory_bytes": int(MEMORY_LIMIT),
        "system": platform.platform(),
        "gpus": _gpus(),
    }


def versions() -> dict[str, str]:
    """Versions of Python, of this checkout's commit, and of the packages that are installed."""
    found = {"python": platform.python_version()}
    commit = _output("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty")
    if commit:
        found["commit"] = commit
    for name in _DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def render(report: Mapping[str, Any], *, table_format: str = "simple") -> str:
    """Lay out a report (:meth:`Report.as_dict`, or what its JSON holds) as tables for people.

    Parameters
    ----------
    report : mapping
        The report.
    table_format : str
        One of tabulate's: ``"simple"`` for a terminal, ``"github"`` for Markdown.
    """
    described = report["machine"]
    gpus = ", ".join(f"{gpu['name']} (driver {gpu['driver']})" for gpu in described["gpus"])
    parts = [
        f"{report['benchmark']} on {described['cpu']}, {described['cpu_cores']} cores, "
        f"{described['memory_bytes'] / 2**30:.0f} GiB; {gpus or 'no GPU'}",
        ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
    ]
    if report["rows"]:
        parts.append(
            tabulate(report["rows"], headers="keys", tablefmt=table_format, floatfmt=".5g")
        )
    if report["bars"]:
        lines = [
            {
                "bar": bar["name"],
                "value": bar["value"],
                "bound": f"{bar['comparison']} {bar['bound']:g}",
                "unit": bar["unit"],
                "holds": "yes" if bar["holds"] else "NO",
            }
            for bar in report["bars"]
        ]
        parts.append(tabulate(lines, headers="keys", tablefmt=table_format, floatfmt=".5g"))
    return "\n\n".join(parts)


def _plain(value: Any) -> Any:
    """Turn NumPy scalars, tuples and paths into what JSON knows; NaN and infinities into null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _cpu_model() -> str:
    # platform.processor() is empty or only "x86_64" on Linux.
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        lines = []
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model"):
            return value.strip()
    return platform.processor() or platform.machine()


def _gpus() -> list[dict[str, Any]]:
    listing = _output(
        "nvidia-smi",
        "--query-gpu=name,uuid,memory.total,driver_version",
        "--format=csv,noheader,nounits",
    )
    gpus = []
    for line in listing.splitlines():
        name, uuid, mebibytes, driver = (cell.strip() for cell in line.split(","))
        # Without a usable driver nvidia-smi prints a sentence, or "[N/A]" for unified memory.
        memory_bytes = int(mebibytes) * 2**20 if mebibytes.isdigit() else None
        gpus.append({"name": name, "uuid": uuid, "memory_bytes": memory_bytes, "driver": driver})
    return gpus


def _output(*command: str) -> str:
    """What a command prints, or "" when it is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def bars_table(paths: Sequence[Path], *, table_format: str = "simple") -> str:
    """One table of the bars of many reports; a file that is not there says "not run here".

    Parameters
    ----------
    paths : sequence of Path
        JSON of benchmarks, named for them.
    table_format : str
        One of tabulate's.
    """
    lines: list[dict[str, Any]] = []
    for path in paths:
        if not path.exists():
            lines.append({"benchmark": path.stem, "bar": "not run here"})
            continue
        report = json.loads(path.read_text(encoding="utf-8"))
        lines += [
            {
                "benchmark": report["benchmark"],
                "bar": bar["name"],
                "value": bar["value"],
                "bound": f"{bar['comparison']} {bar['bound']:g}",
                "unit": bar["unit"],
                "holds": "yes" if bar["holds"] else "NO",
            }
            for bar in report["bars"]
        ]
    return tabulate(lines, headers="keys", tablefmt=table_format, floatfmt=".5g")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print finished reports, or all their bars in one table."""
    parser = argparse.ArgumentParser(description="Print finished reports as Markdown tables.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JSON of a benchmark")
    parser.add_argument("--bars", action="store_true", help="one table of all bars; no Markdown")
    parsed = parser.parse_args(arguments)
    if parsed.bars:
        print(bars_table(parsed.files))
        return 0
    for path in parsed.files:
        report = json.loads(path.read_text(encoding="utf-8"))
        print(f"{render(report, table_format='github')}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
