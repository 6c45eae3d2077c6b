"""Threads that divide torch's threads among them, so that together they use all cores, once."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import torch

__all__ = ["divided_torch_threads"]

# torch has one number for threads to come, whoever makes them.
_lock = threading.Lock()


@contextlib.contextmanager
def divided_torch_threads(parts: int) -> Iterator[Callable[[], None]]:
    """Give each of ``parts`` new threads its part of torch's threads, at least one.

    Yields
    ------
    callable
        What each of the new threads calls first; all must be started before the end.

    Notes
    -----
    torch gives a new thread the number that was set last in any, so it is set back at the end.
    """
    before = torch.get_num_threads()
    ready = threading.Barrier(parts + 1)

    def begin() -> None:
        # A thread's first look takes that number over, and must not come later.
        torch.get_num_threads()
        torch.set_num_threads(max(1, before // parts))
        ready.wait()

    with _lock:
        try:
            yield begin
            ready.wait()
        finally:
            torch.set_num_threads(before)
