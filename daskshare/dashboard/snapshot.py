"""One look at the whole cluster, made of what its workers last reported. Pure."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from daskshare.timesplit import STATES

__all__ = ["CELL_STATES", "Snapshot", "take_snapshot"]

#: What a model can be on a device; a snapshot's ``state`` holds indices into this.
CELL_STATES = ("absent", "unloaded", "loading", "ready", "unloading", "failed")
_STATE_INDEX = {state: i for i, state in enumerate(CELL_STATES)}
_LOADING, _FAILED = _STATE_INDEX["loading"], _STATE_INDEX["failed"]
_HELD = [_STATE_INDEX["ready"], _STATE_INDEX["unloading"]]

# What is read of each model on each device, in this order; summed over devices, but for the last.
_SUMS = ("bytes", "tasks", "frames", "batches", "errors", "loads", "queue_frames")
_MAXIMA = ("peak_tasks", "queue_age_seconds", "max_batch_size")
_COLUMNS = {name: i for i, name in enumerate((*_SUMS, *_MAXIMA, "frames_per_second", "state"))}

_DIGITS = re.compile(r"(\d+)")
_NO_ENGINE = {"queue_frames": 0, "queue_age_seconds": 0.0, "ceiling": 0}


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The cluster at one time.

    Parameters
    ----------
    time : float
        Seconds since the epoch.
    gpus : list of dict
        One entry a device with its one set of models, by name: JSON-able.
    models : list of dict
        One entry a model, by name: JSON-able.
    cells : numpy.ndarray, shape (num_gpus, num_models, number of columns), float64
        Read by :meth:`cell`.
    errors : dict of (int, int) to str
        Why a model could not be loaded, by its indices.
    batch_bins : dict
        Batches by size, of ``all`` time and the ``recent`` seconds; see
        :func:`daskshare._worker_report.batch_bins`.
    totals : dict
        Over all.
    """

    time: float
    gpus: list[dict[str, Any]]
    models: list[dict[str, Any]]
    cells: np.ndarray
    errors: dict[tuple[int, int], str]
    batch_bins: dict[str, dict[str, int]]
    totals: dict[str, Any]

    def cell(self, name: str) -> np.ndarray:
        """Return one figure of each model on each device.

        Parameters
        ----------
        name : str
            ``bytes``, ``tasks``, ``peak_tasks``, ``frames``, ``batches``, ``errors``, ``loads``,
            ``queue_frames``, ``queue_age_seconds``, ``max_batch_size``, ``frames_per_second``, or
            ``state`` (an index into :data:`CELL_STATES`).

        Returns
        -------
        numpy.ndarray, shape (num_gpus, num_models), float64
            A view.
        """
        view: np.ndarray = self.cells[:, :, _COLUMNS[name]]
        return view

    @cached_property
    def json(self) -> bytes:
        """What :meth:`as_dict` returns as JSON; made once, however many ask for it."""
        return json.dumps(self.as_dict(), allow_nan=False).encode()

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values for JSON; each GPU lists its ``models`` by key."""
        gpus = []
        for i, gpu in enumerate(self.gpus):
            models = {}
            for j, model in enumerate(self.models):
                values = dict(zip(_COLUMNS, self.cells[i, j].tolist(), strict=True))
                state = CELL_STATES[int(values.pop("state"))]
                if state != "absent":
                    models[model["key"]] = {
                        "name": model["name"],
                        "state": state,
                        "error": self.errors.get((i, j), ""),
                        **{k: v if k in _FRACTIONAL else int(v) for k, v in values.items()},
                    }
            gpus.append({**gpu, "models": models})
        return {
            "time": self.time,
            "gpus": gpus,
            "models": self.models,
            "batch_bins": self.batch_bins,
            "totals": self.totals,
        }


_FRACTIONAL = {"queue_age_seconds", "frames_per_second"}


def take_snapshot(
    now_seconds: float,
    reports: Iterable[tuple[str, str, Mapping[str, Any]]],
    held: Mapping[str, int],
) -> Snapshot:
    """Add up what workers reported.

    Parameters
    ----------
    now_seconds : float
        Seconds since the epoch.
    reports : iterable of (str, str, mapping)
        Each worker's name, address and report (:func:`daskshare.worker_plugin.worker_report`;
        empty when none has come).
    held : mapping of str to int
        By model key: tasks that wait on the scheduler for a GPU.

    Returns
    -------
    Snapshot
        Of all.
    """
    shares = _shares(reports)
    names = dict.fromkeys(held, "")
    for _, _, report in shares:
        for key, model in report.get("models", {}).items():
            names[key] = model["name"]
    keys = sorted(names, key=lambda key: (names[key] or key, key))
    cells, errors = _cells([report for _, _, report in shares], keys)
    gpus = _gpus(shares, cells)
    models = _models(keys, names, cells, errors, held)
    bins = {
        "all": _add(report.get("batch_bins", {}) for _, _, report in shares),
        "recent": _add(report.get("recent", {}).get("batch_bins", {}) for _, _, report in shares),
    }
    totals = _totals(gpus, models, held)
    recent = [report["recent"] for _, _, report in shares if "recent" in report]
    totals["recent_mean_batch_size"] = _ratio(
        sum(one["frames"] for one in recent), sum(one["batches"] for one in recent)
    )
    return Snapshot(now_seconds, gpus, models, cells, errors, bins, totals)


_Share = tuple[str, list[str], Mapping[str, Any]]


def _shares(reports: Iterable[tuple[str, str, Mapping[str, Any]]]) -> list[_Share]:
    """Merge the workers that share one copy of each model: those of one process."""
    shares: dict[str, _Share] = {}
    for name, address, report in reports:
        known = shares.setdefault(report.get("share") or address, (name, [], report))
        known[1].append(address)
    # gpu2 before gpu10.
    return sorted(
        shares.values(),
        key=lambda share: [
            (int(part), "") if part.isdecimal() else (-1, part) for part in _DIGITS.split(share[0])
        ],
    )


def _cells(
    reports: list[Mapping[str, Any]], keys: list[str]
) -> tuple[np.ndarray, dict[tuple[int, int], str]]:
    cells = np.zeros((len(reports), len(keys), len(_COLUMNS)))
    place = {key: j for j, key in enumerate(keys)}
    errors = {}
    # Thousands of these a second or two: all become one array, not value by value.
    where: list[int] = []
    values: list[float] = []
    for i, report in enumerate(reports):
        rates = report.get("recent", {}).get("frames_per_second", {})
        for key, model in report.get("models", {}).items():
            engine = model["engine"] or _NO_ENGINE
            j = place[key]
            where.append(i * len(keys) + j)
            error = model["load_error"]
            if error:
                errors[i, j] = error
            values += (
                model["model_bytes"],
                model["leases"],
                model["frames"],
                model["batches"],
                model["errors"],
                model["loads"],
                engine["queue_frames"],
                model["peak_leases"],
                engine["queue_age_seconds"],
                engine["ceiling"],
                rates.get(key, 0.0),
                _FAILED if error else _STATE_INDEX[model["state"]],
            )
    rows = np.fromiter(values, np.float64, len(values)).reshape(-1, len(_COLUMNS))
    cells.reshape(-1, len(_COLUMNS))[where] = rows
    return cells, errors


def _gpus(shares: list[_Share], cells: np.ndarray) -> list[dict[str, Any]]:
    size = cells[:, :, _COLUMNS["bytes"]]
    peak = np.maximum(cells[:, :, _COLUMNS["peak_tasks"]], 1)
    columns = {
        "model_bytes": size.sum(axis=1).astype(np.int64).tolist(),
        # What as many copies as tasks ever used a model at once would take.
        "unshared_bytes": (size * peak).sum(axis=1).astype(np.int64).tolist(),
        "frames_per_second": cells[:, :, _COLUMNS["frames_per_second"]].sum(axis=1).tolist(),
        "queue_frames": cells[:, :, _COLUMNS["queue_frames"]].sum(axis=1).astype(np.int64).tolist(),
        "queue_age_seconds": cells[:, :, _COLUMNS["queue_age_seconds"]]
        .max(axis=1, initial=0.0)
        .tolist(),
    }
    gpus = []
    for i, (name, workers, report) in enumerate(shares):
        device = report.get("device") or {}
        fractions = report.get("recent", {}).get("time_fraction", {})
        gpus.append(
            {
                "name": name,
                "workers": workers,
                "state": report.get("state", "starting"),
                "reason": report.get("reason", ""),
                "device": device.get("name", ""),
                "device_index": device.get("index"),
                "device_uuid": device.get("uuid", ""),
                "device_kind": device.get("kind", ""),
                "total_bytes": device.get("total_bytes", 0),
                "budget_bytes": report.get("budget_bytes", 0),
                **{column: found[i] for column, found in columns.items()},
                "time_fraction": {state: fractions.get(state, 0.0) for state in STATES},
            }
        )
    return gpus


def _models(
    keys: list[str],
    names: Mapping[str, str],
    cells: np.ndarray,
    errors: Mapping[tuple[int, int], str],
    held: Mapping[str, int],
) -> list[dict[str, Any]]:
    state = cells[:, :, _COLUMNS["state"]]
    size, peak = cells[:, :, _COLUMNS["bytes"]], cells[:, :, _COLUMNS["peak_tasks"]]
    columns: dict[str, list[int] | list[float]] = {
        "copies": np.isin(state, _HELD).sum(axis=0).tolist(),
        "loading": (state == _LOADING).sum(axis=0).tolist(),
        "failed": (state == _FAILED).sum(axis=0).tolist(),
        "saved_bytes": (size * np.maximum(peak - 1, 0)).sum(axis=0).astype(np.int64).tolist(),
        "frames_per_second": cells[:, :, _COLUMNS["frames_per_second"]].sum(axis=0).tolist(),
        "queue_age_seconds": cells[:, :, _COLUMNS["queue_age_seconds"]]
        .max(axis=0, initial=0.0)
        .tolist(),
        "max_batch_size": cells[:, :, _COLUMNS["max_batch_size"]]
        .max(axis=0, initial=0.0)
        .astype(np.int64)
        .tolist(),
    }
    for name in _SUMS:
        columns[name] = cells[:, :, _COLUMNS[name]].sum(axis=0).astype(np.int64).tolist()
    first_error: dict[int, str] = {}
    for (_, j), error in errors.items():
        first_error.setdefault(j, error)
    same = Counter(names.values())
    models = []
    for j, key in enumerate(keys):
        name = names[key] or key[:8]
        values: dict[str, Any] = {column: found[j] for column, found in columns.items()}
        models.append(
            {
                "key": key,
                "name": name,
                # Models of one name differ in something that the key knows.
                "label": f"{name} ({key[:4]})" if same[name] > 1 else name,
                **values,
                "held_tasks": held.get(key, 0),
                "mean_batch_size": _ratio(values["frames"], values["batches"]),
                "error": first_error.get(j, ""),
            }
        )
    return models


def _totals(
    gpus: list[dict[str, Any]], models: list[dict[str, Any]], held: Mapping[str, int]
) -> dict[str, Any]:
    busy = [gpu["time_fraction"]["busy"] for gpu in gpus if gpu["state"] == "ready"]
    totals: dict[str, Any] = {
        "gpus": len(gpus),
        "gpus_ready": len(busy),
        "gpus_failed": sum(gpu["state"] == "failed" for gpu in gpus),
        "models": len(models),
        "busy_fraction": _ratio(sum(busy), len(busy)),
        "queue_age_seconds": max((gpu["queue_age_seconds"] for gpu in gpus), default=0.0),
        "held_tasks": sum(held.values()),
    }
    for name in ("model_bytes", "unshared_bytes"):
        totals[name] = sum(gpu[name] for gpu in gpus)
    totals["saved_bytes"] = totals["unshared_bytes"] - totals["model_bytes"]
    for name in (
        *("copies", "loading", "failed", "tasks", "frames", "batches"),
        *("frames_per_second", "queue_frames", "errors"),
    ):
        totals[name] = sum(model[name] for model in models)
    totals["mean_batch_size"] = _ratio(totals["frames"], totals["batches"])
    return totals


def _add(many: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for one in many:
        total.update(one)
    return {size: total[size] for size in sorted(total, key=int)}


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
