from __future__ import annotations

import numpy as np
from bokeh.document import Document
from bokeh.models import ColumnDataSource

from daskshare.dashboard.sources import send


def test_only_columns_that_changed_are_sent():
    source = ColumnDataSource({"a": [], "b": [], "words": []})
    document = Document()
    document.add_root(source)
    sent = []
    document.on_change(lambda event: sent.append(sorted(event.cols)))
    nan = np.array([1.0, np.nan])
    send(source, {"a": nan, "b": np.array([1, 2]), "words": ["x", "y"]})
    send(source, {"a": nan.copy(), "b": np.array([1, 3]), "words": ["x", "y"]})
    send(source, {"a": nan.copy(), "b": np.array([1, 3]), "words": ["x", "y"]})
    send(source, {"a": nan.astype(np.float32), "b": np.array([1, 3]), "words": ["x", "z"]})
    assert sent == [["a", "b", "words"], ["b"], ["a", "words"]]
    assert source.data["words"] == ["x", "z"]
