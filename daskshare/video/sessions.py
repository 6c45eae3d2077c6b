"""Keep decoding sessions between chunks: opening one costs as much as a second of video."""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

__all__ = ["Session", "SessionPool"]


class Session(Protocol):
    """What the pool needs of a session."""

    def drain(self) -> None:
        """Drop what is inside, so that the next chunk begins with nothing of this one."""
        ...

    def close(self) -> None:
        """Give everything back to the device."""
        ...


K = TypeVar("K", bound=Hashable)
S = TypeVar("S", bound=Session)


class SessionPool(Generic[K, S]):
    """Sessions by what they can decode; each used by one thread at a time.

    Parameters
    ----------
    create : callable
        Opens a session for a key.
    max_idle : int
        Most sessions kept while nobody uses them; the one idle for longest goes first.
    idle_seconds : float
        Sessions idle for longer are closed, so that a worker that is done gives the device's
        memory back.
    limit : callable, optional
        From a key to (what its sessions share, how many of that may be in use at once).
    patience_seconds : float
        Who has waited for so long while no session came back gets one beyond the limit: whoever
        reads several videos side by side may hold them all.

    Notes
    -----
    Thread-safe. Sessions are opened, drained and closed outside of the lock. A timer thread exists
    only while sessions are idle.
    """

    def __init__(
        self,
        create: Callable[[K], S],
        *,
        max_idle: int = 16,
        idle_seconds: float = 30.0,
        limit: Callable[[K], tuple[Hashable, int]] | None = None,
        patience_seconds: float = 5.0,
    ) -> None:
        self._create = create
        self._max_idle = max_idle
        self._idle_seconds = idle_seconds
        self._limit = limit
        self._patience_seconds = patience_seconds
        self._lock = threading.Lock()
        self._returned = threading.Condition(self._lock)
        self._in_use: Counter[Hashable] = Counter()
        self._last_return_seconds: dict[Hashable, float] = {}
        # Oldest first.
        self._idle: OrderedDict[int, tuple[K, S, float]] = OrderedDict()
        self._timer: threading.Timer | None = None
        self.opened = 0

    @contextmanager
    def use(self, key: K) -> Iterator[S]:
        """Borrow a session; one that raised, or was left in the middle of a chunk, is closed.

        Parameters
        ----------
        key : hashable
            What the session must be able to decode.

        Yields
        ------
        Session
        """
        with self._turn(key):
            session = self._take(key)
            if session is None:
                session = self._create(key)
                with self._lock:
                    self.opened += 1
            try:
                yield session
                session.drain()
            except BaseException:
                session.close()
                raise
            self._keep(key, session)

    def close_idle(self) -> None:
        """Close every session that nobody uses."""
        with self._lock:
            left = [session for _, session, _ in self._idle.values()]
            self._idle.clear()
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
        for session in left:
            session.close()

    @contextmanager
    def _turn(self, key: K) -> Iterator[None]:
        if self._limit is None:
            yield
            return
        shared, most = self._limit(key)
        with self._returned:
            begin_seconds = time.monotonic()
            while self._in_use[shared] >= most:
                last_seconds = max(begin_seconds, self._last_return_seconds.get(shared, 0.0))
                left_seconds = last_seconds + self._patience_seconds - time.monotonic()
                if left_seconds <= 0:
                    break
                self._returned.wait(left_seconds)
            self._in_use[shared] += 1
        try:
            yield
        finally:
            with self._returned:
                self._in_use[shared] -= 1
                self._last_return_seconds[shared] = time.monotonic()
                self._returned.notify_all()

    def _take(self, key: K) -> S | None:
        with self._lock:
            # The last one used: the others grow old and go.
            for number in reversed(self._idle):
                if self._idle[number][0] == key:
                    return self._idle.pop(number)[1]
        return None

    def _keep(self, key: K, session: S) -> None:
        with self._lock:
            self._idle[id(session)] = (key, session, time.monotonic())
            surplus = [
                self._idle.popitem(last=False)[1][1]
                for _ in range(len(self._idle) - self._max_idle)
            ]
            self._schedule()
        for old in surplus:
            old.close()

    def _schedule(self) -> None:
        if self._timer is None and self._idle:
            oldest = next(iter(self._idle.values()))[2]
            wait_seconds = max(0.0, oldest + self._idle_seconds - time.monotonic())
            self._timer = threading.Timer(wait_seconds, self._close_old)
            self._timer.daemon = True
            self._timer.start()

    def _close_old(self) -> None:
        limit = time.monotonic() - self._idle_seconds
        old = []
        with self._lock:
            self._timer = None
            while self._idle and next(iter(self._idle.values()))[2] <= limit:
                old.append(self._idle.popitem(last=False)[1][1])
            self._schedule()
        for session in old:
            session.close()
