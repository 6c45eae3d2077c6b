"""Housekeeping that stops all tasks of a worker process, made rare where a GPU waits for them.

A dozen tasks that decode share one interpreter with Dask's profiler, which walks through all their
stacks, and with Python's search for garbage, which looks through every module.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distributed import Worker

__all__ = ["keep_imports", "profile_less"]


_kept = False


def keep_imports() -> None:
    """Leave what exists out of Python's searches for garbage from now on.

    Notes
    -----
    To be called before there is a model, or anything of a user's: garbage in a cycle with what is
    left out would never be found, and a GPU's memory with it. Only the first call in a process does
    anything. Takes a tenth of a second.
    """
    global _kept
    if not _kept:
        _kept = True
        gc.collect()
        gc.freeze()


def profile_less(worker: Worker, interval_seconds: float) -> Callable[[], None]:
    """Let Dask's profiler look at a worker's tasks no more often than this.

    Parameters
    ----------
    worker : distributed.Worker
    interval_seconds : float

    Returns
    -------
    callable
        Undoes it.

    Notes
    -----
    On the worker's event loop. The new interval counts from the next sample on.
    """
    sampling = worker.periodic_callbacks.get("profile")
    if sampling is None:
        # Switched off in Dask's configuration.
        return lambda: None
    before = sampling.callback_time
    sampling.callback_time = max(before, 1000 * interval_seconds)

    def undo() -> None:
        sampling.callback_time = before

    return undo
