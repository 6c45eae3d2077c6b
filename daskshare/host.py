"""One device's models for processes that are not its Dask worker: Spark's Python workers, mostly.

A *host* is whoever owns a device's :class:`~daskshare.share.ModelShare` on a machine: the Dask
worker where there is one, or else a process that the first client starts and that ends when nobody
has been connected for a while. Clients reach it through a Unix socket; arrays travel in shared
memory.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

import filelock

from daskshare._host_address import CPU, HostAddress, local_devices
from daskshare._host_client import HostClient, HostedModel
from daskshare._host_link import Link, SocketLink
from daskshare._host_operations import Call, operation
from daskshare._host_predict import PredictSpec
from daskshare._host_server import HostServer
from daskshare._host_spec import describe
from daskshare._host_start import connect
from daskshare._host_wire import receive, send
from daskshare.config import HostOptions

if TYPE_CHECKING:
    from daskshare.share import ModelShare

__all__ = [
    "Call",
    "HostAddress",
    "HostClient",
    "HostServer",
    "HostedModel",
    "Link",
    "PredictSpec",
    "SocketLink",
    "WorkerHost",
    "connect",
    "describe",
    "local_devices",
    "operation",
]

logger = logging.getLogger("daskshare.host")

# Between two tries to become the host: short while one is giving way, long beside another worker.
_YIELDING_SECONDS = 0.02
_WAITING_SECONDS = 5.0


class WorkerHost:
    """Makes a Dask worker's process the host of its device.

    A host that runs in a process of its own gives way: it finishes what it has begun, its clients
    come here by themselves, and so there are never two copies of a model on one device for long.
    Beside another Dask worker of the same device this one waits until that one ends.

    Parameters
    ----------
    share : ModelShare
        What to serve; stays its owner's.
    options : HostOptions
        Bounds.

    Notes
    -----
    Claiming runs in a thread of its own, ``daskshare-host-claim``, until :meth:`stop`.
    """

    def __init__(self, share: ModelShare, options: HostOptions) -> None:
        self._share = share
        self._options = options
        device = share.device
        self.address = HostAddress(device.uuid if device.is_cuda else CPU, options.directory)
        self._lock = filelock.FileLock(self.address.owner_lock, thread_local=False)
        self._stopped = threading.Event()
        self._serving = threading.Event()
        self._thread = threading.Thread(
            target=self._claim, name="daskshare-host-claim", daemon=True
        )
        self._thread.start()

    def wait_serving(self, timeout_seconds: float) -> bool:
        """Wait until this process is the host; False when it is not after that time."""
        return self._serving.wait(timeout_seconds)

    def stop(self, *, timeout_seconds: float = 10.0) -> None:
        """Cut all connections and let somebody else be the host."""
        self._stopped.set()
        self._thread.join(timeout_seconds)

    def _claim(self) -> None:
        try:
            self.address.make_directory()
            while not self._stopped.is_set():
                try:
                    self._lock.acquire(blocking=False)
                except filelock.Timeout:
                    self._stopped.wait(
                        _YIELDING_SECONDS if self._ask_to_retire() else _WAITING_SECONDS
                    )
                    continue
                self._serve()
                return
        except Exception:
            # The worker works without; its own tasks need no host.
            logger.exception("This worker does not serve other processes at %s", self.address)

    def _serve(self) -> None:
        try:
            server = HostServer(
                self.address, lambda: self._share, options=self._options, owner="worker"
            )
            logger.info("Serving %s at %s", self.address.device, self.address)
            self._serving.set()
            self._stopped.wait()
            server.close()
        finally:
            self._lock.release()

    def _ask_to_retire(self) -> bool:
        """Ask whoever serves to give way; whether it does, or is gone."""
        try:
            connection = connect(self.address)
            if connection is None:
                return True
            with connection:
                send(connection, 1, {"op": "retire"})
                answer = receive(connection)
        except OSError:
            return True
        if answer is None or answer.header.get("retired"):
            return True
        return bool(answer.header.get("tree"))
