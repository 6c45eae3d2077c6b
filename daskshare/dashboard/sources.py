"""Sends a figure's data, and no more of it than changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from bokeh.models import ColumnDataSource

__all__ = ["send"]


def send(source: ColumnDataSource, data: dict[str, Any]) -> None:
    """Give a source the columns of ``data`` that differ from its own.

    Parameters
    ----------
    source : bokeh.models.ColumnDataSource
        In a document.
    data : dict of str to list or numpy.ndarray
        All columns, of one length. Numbers travel as arrays, words as lists.
    """
    changed = {
        name: values for name, values in data.items() if not _same(source.data.get(name), values)
    }
    if changed:
        source.data.update(changed)


def _same(old: Any, new: Any) -> bool:
    if isinstance(old, np.ndarray) and isinstance(new, np.ndarray):
        return old.dtype == new.dtype and np.array_equal(old, new, equal_nan=True)
    return type(old) is type(new) and bool(old == new)
