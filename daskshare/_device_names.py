"""Which GPUs ``CUDA_VISIBLE_DEVICES`` names, read as CUDA reads it, without starting CUDA."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["VisibleGpu", "driver_uuids", "full_mig_uuid", "visible_gpus"]


@dataclass(frozen=True, slots=True)
class VisibleGpu:
    """One entry of ``CUDA_VISIBLE_DEVICES``.

    Parameters
    ----------
    entry : int or str
        As dask-cuda takes it: the number that was given, or a UUID in full.
    uuid : str
        Of the GPU or MIG slice.
    """

    entry: int | str
    uuid: str


def visible_gpus(variable: str | None = None) -> list[VisibleGpu]:
    """List the GPUs that a process with this variable may use, first the one that it calls 0.

    Parameters
    ----------
    variable : str, optional
        Value of ``CUDA_VISIBLE_DEVICES``; default this process's own, all GPUs without one.

    Returns
    -------
    list of VisibleGpu
        Empty without a GPU, and when the variable hides all.

    Notes
    -----
    As CUDA reads it: numbers, or UUIDs of one kind, which may be cut short if that leaves no doubt.
    The first entry that names nothing (-1, say) ends the list; one that comes twice makes it empty.
    Numbers count GPUs in the order of the PCI bus, as nvidia-smi and Spark's discovery script do.
    Asks the driver's management library: a process that only hands work over must not take device
    memory.
    """
    if variable is None:
        variable = os.environ.get("CUDA_VISIBLE_DEVICES")
    if variable is not None and variable.strip() in ("", "-1"):
        return []
    gpus, slices = driver_uuids()
    if variable is None:
        return [VisibleGpu(number, uuid) for number, uuid in enumerate(gpus) if uuid]
    entries = [entry.strip() for entry in variable.split(",")]
    kind = _kind(entries[0])
    found: list[VisibleGpu] = []
    for entry in entries:
        gpu = _resolve(entry, gpus, slices) if _kind(entry) == kind else None
        if gpu is None:
            break
        if gpu in found:
            return []
        found.append(gpu)
    return found


def full_mig_uuid(name: str) -> str:
    """Complete the name of a MIG slice, so that all processes call it the same."""
    return _only(name, driver_uuids()[1]) or name


def driver_uuids() -> tuple[list[str], list[str]]:
    """Ask the driver for the UUIDs of all GPUs and of all MIG slices, in the PCI bus's order.

    That of a GPU that does not answer is empty.
    """
    try:
        import pynvml
    except ImportError:
        return [], []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        # No driver: no GPU.
        return [], []
    gpus, slices = [], []
    try:
        for number in range(pynvml.nvmlDeviceGetCount()):
            try:
                handle = pynvml.nvmlDeviceGetHandleByIndex(number)
                gpus.append(_text(pynvml.nvmlDeviceGetUUID(handle)))
            except pynvml.NVMLError:
                # One that was lost keeps its number.
                gpus.append("")
                continue
            try:
                places = pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)
            except pynvml.NVMLError:
                continue
            for place in range(places):
                try:
                    part = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, place)
                except pynvml.NVMLError:
                    # MIG is off, or nothing is there.
                    continue
                slices.append(_text(pynvml.nvmlDeviceGetUUID(part)))
    finally:
        pynvml.nvmlShutdown()
    return gpus, slices


def _kind(entry: str) -> str:
    return "number" if entry.isdecimal() else entry[:4]


def _resolve(entry: str, gpus: Sequence[str], slices: Sequence[str]) -> VisibleGpu | None:
    if entry.isdecimal():
        number = int(entry)
        return VisibleGpu(number, gpus[number]) if number < len(gpus) and gpus[number] else None
    uuid = ""
    if entry.startswith("GPU-"):
        uuid = _only(entry, gpus)
    elif entry.startswith("MIG-") and gpus:
        # Older drivers call a slice by its GPU and two numbers, and do not list it so.
        listed = bool(slices) and not entry.startswith("MIG-GPU-")
        uuid = _only(entry, slices) if listed else entry
    return VisibleGpu(uuid, uuid) if uuid else None


def _only(beginning: str, uuids: Sequence[str]) -> str:
    """Return the one UUID that begins so, or ""."""
    found = [uuid for uuid in uuids if uuid.startswith(beginning)]
    return found[0] if len(found) == 1 else ""


def _text(uuid: str | bytes) -> str:
    return uuid.decode() if isinstance(uuid, bytes) else uuid
