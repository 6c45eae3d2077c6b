"""How a batch is run: gather the rows, call the model, bring the outputs to host memory.

One thread, the engine's, calls :meth:`CpuRunner.launch`; the collector's thread calls
:meth:`CpuRunner.collect`. The CUDA runner has the same methods.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from daskshare._engine_request import Group, HostOutputs, Segment, flatten, host_dtype
from daskshare._engine_staging import byte_view
from daskshare.models.spec import Program

__all__ = ["CpuRunner", "Flight", "Forwards", "Runner", "is_out_of_memory"]


@dataclass(slots=True, eq=False)
class Flight:
    """A batch between its launch and the delivery of its outputs.

    Parameters
    ----------
    slot : int
        Whose buffers it uses.
    segments : list of Segment
        What its rows are.
    num_items : int
        Rows that hold items.
    padded_size : int
        Rows that ran.
    outputs : HostOutputs or None
        On a CPU, where they are there already.
    launched_seconds : float
        On the engine's clock.
    """

    slot: int
    segments: list[Segment]
    num_items: int
    padded_size: int
    outputs: HostOutputs | None = None
    launched_seconds: float = 0.0


class Forwards:
    """The model's forward pass, and the compiled one for the batch size that it was made for."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._compiled: Callable[[torch.Tensor], Any] | None = None
        self.compiled_size: int | None = None

    def install(self, compiled: Callable[[torch.Tensor], Any], batch_size: int) -> None:
        """Use ``compiled`` for batches of ``batch_size`` from now on."""
        self._compiled = compiled
        self.compiled_size = batch_size

    @property
    def description(self) -> str:
        """What the compiled forward pass says of itself; "" without one."""
        return str(getattr(self._compiled, "description", ""))

    def remove(self) -> None:
        """Go back to the model's own forward pass."""
        self._compiled = None
        self.compiled_size = None

    def __call__(self, batch: torch.Tensor) -> tuple[Any, list[torch.Tensor]]:
        rows = batch.shape[0]
        if self._compiled is not None and rows == self.compiled_size:
            return flatten(self._compiled(batch), rows)
        return flatten(self._program.forward(batch), rows)


class Runner(Protocol):
    """What the engine needs of a device."""

    forwards: Forwards
    #: Why no CUDA graph is used although asked for; "" otherwise.
    graph_error: str

    @property
    def num_graphs(self) -> int: ...

    def activate(self) -> AbstractContextManager[Any]:
        """Enter on each thread that calls the runner."""
        ...

    def launch(
        self, slot: int, segments: list[Segment], group: Group, num_items: int, padded_size: int
    ) -> Flight:
        """Start a batch in a free slot; on a GPU return before it is done."""
        ...

    def collect(self, flight: Flight) -> HostOutputs:
        """Wait for a batch, once; its arrays are valid until the slot is used again, or owned."""
        ...

    def run_now(
        self, segments: Sequence[Segment], group: Group, num_items: int, padded_size: int
    ) -> HostOutputs:
        """Run a few items by themselves and wait: no buffers of a slot, no graph."""
        ...

    def install(self, compiled: Callable[[torch.Tensor], Any], batch_size: int) -> None:
        """Swap a compiled forward pass in; no batch may be in flight."""
        ...

    @property
    def measurable(self) -> bool:
        """Whether :meth:`measure` knows what batches look like."""
        ...

    def measure(self, rows: int) -> float:
        """Seconds that a batch of so many rows takes; infinity where memory does not do.

        No batch may be in flight.
        """
        ...

    def shrink(self, max_rows: int) -> None:
        """Give buffers back after memory ran out, and make them for ``max_rows`` from now on.

        No batch may be in flight.
        """
        ...

    def check_device(self) -> None:
        """Raise when an earlier error left the device unusable."""
        ...

    def release(self) -> None:
        """Give everything back."""
        ...


class CpuRunner:
    """Runs batches on the CPU, in the engine's thread.

    Parameters
    ----------
    program : Program
        The loaded model.
    slots : int
        Batches between launch and delivery at once.
    """

    graph_error = ""
    num_graphs = 0

    def __init__(self, program: Program, *, slots: int) -> None:
        self.forwards = Forwards(program)
        self._blocks = [torch.empty(0, dtype=torch.uint8) for _ in range(slots)]

    def activate(self) -> AbstractContextManager[Any]:
        return torch.inference_mode()

    def launch(
        self, slot: int, segments: list[Segment], group: Group, num_items: int, padded_size: int
    ) -> Flight:
        if len(segments) == 1 and num_items == padded_size:
            # The caller's own memory: nothing to copy when a batch is one request's items.
            batch = segments[0].items
        else:
            batch = self._buffer(slot, group, padded_size)
            _gather(batch, segments)
        return Flight(slot, segments, num_items, padded_size, self._run(batch))

    def collect(self, flight: Flight) -> HostOutputs:
        assert flight.outputs is not None
        return flight.outputs

    def run_now(
        self, segments: Sequence[Segment], group: Group, num_items: int, padded_size: int
    ) -> HostOutputs:
        batch = torch.empty((padded_size, *group.shape), dtype=group.dtype)
        _gather(batch, segments)
        repeat_first_row(batch, num_items)
        return self._run(batch)

    def install(self, compiled: Callable[[torch.Tensor], Any], batch_size: int) -> None:
        self.forwards.install(compiled, batch_size)

    @property
    def measurable(self) -> bool:
        # Smaller batches take less time on a CPU.
        return False

    def measure(self, rows: int) -> float:
        raise NotImplementedError("a CPU's batches are not padded, so no size is measured")

    def shrink(self, max_rows: int) -> None:
        self._blocks = [torch.empty(0, dtype=torch.uint8) for _ in self._blocks]

    def check_device(self) -> None:
        pass

    def release(self) -> None:
        self._blocks = []
        self.forwards.remove()

    def _buffer(self, slot: int, group: Group, rows: int) -> torch.Tensor:
        num_bytes = rows * group.item_bytes
        if self._blocks[slot].numel() < num_bytes:
            self._blocks[slot] = torch.zeros(num_bytes, dtype=torch.uint8)
        return byte_view(self._blocks[slot], 0, rows, group.shape, group.dtype)

    def _run(self, batch: torch.Tensor) -> HostOutputs:
        structure, leaves = self.forwards(batch)
        return HostOutputs(
            structure, [leaf.to(host_dtype(leaf.dtype)).numpy(force=True) for leaf in leaves]
        )


def repeat_first_row(batch: torch.Tensor, num_items: int) -> None:
    """Fill the padding of a batch, so that no other request's row decides whether it fails."""
    if num_items < batch.shape[0]:
        batch[num_items:].copy_(batch[:1].expand_as(batch[num_items:]))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, in any of torch's ways."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(
        sign in text
        for sign in (
            "CUDA out of memory",
            "CUDA error: out of memory",
            "CUBLAS_STATUS_ALLOC_FAILED",
            "CUDNN_STATUS_ALLOC_FAILED",
            "DefaultCPUAllocator: can't allocate memory",
        )
    )


def _gather(batch: torch.Tensor, segments: Sequence[Segment]) -> None:
    row = 0
    for segment in segments:
        batch[row : row + segment.num_items].copy_(segment.items)
        row += segment.num_items
