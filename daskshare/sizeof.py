"""Tells Dask how much memory torch tensors take; it would assume 80 bytes for any of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["register"]

_HANDLE_BYTES = 80


def register(sizeof: Any) -> None:
    """Register tensors' sizes; the entry point of group ``dask.sizeof``.

    Parameters
    ----------
    sizeof : dask.utils.Dispatch
        Dask's ``sizeof``.

    Notes
    -----
    Runs when Dask is imported, in every process; torch is not imported until a tensor turns up.
    """

    def register_torch() -> None:
        import torch

        sizeof.register(torch.Tensor, _tensor_bytes)

    sizeof.register_lazy("torch", register_torch)


def _tensor_bytes(tensor: torch.Tensor) -> int:
    import torch

    if tensor.device.type != "cpu" or tensor.layout != torch.strided:
        # Dask's limits are about host memory.
        return _HANDLE_BYTES
    # A view keeps all of its storage alive.
    return int(tensor.untyped_storage().nbytes()) + _HANDLE_BYTES
