"""How models and statistics look in a notebook. No torch here: the scheduler reads this module."""

from __future__ import annotations

import dataclasses
from typing import Any

from daskshare.html_repr import format_bytes, properties, table
from daskshare.models.spec import ModelSpec

__all__ = ["ClusterStats", "model_html"]


def model_html(spec: ModelSpec) -> str:
    """Describe a model by the options of its spec.

    Parameters
    ----------
    spec : ModelSpec
        A dataclass shows its fields, but for those that it leaves out of its ``repr``.

    Returns
    -------
    str
        HTML.
    """
    pairs: list[tuple[str, Any]] = [("key", spec.key[:24])]
    if dataclasses.is_dataclass(spec):
        for field in dataclasses.fields(spec):
            if not field.repr or field.name in ("name", "key"):
                continue
            value = getattr(spec, field.name)
            label = field.name.replace("_", " ")
            if field.name == "class_ids":
                names = getattr(spec, "class_names", ())
                label = "classes"
                value = [names[i] for i in value] if value else f"all {len(names)}"
            elif field.name == "input_size":
                value = "x".join(map(str, value))
            pairs.append((label, value if value != () else None))
    size = spec.estimated_bytes()
    pairs.append(("weights at most", format_bytes(size) if size else None))
    return properties(
        f"Shared model {spec.name}", pairs, note="One copy on each worker that a task asks."
    )


class ClusterStats(dict[str, dict[str, Any]]):
    """What each worker's models have done, by worker address; see :func:`daskshare.stats`.

    An ordinary dict, but that notebooks show it as a table.
    """

    def _repr_html_(self) -> str:
        """Show one line a worker and model, in notebooks."""
        columns = (
            *("worker", "device", "model", "state", "loads", "frames", "batches"),
            *("mean batch", "weights"),
        )
        rows = []
        for worker, report in self.items():
            device = report.get("device", {}).get("name", "")
            for model in report.get("models", {}).values():
                counts = [model[name] for name in ("loads", "frames", "batches")]
                mean, size = model["mean_batch_size"], format_bytes(model["model_bytes"])
                rows.append([worker, device, model["name"], model["state"], *counts, mean, size])
            if not report.get("models"):
                state = ": ".join(filter(None, (report.get("state", ""), report.get("reason"))))
                rows.append([worker, device, "no model yet", state, 0, 0, 0, 0.0, ""])
        workers = f"{len(self):,} worker{'' if len(self) == 1 else 's'}"
        return table(f"daskshare on {workers}", columns, rows, max_rows=60)
