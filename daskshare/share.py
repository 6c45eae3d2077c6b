"""One copy of each model on a device, however many tasks ask for it.

Imports no torch by itself: loading the first model does.
"""

from __future__ import annotations

import gc
import itertools
import logging
import threading
import time
import traceback
from collections import Counter
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from daskshare._engine_activity import DeviceActivity
from daskshare._share_lease import Entry, Lease, Load, ModelStats, not_held
from daskshare.config import EngineOptions, ShareOptions
from daskshare.device import Device
from daskshare.errors import (
    DaskshareError,
    EngineClosedError,
    ModelError,
    ModelLoadError,
    ModelTooLargeError,
)
from daskshare.models.spec import ModelSpec, Program

if TYPE_CHECKING:
    from daskshare.engine import InferenceEngine

__all__ = ["Lease", "ModelShare", "ModelStats"]

logger = logging.getLogger(__name__)


class ModelShare:
    """All models of one device: loads each once, keeps them within a budget, forgets the idle.

    Parameters
    ----------
    device : Device
        Where models are loaded.
    options : ShareOptions
        Budget and bounds.
    engine_options : EngineOptions
        For every model's engine.

    Notes
    -----
    Thread-safe. A model loads in the thread of the first task that asks for it; the others wait.
    The budget counts weights. When models in use fill it, a load waits for a lease to end, at most
    ``options.lease_timeout_seconds``: leases are as short as a task, so waiting mostly helps; but
    two tasks that each hold a model and want the other's would wait for ever, so it is bounded.
    """

    def __init__(
        self, device: Device, *, options: ShareOptions, engine_options: EngineOptions
    ) -> None:
        self.device = device
        self.options = options
        self.engine_options = engine_options
        self.budget_bytes = options.budget_bytes(device.total_bytes)
        # Reentrant: the end of a forgotten lease may come from the collector under the lock.
        self._changed = threading.Condition(threading.RLock())
        self._entries: dict[str, Entry] = {}
        self._clock = itertools.count(1)
        self._load_gate = threading.Semaphore(options.load_threads)
        self._closed = False
        #: What the device's time goes to.
        self.activity = DeviceActivity()

    def lease(self, spec: ModelSpec) -> Lease:
        """Return the right to use a model; loads it when it is not there.

        Raises
        ------
        ModelLoadError
            When loading fails, in every caller that waited for it. The next call tries again.
        ModelTooLargeError
            When the model exceeds the budget.
        EngineClosedError
            When the share was closed.
        """
        with self._changed:
            entry = self._entries.setdefault(spec.key, Entry(spec))
            while True:
                self._check_open()
                if entry.state == "ready":
                    return self._lend(entry)
                if entry.state == "unloaded":
                    entry.state = "loading"
                    entry.load = Load()
                    break
                load = entry.load
                if entry.state == "unloading":
                    self._changed.wait()
                    continue
                while not load.ended:
                    self._changed.wait()
                if load.error is not None:
                    raise _copy(load.error)
        # Waiting for room counts too: the task is there, the device has nothing to do.
        with self.activity.during("loading"):
            return self._load(entry)

    def load(self, spec: ModelSpec) -> None:
        """Load a model ahead of its first use; raises as :meth:`lease` does."""
        self.lease(spec).release()

    def unload(self, key: str, *, timeout_seconds: float | None = None) -> bool:
        """Give a model's memory back to the device.

        Parameters
        ----------
        key : str
            The spec's.
        timeout_seconds : float or None
            How long to wait for leases to end; None: the options' bound of a shutdown.

        Returns
        -------
        bool
            False when it was not loaded.

        Raises
        ------
        ModelError
            When it is still in use after that time.
        """
        if timeout_seconds is None:
            timeout_seconds = self.options.close_timeout_seconds
        deadline = time.monotonic() + timeout_seconds
        with self._changed:
            entry = self._entries.get(key)
            while True:
                if entry is None or entry.state == "unloaded":
                    return False
                if entry.state == "ready" and not entry.leases:
                    entry.state = "unloading"
                    break
                left = deadline - time.monotonic()
                if left <= 0:
                    raise ModelError(
                        f"Model {entry.spec.name!r} cannot be unloaded: after "
                        f"{timeout_seconds:g} s it is {entry.state} with {entry.leases} leases; "
                        "expected none. End the tasks that use it.",
                        model=entry.spec.name,
                        leases=entry.leases,
                    )
                self._changed.wait(left)
        self._free(entry)
        return True

    def stats(self) -> dict[str, ModelStats]:
        """Say what each model did, by key; unloaded ones too."""
        with self._changed:
            found = [(self._stats_of(entry), entry.engine) for entry in self._entries.values()]
        # An engine's lock is never taken under the share's: see Lease's finalizer.
        return {stats.key: _with_engine(stats, engine) for stats, engine in found}

    def report(self) -> dict[str, Any]:
        """Return device, budget and models as plain values that JSON can hold."""
        models = {}
        for key, stats in self.stats().items():
            values = asdict(stats)
            for counted in (values, values["engine"] or {}):
                counts = counted.get("batch_size_counts", {})
                counted["batch_size_counts"] = {str(k): v for k, v in counts.items()}
            values["engine"] = values["engine"] or None
            models[key] = values
        return {
            "device": asdict(self.device),
            "spent_seconds": self.activity.spent_seconds(),
            "budget_bytes": self.budget_bytes,
            "used_bytes": sum(model["model_bytes"] for model in models.values()),
            "free_bytes": self.device.free_bytes(),
            "models": models,
        }

    def close(self) -> None:
        """End all engines and give their memory back, within ``close_timeout_seconds``.

        Calls that run may finish in that time; later ones get EngineClosedError. Again is nothing.
        """
        deadline = time.monotonic() + self.options.close_timeout_seconds
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            ready = [entry for entry in self._entries.values() if entry.state == "ready"]
            for entry in ready:
                entry.state = "unloading"
        for entry in ready:
            self._free(entry, max(0.0, deadline - time.monotonic()))
        with self._changed:
            # A load that ends now finds the share closed and discards what it has.
            while any(e.state != "unloaded" for e in self._entries.values()):
                left = deadline - time.monotonic()
                if left <= 0:
                    logger.warning("Models were still loading or unloading when the share closed")
                    return
                self._changed.wait(left)

    # -- under the lock --

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosedError(
                f"The models on {self.device.name} were unloaded because their worker ends. "
                "Call again from a task on a running worker."
            )

    def _lend(self, entry: Entry) -> Lease:
        entry.leases += 1
        entry.peak_leases = max(entry.peak_leases, entry.leases)
        self.activity.begin("input")
        entry.last_used = next(self._clock)
        return Lease(self, entry)

    def give_back(self, entry: Entry) -> None:
        """End a lease; called by the lease."""
        with self._changed:
            entry.leases -= 1
            self.activity.end("input")
            entry.last_used = next(self._clock)
            self._changed.notify_all()

    def _stats_of(self, entry: Entry) -> ModelStats:
        return ModelStats(
            name=entry.spec.name,
            key=entry.spec.key,
            state=entry.state,
            loads=entry.loads,
            leases=entry.leases,
            model_bytes=entry.reserved_bytes if entry.program is not None else 0,
            frames=entry.past_frames,
            batches=entry.past_batches,
            mean_batch_size=0.0,
            batch_size_counts=dict(entry.past_sizes),
            busy_seconds=entry.past_busy_seconds,
            errors=entry.past_errors,
            peak_leases=entry.peak_leases,
            load_error=(
                str(entry.load.error) if entry.state == "unloaded" and entry.load.error else ""
            ),
            rebuilds=entry.rebuilds,
            engine=None,
        )

    def _least_recently_used(self) -> Entry | None:
        idle = [e for e in self._entries.values() if e.state == "ready" and not e.leases]
        return min(idle, key=lambda e: e.last_used, default=None)

    # -- loading and unloading --

    def _load(self, entry: Entry) -> Lease:
        program: Program | None = None
        try:
            self._reserve(entry, entry.spec.estimated_bytes())
            with self._load_gate:
                program = self._load_program(entry.spec)
            self._reserve(entry, program.model_bytes)
            engine = self._start_engine(entry.spec, program)
        except BaseException as error:
            program = None
            traceback.clear_frames(error.__traceback__)
            failure = self._load_error(entry.spec, error)
            self._return_memory()
            with self._changed:
                entry.state = "unloaded"
                entry.reserved_bytes = 0
                entry.load.error = failure
                entry.load.ended = True
                self._changed.notify_all()
            if not isinstance(error, Exception):
                raise
            raise _copy(failure) from failure.__cause__
        with self._changed:
            entry.program, entry.engine = program, engine
            entry.loads += 1
            entry.state = "ready"
            entry.load.ended = True
            lease = self._lend(entry)
            self._changed.notify_all()
            closed = self._closed
            if closed:
                entry.state = "unloading"
        if closed:
            lease.release()
            self._free(entry, 0.0)
            with self._changed:
                self._check_open()
        return lease

    def _load_program(self, spec: ModelSpec) -> Program:
        from daskshare._engine_runner import is_out_of_memory

        logger.info("Loading model %s onto %s", spec.name, self.device.name)
        while True:
            try:
                return spec.load(self.device)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                traceback.clear_frames(error.__traceback__)
                # Others than models may have taken memory within the budget.
                if not self._evict():
                    raise

    def _start_engine(self, spec: ModelSpec, program: Program) -> InferenceEngine:
        # A program that takes no tensors brings an engine of its own, with the same methods.
        start = getattr(program, "start_engine", None)
        if start is not None:
            own: InferenceEngine = start(
                self.device,
                options=self.engine_options,
                name=spec.name,
                activity=self.activity,
            )
            return own
        from daskshare.engine import InferenceEngine

        return InferenceEngine(
            program,
            self.device,
            options=self.engine_options,
            name=spec.name,
            activity=self.activity,
        )

    def living_engine(self, entry: Entry) -> InferenceEngine:
        """Return a leased model's engine, started anew when it died; called by the lease."""
        with entry.engine_lock:
            engine = entry.engine
            if engine is not None and engine.alive:
                return engine
            with self._changed:
                self._check_open()
            if engine is None or entry.program is None:
                raise not_held(entry)
            engine.close(timeout_seconds=self.options.close_timeout_seconds)
            # The weights are unharmed by a dead thread; after a CUDA error nothing in this
            # process works any more, and the new engine says so.
            fresh = self._start_engine(entry.spec, entry.program)
            last = engine.stats()
            with self._changed:
                entry.retire_engine(last)
                entry.engine = fresh
                entry.rebuilds += 1
            return fresh

    def _reserve(self, entry: Entry, needed_bytes: int) -> None:
        """Book a model's bytes, evicting idle models and waiting for leases to end."""
        if needed_bytes > self.budget_bytes:
            raise ModelTooLargeError(
                f"Model {entry.spec.name!r} needs {needed_bytes} bytes on {self.device.name}; the "
                f"budget is {self.budget_bytes} bytes. Raise daskshare.share.memory-limit or use "
                "a lower precision.",
                model=entry.spec.name,
                needed_bytes=needed_bytes,
                budget_bytes=self.budget_bytes,
            )
        deadline = time.monotonic() + self.options.lease_timeout_seconds
        while True:
            with self._changed:
                self._check_open()
                others = sum(e.reserved_bytes for e in self._entries.values() if e is not entry)
                if others + needed_bytes <= self.budget_bytes:
                    entry.reserved_bytes = needed_bytes
                    return
                if self._least_recently_used() is None:
                    left = deadline - time.monotonic()
                    if left <= 0:
                        raise _full(entry.spec, needed_bytes, others, self.budget_bytes)
                    self._changed.wait(left)
                    continue
            self._evict()

    def _evict(self) -> bool:
        with self._changed:
            victim = self._least_recently_used()
            if victim is None:
                return False
            victim.state = "unloading"
        logger.info("Unloading model %s to make room", victim.spec.name)
        self._free(victim)
        return True

    def _free(self, entry: Entry, timeout_seconds: float | None = None) -> None:
        """Unload a model in state "unloading"."""
        if timeout_seconds is None:
            timeout_seconds = self.options.close_timeout_seconds
        with entry.engine_lock:
            engine = entry.engine
            assert engine is not None
            engine.close(timeout_seconds=timeout_seconds)
            last = engine.stats()
            with self._changed:
                entry.retire_engine(last)
                entry.program = None
            del engine
        self._return_memory()
        with self._changed:
            entry.state = "unloaded"
            entry.reserved_bytes = 0
            self._changed.notify_all()

    def _return_memory(self) -> None:
        gc.collect()
        try:
            self.device.release_cached_memory()
        except Exception:
            # After a CUDA error the driver takes everything back when the process ends.
            logger.warning("Could not return memory to %s", self.device.name, exc_info=True)

    def _load_error(self, spec: ModelSpec, error: BaseException) -> DaskshareError:
        if isinstance(error, (ModelTooLargeError, ModelLoadError, EngineClosedError)):
            return error
        reason = f"{type(error).__name__}: {error}"
        failure = ModelLoadError(
            f"Model {spec.name!r} could not be loaded onto {self.device.name}: {reason}",
            model=spec.name,
            device=self.device.uuid,
            reason=reason,
        )
        failure.__cause__ = error
        return failure


def _copy(error: DaskshareError) -> DaskshareError:
    # One exception raised in many threads would grow everybody's traceback.
    copied = type(error)(str(error), **error.fields)
    copied.__cause__ = error.__cause__
    return copied


def _with_engine(stats: ModelStats, engine: InferenceEngine | None) -> ModelStats:
    mean = stats.frames / stats.batches if stats.batches else 0.0
    if engine is None:
        return replace(stats, mean_batch_size=mean)
    now = engine.stats()
    frames, batches = stats.frames + now.frames, stats.batches + now.batches
    sizes = Counter(stats.batch_size_counts) + Counter(now.batch_size_counts)
    return replace(
        stats,
        engine=now,
        frames=frames,
        batches=batches,
        mean_batch_size=frames / batches if batches else 0.0,
        batch_size_counts=dict(sorted(sizes.items())),
        busy_seconds=stats.busy_seconds + now.busy_seconds,
        errors=stats.errors + now.errors,
    )


def _full(spec: ModelSpec, needed_bytes: int, used_bytes: int, budget_bytes: int) -> ModelLoadError:
    reason = (
        f"models in use hold {used_bytes} of {budget_bytes} bytes and {needed_bytes} are needed"
    )
    return ModelLoadError(
        f"Model {spec.name!r} could not be loaded: {reason}. Raise daskshare.share.memory-limit, "
        "or run fewer models at once.",
        model=spec.name,
        reason=reason,
        needed_bytes=needed_bytes,
        used_bytes=used_bytes,
        budget_bytes=budget_bytes,
    )
