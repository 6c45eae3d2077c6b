"""Looking into a pool's books: contradictions, a sentence on a task, plain data."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable
from typing import Any

from daskshare._placement_books import Device, Model, Worker
from daskshare._placement_dispatch import Dispatcher
from daskshare._placement_tasks import Task

__all__ = ["explain", "problems", "snapshot"]


def problems(books: Dispatcher) -> list[str]:
    """A sentence for each contradiction in the books."""
    return [
        *_task_problems(books),
        *(p for worker in books.workers.values() for p in _worker_problems(books, worker)),
        *(p for device in books.devices.values() for p in _device_problems(device)),
        *(p for model in books.models.values() for p in _model_problems(books, model)),
    ]


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-3)


def _task_problems(books: Dispatcher) -> Iterable[str]:
    for key, task in books.tasks.items():
        if (task.replica is None) == (task.sequence is None):
            yield f"task {key!r} is not either waiting or in flight"
        elif task.replica is None:
            if task.model.queues.get(task.queue.signature) is not task.queue:
                yield f"task {key!r} waits in a queue that is not in the books"
        else:
            worker = task.replica.worker
            if worker.in_flight.get(key) is not task:
                yield f"task {key!r} is in flight, but not for its worker {worker.address}"
            allowed = task.queue.signature.addresses
            if allowed is not None and worker.address not in allowed:
                yield f"task {key!r} is on {worker.address}, where the user does not allow it"


def _worker_problems(books: Dispatcher, worker: Worker) -> Iterable[str]:
    at = f"worker {worker.address}"
    if worker.device.workers.get(worker.address) is not worker:
        yield f"{at} is not among its device's workers"
    if len(worker.in_flight) > worker.limit:
        yield f"{at} has {len(worker.in_flight)} tasks in flight; its limit is {worker.limit}"
    if not _close(worker.outstanding_seconds, sum(t.seconds for t in worker.in_flight.values())):
        yield f"{at} counts {worker.outstanding_seconds} s in flight, its tasks sum up otherwise"
    if worker.num_loading != sum(r.state == "loading" for r in worker.replicas.values()):
        yield f"{at} counts {worker.num_loading} loads, its models say otherwise"
    counted: Counter[str] = Counter()
    used: Counter[str] = Counter()
    for key, task in worker.in_flight.items():
        if books.tasks.get(key) is not task:
            yield f"{at} runs task {key!r}, which is not in the books"
        if task.replica is None or task.replica.worker is not worker:
            yield f"{at} runs task {key!r}, which is elsewhere"
        counted[task.model.key] += 1
        if task.queue.signature.alone and len(worker.in_flight) > 1:
            yield f"{at} runs task {key!r}, which must run alone, beside others"
        for name, amount in task.queue.signature.resources:
            used[name] += amount  # type: ignore[assignment]
    for name, amount in used.items():
        if amount > worker.resources.get(name, 0.0) + 1e-6:
            yield f"{at} has {amount} of resource {name} in use, more than it offers"
    for name in used.keys() | worker.resources_used.keys():
        if not _close(worker.resources_used.get(name, 0.0), used[name]):
            yield f"{at} counts {worker.resources_used.get(name)} of {name}, its tasks {used[name]}"
    for model_key in counted.keys() - worker.replicas.keys():
        yield f"{at} runs tasks of model {model_key}, which is not on it"
    for model_key, replica in worker.replicas.items():
        what = f"model {model_key} on {at}"
        if replica.in_flight != counted[model_key]:
            yield f"{what} counts {replica.in_flight} tasks; there are {counted[model_key]}"
        if replica.in_flight and replica.state not in ("ready", "draining"):
            yield f"{what} is {replica.state} with {replica.in_flight} tasks in flight"
        if replica.model.replicas.get(worker) is not replica:
            yield f"{what} is not among the model's replicas"
        serves = replica.state == "ready" and worker.accepting
        if serves != (replica.speed_class is not None) or serves != (replica in worker.ready):
            yield f"{what} is {replica.state}, but its availability says otherwise"
        if not replica.model.fits_kind(worker) and replica.in_flight:
            yield f"{what} needs a GPU or is not allowed there, and has tasks"


def _device_problems(device: Device) -> Iterable[str]:
    at = f"device {device.uuid}"
    replicas = [r for w in device.workers.values() for r in w.replicas.values()]
    for replica in replicas:
        copies = [
            w.replicas[replica.model.key]
            for w in replica.worker.peers.values()
            if replica.model.key in w.replicas
        ]
        if sum(copy.num_bytes > 0 for copy in copies) > 1:
            yield f"{at} counts the one copy of {replica.model.key} in a process several times"
    total = sum(r.num_bytes for r in replicas)
    if total != device.used_bytes:
        yield f"{at} counts {device.used_bytes} bytes; its models take {total}"
    if total > device.budget_bytes and not device.exceeded:
        yield f"{at} is overbooked: {total} of {device.budget_bytes} bytes"
    seconds = sum(w.outstanding_seconds for w in device.workers.values())
    if not _close(device.outstanding_seconds, seconds):
        yield f"{at} counts {device.outstanding_seconds} s in flight, its workers {seconds}"


def _model_problems(books: Dispatcher, model: Model) -> Iterable[str]:
    at = f"model {model.key}"
    waiting = 0
    frames = 0.0
    for queue in model.queues.values():
        tasks = list(queue.tasks())
        if len(tasks) != queue.num_waiting or len({t.key for t in tasks}) != len(tasks):
            yield f"{at} has a queue of {queue.num_waiting} tasks that holds {len(tasks)}"
        for task in tasks:
            if books.tasks.get(task.key) is not task or task.model is not model:
                yield f"{at} has task {task.key!r} waiting, which is not in the books or not its"
        waiting += len(tasks)
        frames += sum(t.frames for t in tasks if t.frames is not None)
    in_flight = sum(r.in_flight for r in model.replicas.values())
    if waiting != model.num_waiting or in_flight != model.in_flight:
        yield (
            f"{at} counts {model.num_waiting} waiting and {model.in_flight} in flight; there are "
            f"{waiting} and {in_flight}"
        )
    if not _close(frames, model.waiting_frames):
        yield f"{at} counts {model.waiting_frames} waiting frames; there are {frames}"
    for worker in model.replicas:
        if books.workers.get(worker.address) is not worker:
            yield f"{at} has a replica on {worker.address}, which has gone"
    rates = [r for r in model.replicas.values() if r.speed_class is not None]
    if not _close(sum(r.rate for r in rates), model.supply_rate):
        yield f"{at} counts {model.supply_rate} frames/s, its replicas sum up otherwise"
    if {r for c in model.classes.values() for r in c.replicas} != set(rates):
        yield f"{at} has replicas in no speed class, or in one too many"


def explain(books: Dispatcher, key: Hashable, now_seconds: float) -> str:
    """Say in one sentence why a task waits, or where it runs and why there."""
    task = books.tasks.get(key)
    if task is None:
        return f"Task {key!r} is not with the allocator: it is done, was cancelled or never came."
    if task.decision is not None:
        return f"Task {key!r} was sent to {task.decision.worker}: {task.decision.reason}."
    return f"Task {key!r} waits: {_reason_to_wait(books, task, now_seconds)}."


def _reason_to_wait(books: Dispatcher, task: Task, now_seconds: float) -> str:
    model = task.model
    addresses, resources, alone = task.queue.signature
    kind = [w for w in books.workers.values() if model.fits_kind(w)]
    if not kind:
        needs = "a GPU worker" if model.needs_gpu else "a worker"
        return f"model {model.name} needs {needs}, and none is connected"
    pinned = [w for w in kind if model.may_live_on(w)]
    if not pinned:
        return f"model {model.name} is pinned to devices of which none is connected"
    able = [w for w in pinned if addresses is None or w.address in addresses]
    if not able:
        return f"it may run on {', '.join(sorted(addresses or ()))} only, not usable now"
    able = [w for w in able if w.offers(resources)]
    if not able:
        return f"no worker offers the resources it asks for ({dict(resources)})"
    accepting = [w for w in able if w.accepting]
    if not accepting:
        return f"the workers it may run on are paused or leaving ({len(able)})"
    states = Counter(model.replicas[w].state for w in accepting if w in model.replicas)
    if states["ready"]:
        ready = [w for w in accepting if w in model.replicas and model.replicas[w].speed_class]
        if alone:
            return "it must run alone, because workers died with it, and no worker is empty yet"
        if any(w.is_open and w.has(resources) for w in ready):
            return f"a faster worker that is full now will finish it sooner ({len(ready)} hold it)"
        return (
            f"all {len(ready)} workers that hold model {model.name} are full; it is one of "
            f"{model.num_waiting} tasks of that model that wait"
        )
    if states["loading"]:
        return f"model {model.name} is loading on {states['loading']} workers"
    if any(w.intent is model for w in accepting):
        return f"room is being made for model {model.name}; tasks in flight end first"
    failures = [f for w in accepting if (f := w.device.failures.get(model.key)) is not None]
    retries = [f.retry_seconds for f in failures if f.retry_seconds > now_seconds]
    if failures and len(retries) == len(accepting):
        return (
            f"model {model.name} failed to load ({failures[0].reason}); the next attempt is in "
            f"{min(retries) - now_seconds:.0f} s"
        )
    return (
        f"model {model.name} ({model.estimated_bytes} bytes) is on none of {len(accepting)} "
        "workers that may hold it, and what is there is in use or has just been loaded"
    )


def snapshot(books: Dispatcher, counts: dict[str, int]) -> dict[str, Any]:
    """Everything as plain values."""
    models = {
        model.key: {
            "name": model.name,
            "waiting": model.num_waiting,
            "in_flight": model.in_flight,
            "estimated_bytes": model.estimated_bytes,
            "needs_gpu": model.needs_gpu,
            "replicas": dict(Counter(r.state for r in model.replicas.values())),
            "frames_per_second": model.supply_rate,
            "pinned": sorted(model.pinned),
            "wanted_replicas": model.wanted_replicas,
            "superseded_by": model.successor.key if model.successor else None,
            "load_seconds": model.load_seconds,
            "last_failure": model.failed_reason,
        }
        for model in books.models.values()
    }
    devices = {
        device.uuid: {
            "is_gpu": device.is_gpu,
            "workers": list(device.workers),
            "budget_bytes": device.budget_bytes,
            "used_bytes": device.used_bytes,
            "reported_free_bytes": device.reported_free_bytes,
            "outstanding_seconds": device.outstanding_seconds,
            "frames_per_second": dict(device.rates),
            "failures": {
                key: {"count": f.count, "reason": f.reason, "retry_seconds": f.retry_seconds}
                for key, f in device.failures.items()
            },
        }
        for device in books.devices.values()
    }
    workers = {
        worker.address: {
            "device": worker.device.uuid,
            "slots": worker.slots,
            "in_flight": len(worker.in_flight),
            "accepting": worker.accepting,
            "models": {key: r.state for key, r in worker.replicas.items()},
            "making_room_for": worker.intent.key if worker.intent else None,
        }
        for worker in books.workers.values()
    }
    waiting = sum(m.num_waiting for m in books.models.values())
    return {
        "models": models,
        "devices": devices,
        "workers": workers,
        "counts": {"waiting": waiting, "in_flight": len(books.tasks) - waiting, **counts},
    }
