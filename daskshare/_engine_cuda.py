"""How a batch is run on a CUDA device: three streams, two or more slots, one graph replay a batch.

The engine's thread enqueues, for each batch: transfers of the callers' page-locked memory into the
slot's input buffer (copy-in stream), one CUDA graph that runs the model and copies its outputs into
the slot's output buffers (compute stream), and the transfer of these into page-locked memory
(copy-out stream). Events order the streams; only the collector's thread waits.

Both threads give the interpreter's lock away as seldom as can be: with a dozen tasks that decode,
each time costs them longer than the work.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch

from daskshare._engine_buffers import Buffers, runs
from daskshare._engine_request import Group, HostOutputs, Segment, host_dtype
from daskshare._engine_runner import Flight, Forwards, is_out_of_memory, repeat_first_row
from daskshare._engine_staging import byte_view
from daskshare.device import Device
from daskshare.kernels.capture import CAPTURE_GATE, was_disturbed
from daskshare.kernels.streams import STREAMS, CurrentStream
from daskshare.kernels.transfer import Event, copy_async, wait_event
from daskshare.models.spec import Program

__all__ = ["CudaRunner"]

logger = logging.getLogger(__name__)

# Torch's allocators may ask a graph whose capture failed whether it captures, for ever.
_FAILED_CAPTURES: list[torch.cuda.CUDAGraph] = []

# Models whose inputs come in ever new shapes would otherwise capture without end.
_MAX_GRAPHS_PER_SLOT = 16
# Captures that other threads made invalid; the wait for the next try doubles each time.
_MAX_DISTURBED_CAPTURES = 8
_TIMED_RUNS = 3


class _Slot:
    def __init__(self) -> None:
        self.block: torch.Tensor | None = None
        #: Views of the block as batches.
        self.batches: dict[tuple[Group, int], torch.Tensor] = {}
        self.graphs: dict[tuple[Group, int], tuple[torch.cuda.CUDAGraph, Buffers]] = {}
        self.buffers: dict[tuple[Group, int], Buffers] = {}
        #: Those of the batch that runs.
        self.running: Buffers | None = None
        self.copied, self.computed = Event(), Event()
        self.done = Event(blocking=True)

    def clear(self) -> None:
        self.graphs.clear()
        self.buffers.clear()
        self.batches.clear()
        self.block = self.running = None


_STREAMS = ("copy-in", "compute", "copy-out")


class CudaRunner:
    """Runs batches on one CUDA device.

    Parameters
    ----------
    program : Program
        The loaded model.
    device : Device
        Where it is.
    slots : int
        Batches in flight at once.
    max_rows : int
        Rows of the largest batch.
    cuda_graphs : bool
        Whether to capture ``program.forward`` where it allows that.
    """

    def __init__(
        self, program: Program, device: Device, *, slots: int, max_rows: int, cuda_graphs: bool
    ) -> None:
        self.forwards = Forwards(program)
        self.graph_error = ""
        self._device = device.torch_device()
        self._max_rows = max_rows
        self._use_graphs = cuda_graphs and program.graph_capturable
        self._last_group: Group | None = None
        self._warm: set[tuple[Group, int]] = set()
        self._launches = self._disturbed_captures = self._capture_not_before = 0
        with torch.cuda.device(self._device):
            self._streams = [STREAMS.take(device.index, purpose) for purpose in _STREAMS]
            self._copy_in, self._compute, self._copy_out = self._streams
            self._slots = [_Slot() for _ in range(slots)]
        self._pool: Any = None

    @property
    def num_graphs(self) -> int:
        return sum(len(slot.graphs) for slot in self._slots)

    def activate(self) -> AbstractContextManager[Any]:
        stack = ExitStack()
        stack.enter_context(torch.cuda.device(self._device))
        stack.enter_context(torch.inference_mode())
        return stack

    def launch(
        self, slot: int, segments: list[Segment], group: Group, num_items: int, padded_size: int
    ) -> Flight:
        state = self._slots[slot]
        batch = self._input(state, group, padded_size)
        self._last_group = group
        self._launches += 1
        self._gather(batch, segments, group, self._copy_in)
        state.copied.record(self._copy_in)
        state.copied.hold(self._compute)
        with CurrentStream(self._compute):
            buffers = self._run(state, (group, padded_size), batch)
        state.computed.record(self._compute)
        state.computed.hold(self._copy_out)
        buffers.fetch(self._copy_out)
        state.done.record(self._copy_out)
        state.running = buffers
        return Flight(slot, segments, num_items, padded_size)

    def collect(self, flight: Flight) -> HostOutputs:
        state = self._slots[flight.slot]
        state.done.synchronize()
        buffers, state.running = state.running, None
        assert buffers is not None
        return buffers.take()

    def run_now(
        self, segments: Sequence[Segment], group: Group, num_items: int, padded_size: int
    ) -> HostOutputs:
        with torch.cuda.stream(self._compute):
            batch = torch.empty((padded_size, *group.shape), dtype=group.dtype, device=self._device)
            self._gather(batch, segments, group, self._compute)
            repeat_first_row(batch, num_items)
            structure, leaves = self.forwards(batch)
            arrays = [leaf.to(host_dtype(leaf.dtype)).numpy(force=True) for leaf in leaves]
        self._compute.synchronize()
        return HostOutputs(structure, arrays)

    def install(self, compiled: Callable[[torch.Tensor], Any], batch_size: int) -> None:
        # All graphs, as they share one pool: only whole does it give the eager passes' memory back.
        for state in self._slots:
            state.graphs.clear()
        self._pool = None
        torch.cuda.empty_cache()
        self._warm = {key for key in self._warm if key[1] != batch_size}
        self.forwards.install(compiled, batch_size)
        if self._last_group is None or not self._use_graphs or batch_size > self._max_rows:
            return
        # Captured now rather than in the middle of a batch's way.
        key = (self._last_group, batch_size)
        with torch.cuda.stream(self._compute):
            for state in self._slots:
                for _ in range(2):
                    self._run(state, key, self._input(state, self._last_group, batch_size))
        self._compute.synchronize()

    @property
    def measurable(self) -> bool:
        return self._last_group is not None

    def measure(self, rows: int) -> float:
        assert self._last_group is not None
        key, state = (self._last_group, rows), self._slots[0]
        kept = rows == self.forwards.compiled_size
        known, pool = state.graphs.get(key), self._pool
        if not kept and known is None:
            # A pool gives its memory back as a whole, and this graph may not be wanted.
            self._pool = None
        try:
            return min(self._replay_seconds(state, key) for _ in range(_TIMED_RUNS))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return math.inf
        finally:
            if not kept and known is None:
                state.graphs.pop(key, None)
                state.buffers.pop(key, None)
                self._pool = pool
                torch.cuda.empty_cache()

    def _replay_seconds(self, state: _Slot, key: tuple[Group, int]) -> float:
        with torch.cuda.stream(self._compute):
            batch = self._input(state, *key)
            # The first two of a kind make its graph.
            for _ in range(1 if key in state.graphs else 3):
                start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                stop = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                start.record()
                self._run(state, key, batch)
                stop.record()
                stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3

    def shrink(self, max_rows: int) -> None:
        self._max_rows = max_rows
        self._compute.synchronize()
        for state in self._slots:
            state.clear()
        self._warm.clear()
        self._pool = None
        torch.cuda.empty_cache()

    def check_device(self) -> None:
        # An illegal address or a device-side assert makes every later call fail.
        for stream in (self._copy_in, self._compute, self._copy_out):
            stream.synchronize()

    def release(self) -> None:
        try:
            # An engine that died may have left a batch under way.
            self.check_device()
        finally:
            for state in self._slots:
                state.clear()
            self._warm.clear()
            self._pool = None
            self.forwards.remove()
        for stream, purpose in zip(self._streams, _STREAMS, strict=True):
            STREAMS.give_back(stream, purpose)
        torch.cuda.empty_cache()

    def _input(self, state: _Slot, group: Group, rows: int) -> torch.Tensor:
        num_bytes = max(rows, self._max_rows) * group.item_bytes
        if state.block is None or state.block.numel() < rows * group.item_bytes:
            # The graphs hold the old block's address.
            state.graphs.clear()
            state.batches.clear()
            state.block = torch.zeros(num_bytes, dtype=torch.uint8, device=self._device)
            # Written next on the copy-in stream, zeroed on this thread's current one.
            torch.cuda.current_stream(self._device).synchronize()
        batch = state.batches.get((group, rows))
        if batch is None:
            if len(state.batches) >= _MAX_GRAPHS_PER_SLOT:
                state.batches.clear()
            batch = byte_view(state.block, 0, rows, group.shape, group.dtype)
            state.batches[group, rows] = batch
        return batch

    def _gather(
        self,
        batch: torch.Tensor,
        segments: Sequence[Segment],
        group: Group,
        stream: torch.cuda.Stream,
    ) -> None:
        target, handle = batch.data_ptr(), stream.cuda_stream
        for address, rows, segment in runs(segments, group):
            piece = None if segment is None else segment.piece
            if piece is not None and piece.ready is not None:
                wait_event(handle, piece.ready.cuda_event)
            if address:
                # The flight keeps the source until the copy has been made.
                copy_async(target, address, rows * group.item_bytes, handle)
            else:
                assert segment is not None
                first = (target - batch.data_ptr()) // max(1, group.item_bytes)
                with CurrentStream(stream):
                    source = segment.items
                    batch[first : first + rows].copy_(source, non_blocking=True)
                    source.record_stream(stream)
            target += rows * group.item_bytes

    def _run(self, state: _Slot, key: tuple[Group, int], batch: torch.Tensor) -> Buffers:
        captured = state.graphs.get(key)
        if captured is None and self._may_capture(state, key):
            captured = self._capture(state, key, batch)
        if captured is not None:
            captured[0].replay()
            return captured[1]
        structure, leaves = self.forwards(batch)
        buffers = state.buffers.get(key)
        if buffers is None or not buffers.fits(structure, leaves):
            if len(state.buffers) >= _MAX_GRAPHS_PER_SLOT:
                state.buffers.clear()
            buffers = state.buffers[key] = Buffers(structure, leaves, self._device)
        buffers.store(leaves)
        # The next batch of this kind may be captured: kernels are loaded, workspaces allocated.
        self._warm.add(key)
        return buffers

    def _may_capture(self, state: _Slot, key: tuple[Group, int]) -> bool:
        return (
            self._use_graphs
            and not self.graph_error
            and self._launches >= self._capture_not_before
            and key in self._warm
            and len(state.graphs) < _MAX_GRAPHS_PER_SLOT
        )

    def _capture(
        self, state: _Slot, key: tuple[Group, int], batch: torch.Tensor
    ) -> tuple[torch.cuda.CUDAGraph, Buffers] | None:
        buffers = state.buffers.get(key)
        if buffers is None:
            # This slot has not run such a batch: one eager run tells the outputs' form.
            structure, leaves = self.forwards(batch)
            buffers = state.buffers[key] = Buffers(structure, leaves, self._device)
            del leaves
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            # All graphs share one pool, which is safe only because they replay one after another
            # on one stream and leave nothing in it: outputs are copied to the slot's buffers
            # inside the graph. thread_local: callers may allocate meanwhile.
            with (
                CAPTURE_GATE.capturing(),
                torch.cuda.graph(
                    graph,
                    pool=self._pool,
                    stream=self._compute,
                    capture_error_mode="thread_local",
                ),
            ):
                structure, leaves = self.forwards(batch)
                if not buffers.fits(structure, leaves):
                    raise RuntimeError("the model's outputs change their form between batches")
                buffers.store(leaves)
                del leaves
        except Exception as error:
            self._capture_failed(error)
            self._abort_capture(graph)
            self.check_device()
            return None
        state.graphs[key] = (graph, buffers)
        return state.graphs[key]

    def _capture_failed(self, error: Exception) -> None:
        self._disturbed_captures += 1
        if was_disturbed(error) and self._disturbed_captures <= _MAX_DISTURBED_CAPTURES:
            self._capture_not_before = self._launches + 2**self._disturbed_captures
            logger.info("Capturing a CUDA graph failed and is tried again: %s", error)
            return
        self.graph_error = f"{type(error).__name__}: {error}"
        logger.warning("No CUDA graph, the model runs eagerly: %s", self.graph_error)

    def _abort_capture(self, graph: torch.cuda.CUDAGraph) -> None:
        # When the driver calls a capture invalid, torch's allocator goes on recording into the
        # pool and never again frees what other streams used.
        try:
            torch._C._cuda_endAllocateToPool(self._device.index, self._pool)
        except RuntimeError:
            return  # It was no longer recording: the capture ended as it should.
        torch._C._cuda_releasePool(self._device.index, self._pool)
        _FAILED_CAPTURES.append(graph)
