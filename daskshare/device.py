"""Which GPU this is, how much memory it has; and the stand-in for machines without one.

Torch is imported inside functions, so that the scheduler can unpickle a :class:`Device`.
"""

from __future__ import annotations

import os
import platform
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import psutil

from daskshare._device_names import full_mig_uuid

if TYPE_CHECKING:
    import torch

__all__ = ["Device", "current_device", "list_devices"]


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU that this process sees, or the CPU.

    Parameters
    ----------
    kind : {"cuda", "cpu"}
        What it is.
    index : int
        Ordinal among the devices that this process sees; 0 for the CPU. Means nothing elsewhere.
    uuid : str
        The same in every process: ``GPU-...``, ``MIG-...`` or ``cpu-<host name>``.
    name : str
        For people.
    total_bytes : int
        All of its memory.
    """

    kind: str
    index: int
    uuid: str
    name: str
    total_bytes: int

    @classmethod
    def cpu(cls) -> Self:
        """Describe this machine's CPU and main memory."""
        return cls(
            kind="cpu",
            index=0,
            uuid=f"cpu-{socket.gethostname()}",
            name=platform.processor() or platform.machine() or "CPU",
            total_bytes=int(psutil.virtual_memory().total),
        )

    @property
    def is_cuda(self) -> bool:
        """Whether it is a CUDA device."""
        return self.kind == "cuda"

    def torch_device(self) -> torch.device:
        """Return torch's name of it, valid in this process only."""
        import torch

        return torch.device("cuda", self.index) if self.is_cuda else torch.device("cpu")

    def free_bytes(self) -> int:
        """Memory that no process has taken, bytes."""
        if not self.is_cuda:
            return int(psutil.virtual_memory().available)
        import torch

        return int(torch.cuda.mem_get_info(self.index)[0])

    def release_cached_memory(self) -> None:
        """Give memory that torch keeps for reuse back: the device's and page-locked host memory."""
        if self.is_cuda:
            import torch

            with torch.cuda.device(self.index):
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            torch._C._host_emptyCache()


def list_devices() -> list[Device]:
    """Return the CUDA devices that this process sees; empty without a GPU.

    Notes
    -----
    Starts CUDA in this process; call it in workers, not in a scheduler.
    """
    import torch

    if not torch.cuda.is_available():
        return []
    visible = [v.strip() for v in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        chosen_by = visible[index] if index < len(visible) else ""
        devices.append(
            Device(
                kind="cuda",
                index=index,
                uuid=_device_uuid(str(properties.uuid), chosen_by),
                name=properties.name,
                total_bytes=int(properties.total_memory),
            )
        )
    return devices


def current_device() -> Device:
    """Return the first GPU that this process sees, or else the CPU.

    A worker of dask-cuda sees all GPUs of its machine, its own first.
    """
    devices = list_devices()
    return devices[0] if devices else Device.cpu()


def _device_uuid(runtime_uuid: str, chosen_by: str) -> str:
    # The runtime names a MIG slice by its parent GPU; the variable names the slice.
    if chosen_by.startswith("MIG-"):
        return full_mig_uuid(chosen_by)
    return runtime_uuid if runtime_uuid.startswith(("GPU-", "MIG-")) else f"GPU-{runtime_uuid}"
