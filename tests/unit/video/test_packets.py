"""Lists of packets, and reading them in few pieces."""

from __future__ import annotations

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from daskshare.video import packets
from daskshare.video.packets import pack_table, read_packets, unpack_table
from daskshare.video.probe import probe_videos

NUMBERS = st.integers(0, 2**40)


@given(st.lists(st.tuples(NUMBERS, NUMBERS, st.integers(-(2**40), 2**40)), max_size=20))
def test_a_table_comes_back(rows):
    columns = np.array(rows, np.int64).reshape(-1, 3).T
    for got, expected in zip(unpack_table(pack_table(*columns)), columns, strict=True):
        assert got.dtype == np.int64
        np.testing.assert_array_equal(got, expected)


def test_a_video_takes_a_few_bytes_a_packet(clips, tmp_path):
    chunks = probe_videos(clips.write(tmp_path / "a.mp4", frames=250), chunk_seconds=100)
    assert 0 < len(chunks[0].packed_packets) < 250 * 5


def with_sound(path, clips, tmp_path):
    """Copy a video's packets between those of a sound."""
    silent = clips.write(tmp_path / "silent.mp4", frames=60)
    with av.open(str(silent)) as source, av.open(str(path), "w") as target:
        video = target.add_stream_from_template(source.streams.video[0])
        sound = target.add_stream("aac", rate=8000)
        for packet in source.demux(video=0):
            if packet.dts is None:
                continue
            packet.stream = video
            target.mux(packet)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate = 8000
            target.mux(sound.encode(frame))
        target.mux(sound.encode(None))
    return path


@pytest.mark.parametrize("window_bytes", [1, 2000, 512 << 10])
@pytest.mark.parametrize("sound", [False, True])
def test_packets_are_those_of_the_demultiplexer(window_bytes, sound, clips, tmp_path, monkeypatch):
    monkeypatch.setattr(packets, "_WINDOW_BYTES", window_bytes)
    path = tmp_path / "a.mp4"
    path = with_sound(path, clips, tmp_path) if sound else clips.write(path, frames=60)
    chunks = probe_videos(path, chunk_seconds=0.5)
    assert len(chunks) > 1
    with av.open(str(path)) as container:
        expected = [(bytes(p), p.pts) for p in container.demux(video=0) if p.size]
    got = [
        (bytes(data), time)
        for chunk in chunks
        for data, time in read_packets(chunk.video, chunk.packed_packets)
    ]
    # A chunk of an open group of pictures reads into the next one.
    assert [pair for pair in expected if pair not in got] == []
    assert [pair for pair in got if pair not in expected] == []


def test_a_file_that_ends_early(tmp_path):
    path = tmp_path / "short"
    path.write_bytes(bytes(100))
    table = pack_table(np.array([0, 90]), np.array([90, 20]), np.array([0, 1]))
    with pytest.raises(OSError, match=r"got 100 bytes at byte 0, expected 110.*changed"):
        list(read_packets(str(path), table))
