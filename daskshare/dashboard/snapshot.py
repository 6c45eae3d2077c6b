"""One look at the whole cluster, made of what its workers last reported. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from daskshare.timesplit import STATES

__all__ = ["take_snapshot"]

#: A model's states on a device that are shown; "unloaded" is the absence of them.
MODEL_STATES = ("ready", "loading", "unloading", "failed")

_DIGITS = re.compile(r"(\d+)")
_NO_RATES: dict[str, Any] = {"time_fraction": {}, "models": {}}


def take_snapshot(
    reports: Iterable[tuple[str, str, Mapping[str, Any]]], held: Mapping[str, int]
) -> dict[str, Any]:
    """Add up what workers reported.

    Parameters
    ----------
    reports : iterable of (str, str, mapping)
        Each worker's name, address and report (:func:`daskshare.worker_plugin.worker_report`;
        empty when none has come).
    held : mapping of str to int
        By model key: tasks that wait on the scheduler for a GPU.

    Returns
    -------
    dict
        Plain JSON-able data: ``gpus``, one entry a device with its one set of models, and
        ``models``, one entry a model, both by name; ``batch_size_counts`` of all
        models, ``all`` time and ``recent``; and ``totals``.
    """
    gpus = _gpus(reports)
    models = _models(gpus, held)
    everything: Counter[str] = Counter()
    recent: Counter[str] = Counter()
    for gpu in gpus:
        for on_gpu in gpu["models"].values():
            _count(everything, on_gpu.pop("batch_size_counts"))
            _count(recent, on_gpu.pop("recent_batch_size_counts"))
    ready = [gpu for gpu in gpus if gpu["state"] == "ready"]
    totals = {
        "gpus": len(gpus),
        "gpus_ready": len(ready),
        "gpus_failed": sum(gpu["state"] == "failed" for gpu in gpus),
        "models": len(models),
        "copies": sum(model["copies"] for model in models),
        "loading": sum(model["loading"] for model in models),
        "failed": sum(model["failed"] for model in models),
        "frames": sum(model["frames"] for model in models),
        "frames_per_second": sum(gpu["frames_per_second"] for gpu in gpus),
        "busy_fraction": _mean(gpu["time_fraction"].get("busy", 0.0) for gpu in ready),
        "queue_frames": sum(gpu["queue_frames"] for gpu in gpus),
        "queue_age_seconds": max((gpu["queue_age_seconds"] for gpu in gpus), default=0.0),
        "model_bytes": sum(gpu["model_bytes"] for gpu in gpus),
        "unshared_bytes": sum(gpu["unshared_bytes"] for gpu in gpus),
        "saved_bytes": sum(gpu["unshared_bytes"] - gpu["model_bytes"] for gpu in gpus),
        "tasks": sum(model["tasks"] for model in models),
        "held_tasks": sum(held.values()),
        "errors": sum(model["errors"] for model in models),
    }
    return {
        "gpus": gpus,
        "models": models,
        "batch_size_counts": {"all": _by_size(everything), "recent": _by_size(recent)},
        "totals": totals,
    }


def _gpus(reports: Iterable[tuple[str, str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    gpus: dict[str, dict[str, Any]] = {}
    for name, address, report in reports:
        state = report.get("state", "starting")
        # Workers of one process share one copy and report the same.
        share = report.get("share") or address
        if share in gpus:
            gpus[share]["workers"].append(address)
            continue
        recent = report.get("recent") or _NO_RATES
        device = report.get("device") or {}
        models = {
            key: _on_gpu(model, recent["models"].get(key))
            for key, model in report.get("models", {}).items()
        }
        gpus[share] = {
            "name": name,
            "workers": [address],
            "state": state,
            "reason": report.get("reason", ""),
            "device": device.get("name", ""),
            "device_index": device.get("index"),
            "device_uuid": device.get("uuid", ""),
            "device_kind": device.get("kind", ""),
            "total_bytes": device.get("total_bytes", 0),
            "budget_bytes": report.get("budget_bytes", 0),
            "model_bytes": sum(model["bytes"] for model in models.values()),
            # What as many copies as tasks ever used a model at once would take.
            "unshared_bytes": sum(
                model["bytes"] * max(1, model["peak_tasks"]) for model in models.values()
            ),
            "frames_per_second": sum(model["frames_per_second"] for model in models.values()),
            "queue_frames": sum(model["queue_frames"] for model in models.values()),
            "queue_age_seconds": max(
                (model["queue_age_seconds"] for model in models.values()), default=0.0
            ),
            "time_fraction": {state: recent["time_fraction"].get(state, 0.0) for state in STATES},
            "models": models,
        }
    return sorted(gpus.values(), key=lambda gpu: _natural(gpu["name"]))


def _on_gpu(model: Mapping[str, Any], recent: Mapping[str, Any] | None) -> dict[str, Any]:
    engine = model.get("engine") or {}
    error = model.get("load_error", "")
    return {
        "name": model["name"],
        "state": "failed" if error else model["state"],
        "error": error,
        "bytes": model["model_bytes"],
        "tasks": model["leases"],
        "peak_tasks": model["peak_leases"],
        "frames": model["frames"],
        "batches": model["batches"],
        "errors": model["errors"],
        "loads": model["loads"],
        "frames_per_second": recent["frames_per_second"] if recent else 0.0,
        "queue_frames": engine.get("queue_frames", 0),
        "queue_age_seconds": engine.get("queue_age_seconds", 0.0),
        "max_batch_size": engine.get("ceiling", 0),
        "mode": engine.get("mode", ""),
        "batch_size_counts": model["batch_size_counts"],
        "recent_batch_size_counts": recent["batch_size_counts"] if recent else {},
    }


def _models(gpus: list[dict[str, Any]], held: Mapping[str, int]) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for gpu in gpus:
        for key, on_gpu in gpu["models"].items():
            model = found.get(key)
            if model is None:
                model = found[key] = _no_model(key, on_gpu["name"], held.get(key, 0))
            state = on_gpu["state"]
            if state in ("ready", "unloading"):
                model["copies"] += 1
            elif state != "unloaded":
                model[state] += 1
            model["bytes"] += on_gpu["bytes"]
            model["saved_bytes"] += on_gpu["bytes"] * max(0, on_gpu["peak_tasks"] - 1)
            for total in (
                "tasks",
                "frames",
                "batches",
                "errors",
                "loads",
                "frames_per_second",
                "queue_frames",
            ):
                model[total] += on_gpu[total]
            for largest in ("queue_age_seconds", "max_batch_size"):
                model[largest] = max(model[largest], on_gpu[largest])
            model["error"] = model["error"] or on_gpu["error"]
    for key, number in held.items():
        if key not in found:
            found[key] = _no_model(key, key[:8], number)
    models = sorted(found.values(), key=lambda model: (model["name"], model["key"]))
    names = Counter(model["name"] for model in models)
    for model in models:
        if names[model["name"]] > 1:
            model["label"] = f"{model['name']} ({model['key'][:4]})"
        model["mean_batch_size"] = model["frames"] / model["batches"] if model["batches"] else 0.0
    return models


def _no_model(key: str, name: str, held_tasks: int) -> dict[str, Any]:
    counts = dict.fromkeys(
        (
            *("copies", "loading", "failed", "bytes", "saved_bytes", "tasks", "frames"),
            *("batches", "errors", "loads", "queue_frames", "max_batch_size"),
        ),
        0,
    )
    return {
        "key": key,
        "name": name,
        "label": name,
        "held_tasks": held_tasks,
        **counts,
        "frames_per_second": 0.0,
        "queue_age_seconds": 0.0,
        "mean_batch_size": 0.0,
        "error": "",
    }


def _count(counter: Counter[str], counts: Mapping[str, int]) -> None:
    for size, count in counts.items():
        counter[size] += count


def _by_size(counter: Counter[str]) -> dict[str, int]:
    return {size: counter[size] for size in sorted(counter, key=int)}


def _natural(name: str) -> list[tuple[int, str]]:
    # gpu2 before gpu10.
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in _DIGITS.split(name)]


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else 0.0
