"""Any torch model as a ModelSpec. The scheduler reads this module: torch is imported on loading."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import cloudpickle
import numpy as np

from daskshare.errors import ConfigurationError, InvalidInputError, ModelLoadError
from daskshare.models.spec import Prepared

if TYPE_CHECKING:
    import torch

    from daskshare.device import Device

__all__ = ["TorchModelSpec", "TorchProgram", "torch_model_spec"]

DEFAULT_MAX_BATCH_SIZE = 32

_INPUT_DTYPES = ("uint8", "float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True, slots=True, eq=False)
class TorchModelSpec:
    """A loader function, in a form that travels without being looked into.

    Make one with :func:`torch_model_spec`. The loader stays bytes until a worker loads it, because
    Dask's scheduler unpickles what is in a graph, and unpickling the function may import torch.

    Parameters
    ----------
    name : str
        For people.
    key : str
        Equal keys share one copy.
    loader : bytes
        The loader, pickled by cloudpickle.
    max_batch_size : int
        Items.
    batch_sizes : tuple of int
        Sizes to which batches are padded.
    input_dtype : str or None
        Dtype to which a batch is converted on the device.
    cuda_graph : bool
        Whether the model may be captured into a CUDA graph.
    """

    name: str
    key: str
    loader: bytes = field(repr=False)
    max_batch_size: int = DEFAULT_MAX_BATCH_SIZE
    batch_sizes: tuple[int, ...] = ()
    input_dtype: str | None = None
    cuda_graph: bool = False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TorchModelSpec) and other.key == self.key

    def __hash__(self) -> int:
        return hash(self.key)

    def estimated_bytes(self) -> int:
        """Bytes of device memory that the weights will take: 0, nobody knows before loading."""
        return 0

    def load(self, device: Device) -> TorchProgram:
        """Call the loader and wrap what it returns.

        Raises
        ------
        ModelLoadError
            When the loader returns something that cannot be called. What the loader itself raises
            goes through.

        Notes
        -----
        Runs in a loader thread of a worker.
        """
        import torch

        load = cloudpickle.loads(self.loader)
        torch_device = device.torch_device()
        call = load(torch_device)
        if not callable(call):
            raise ModelLoadError(
                f"The loader of model {self.name!r} returned {type(call).__name__}; expected a "
                "torch.nn.Module or another callable that takes a batch tensor. Return one.",
                model=self.name,
                device=str(torch_device),
                reason=f"the loader returned {type(call).__name__}",
            )
        if isinstance(call, torch.nn.Module):
            call = call.to(torch_device).eval().requires_grad_(False)
        return TorchProgram(call, self, torch_device)


def torch_model_spec(
    load: Callable[[torch.device], Callable[[torch.Tensor], Any]],
    *,
    name: str,
    max_batch_size: int | None = None,
    batch_sizes: tuple[int, ...] = (),
    input_dtype: str | None = None,
    cuda_graph: bool = False,
    version: str | None = None,
) -> TorchModelSpec:
    """Describe any torch model by the function that loads it; see :func:`daskshare.share`.

    Raises
    ------
    ConfigurationError
        When an option is wrong, or ``load`` cannot be pickled.
    """
    if not callable(load):
        raise ConfigurationError(
            f"Got a loader of type {type(load).__name__}; expected a function load(device) that "
            "returns the model. Pass the function, not the loaded model.",
            option="load",
        )
    if hasattr(load, "forward") and hasattr(load, "state_dict"):
        raise ConfigurationError(
            "Got a torch.nn.Module; expected a function load(device) that returns it, so that "
            "the weights load once on each worker instead of travelling with every task. Write "
            "`def load(device): ...` around the module.",
            option="load",
        )
    if not isinstance(name, str) or not name:
        raise ConfigurationError(
            f"Got name={name!r}; expected a non-empty string. Name the model.", option="name"
        )
    largest = DEFAULT_MAX_BATCH_SIZE if max_batch_size is None else max_batch_size
    sizes = tuple(sorted(set(batch_sizes)))
    for option, size in [("max_batch_size", largest), *(("batch_sizes", s) for s in sizes)]:
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= largest:
            raise ConfigurationError(
                f"Got {option} {size!r}; expected whole numbers from 1 to max_batch_size "
                f"({largest!r}). Correct it.",
                option=option,
            )
    if input_dtype is not None and input_dtype not in _INPUT_DTYPES:
        raise ConfigurationError(
            f"Got input_dtype={input_dtype!r}; expected None or one of {_INPUT_DTYPES}.",
            option="input_dtype",
        )
    if cuda_graph and not sizes:
        # One graph is captured for each size: without padding every batch would need its own.
        powers = (2**i for i in range(largest.bit_length()))
        sizes = (*(size for size in powers if size < largest), largest)
    try:
        loader = cloudpickle.dumps(load)
    except Exception as error:
        raise ConfigurationError(
            f"The loader of model {name!r} cannot be pickled ({type(error).__name__}: {error}); "
            "expected a function that can travel to the workers. Open files, locks and the like "
            "inside the function, not around it.",
            option="load",
        ) from error
    digest = hashlib.sha256()
    options = (name, largest, sizes, input_dtype, bool(cuda_graph), version)
    digest.update(repr(("torch", *options)).encode())
    if version is None:
        digest.update(loader)
    return TorchModelSpec(
        name=name,
        key=digest.hexdigest(),
        loader=loader,
        max_batch_size=largest,
        batch_sizes=sizes,
        input_dtype=input_dtype,
        cuda_graph=bool(cuda_graph),
    )


class TorchProgram:
    """A loaded torch model as the engine sees it; outputs keep the structure the model gives.

    Parameters
    ----------
    call : callable
        Takes a batch tensor on the device.
    spec : TorchModelSpec
        Where it comes from.
    torch_device : torch.device
        Where it lives.
    """

    item_shape: tuple[int, ...] | None = None

    def __init__(
        self, call: Callable[[torch.Tensor], Any], spec: TorchModelSpec, torch_device: torch.device
    ) -> None:
        import torch

        self._call = call
        self._name = spec.name
        self._device = torch_device
        self._dtype = None if spec.input_dtype is None else getattr(torch, spec.input_dtype)
        self.max_batch_size = spec.max_batch_size
        self.batch_sizes = spec.batch_sizes
        self.graph_capturable = spec.cuda_graph and torch_device.type == "cuda"
        self.model_bytes = _model_bytes(call)

    def prepare(self, inputs: Any) -> Prepared:
        """Check a request.

        Parameters
        ----------
        inputs : array, tensor, or list of them
            With a leading batch axis; NumPy, torch, CuPy or anything that offers
            ``__cuda_array_interface__`` or ``__array__``. A list: arrays of one shape and dtype,
            one an item, stacked. Device memory is read in place.

        Raises
        ------
        InvalidInputError
            When it is no array of numbers, ragged, an empty list, or in another device's memory.

        Notes
        -----
        Runs in the caller's thread.
        """
        if isinstance(inputs, (list, tuple)):
            return Prepared(self._stack(inputs))
        return Prepared(self._check(inputs))

    def forward(self, batch: torch.Tensor) -> Any:
        """Compute one batch; see :class:`daskshare.models.spec.Program`."""
        import torch

        with torch.inference_mode():
            if self._dtype is not None and batch.dtype != self._dtype:
                batch = batch.to(self._dtype)
            outputs = self._call(batch)
        return dict(outputs) if isinstance(outputs, Mapping) else outputs

    def compile(self, batch_size: int) -> Any:
        """Return None: a loader that wants ``torch.compile`` returns a compiled module."""
        return None

    def finish(self, outputs: Any, context: Any) -> Any:
        """Return the host arrays as they are."""
        return outputs

    def _stack(self, arrays: list[Any] | tuple[Any, ...]) -> Any:
        import torch

        if not arrays:
            raise self._invalid("an empty list")
        items = [self._check(array, item=True) for array in arrays]
        shapes = {(tuple(item.shape), str(item.dtype).removeprefix("torch.")) for item in items}
        if len(shapes) > 1 or len({type(item) for item in items}) > 1:
            raise self._invalid(
                f"a list of {len(items)} arrays of different shapes, dtypes or kinds "
                f"({', '.join(f'{dtype} {shape}' for shape, dtype in sorted(shapes, key=str))})"
            )
        return torch.stack(items) if isinstance(items[0], torch.Tensor) else np.stack(items)

    def _check(self, array: Any, *, item: bool = False) -> Any:
        import torch

        if not isinstance(array, torch.Tensor) and hasattr(array, "__cuda_array_interface__"):
            if self._device.type != "cuda":
                raise self._invalid("an array in GPU memory")
            # DLPack also makes torch's stream wait for the array's producer.
            known = hasattr(array, "__dlpack__")
            array = torch.utils.dlpack.from_dlpack(array) if known else torch.as_tensor(array)
        if isinstance(array, torch.Tensor):
            if array.device.type != "cpu" and array.device != self._device:
                raise self._invalid(f"a tensor on {array.device}")
            if array.ndim < 1 and not item:
                raise self._invalid("a tensor without axes")
            return array.detach().contiguous()
        if not hasattr(array, "__array__"):
            raise self._invalid(f"an object of type {type(array).__name__}")
        host = np.asarray(array)
        if host.dtype.kind not in "uifb" or host.dtype.itemsize > 8:
            raise self._invalid(f"an array of dtype {host.dtype}")
        if host.ndim < 1 and not item:
            raise self._invalid("an array without axes")
        # torch takes neither negative strides nor foreign byte order.
        return np.require(host, dtype=host.dtype.newbyteorder("="), requirements="C")

    def _invalid(self, got: str) -> InvalidInputError:
        return InvalidInputError(
            f"Model {self._name!r} on {self._device} got {got}; expected an array of numbers "
            "whose first axis counts the items, or a list of arrays of one shape "
            "and dtype, in host memory or on the model's own device. Convert or move it first.",
            model=self._name,
        )


def _model_bytes(call: Any) -> int:
    """Bytes of the parameters and buffers of the modules that ``call`` is made of."""
    seen: dict[int, int] = {}
    for module in _modules(call):
        for tensor in itertools.chain(module.parameters(), module.buffers()):
            if tensor.device.type != "meta":
                storage: torch.UntypedStorage = tensor.untyped_storage()
                seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


def _modules(call: Any) -> list[torch.nn.Module]:
    import torch

    if isinstance(call, functools.partial):
        held = [call.func, *call.args, *call.keywords.values()]
    else:
        cells = getattr(call, "__closure__", None) or ()
        held = [call, getattr(call, "__self__", None)]
        held += [cell.cell_contents for cell in cells if _is_filled(cell)]
        held += list(getattr(call, "__dict__", {}).values())
    return [value for value in held if isinstance(value, torch.nn.Module)]


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
