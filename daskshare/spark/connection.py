"""Which host a Spark task uses, and this process's connections to hosts."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from typing import Any

from daskshare.errors import ConfigurationError
from daskshare.host import HostClient, local_devices

__all__ = ["MAX_CLOSURE_BYTES", "SharedClient", "check_closure", "client_of_process", "task_device"]

#: What a task may carry. Spark Connect's server dies of a plan of about 200 MB, and a classic
#: driver sends the closure to every Python worker.
MAX_CLOSURE_BYTES = 64 * 2**20


def check_closure(name: str, num_bytes: int) -> None:
    """Refuse a function that carries weights.

    Raises
    ------
    ConfigurationError
        When it is too large to travel with tasks.
    """
    if num_bytes > MAX_CLOSURE_BYTES:
        raise ConfigurationError(
            f"{name} is {num_bytes} bytes once pickled; expected at most {MAX_CLOSURE_BYTES}. It "
            "carries data, weights probably, that it found in the variables around it. Load them "
            "inside the function instead, from a path or URL that every executor can read: Spark "
            "sends the function to every Python worker, and a Spark Connect server does not "
            "survive a plan of about 200 MB.",
            got_bytes=num_bytes,
            limit_bytes=MAX_CLOSURE_BYTES,
        )


def task_device() -> str:
    """Return the device that the running Spark task is to use.

    Returns
    -------
    str
        The GPU that Spark assigned to the task, where it schedules GPUs; else the machine's GPUs
        take turns by partition; ``"cpu"`` without one.

    Notes
    -----
    Runs in a Python worker. Starts no CUDA there.
    """
    from pyspark import TaskContext

    context = TaskContext.get()
    devices = local_devices()
    if context is None:
        return devices[0]
    gpus = context.resources().get("gpu")
    if gpus is not None and gpus.addresses:
        address = str(gpus.addresses[0])
        if address.isdigit() and int(address) < len(devices):
            return devices[int(address)]
        if address in devices:
            return address
    return devices[int(context.partitionId()) % len(devices)]


@dataclass(slots=True)
class SharedClient:
    """A client and the lock that makes its user the only one."""

    client: HostClient
    pid: int
    lock: threading.RLock = field(default_factory=threading.RLock)


_clients: dict[str, SharedClient] = {}
_clients_lock = threading.Lock()


def client_of_process(device: str, **options: Any) -> SharedClient:
    """Return this process's client of a device's host.

    Parameters
    ----------
    device : str
        From :func:`task_device`.
    **options
        Of :class:`~daskshare.host.HostClient`, where one is made.

    Notes
    -----
    It lives as long as the process: a host counts who is connected, and ends some time after the
    last of Spark's workers has.
    """
    with _clients_lock:
        found = _clients.get(device)
        # After a fork the parent's connection must not be used.
        if found is None or found.pid != os.getpid():
            found = SharedClient(HostClient(device, **options), os.getpid())
            _clients[device] = found
        return found
