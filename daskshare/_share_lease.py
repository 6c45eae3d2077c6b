"""The right to use a shared model, and the account that the share keeps of it."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Hashable
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from daskshare._engine_activity import DeviceActivity, Switch
from daskshare.errors import DaskshareError, EngineClosedError
from daskshare.models.spec import ModelSpec, Prepared, Program

if TYPE_CHECKING:
    from daskshare._engine_stats import EngineStats
    from daskshare.engine import InferenceEngine

__all__ = ["Entry", "Lease", "Load", "ModelStats", "not_held"]


@dataclass(frozen=True, slots=True)
class ModelStats:
    """What one model did on this device.

    Parameters
    ----------
    name, key : str
        The spec's.
    state : {"unloaded", "loading", "ready", "unloading"}
        Where it is in its life.
    loads : int
        How often it was loaded.
    leases : int
        Who uses it now.
    model_bytes : int
        Device memory of its weights; 0 when not loaded.
    frames, batches : int
        Since the first load.
    mean_batch_size : float
        Frames in a batch on average.
    batch_size_counts : dict of int to int
        How many batches held how many frames, since the first load.
    busy_seconds : float
        Time with at least one of its batches on the device, since the first load.
    errors : int
        Requests that failed, since the first load.
    peak_leases : int
        Most users at once so far.
    load_error : str
        Why it is not loaded, when the last attempt failed; "" otherwise.
    rebuilds : int
        How often its engine died and was started anew.
    engine : EngineStats or None
        The present engine's.
    """

    name: str
    key: str
    state: str
    loads: int
    leases: int
    model_bytes: int
    frames: int
    batches: int
    mean_batch_size: float
    batch_size_counts: dict[int, int]
    busy_seconds: float
    errors: int
    peak_leases: int
    load_error: str
    rebuilds: int
    engine: EngineStats | None


class Load:
    """One attempt to load; those who wait for it learn how it ended."""

    __slots__ = ("ended", "error")

    def __init__(self) -> None:
        self.ended = False
        self.error: DaskshareError | None = None


class Entry:
    """A model that was asked for on this device; stays after unloading, for the account."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.state = "unloaded"
        self.load = Load()
        self.program: Program | None = None
        self.engine: InferenceEngine | None = None
        self.engine_lock = threading.Lock()
        self.leases = self.peak_leases = 0
        self.reserved_bytes = 0
        self.last_used = 0
        self.loads = self.rebuilds = 0
        self.past_frames = self.past_batches = self.past_errors = 0
        self.past_busy_seconds = 0.0
        self.past_sizes: Counter[int] = Counter()

    def retire_engine(self, last: EngineStats) -> None:
        """Take the engine off and keep its counts; under the share's lock."""
        self.engine = None
        self.past_frames += last.frames
        self.past_batches += last.batches
        self.past_errors += last.errors
        self.past_busy_seconds += last.busy_seconds
        self.past_sizes.update(last.batch_size_counts)


class LeaseOwner(Protocol):
    """What a lease needs of the share that gave it."""

    activity: DeviceActivity

    def give_back(self, entry: Entry) -> None: ...

    def living_engine(self, entry: Entry) -> InferenceEngine: ...


class Lease:
    """The right to use a model; while it is held the model stays on the device.

    A context manager. A lease that is forgotten ends when it is garbage.

    Notes
    -----
    Thread-safe; several threads may use one lease.
    """

    def __init__(self, share: LeaseOwner, entry: Entry) -> None:
        self._share = share
        self._entry = entry
        self._end = weakref.finalize(self, share.give_back, entry)
        self._end.atexit = False

    @property
    def spec(self) -> ModelSpec:
        """What was leased."""
        return self._entry.spec

    @property
    def program(self) -> Program:
        """The loaded model.

        Raises
        ------
        EngineClosedError
            When the lease has ended.
        """
        program = self._entry.program
        if not self._end.alive or program is None:
            raise not_held(self._entry)
        return program

    @property
    def engine(self) -> InferenceEngine:
        """The model's engine, started anew if it had died.

        Raises
        ------
        EngineClosedError
            When the lease has ended or the share was closed.
        """
        if not self._end.alive:
            raise not_held(self._entry)
        return self._share.living_engine(self._entry)

    def decoding(self) -> Switch:
        """Return what to set while the caller decodes video for the model."""
        return Switch(self._share.activity, "decoding")

    def infer(self, inputs: Any, task: Hashable = None) -> Any:
        """Run the model on inputs; see :meth:`InferenceEngine.infer`."""
        return self.engine.infer(inputs, task=task)

    def submit(self, prepared: Prepared, task: Hashable = None) -> Future[Any]:
        """Queue prepared items; see :meth:`InferenceEngine.submit`."""
        return self.engine.submit(prepared, task=task)

    def release(self) -> None:
        """End the lease; again is nothing."""
        self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.release()


def not_held(entry: Entry) -> EngineClosedError:
    return EngineClosedError(
        f"The lease of model {entry.spec.name!r} has ended. Lease the model again.",
        model=entry.spec.name,
    )
