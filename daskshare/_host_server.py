"""A device's models for other processes: connections, their requests and their leases."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from daskshare._host_address import HostAddress
from daskshare._host_connection import Connection
from daskshare._host_ledger import Ledger
from daskshare.config import HostOptions

if TYPE_CHECKING:
    from daskshare.share import ModelShare

__all__ = ["HostServer", "listen"]

logger = logging.getLogger("daskshare.host")

_BACKLOG = 256


def listen(address: HostAddress) -> socket.socket:
    """Open the socket; only for who holds the address's owner lock."""
    address.socket.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(address.socket))
        os.chmod(address.socket, 0o600)
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


class HostServer(Ledger):
    """Serves one device's :class:`~daskshare.share.ModelShare` over a Unix socket.

    Parameters
    ----------
    address : HostAddress
        Where; the caller holds its owner lock.
    make_share : callable
        Returns the share; called once, when the first model is opened.
    options : HostOptions
        Bounds.
    owner : {"process", "worker"}
        Whether it runs in a process of its own, which gives way to a Dask worker.

    Notes
    -----
    One thread accepts (``daskshare-host-accept``), each connection has one that reads
    (``daskshare-host-read-N``) and up to ``options.window`` that work
    (``daskshare-host-work-N``). A connection's leases end with it, however it ends.
    """

    def __init__(
        self,
        address: HostAddress,
        make_share: Callable[[], ModelShare],
        *,
        options: HostOptions,
        owner: str,
    ) -> None:
        super().__init__(make_share, options=options, owner=owner)
        self.address = address
        self._connections: set[Connection] = set()
        self._num_connections = 0
        self._last_end_seconds = time.monotonic()
        self._listener = listen(address)
        self._accepting = threading.Thread(
            target=self._accept, name="daskshare-host-accept", daemon=True
        )
        self._accepting.start()

    # -- for connections --

    def connection_ended(self, connection: Connection) -> None:
        """Forget a connection."""
        with self._changed:
            self._connections.discard(connection)
            self._last_end_seconds = time.monotonic()
            self._changed.notify_all()

    def report(self) -> dict[str, Any]:
        """Say what it did, as plain JSON-able data."""
        with self._changed:
            connections = {
                "connections": len(self._connections),
                "connections_since_start": self._num_connections,
            }
        return super().report() | connections

    # -- for the owner --

    def wait_unused(self) -> None:
        """Return when nobody has been connected for the idle time, or when it was retired."""
        with self._changed:
            while True:
                if self._retiring and not self._in_flight:
                    return
                if self._connections or self._retiring:
                    self._changed.wait()
                    continue
                since_seconds = time.monotonic() - self._last_end_seconds
                left = self.options.idle_timeout_seconds - since_seconds
                if left <= 0:
                    return
                self._changed.wait(left)

    def close(self, *, timeout_seconds: float = 10.0) -> None:
        """Stop listening and cut all connections; leaves the share to its owner. Idempotent."""
        deadline = time.monotonic() + timeout_seconds
        with self._changed:
            connections = list(self._connections)
        timers = self.stop_unloading()
        self.address.socket.unlink(missing_ok=True)
        try:
            # Closing alone would not wake the thread that accepts.
            self._listener.shutdown(socket.SHUT_RDWR)
        except OSError:
            logger.debug("The listener was closed before")
        self._listener.close()
        for connection in connections:
            connection.cut()
        for thread in (self._accepting, *timers, *(c.thread for c in connections)):
            thread.join(max(0.0, deadline - time.monotonic()))

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                if not self._closing:
                    logger.exception("The host stopped listening at %s", self.address)
                return
            with self._changed:
                if self._closing:
                    peer.close()
                    return
                self._num_connections += 1
                connection = Connection(self, peer, self._num_connections)
                self._connections.add(connection)
                # Before the lock is free: whoever closes must be able to join the thread.
                connection.thread.start()
