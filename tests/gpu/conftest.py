"""Decoding sessions outlive the chunks that they decoded; not the tests."""

from __future__ import annotations

import pytest

from daskshare.video.nvdec import close_idle_sessions


@pytest.fixture(autouse=True)
def no_idle_sessions():
    """Close what a test leaves in the pool."""
    yield
    close_idle_sessions()
