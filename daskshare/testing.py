"""Stand-ins and checks for tests of programs that use daskshare, and of models they bring.

Nothing here needs a GPU or a cluster, and torch is imported only where a tensor is made.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from daskshare.device import Device
from daskshare.models.spec import Prepared
from daskshare.models.torch_model import TorchProgram, torch_model_spec

if TYPE_CHECKING:
    import torch

__all__ = ["FakeDevice", "FakeProgram", "FakeSpec", "LoaderCheck", "check_loader"]


@dataclass(frozen=True, slots=True)
class FakeDevice(Device):
    """A device of any size that computes on the CPU, for tests of memory budgets and placement.

    Parameters
    ----------
    kind, index, uuid, name, total_bytes
        As in :class:`daskshare.device.Device`, with defaults.
    used_bytes : int
        What other programs are to have taken of it.
    """

    kind: str = "cpu"
    index: int = 0
    uuid: str = "GPU-00000000-0000-0000-0000-000000000000"
    name: str = "fake device"
    total_bytes: int = 8 * 2**30
    used_bytes: int = 0

    def torch_device(self) -> torch.device:
        """Return the CPU, whatever the kind."""
        import torch

        return torch.device("cpu")

    def free_bytes(self) -> int:
        """Return what ``used_bytes`` leaves."""
        return self.total_bytes - self.used_bytes

    def release_cached_memory(self) -> None:
        """Nothing is cached."""


@dataclass(frozen=True, slots=True)
class FakeSpec:
    """A model that multiplies by a factor, and fails where told.

    Parameters
    ----------
    name : str
        Part of the key.
    factor : float
        What items are multiplied by.
    model_bytes : int
        What it claims to take.
    load_error : str
        When not empty, loading raises RuntimeError with this text.
    poison : float or None
        A batch with an item that holds this value raises RuntimeError.
    max_batch_size : int
        Items.
    """

    name: str = "fake"
    factor: float = 2.0
    model_bytes: int = 1000
    load_error: str = ""
    poison: float | None = None
    max_batch_size: int = 8

    @property
    def key(self) -> str:
        """Digest of all fields."""
        return hashlib.sha256(repr(self).encode()).hexdigest()

    def estimated_bytes(self) -> int:
        """Return ``model_bytes``."""
        return self.model_bytes

    def load(self, device: Device) -> FakeProgram:
        """Make the program, or fail.

        Raises
        ------
        RuntimeError
            With ``load_error``.
        """
        if self.load_error:
            raise RuntimeError(self.load_error)
        return FakeProgram(self)


@dataclass(slots=True)
class FakeProgram:
    """The loaded :class:`FakeSpec`; keeps the sizes of its batches and who called it.

    Parameters
    ----------
    spec : FakeSpec
        What it does.
    """

    spec: FakeSpec
    batch_lengths: list[int] = field(default_factory=list)
    threads: set[int] = field(default_factory=set)

    item_shape: tuple[int, ...] | None = None
    batch_sizes: tuple[int, ...] = ()
    graph_capturable: bool = False
    max_batch_size: int = 0
    model_bytes: int = 0

    def __post_init__(self) -> None:
        self.max_batch_size = self.spec.max_batch_size
        self.model_bytes = self.spec.model_bytes

    def prepare(self, inputs: Any) -> Prepared:
        """Take anything that NumPy takes, items first."""
        return Prepared(np.asarray(inputs, dtype=np.float32))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """Multiply.

        Raises
        ------
        RuntimeError
            When an item holds ``poison``.
        """
        self.batch_lengths.append(len(batch))
        self.threads.add(threading.get_ident())
        if self.spec.poison is not None and bool((batch == self.spec.poison).any()):
            raise RuntimeError(f"an item holds {self.spec.poison}")
        return batch * self.spec.factor

    def compile(self, batch_size: int) -> None:
        """Return None: there is nothing faster."""

    def finish(self, outputs: Any, context: Any) -> Any:
        """Return the outputs as they are."""
        return outputs


@dataclass(frozen=True, slots=True)
class LoaderCheck:
    """What :func:`check_loader` found out.

    Parameters
    ----------
    output_shapes : dict of str to tuple of int
        Shape of one item's output, by its place: "" for a single array, "[0]" or "['logits']".
    output_dtypes : dict of str to str
        Dtypes in host memory, likewise.
    model_bytes : int
        Bytes of parameters and buffers.
    largest_difference : float
        Between an item's output in a batch and alone, absolute.
    """

    output_shapes: dict[str, tuple[int, ...]]
    output_dtypes: dict[str, str]
    model_bytes: int
    largest_difference: float


def check_loader(
    load: Callable[[torch.device], Callable[[torch.Tensor], Any]],
    example: Any,
    *,
    input_dtype: str | None = None,
    device: Device | None = None,
    relative_tolerance: float = 1e-3,
    absolute_tolerance: float = 1e-4,
) -> LoaderCheck:
    """Check that a loader suits :func:`daskshare.share`.

    A shared model sees one task's items next to another's, in batches of any size, so its outputs
    must be tensors with the batch as first axis, the same each time, and an item's output must not
    depend on its neighbours. The loader must also survive pickling.

    Parameters
    ----------
    load : callable
        As for :func:`daskshare.share`.
    example : array or tensor, shape (n, ...)
        At least 2 items that differ.
    input_dtype : str, optional
        As for :func:`daskshare.share`.
    device : Device, optional
        Where to load; default the CPU.
    relative_tolerance, absolute_tolerance : float
        How far an item's output may differ between batches: sums in another order round otherwise.

    Returns
    -------
    LoaderCheck
        What was found.

    Raises
    ------
    AssertionError
        When the model does not suit; the message says what was got and what to change.
    DaskshareError
        When the loader or the example is refused as :func:`daskshare.share` would refuse it.

    Examples
    --------
    >>> check_loader(load, np.random.rand(4, 3, 224, 224).astype("float32"))   # doctest: +SKIP
    LoaderCheck(output_shapes={'': (1000,)}, ...)
    """
    import torch

    spec = torch_model_spec(load, name="checked", input_dtype=input_dtype)
    target = device or Device.cpu()
    program = spec.load(target)
    prepared = program.prepare(example).items
    if isinstance(prepared, np.ndarray):
        # torch warns of arrays that cannot be written to.
        prepared = torch.from_numpy(np.array(prepared))
    items = prepared.to(target.torch_device())
    if len(items) < 2:
        raise AssertionError(f"Got an example of {len(items)} items; expected 2 or more.")
    together = _outputs(program, items)
    again = _outputs(program, items)
    alone = [_outputs(program, items[i : i + 1]) for i in range(len(items))]
    largest = 0.0
    for place, batch in together.items():
        if again.get(place) is None or not _close(batch, again[place], 0, 0):
            raise AssertionError(
                f"Output{place} of the same batch differs between two calls; expected the same. "
                "Turn off dropout and other random layers (eval()) and fix their seeds."
            )
        for i, one in enumerate(alone):
            if one.keys() != together.keys() or one[place].shape[1:] != batch.shape[1:]:
                raise AssertionError(
                    f"Output{place} has shape {tuple(batch.shape[1:])} an item in a batch of "
                    f"{len(items)}, and another structure or shape when item {i} comes alone; "
                    "expected the same. Return outputs of fixed shapes."
                )
            if not _close(batch[i], one[place][0], relative_tolerance, absolute_tolerance):
                raise AssertionError(
                    f"Output{place} of item {i} depends on the other items of its batch; expected "
                    "independent items. Use eval() (batch normalisation) and per-item operations."
                )
            difference = (batch[i].double() - one[place][0].double()).abs()
            largest = max(
                largest, float(difference.nan_to_num().max()) if difference.numel() else 0
            )
    return LoaderCheck(
        output_shapes={place: tuple(value.shape[1:]) for place, value in together.items()},
        output_dtypes={
            place: str(value.dtype).removeprefix("torch.") for place, value in together.items()
        },
        model_bytes=program.model_bytes,
        largest_difference=largest,
    )


def _close(a: torch.Tensor, b: torch.Tensor, relative: float, absolute: float) -> bool:
    import torch

    return torch.allclose(a.double(), b.double(), rtol=relative, atol=absolute, equal_nan=True)


def _outputs(program: TorchProgram, batch: torch.Tensor) -> dict[str, torch.Tensor]:
    """Run the model and name each output tensor by its place."""
    found: dict[str, torch.Tensor] = {}
    _collect(program.forward(batch), "", len(batch), found)
    return found


def _collect(value: Any, place: str, num_items: int, found: dict[str, torch.Tensor]) -> None:
    import torch

    if isinstance(value, dict):
        for name, part in value.items():
            _collect(part, f"{place}[{name!r}]", num_items, found)
    elif isinstance(value, (list, tuple)):
        for i, part in enumerate(value):
            _collect(part, f"{place}[{i}]", num_items, found)
    elif isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == num_items:
        host = value.cpu()
        found[place] = host.float() if host.dtype == torch.bfloat16 else host
    else:
        got = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise AssertionError(
            f"Output{place} of a batch of {num_items} is {got}; expected a tensor whose first axis "
            f"is {num_items}. Wrap the model in a function that returns only such tensors."
        )
