"""Keep a bounded number of tasks on a cluster and hand back each as it ends."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from daskshare.errors import DaskshareError

if TYPE_CHECKING:
    from distributed import Client, Future

__all__ = ["Dispatcher"]

T = TypeVar("T")

_TICK_SECONDS = 1.0


class Dispatcher:
    """Submit tasks so that each worker thread has a few waiting, however many there are in all.

    Dask queues tasks that may run anywhere on its own, but not those that are bound to workers,
    as tasks that need a model are; and a million descriptions are a burden on the scheduler in
    any case.

    Parameters
    ----------
    client : distributed.Client
        A synchronous client.
    per_thread : int
        Tasks in flight for each worker thread.
    on_message : callable
        Gets what :meth:`post` was given, in the thread that iterates.
    on_tick : callable
        Gets the number of worker threads about once a second, in the thread that iterates.

    Notes
    -----
    The thread that iterates does all the work; Dask's callback thread and the client's event loop
    only put into a queue.
    """

    def __init__(
        self,
        client: Client,
        *,
        per_thread: int = 3,
        on_message: Callable[[Any], None] = lambda message: None,
        on_tick: Callable[[int], None] = lambda num_threads: None,
    ) -> None:
        self._client = client
        self._per_thread = per_thread
        self._on_message = on_message
        self._on_tick = on_tick
        self._events: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._pending: dict[Any, tuple[Any, Future[Any]]] = {}

    def post(self, message: Any) -> None:
        """Queue a message for ``on_message``; from any thread."""
        self._events.put(("message", message))

    def completed(
        self, items: Iterable[T], submit: Callable[[T], Future[Any]]
    ) -> Iterator[tuple[T, Future[Any]]]:
        """Yield each item with its future, in the order in which they end.

        Parameters
        ----------
        items : iterable
            Read only as far as there is room.
        submit : callable
            Starts an item and returns its future.

        Raises
        ------
        DaskshareError
            When the scheduler or the connection to it is lost.
        """
        left = iter(items)
        window = self._window()
        next_tick_seconds = time.monotonic() + _TICK_SECONDS
        exhausted = False
        while True:
            while not exhausted and len(self._pending) < window:
                try:
                    item = next(left)
                except StopIteration:
                    exhausted = True
                    break
                future = submit(item)
                self._pending[future.key] = (item, future)
                future.add_done_callback(lambda f: self._events.put(("done", f.key)))
            if not self._pending:
                return
            wait_seconds = next_tick_seconds - time.monotonic()
            if wait_seconds <= 0:
                next_tick_seconds = time.monotonic() + _TICK_SECONDS
                window = self._window()
                continue
            try:
                kind, value = self._events.get(timeout=wait_seconds)
            except queue.Empty:
                continue
            if kind == "message":
                self._on_message(value)
                continue
            item, future = self._pending.pop(value)
            if future.status not in ("finished", "error"):
                raise DaskshareError(
                    f"Lost the Dask cluster at {self._client.scheduler_info()['address']}: a task "
                    f"is {future.status}. Start the cluster again and run the same command: "
                    "finished chunks are kept.",
                )
            yield item, future

    def cancel(self) -> None:
        """Take back what is in flight."""
        futures = [future for _, future in self._pending.values()]
        self._pending.clear()
        if futures and self._client.status == "running":
            self._client.cancel(futures, force=True)

    def _window(self) -> int:
        num_threads: int = sum(self._client.nthreads().values())
        self._on_tick(num_threads)
        # Some wait even without workers, so that an adaptive cluster has a reason to grow.
        return max(16, num_threads * self._per_thread)
