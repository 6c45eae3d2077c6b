"""Who uses which model through a host, and what is being worked on."""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from daskshare.config import HostOptions
from daskshare.errors import ModelError

if TYPE_CHECKING:
    from daskshare.models.spec import ModelSpec
    from daskshare.share import Lease, ModelShare

__all__ = ["Ledger"]

logger = logging.getLogger("daskshare.host")


class Ledger:
    """What sessions need of their server, whatever they are connected by.

    Parameters
    ----------
    make_share : callable
        Returns the share; called once, when the first model is opened.
    options : HostOptions
        Bounds.
    owner : {"process", "worker"}
        Whether it runs in a process of its own, which gives way to a Dask worker.

    Notes
    -----
    Thread-safe.
    """

    def __init__(
        self, make_share: Callable[[], ModelShare], *, options: HostOptions, owner: str
    ) -> None:
        self.options = options
        self.owner = owner
        self._make_share = make_share
        self._share: ModelShare | None = None
        self._share_lock = threading.Lock()
        self._changed = threading.Condition()
        self._in_flight = 0
        self._retiring = self._closing = False
        self._users: Counter[str] = Counter()
        self._timers: dict[str, threading.Timer] = {}

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

    def retire(self) -> None:
        """Take no more requests; :meth:`wait_unused` returns when those that run have ended."""
        with self._changed:
            self._retiring = True
            self._changed.notify_all()

    def report(self) -> dict[str, Any]:
        """Say what it did, as plain JSON-able data."""
        report: dict[str, Any] = {"pid": os.getpid(), "owner": self.owner}
        share = self._share
        return report | ({"models": {}} if share is None else share.report())

    def stop_unloading(self) -> list[threading.Timer]:
        """Unload nothing more; returns the threads to wait for."""
        with self._changed:
            self._closing = True
            timers = list(self._timers.values())
            self._timers.clear()
        for timer in timers:
            timer.cancel()
        return timers
