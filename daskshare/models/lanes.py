"""The rows of a batch divided among threads that each compute with a share of the cores."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

import torch

from daskshare._torch_threads import divided_torch_threads

__all__ = ["RowLanes"]

Outputs = dict[str, torch.Tensor]


class RowLanes:
    """Computes a batch on the CPU in several threads, each some of its rows.

    torch divides every operation among its threads, which then wait for each other: what else runs
    on one core for a moment, such as a caller that looks at its results, holds up all. Threads with
    rows of their own wait once a batch.

    Parameters
    ----------
    most : int
        Threads at most.

    Notes
    -----
    For one calling thread. The threads are made when first needed and end with this object.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._pools: dict[int, ThreadPoolExecutor] = {}

    def run(self, function: Callable[[torch.Tensor], Outputs], batch: torch.Tensor) -> Outputs:
        """Call ``function`` with parts of the rows and put its outputs together again.

        Parameters
        ----------
        function : callable
            From rows to tensors with as many rows. Called in several threads at once.
        batch : torch.Tensor, shape (n, ...)
            In host memory. It is computed by as many threads as divide both ``n`` and torch's
            number of threads evenly; with one, by the calling thread.

        Raises
        ------
        Exception
            What ``function`` raises, when no thread looks at the batch any more.
        """
        even = math.gcd(len(batch), torch.get_num_threads())
        count = max(n for n in range(1, max(1, min(even, self._most)) + 1) if even % n == 0)
        if count == 1:
            return function(batch)
        pool = self._pools.get(count)
        if pool is None:
            pool = self._pools[count] = _start(count)
        futures = [pool.submit(function, rows) for rows in batch.chunk(count)]
        wait(futures)
        parts = [future.result() for future in futures]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _start(count: int) -> ThreadPoolExecutor:
    with divided_torch_threads(count) as begin:
        pool = ThreadPoolExecutor(count, "daskshare-rows", initializer=begin)
        for _ in range(count):
            # Each finds the others still beginning, so each gets a thread of its own.
            pool.submit(int)
    return pool
