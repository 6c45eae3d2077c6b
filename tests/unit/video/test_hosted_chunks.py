"""Chunks on their way to a host and back."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from daskshare.results import hosted
from daskshare.video.probe import probe_videos


@pytest.fixture
def call(clips, tmp_path):
    path = clips.write(tmp_path / "a.mp4", frames=30)
    return SimpleNamespace(arguments={"path": path, "chunk_seconds": 0.5})


def test_chunks_come_back(call):
    answer = json.loads(json.dumps(hosted.probe(call)))
    chunks = [hosted._from_json(values) for values in answer]
    assert chunks == probe_videos(call.arguments["path"], chunk_seconds=0.5)
    assert all(chunk.packed_packets for chunk in chunks)


def test_long_videos_come_without_the_places_of_packets(call, monkeypatch):
    monkeypatch.setattr(hosted, "_MOST_TABLE_BYTES", 10)
    chunks = [hosted._from_json(values) for values in hosted.probe(call)]
    assert [chunk.packed_packets for chunk in chunks] == [b""] * len(chunks)
    assert all(len(chunk.pts()) == chunk.num_frames for chunk in chunks)
