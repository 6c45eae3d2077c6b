"""What a caller hands to an engine, checked and in a form that the engine reads without copying."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
import torch.utils.dlpack

from daskshare._engine_request import Group
from daskshare.device import Device
from daskshare.errors import InvalidInputError

__all__ = ["as_items", "group_of", "host_tensor", "without_rows"]


def as_items(
    items: Any, item_shape: tuple[int, ...] | None, device: Device, model: str
) -> np.ndarray | torch.Tensor:
    """Return items as a NumPy array or a torch tensor in memory that the engine can read.

    Parameters
    ----------
    items : numpy.ndarray, torch.Tensor, or an object with ``__dlpack__``
        One item along the first axis.
    item_shape : tuple of int or None
        What the model asks for.
    device : Device
        The engine's.
    model : str
        For the message.

    Raises
    ------
    InvalidInputError
        When kind, shape, dtype or device is wrong.
    """
    expected = f"expected {list(item_shape)} for each frame" if item_shape else "expected frames"
    if not isinstance(items, (np.ndarray, torch.Tensor)):
        if not hasattr(items, "__dlpack__"):
            raise InvalidInputError(
                f"Model {model!r} got items of type {type(items).__name__}; expected a NumPy "
                "array or a torch tensor. Correct the model's prepare().",
                model=model,
            )
        items = torch.utils.dlpack.from_dlpack(items)
    shape = tuple(items.shape)
    if (
        len(shape) < 1
        or 0 in shape[1:]
        or (item_shape is not None and shape[1:] != tuple(item_shape))
    ):
        raise InvalidInputError(
            f"Model {model!r} got items of shape {shape}; {expected} along a first axis. Convert "
            "them with the model's prepare().",
            model=model,
            shape=shape,
        )
    if isinstance(items, np.ndarray):
        try:
            _torch_dtype(items.dtype)
        except (TypeError, ValueError):
            raise InvalidInputError(
                f"Model {model!r} got items of dtype {items.dtype}; expected numbers that torch "
                "knows, in native byte order. Convert them with astype().",
                model=model,
            ) from None
        return items
    if items.device.type not in ("cpu", device.torch_device().type) or (
        items.is_cuda and items.device != device.torch_device()
    ):
        raise InvalidInputError(
            f"Model {model!r} runs on {device.torch_device()} and got items on {items.device}; "
            "expected them there or in host memory. Move them with .to().",
            model=model,
        )
    if type(items) is torch.Tensor and not items.requires_grad:
        return items
    tensor: torch.Tensor = items.detach()
    return tensor


def group_of(items: np.ndarray | torch.Tensor) -> Group:
    """Return what items must have in common to share a batch."""
    dtype = items.dtype if isinstance(items, torch.Tensor) else _torch_dtype(items.dtype)
    return Group(tuple(items.shape[1:]), dtype)


def host_tensor(items: np.ndarray | torch.Tensor) -> torch.Tensor:
    """View items as a tensor; copies only arrays that torch cannot address."""
    if isinstance(items, torch.Tensor):
        return items
    if not items.flags.c_contiguous:
        items = np.ascontiguousarray(items)
    # Torch warns of read-only arrays, which frames often are; the engine never writes them.
    return torch.from_numpy(items if items.flags.writeable else np.asarray(_Writable(items)))


def without_rows(outputs: Any) -> Any:
    """Outputs of no frame, from those of one."""
    if isinstance(outputs, dict):
        return {key: without_rows(value) for key, value in outputs.items()}
    if isinstance(outputs, (tuple, list)):
        values = [without_rows(value) for value in outputs]
        kind: Any = type(outputs)
        return kind(*values) if hasattr(kind, "_fields") else kind(values)
    return outputs[:0]


class _Writable:
    """The same memory, presented as writable; keeps the array alive."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array
        interface = dict(array.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__ = interface


@cache
def _torch_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype)).dtype
