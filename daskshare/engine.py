"""The one thread that talks to a model, and the queue through which all tasks reach it."""

from __future__ import annotations

import logging
import math
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import torch

from daskshare._engine_activity import DeviceActivity, Switch
from daskshare._engine_cuda import CudaRunner
from daskshare._engine_input import as_items, group_of, without_rows
from daskshare._engine_queue import RequestQueue
from daskshare._engine_recovery import Recovery
from daskshare._engine_request import Group, HostOutputs, Request, Segment
from daskshare._engine_runner import CpuRunner, Flight, Runner
from daskshare._engine_staging import Staging
from daskshare._engine_stats import EngineStats, Tally
from daskshare.batching import DynamicBatcher
from daskshare.config import EngineOptions
from daskshare.device import Device
from daskshare.errors import EngineClosedError, EngineDiedError, InferenceError
from daskshare.models.spec import Prepared, Program

__all__ = ["EngineStats", "InferenceEngine"]

logger = logging.getLogger(__name__)

_COMPILER_GRACE_SECONDS = 1.0
# Enough to copy a batch in and launch it before the device runs dry.
_LEAD_SECONDS = 0.003

# A compiler would take the interpreter from the first batches and disturb their capture in graphs:
# it waits for so many of them, looking this often whether any is on its way.
_SETTLED_BATCHES = 4
_SETTLING_STEP_SECONDS = 0.5
_SETTLING_STEPS = 120

_Launch = tuple[int, list[Segment], Group, int, int]
_Forward = Callable[[torch.Tensor], Any]


class InferenceEngine:
    """Runs one model for many callers, in batches made of all their frames.

    Parameters
    ----------
    program : Program
        The loaded model.
    device : Device
        Where it was loaded.
    options : EngineOptions
        How to batch and run.
    name : str
        For people: in messages and names of threads.
    activity : DeviceActivity or None
        Told when batches are on the device.

    Notes
    -----
    Thread-safe. Exactly one thread, ``daskshare-engine-NAME``, calls the model. A second,
    ``daskshare-collect-NAME``, waits for batches and hands their results out; with compiling asked
    for, a third calls ``program.compile``. All are daemons; :meth:`close` ends them.
    """

    def __init__(
        self,
        program: Program,
        device: Device,
        *,
        options: EngineOptions,
        name: str,
        activity: DeviceActivity | None = None,
    ) -> None:
        self.name = name
        self.program = program
        self.device = device
        rows = options.max_batch_size or program.max_batch_size
        bound = options.queue_batches * rows
        self._batcher = DynamicBatcher(
            max_batch_size=rows,
            max_wait_seconds=options.max_wait_seconds,
            max_queue_items=bound,
            batch_sizes=program.batch_sizes,
        )
        self._runner: Runner
        staging = None
        if device.is_cuda:
            self._runner = CudaRunner(
                program,
                device,
                slots=options.slots,
                max_rows=rows,
                cuda_graphs=options.cuda_graphs,
            )
            staging = Staging(max_items=bound + options.slots * rows, batch_items=rows, pin=True)
        else:
            self._runner = CpuRunner(program, slots=options.slots)
        self._queue = RequestQueue(self._batcher, staging=staging)

        self._lock = self._queue.lock
        self._work = self._queue.work
        self._flying = threading.Condition(self._lock)
        self._num_slots = options.slots
        self._free_slots = deque(range(options.slots))
        self._flights: deque[Flight] = deque()
        self._closing = self._abandoned = self._launching_ended = False
        self._dead: BaseException | None = None

        self._tally = Tally()
        self._busy = Switch(activity, "busy")

        self._compiled: _Forward | None = None
        self._compile_error = ""
        self._compile_ended = threading.Event()
        self._settled = threading.Event()
        self._sizes_unmeasured = False
        compiling = options.compile is True or (options.compile == "auto" and device.is_cuda)
        if not compiling:
            self._compile_ended.set()
        roles: list[tuple[Callable[[], None], str]] = [
            (self._launch_all, "engine"),
            (self._collect_all, "collect"),
            *([(self._compile, "compile")] if compiling else []),
        ]
        self._threads = [
            threading.Thread(target=target, name=f"daskshare-{role}-{name}", daemon=True)
            for target, role in roles
        ]
        for thread in self._threads:
            thread.start()

    @property
    def alive(self) -> bool:
        """Whether it takes calls: neither closed nor dead."""
        return self._dead is None and not self._closing

    def infer(self, inputs: Any, *, task: Hashable = None) -> Any:
        """Prepare inputs, run the model and finish its outputs; blocks until the result is there.

        Parameters
        ----------
        inputs : object
            What the model's ``prepare`` takes.
        task : hashable
            Whose call it is: tasks take turns. None: the calling thread's.

        Raises
        ------
        InvalidInputError
            When the model does not take the inputs.
        InferenceError
            When it failed on one of the frames, or the engine was closed or died.
        """
        prepared = self.program.prepare(inputs)
        outputs = self.submit(prepared, task=task).result()
        return self.program.finish(outputs, prepared.context)

    def submit(self, prepared: Prepared, *, task: Hashable = None) -> Future[Any]:
        """Queue prepared items; blocks while the queue is full.

        Parameters
        ----------
        prepared : Prepared
            Its items must stay as they are until the future is done. On a GPU, host items are
            copied before this returns, and device items are read after what the calling thread's
            current stream holds.
        task : hashable
            Whose request it is; None: the calling thread's.

        Returns
        -------
        concurrent.futures.Future
            Of the outputs: NumPy arrays (num_items, ...) nested as the model's ``forward`` nests
            its tensors; dtypes that NumPy lacks come as float32. Fails with InferenceError.
            Cancelling it takes effect until its first item runs.

        Raises
        ------
        InvalidInputError
            When the items do not fit the model.
        EngineClosedError, EngineDiedError
            When the engine is no more, or ends while the call waits.
        """
        items = as_items(prepared.items, self.program.item_shape, self.device, self.name)
        group = group_of(items)
        if items.shape[0] == 0:
            return self._submit_empty(group)
        return self._queue.put(items, group, threading.get_ident() if task is None else task)

    def stats(self) -> EngineStats:
        """Say what was done so far."""
        with self._lock:
            return EngineStats(
                frames=self._tally.frames,
                batches=self._tally.batches,
                batch_size_counts=dict(sorted(self._tally.sizes.items())),
                queue_frames=self._batcher.num_items,
                queue_age_seconds=self._queue.age_seconds(),
                busy_seconds=self._tally.busy_seconds,
                mode="eager" if self._runner.forwards.compiled_size is None else "compiled",
                compiled_as=self._runner.forwards.description,
                graphs=self._runner.num_graphs,
                ceiling=self._batcher.ceiling,
                errors=self._tally.errors,
                compile_error=self._compile_error,
                graph_error=self._runner.graph_error,
            )

    def wait_compiled(self, timeout_seconds: float) -> bool:
        """Wait until compiling has ended; whether the compiled forward pass serves now."""
        self._compile_ended.wait(timeout_seconds)
        return self._runner.forwards.compiled_size is not None

    def close(self, *, timeout_seconds: float = 10.0) -> None:
        """Run what is queued, then end; whoever still waits at the end gets EngineClosedError.

        Parameters
        ----------
        timeout_seconds : float
            Bound of the whole. A thread that hangs in the model or in a compiler then stays
            behind; the log says so.

        Notes
        -----
        Callers that wait for room get the error at once. May be called again.
        """
        deadline = time.monotonic() + timeout_seconds
        with self._lock:
            self._closing = True
            self._queue.refuse(self._closed)
        self._compile_ended.set()
        self._settled.set()
        for thread in self._threads[:2]:
            thread.join(max(0.0, deadline - time.monotonic()))
        for thread in self._threads[2:]:
            # A compiler takes no notice of us; an ending worker need not sit it out.
            thread.join(min(_COMPILER_GRACE_SECONDS, max(0.0, deadline - time.monotonic())))
        with self._lock:
            self._abandoned = True
            self._busy.retire()
            self._work.notify_all()
            left = list(self._queue.requests)
        for request in left:
            self._queue.fail(request, self._closed())
        hanging = [thread.name for thread in self._threads if thread.is_alive()]
        if hanging:
            logger.warning("Still running after %.1f s: %s", timeout_seconds, ", ".join(hanging))

    def _submit_empty(self, group: Group) -> Future[Any]:
        # One frame of zeros tells how outputs without a frame look.
        outer: Future[Any] = Future()
        outer.set_running_or_notify_cancel()

        def shorten(inner: Future[Any]) -> None:
            error = inner.exception()
            if error is not None:
                outer.set_exception(error)
            else:
                outer.set_result(without_rows(inner.result()))

        one = torch.zeros((1, *group.shape), dtype=group.dtype)
        self.submit(Prepared(one)).add_done_callback(shorten)
        return outer

    # -- the engine's thread --

    def _launch_all(self) -> None:
        try:
            with self._runner.activate():
                while (work := self._next_work()) is not None:
                    if isinstance(work, tuple):
                        self._launch(*work)
                    else:
                        work()
        except BaseException as error:
            self._die(error)
        with self._lock:
            self._launching_ended = True
            self._flying.notify_all()
        self._threads[1].join()
        try:
            with self._runner.activate():
                self._runner.release()
        except Exception:
            logger.warning("Engine %s could not free its memory", self.name, exc_info=True)

    def _next_work(self) -> _Launch | Callable[[], None] | None:
        with self._lock:
            while self._dead is None and not self._abandoned:
                idle = not self._flights
                wake_seconds: float | None = None
                if self._compiled is not None:
                    # Swapping needs every slot; batches wait for it.
                    if idle:
                        compiled, self._compiled = self._compiled, None
                        return partial(self._install, compiled)
                elif self._sizes_unmeasured and self._runner.measurable:
                    if idle:
                        self._sizes_unmeasured = False
                        return self._choose_sizes
                elif self._free_slots:
                    start_seconds = self._could_start_seconds()
                    taken = self._queue.take(
                        device_idle=idle or self._closing, not_before_seconds=start_seconds
                    )
                    if taken is not None and taken[0]:
                        num_items = sum(segment.num_items for segment in taken[0])
                        padded_size = self._batcher.padded_size(num_items)
                        self._busy.set(True)
                        return self._free_slots.popleft(), *taken, num_items, padded_size
                    if taken is not None:
                        continue
                    if idle and self._closing and not self._batcher.num_items:
                        return None
                    due_seconds = self._batcher.deadline()
                    if due_seconds is not None:
                        wake_seconds = max(due_seconds, start_seconds)
                self._work.wait(
                    None if wake_seconds is None else max(0.0, wake_seconds - time.monotonic())
                )
            return None

    def _could_start_seconds(self) -> float:
        # A batch sent earlier than the device is about to be free would only wait there, when it
        # could fill here; a wrong guess ends when the device is idle.
        if not self._flights:
            return -math.inf
        free_seconds = self._tally.free_seconds(
            self._flights[0].launched_seconds, [flight.padded_size for flight in self._flights]
        )
        return free_seconds - _LEAD_SECONDS

    def _launch(
        self, slot: int, segments: list[Segment], group: Group, num_items: int, padded_size: int
    ) -> None:
        launched_seconds = time.monotonic()
        try:
            flight = self._runner.launch(slot, segments, group, num_items, padded_size)
        except Exception as error:
            self._recover(segments, group, padded_size, error)
            with self._lock:
                self._free_slot(slot)
            return
        flight.launched_seconds = launched_seconds
        with self._lock:
            self._flights.append(flight)
            self._flying.notify()

    def _recover(
        self, segments: list[Segment], group: Group, padded_size: int, error: Exception
    ) -> None:
        self._runner.check_device()
        with self._lock:
            # Results stay in order, and memory in use by other batches comes free.
            while self._flights and self._dead is None:
                self._work.wait()
        recovery = Recovery(
            self._runner, self._queue, self.name, self.device, self._deliver, self._fail
        )
        recovery.start(segments, padded_size, error)
        while self._dead is None and not self._abandoned and recovery.step(group):
            pass
        with self._lock:
            for segment in segments:
                self._queue.items_done(segment)

    def _install(self, compiled: _Forward) -> None:
        try:
            self._runner.install(compiled, self._batcher.padded_size(self._batcher.ceiling))
        except Exception as error:
            self._runner.check_device()
            self._runner.forwards.remove()
            self._compile_failed(error)
        else:
            self._sizes_unmeasured = bool(self.program.batch_sizes)
        self._compile_ended.set()

    def _choose_sizes(self) -> None:
        """Pad to a smaller size only where that is faster than a full, compiled batch."""
        full = self._batcher.padded_size(self._batcher.ceiling)
        sizes = [size for size in sorted(self.program.batch_sizes) if size < full]
        try:
            full_seconds = self._runner.measure(full)
            while sizes and self._runner.measure(sizes[-1]) >= full_seconds:
                sizes.pop()
        except Exception:
            self._runner.check_device()
            logger.warning("Engine %s could not measure its batch sizes", self.name, exc_info=True)
            return
        with self._lock:
            self._batcher.set_batch_sizes(sizes)

    # -- the collector's thread --

    def _collect_all(self) -> None:
        try:
            with self._runner.activate():
                while (flight := self._next_flight()) is not None:
                    outputs = self._runner.collect(flight)
                    self._deliver(
                        flight.segments,
                        flight.num_items,
                        flight.padded_size,
                        outputs,
                        flight.launched_seconds,
                        landed=flight,
                    )
        except BaseException as error:
            self._die(error)

    def _next_flight(self) -> Flight | None:
        with self._lock:
            while not self._flights and not self._launching_ended and self._dead is None:
                self._flying.wait()
            return self._flights[0] if self._flights and self._dead is None else None

    def _deliver(
        self,
        segments: Sequence[Segment],
        num_items: int,
        padded_size: int,
        outputs: HostOutputs,
        launched_seconds: float,
        *,
        landed: Flight | None = None,
    ) -> None:
        """Hand a batch's rows out; by one thread at a time."""
        complete = []
        row = 0
        for segment in segments:
            request = segment.piece.request
            first_item = segment.piece.offset + segment.start
            if not request.finished:
                try:
                    if request.fill(first_item, segment.num_items, outputs, row):
                        complete.append(request)
                except ValueError as error:
                    failure = InferenceError(
                        f"Model {self.name!r}: {error}", model=self.name, frame=first_item
                    )
                    failure.__cause__ = error
                    self._fail(request, failure)
            row += segment.num_items
        with self._lock:
            self._tally.add(num_items, padded_size, launched_seconds, time.monotonic())
            complete = [request for request in complete if self._queue.drop(request)]
            if landed is not None:
                for segment in segments:
                    self._queue.items_done(segment)
                self._flights.popleft()
                self._free_slot(landed.slot)
                self._work.notify()
        if self._tally.batches >= _SETTLED_BATCHES:
            self._settled.set()
        for request in complete:
            request.future.set_result(request.result())

    # -- any thread --

    def _free_slot(self, slot: int) -> None:
        self._free_slots.append(slot)
        self._busy.set(len(self._free_slots) < self._num_slots)

    def _compile(self) -> None:
        for _ in range(_SETTLING_STEPS):
            if self._settled.wait(_SETTLING_STEP_SECONDS) or not self._queue.requests:
                break
        size = self._batcher.padded_size(self._batcher.max_batch_size)
        try:
            if not self.alive:
                self._compile_ended.set()
                return
            with self._runner.activate():
                compiled = self.program.compile(size)
        except BaseException as error:
            self._compile_failed(error)
            self._compile_ended.set()
            return
        if compiled is None:
            self._compile_ended.set()
            return
        with self._lock:
            self._compiled = compiled
            self._work.notify()

    def _compile_failed(self, error: BaseException) -> None:
        traceback.clear_frames(error.__traceback__)
        logger.warning("Model %s is served eagerly: compiling failed", self.name, exc_info=error)
        self._compile_error = f"{type(error).__name__}: {error}"

    def _fail(self, request: Request, error: InferenceError) -> None:
        if self._queue.fail(request, error):
            with self._lock:
                self._tally.errors += 1

    def _die(self, error: BaseException) -> None:
        with self._lock:
            if self._dead is None:
                self._dead = error
                self._busy.retire()
                logger.error("The engine of model %s died", self.name, exc_info=error)
            self._queue.refuse(self._died)
            self._flying.notify_all()
            left = list(self._queue.requests)
        self._compile_ended.set()
        for request in left:
            self._fail(request, self._died())

    def _died(self) -> EngineDiedError:
        reason = f"{type(self._dead).__name__}: {self._dead}"
        error = EngineDiedError(
            f"The engine of model {self.name!r} died ({reason}). The next call starts it anew; "
            "after a CUDA error the worker process must be restarted.",
            model=self.name,
            reason=reason,
        )
        error.__cause__ = self._dead
        return error

    def _closed(self) -> EngineClosedError:
        return EngineClosedError(
            f"The engine of model {self.name!r} was closed. Lease the model again.",
            model=self.name,
        )
