"""Prometheus metrics of workers and schedulers, on the ``/metrics`` that Dask already serves."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import REGISTRY
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from daskshare.dashboard.snapshot import Snapshot

__all__ = ["SCHEDULER_METRICS", "WORKER_METRICS", "ProcessMetrics"]

_MODEL_STATES = ("unloaded", "loading", "ready", "unloading", "failed")
_MODEL = ["model", "key"]


class ProcessMetrics(Collector):
    """Metrics of one kind of Dask server, of which a process may hold several.

    Parameters
    ----------
    describe : callable
        Makes the metrics from what a source returns.

    Notes
    -----
    Prometheus' registry belongs to the process: with several servers in it, the newest answers
    for all, as with Dask's own metrics. Sources are called on an event loop, at each scrape.
    """

    def __init__(self, describe: Callable[[Any], Iterator[Metric]]) -> None:
        self._describe = describe
        self._lock = threading.Lock()
        self._sources: dict[int, Callable[[], Any]] = {}

    def add(self, owner: object, source: Callable[[], Any]) -> None:
        """Begin to serve what ``source`` returns."""
        with self._lock:
            first = not self._sources
            self._sources[id(owner)] = source
        if first:
            REGISTRY.register(self)

    def remove(self, owner: object) -> None:
        """Stop serving an owner's source; one that is unknown is nothing."""
        with self._lock:
            known = self._sources.pop(id(owner), None) is not None
            last = known and not self._sources
        if last:
            REGISTRY.unregister(self)

    def describe(self) -> list[Metric]:
        """Return nothing: the registry need not know the names beforehand."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of now."""
        with self._lock:
            sources = list(self._sources.values())
        if sources:
            yield from self._describe(sources[-1]())


def _worker_metrics(report: Mapping[str, Any]) -> Iterator[Metric]:
    if "device" in report:
        device = report["device"]
        yield InfoMetricFamily(
            "daskshare_device",
            "The device that this worker runs models on.",
            value={
                "kind": device["kind"],
                "name": device["name"],
                "uuid": device["uuid"],
                "index": str(device["index"]),
            },
        )
        yield GaugeMetricFamily(
            "daskshare_device_memory_bytes", "Memory of the device.", value=device["total_bytes"]
        )
        yield GaugeMetricFamily(
            "daskshare_memory_limit_bytes",
            "Device memory that models may take.",
            value=report["budget_bytes"],
        )
        spent = CounterMetricFamily(
            "daskshare_device_time_seconds",
            "Time of the device by what it went to: busy, or idle and for which reason.",
            labels=["state"],
        )
        for state, seconds in report["spent_seconds"].items():
            spent.add_metric([state], seconds)
        yield spent
    yield from _model_metrics(list(report.get("models", {}).values()))
    chunks = report.get("chunks", {})
    if chunks:
        outcomes = CounterMetricFamily(
            "daskshare_video_chunks", "Chunks of video that ended, by outcome.", labels=["outcome"]
        )
        unread = {name: chunks[f"chunks_{name}"] for name in ("failed", "incomplete")}
        outcomes.add_metric(["complete"], chunks["chunks"] - sum(unread.values()))
        for outcome, count in {**unread, "aborted": chunks["chunks_aborted"]}.items():
            outcomes.add_metric([outcome], count)
        yield outcomes
        decoders = CounterMetricFamily(
            "daskshare_video_decoded_chunks", "Chunks of video by decoder.", labels=["decoder"]
        )
        for decoder in ("nvdec", "pyav"):
            decoders.add_metric([decoder], chunks[f"decoder_{decoder}"])
        yield decoders
        yield CounterMetricFamily(
            "daskshare_video_frames", "Frames of chunks that ended.", value=chunks["frames"]
        )


def _model_metrics(models: list[Mapping[str, Any]]) -> Iterator[Metric]:
    state = GaugeMetricFamily(
        "daskshare_model_state",
        "1 for the state that a model is in on this device, else 0.",
        labels=[*_MODEL, "state"],
    )
    batches = HistogramMetricFamily(
        "daskshare_model_batch_frames", "Frames in a batch, padding not counted.", labels=_MODEL
    )
    for model in models:
        labels = _labels(model)
        now = "failed" if model["load_error"] else model["state"]
        for one in _MODEL_STATES:
            state.add_metric([*labels, one], float(one == now))
        batches.add_metric(
            labels, _buckets(model["batch_size_counts"]), sum_value=float(model["frames"])
        )
    yield state
    yield batches
    for name, text, read in (
        ("frames", "Frames whose results were delivered.", _reader("frames")),
        ("errors", "Requests that failed.", _reader("errors")),
        ("loads", "Times that a model was loaded.", _reader("loads")),
        ("rebuilds", "Times that an engine died and was started anew.", _reader("rebuilds")),
        (
            "busy_seconds",
            "Time with at least one of a model's batches on the device.",
            _reader("busy_seconds"),
        ),
    ):
        yield _family(CounterMetricFamily, name, text, models, read)
    for name, text, read in (
        ("memory_bytes", "Device memory of a model's weights.", _reader("model_bytes")),
        ("users", "Tasks that use a model now.", _reader("leases")),
        ("peak_users", "Most tasks that used a model at once.", _reader("peak_leases")),
        ("queue_frames", "Frames that wait for a batch.", _engine_reader("queue_frames")),
        (
            "queue_age_seconds",
            "How long the oldest waiting frame has waited.",
            _engine_reader("queue_age_seconds"),
        ),
        (
            "max_batch_frames",
            "Frames that a batch may hold now; falls when memory ran out.",
            _engine_reader("ceiling"),
        ),
        (
            "compiled",
            "1 when the compiled forward pass serves full batches, else 0.",
            lambda model: float((model["engine"] or {}).get("mode") == "compiled"),
        ),
    ):
        yield _family(GaugeMetricFamily, name, text, models, read)


def _scheduler_metrics(snapshot: Snapshot) -> Iterator[Metric]:
    gpus = GaugeMetricFamily(
        "daskshare_scheduler_devices",
        "Devices by the state of daskshare on them.",
        labels=["state"],
    )
    for state in ("ready", "starting", "failed", "absent"):
        gpus.add_metric([state], sum(gpu["state"] == state for gpu in snapshot.gpus))
    yield gpus
    models = snapshot.models
    copies = GaugeMetricFamily(
        "daskshare_scheduler_model_copies",
        "Devices that hold, load or failed to load a model.",
        labels=[*_MODEL, "state"],
    )
    for model in models:
        for state, count in (("ready", "copies"), ("loading", "loading"), ("failed", "failed")):
            copies.add_metric([*_labels(model), state], model[count])
    yield copies
    for name, text, read in (
        ("memory_bytes", "Device memory of all copies of a model.", _reader("bytes")),
        (
            "saved_bytes",
            "Device memory that a copy for each task would have taken besides.",
            _reader("saved_bytes"),
        ),
        ("users", "Tasks that use a model now.", _reader("tasks")),
        ("held_tasks", "Tasks that wait for a device.", _reader("held_tasks")),
        ("queue_frames", "Frames that wait for a batch.", _reader("queue_frames")),
        (
            "queue_age_seconds",
            "How long the oldest waiting frame has waited.",
            _reader("queue_age_seconds"),
        ),
    ):
        yield _family(GaugeMetricFamily, name, text, models, read, "daskshare_scheduler_model")


def _family(
    kind: Callable[..., Any],
    name: str,
    text: str,
    models: Sequence[Mapping[str, Any]],
    read: Callable[[Mapping[str, Any]], float],
    prefix: str = "daskshare_model",
) -> Metric:
    family = kind(f"{prefix}_{name}", text, labels=_MODEL)
    for model in models:
        family.add_metric(_labels(model), read(model))
    made: Metric = family
    return made


def _labels(model: Mapping[str, Any]) -> list[str]:
    return [model["name"], model["key"][:12]]


def _reader(name: str) -> Callable[[Mapping[str, Any]], float]:
    return lambda model: float(model[name])


def _engine_reader(name: str) -> Callable[[Mapping[str, Any]], float]:
    return lambda model: float((model["engine"] or {}).get(name, 0))


def _buckets(counts: Mapping[str, int]) -> list[tuple[str, float]]:
    """Return how many batches were at most as large as each power of two up to 1024."""
    bounds = [2**i for i in range(11)]
    return [
        *(
            (str(float(bound)), float(sum(n for size, n in counts.items() if int(size) <= bound)))
            for bound in bounds
        ),
        ("+Inf", float(sum(counts.values()))),
    ]


#: What this process's workers serve: the newest worker's last report.
WORKER_METRICS = ProcessMetrics(_worker_metrics)
#: What this process's scheduler serves: a snapshot of its cluster.
SCHEDULER_METRICS = ProcessMetrics(_scheduler_metrics)
