"""Results of a predict function of NumPy arrays: told apart by callers, and put together again.

Such a function returns an array, a dict of arrays or a list, with a row for each row it got.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["join_rows", "split_rows"]


def split_rows(result: Any, rows: Sequence[int]) -> list[Any] | None:
    """Each caller's part of a result; None when it has no row for each row."""
    stops = np.cumsum(rows).tolist()
    starts = [0, *stops[:-1]]
    total = stops[-1]

    def has_rows(value: Any) -> bool:
        if isinstance(value, np.ndarray):
            return value.ndim > 0 and len(value) == total
        return isinstance(value, list) and len(value) == total

    if isinstance(result, dict):
        if not result or not all(has_rows(value) for value in result.values()):
            return None
        return [
            {name: value[a:b] for name, value in result.items()}
            for a, b in zip(starts, stops, strict=True)
        ]
    if not has_rows(result):
        return None
    return [result[a:b] for a, b in zip(starts, stops, strict=True)]


def join_rows(results: Sequence[Any], rows: Sequence[int]) -> Any | None:
    """The result of all rows from those of its parts; None when they are of no such form."""
    for result, count in zip(results, rows, strict=True):
        if split_rows(result, [count]) is None:
            return None
    first = results[0]
    if any(type(result) is not type(first) for result in results):
        return None
    if isinstance(first, dict):
        if any(result.keys() != first.keys() for result in results):
            return None
        columns = {name: join_rows([r[name] for r in results], rows) for name in first}
        return None if any(column is None for column in columns.values()) else columns
    if isinstance(first, list):
        return list(itertools.chain.from_iterable(results))
    if any(result.shape[1:] != first.shape[1:] for result in results):
        return None
    return np.concatenate(results)
