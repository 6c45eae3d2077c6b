"""A device's models for other processes: connections, their requests and their leases."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from daskshare._host_address import HostAddress
from daskshare._host_connection import Connection
from daskshare.config import HostOptions
from daskshare.errors import ModelError

if TYPE_CHECKING:
    from daskshare.models.spec import ModelSpec
    from daskshare.share import Lease, ModelShare

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


class HostServer:
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
        self.address = address
        self.options = options
        self.owner = owner
        self._make_share = make_share
        self._share: ModelShare | None = None
        self._share_lock = threading.Lock()
        self._changed = threading.Condition()
        self._connections: set[Connection] = set()
        self._num_connections = 0
        self._in_flight = 0
        self._last_end_seconds = time.monotonic()
        self._retiring = self._closing = False
        self._users: Counter[str] = Counter()
        self._timers: dict[str, threading.Timer] = {}
        self._listener = listen(address)
        self._accepting = threading.Thread(
            target=self._accept, name="daskshare-host-accept", daemon=True
        )
        self._accepting.start()

    # -- for connections --

    @property
    def retiring(self) -> bool:
        """Whether new requests are to go to whoever comes next."""
        return self._retiring

    def share(self) -> ModelShare:
        """Return the share; builds it at the first call."""
        with self._share_lock:
            if self._share is None:
                self._share = self._make_share()
            return self._share

    def lease(self, spec: ModelSpec) -> Lease:
        """Lease a model for a connection; ended by :meth:`give_back`."""
        with self._changed:
            self._users[spec.key] += 1
            timer = self._timers.pop(spec.key, None)
        if timer is not None:
            timer.cancel()
        try:
            return self.share().lease(spec)
        except BaseException:
            with self._changed:
                self._users[spec.key] -= 1
            raise

    def give_back(self, lease: Lease, *, unload: bool) -> None:
        """End a connection's lease.

        Parameters
        ----------
        lease : Lease
            From :meth:`lease`.
        unload : bool
            Whether to unload the model when nobody has used it for a while: a caller's function
            is made anew for each of its jobs, and its memory is not known to the budget.
        """
        key = lease.spec.key
        lease.release()
        with self._changed:
            self._users[key] -= 1
            if self._users[key] > 0 or not unload or self._closing:
                return
            del self._users[key]
            timer = threading.Timer(self.options.idle_timeout_seconds, self._unload, [key])
            timer.name = "daskshare-host-unload"
            timer.daemon = True
            self._timers[key] = timer
            timer.start()

    def _unload(self, key: str) -> None:
        with self._changed:
            self._timers.pop(key, None)
        try:
            self.share().unload(key, timeout_seconds=0.0)
        except ModelError:
            logger.debug("Model %s is in use again", key)

    def request_started(self) -> None:
        """Count a request, so that retiring waits for it."""
        with self._changed:
            self._in_flight += 1

    def request_ended(self) -> None:
        """Undo :meth:`request_started`."""
        with self._changed:
            self._in_flight -= 1
            self._changed.notify_all()

    def connection_ended(self, connection: Connection) -> None:
        """Forget a connection."""
        with self._changed:
            self._connections.discard(connection)
            self._last_end_seconds = time.monotonic()
            self._changed.notify_all()

    def retire(self) -> None:
        """Take no more requests; :meth:`wait_unused` returns when those that run have ended."""
        with self._changed:
            self._retiring = True
            self._changed.notify_all()

    def report(self) -> dict[str, Any]:
        """Say what it did, as plain JSON-able data."""
        with self._changed:
            report: dict[str, Any] = {
                "pid": os.getpid(),
                "owner": self.owner,
                "connections": len(self._connections),
                "connections_since_start": self._num_connections,
            }
            share = self._share
        return report | ({"models": {}} if share is None else share.report())

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
            self._closing = True
            connections = list(self._connections)
            timers = list(self._timers.values())
            self._timers.clear()
        self.address.socket.unlink(missing_ok=True)
        try:
            # Closing alone would not wake the thread that accepts.
            self._listener.shutdown(socket.SHUT_RDWR)
        except OSError:
            logger.debug("The listener was closed before")
        self._listener.close()
        for timer in timers:
            timer.cancel()
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
