"""A caller's own function of NumPy arrays as a shared model, called by one thread for everybody."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import cloudpickle
import numpy as np

from daskshare._engine_activity import DeviceActivity, Switch
from daskshare._engine_stats import EngineStats, Tally
from daskshare._host_rows import join_rows, split_rows
from daskshare._host_values import BytesRows
from daskshare.config import EngineOptions
from daskshare.errors import EngineClosedError, InvalidInputError, ModelLoadError

if TYPE_CHECKING:
    from daskshare.device import Device

__all__ = ["PredictEngine", "PredictProgram", "PredictSpec"]

# A process has one working directory, and loaders may look for files in their caller's.
_directory_lock = threading.Lock()


@dataclass(frozen=True, slots=True, eq=False)
class PredictSpec:
    """A function that makes a ``predict`` function of NumPy arrays.

    Parameters
    ----------
    name : str
        For people.
    key : str
        Equal keys share one copy.
    loader : bytes
        ``make_predict() -> predict``, pickled by cloudpickle.
    max_batch_size : int
        Rows of one call of ``predict`` at most.
    paths : tuple of str
        Where the loader's modules are found, besides the usual places.
    directory : str
        Working directory while loading; "": the process's own.
    concurrent_calls : int
        Calls of ``predict`` that may run at once, in threads of one process. On a CPU they divide
        the rows of a call among them.
    """

    name: str
    key: str
    loader: bytes = field(repr=False)
    max_batch_size: int
    paths: tuple[str, ...] = field(default=(), repr=False)
    directory: str = ""
    concurrent_calls: int = 1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PredictSpec) and other.key == self.key

    def __hash__(self) -> int:
        return hash(self.key)

    def estimated_bytes(self) -> int:
        """Bytes of device memory: 0, nobody can ask the function."""
        return 0

    def load(self, device: Device) -> Any:
        """Call the loader; returns a :class:`PredictProgram`.

        Raises
        ------
        ModelLoadError
            When it returns nothing that can be called. What it raises itself goes through.

        Notes
        -----
        Runs in a loader thread of a host. Loaders with a ``directory`` load one at a time.
        """
        sys.path += [path for path in self.paths if path not in sys.path]
        if self.directory and os.path.isdir(self.directory):
            with _directory_lock:
                before = os.getcwd()
                os.chdir(self.directory)
                try:
                    predict = cloudpickle.loads(self.loader)()
                finally:
                    os.chdir(before)
        else:
            predict = cloudpickle.loads(self.loader)()
        if not callable(predict):
            raise ModelLoadError(
                f"The function of model {self.name!r} returned {type(predict).__name__}; expected "
                "a predict function of NumPy arrays. Return one.",
                model=self.name,
                reason=f"it returned {type(predict).__name__}",
            )
        return PredictProgram(predict, self)


class PredictProgram:
    """A loaded :class:`PredictSpec`; brings its own engine, as it takes no tensors.

    Parameters
    ----------
    predict : callable
        Takes arrays, rows first.
    spec : PredictSpec
        Where it comes from.
    """

    item_shape = None
    batch_sizes: tuple[int, ...] = ()
    model_bytes = 0
    graph_capturable = False

    def __init__(self, predict: Any, spec: PredictSpec) -> None:
        self.predict = predict
        self.max_batch_size = spec.max_batch_size
        self.concurrent_calls = spec.concurrent_calls
        self.num_parameters = len(inspect.signature(predict).parameters)

    def start_engine(
        self, device: Device, *, options: EngineOptions, name: str, activity: DeviceActivity
    ) -> PredictEngine:
        """Return an engine that calls ``predict``."""
        return PredictEngine(
            self.predict,
            max_batch_size=self.max_batch_size,
            name=name,
            concurrent_calls=self.concurrent_calls,
            share_cores=not device.is_cuda,
            activity=activity,
        )

    def prepare(self, inputs: Any) -> Any:
        """Refuse: :class:`PredictEngine` takes arrays as they are."""
        raise NotImplementedError("a predict function takes arrays through its own engine")

    forward = compile = finish = prepare


@dataclass(slots=True, eq=False)
class _Call:
    inputs: tuple[np.ndarray | BytesRows, ...]
    rows: int
    group: Hashable
    arrived_seconds: float
    #: Of one that is divided; what goes wrong with a part is not yet the caller's error.
    is_part: bool = False
    done: Future[Any] = field(default_factory=Future)


class PredictEngine:
    """Calls one ``predict`` function for many callers, with the rows of several put together.

    Parameters
    ----------
    predict : callable
        ``predict(*arrays)``: rows first, any number of arrays; returns an array, a dict of arrays
        or a list of dicts, with as many rows.
    max_batch_size : int
        Rows of one call at most, unless one caller brings more.
    name : str
        For people, and of the threads.
    concurrent_calls : int
        Threads that call ``predict``.
    share_cores : bool
        Whether several threads divide among them what one would use: torch's threads, and the rows
        of a call, so that all their intermediate results are no larger than one call's.
    activity : DeviceActivity, optional
        Where to count the time in which ``predict`` runs.

    Notes
    -----
    Thread-safe. Exactly one thread, ``daskshare-engine-NAME``, calls ``predict``, unless more are
    asked for. None waits for more rows: what came in while it was busy makes the next call. When a
    call of several callers' rows fails, or its result cannot be told apart, each caller's rows are
    run alone, so that everybody gets what they would have got by themselves.
    """

    def __init__(
        self,
        predict: Any,
        *,
        max_batch_size: int,
        name: str,
        concurrent_calls: int = 1,
        share_cores: bool = False,
        activity: DeviceActivity | None = None,
    ) -> None:
        self.name = name
        self._busy = Switch(activity, "busy")
        self._num_running = 0
        self._predict = predict
        divided = share_cores and concurrent_calls > 1
        self._max_batch_size = max_batch_size
        self._max_call_rows = -(-max_batch_size // concurrent_calls) if divided else max_batch_size
        self._divides = divided
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._waiting: deque[_Call] = deque()
        self._closing = False
        self._tally = Tally()
        suffixes = ["", *(f"-{i}" for i in range(2, concurrent_calls + 1))]
        self._threads = [
            threading.Thread(target=self._run, name=f"daskshare-engine-{name}{suffix}", daemon=True)
            for suffix in suffixes
        ]
        self._begin: Callable[[], None] | None
        starting: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if divided:
            # Only those that divide cores need torch for it.
            from daskshare._torch_threads import divided_torch_threads

            starting = divided_torch_threads(concurrent_calls)
        with starting as self._begin:
            for thread in self._threads:
                thread.start()

    @property
    def alive(self) -> bool:
        """Whether it takes calls."""
        return not self._closing

    def infer(self, inputs: Any, *, task: Hashable = None) -> Any:
        """Run ``predict`` on a caller's rows; blocks until the result is there.

        Parameters
        ----------
        inputs : sequence of numpy.ndarray or BytesRows
            As many as ``predict`` takes, equally long; copied when their turn comes.
        task : hashable
            Whose call it is; calls are taken in the order of their arrival.

        Raises
        ------
        InvalidInputError
            When the arrays differ in length.
        EngineClosedError
            When the engine is closed, before or meanwhile.
        Exception
            What ``predict`` raises.
        """
        if isinstance(inputs, BytesRows):
            inputs = np.asarray(inputs)
        arrays = tuple(
            array if isinstance(array, BytesRows) else np.asarray(array) for array in inputs
        )
        lengths = [len(array) if array.ndim else -1 for array in arrays]
        if not lengths or lengths[0] < 0 or len(set(lengths)) > 1:
            raise InvalidInputError(
                f"Model {self.name!r} got arrays of {lengths} rows; expected one or more arrays, "
                "equally long.",
                model=self.name,
            )
        group = tuple((array.dtype.str, array.shape[1:]) for array in arrays)
        call = _Call(arrays, lengths[0], group, time.monotonic())
        if self._divides and call.rows > self._max_call_rows:
            result = self._in_parts(call)
            if result is not None:
                return result
        self._submit([call])
        return call.done.result()

    def _submit(self, calls: Sequence[_Call]) -> None:
        with self._lock:
            if self._closing:
                raise self._closed()
            self._waiting.extend(calls)
            self._work.notify(len(calls))

    def _in_parts(self, call: _Call) -> Any | None:
        """Run a caller's rows as several calls; None when they must be run as one."""
        count = -(-call.rows // self._max_call_rows)
        stops = [call.rows * i // count for i in range(count + 1)]
        parts = [
            _Call(
                tuple(array[start:stop] for array in call.inputs),
                stop - start,
                call.group,
                call.arrived_seconds,
                is_part=True,
            )
            for start, stop in itertools.pairwise(stops)
        ]
        self._submit(parts)
        # All of them, because they look into the caller's memory.
        wait([part.done for part in parts])
        if any(part.done.exception() is not None for part in parts):
            return None
        return join_rows([part.done.result() for part in parts], [part.rows for part in parts])

    def stats(self) -> EngineStats:
        """Say what was done so far; ``frames`` are rows."""
        with self._lock:
            oldest = self._waiting[0].arrived_seconds if self._waiting else None
            return EngineStats(
                queue_age_seconds=0.0 if oldest is None else time.monotonic() - oldest,
                frames=self._tally.frames,
                batches=self._tally.batches,
                batch_size_counts=dict(sorted(self._tally.sizes.items())),
                queue_frames=sum(call.rows for call in self._waiting),
                busy_seconds=self._tally.busy_seconds,
                mode="eager",
                graphs=0,
                ceiling=self._max_batch_size,
                errors=self._tally.errors,
                compiled_as="",
                compile_error="",
                graph_error="",
            )

    def close(self, *, timeout_seconds: float = 10.0) -> None:
        """End after the call that runs; whoever waits gets EngineClosedError. Idempotent."""
        with self._lock:
            self._closing = True
            left = list(self._waiting)
            self._waiting.clear()
            self._work.notify_all()
        for call in left:
            call.done.set_exception(self._closed())
        deadline = time.monotonic() + timeout_seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _closed(self) -> EngineClosedError:
        return EngineClosedError(
            f"The engine of model {self.name!r} was closed. Lease the model again.",
            model=self.name,
        )

    def _run(self) -> None:
        if self._begin is not None:
            self._begin()
        while calls := self._next():
            self._count_running(1)
            if len(calls) == 1 or not self._together(calls):
                for call in calls:
                    self._alone(call)
            self._count_running(-1)

    def _count_running(self, change: int) -> None:
        with self._lock:
            self._num_running += change
            self._busy.set(self._num_running > 0)

    def _next(self) -> list[_Call]:
        with self._lock:
            while not self._waiting and not self._closing:
                self._work.wait()
            if not self._waiting:
                return []
            first = self._waiting.popleft()
            calls, rows = [first], first.rows
            others: deque[_Call] = deque()
            for call in self._waiting:
                if call.group == first.group and rows + call.rows <= self._max_call_rows:
                    calls.append(call)
                    rows += call.rows
                else:
                    others.append(call)
            self._waiting = others
            return calls

    def _together(self, calls: Sequence[_Call]) -> bool:
        """Run several callers' rows as one; False when each must be run alone."""
        rows = [call.rows for call in calls]
        started = time.monotonic()
        try:
            columns = zip(*(call.inputs for call in calls), strict=True)
            result = self._predict(*(np.concatenate(column) for column in columns))
            parts = split_rows(result, rows)
        except BaseException:
            # Whose rows it was shows when each runs alone; that caller gets the error.
            return False
        if parts is None:
            return False
        self._count(sum(rows), started)
        for call, part in zip(calls, parts, strict=True):
            call.done.set_result(part)
        return True

    def _alone(self, call: _Call) -> None:
        started = time.monotonic()
        try:
            # A copy, because the function may write into what it gets.
            result = self._predict(*(np.array(array) for array in call.inputs))
        except BaseException as error:
            with self._lock:
                self._tally.errors += not call.is_part
            call.done.set_exception(error)
            return
        self._count(call.rows, started)
        call.done.set_result(result)

    def _count(self, rows: int, started: float) -> None:
        with self._lock:
            self._tally.add(rows, rows, started, time.monotonic())
