"""Which of a batch's arrays a request keeps, and which rows it copies."""

from __future__ import annotations

import numpy as np
import pytest

from daskshare._engine_request import HostOutputs, Request


def batch(rows, *, owned, structure=None):
    return HostOutputs(structure, [np.arange(rows * 3).reshape(rows, 3)], owned)


@pytest.mark.parametrize(
    ("rows", "items", "owned", "kept"),
    [
        (16, 16, True, True),
        (16, 2, True, True),
        # It would keep more than eight times its own size.
        (17, 2, True, False),
        (16, 2, False, False),
    ],
)
def test_a_whole_request_keeps_its_part_of_what_nobody_else_writes(rows, items, owned, kept):
    outputs = batch(rows, owned=owned)
    request = Request(items)
    start = 5 if items < rows else 0
    assert request.fill(0, items, outputs, start)
    result = request.result()
    np.testing.assert_array_equal(result, outputs.arrays[0][start : start + items])
    assert np.shares_memory(result, outputs.arrays[0]) == kept


def test_a_request_in_two_batches_is_put_together():
    request = Request(3)
    first, second = batch(2, owned=True), batch(4, owned=True)
    assert not request.fill(1, 2, first, 0)
    assert request.fill(0, 1, second, 3)
    np.testing.assert_array_equal(request.result(), [[9, 10, 11], [0, 1, 2], [3, 4, 5]])
    assert not np.shares_memory(request.result(), first.arrays[0])


def test_outputs_that_change_their_form_are_refused():
    request = Request(2)
    request.fill(0, 1, batch(1, owned=True), 0)
    with pytest.raises(ValueError, match="differ between batches"):
        request.fill(1, 1, batch(1, owned=True, structure=(tuple, None, (None,))), 0)
