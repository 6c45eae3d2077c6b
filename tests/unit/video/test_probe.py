from __future__ import annotations

import pickle
from pathlib import Path

import fsspec
import numpy as np
import pytest

from daskshare.errors import ConfigurationError, UnreadableVideoError
from daskshare.video.probe import probe_videos
from daskshare.video.sources import expand_paths

GOPS = {"options": {"x264-params": "keyint=10:min-keyint=10:scenecut=0"}}


@pytest.fixture(scope="module")
def folder(clips, tmp_path_factory):
    root = tmp_path_factory.mktemp("videos")
    (root / "deep").mkdir()
    for name in ("b.mp4", "a.mp4", "deep/c.MKV"):
        clips.write(root / name, frames=20, **GOPS)
    (root / "notes.txt").write_text("no video\n")
    return root


def videos(chunks):
    return list(dict.fromkeys(Path(c.video).name for c in chunks))


def test_one_file(folder):
    chunks = probe_videos(str(folder / "a.mp4"), chunk_seconds=0.4)
    assert [(c.index, c.first_frame, c.num_frames) for c in chunks] == [(0, 0, 10), (1, 10, 10)]
    assert [(c.start_seconds, c.end_seconds) for c in chunks] == [
        pytest.approx((0, 0.4)),
        pytest.approx((0.4, 0.8)),
    ]
    assert {(c.width, c.height, c.codec, c.error, c.damage) for c in chunks} == {
        (64, 48, "h264", "", "")
    }


def test_order_is_as_given_and_sorted_inside_globs_and_folders(folder):
    assert videos(probe_videos([folder / "b.mp4", str(folder / "a.mp4")])) == ["b.mp4", "a.mp4"]
    assert videos(probe_videos(folder / "*.mp4")) == ["a.mp4", "b.mp4"]
    assert videos(probe_videos(str(folder / "**" / "*.[mM]*"))) == ["a.mp4", "b.mp4", "c.MKV"]
    assert videos(probe_videos(folder)) == ["a.mp4", "b.mp4", "c.MKV"]
    assert videos(probe_videos([folder / "b.mp4", folder])) == ["b.mp4", "a.mp4", "c.MKV"]


def test_file_whose_name_looks_like_a_pattern_or_a_protocol(folder, clips):
    for name in ("cam[1].mp4", "cam:2%03d.mp4", "späť.mp4"):
        path = clips.write(folder / "deep" / "x.mp4", frames=5)
        odd = Path(path).rename(folder / "deep" / name)
        (chunk,) = probe_videos(odd)
        odd.unlink()
        assert (chunk.error, chunk.num_frames) == ("", 5)


@pytest.mark.parametrize("pattern", ["*.mov", "nothing-*", "deep/**/*.ts"])
def test_glob_that_matches_nothing(folder, pattern):
    with pytest.raises(UnreadableVideoError, match="No video found") as caught:
        probe_videos(folder / pattern)
    assert str(folder / pattern) in str(caught.value)
    assert caught.value.video == str(folder / pattern)


def test_folder_without_videos(tmp_path):
    (tmp_path / "readme.txt").write_text("x")
    with pytest.raises(UnreadableVideoError, match=r"\.mp4"):
        probe_videos(tmp_path)


def test_no_paths_and_wrong_types():
    with pytest.raises(ConfigurationError, match="empty list"):
        probe_videos([])
    with pytest.raises(ConfigurationError, match="expected a str or a Path"):
        expand_paths([b"bytes.mp4"])


def test_negative_chunk_seconds_is_found_before_reading(folder):
    with pytest.raises(ConfigurationError, match="chunk_seconds"):
        probe_videos(folder, chunk_seconds=-1)


def test_files_that_are_no_video_give_one_chunk_each_and_the_others_go_on(folder, tmp_path):
    (tmp_path / "text.mp4").write_text("this is text\n" * 100)
    (tmp_path / "noise.mkv").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "empty.mp4").write_bytes(b"")
    bad = [
        tmp_path / "text.mp4",
        tmp_path / "noise.mkv",
        tmp_path / "empty.mp4",
        tmp_path / "missing.mp4",
        folder / "notes.txt",
        tmp_path,
    ]
    chunks = probe_videos([*bad[:-1], folder / "a.mp4"], chunk_seconds=10)
    assert [bool(c.error) for c in chunks] == [True] * 5 + [False]
    for path, chunk in zip(bad, chunks[:-1], strict=False):
        assert str(path) in chunk.error
        assert (chunk.num_frames, chunk.index) == (0, 0)
        with chunk.open_frames() as stream:
            assert list(stream) == []
        assert stream.problem == chunk.error
    assert "FileNotFoundError" in chunks[3].error


def test_sound_without_picture(tmp_path):
    import av

    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        for number in range(20):
            frame = av.AudioFrame.from_ndarray(
                np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
            )
            frame.sample_rate, frame.pts = 44100, number * 1024
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    (chunk,) = probe_videos(path)
    assert "no video stream" in chunk.error
    assert "audio" in chunk.error


def test_chunk_is_small_picklable_hashable_and_free_of_pixels(folder):
    chunk = probe_videos(folder / "a.mp4")[0]
    data = pickle.dumps(chunk)
    assert len(data) < 2000
    copy = pickle.loads(data)  # noqa: S301
    assert copy == chunk
    assert hash(copy) == hash(chunk)
    assert "packed" not in repr(chunk)


def test_fingerprint_changes_with_the_file(clips, tmp_path):
    path = clips.write(tmp_path / "clip.mp4", frames=5)
    (before,) = probe_videos(path)
    clips.write(tmp_path / "clip.mp4", frames=6)
    (after,) = probe_videos(path)
    assert before.fingerprint
    assert before.fingerprint != after.fingerprint


def test_fsspec_urls(folder, clips):
    memory = fsspec.filesystem("memory")
    for name in ("a.mp4", "b.mp4"):
        memory.pipe(f"/cams/{name}", (folder / name).read_bytes())
    memory.pipe("/cams/notes.txt", b"no video")
    reference = clips.reference(str(folder / "a.mp4"))
    for given in ("memory://cams/*.mp4", "memory://cams", "memory://cams/"):
        chunks = probe_videos(given, chunk_seconds=0.4, storage_options={})
        assert videos(chunks) == ["a.mp4", "b.mp4"]
        assert all(c.video.startswith("memory://") for c in chunks)
    frames, problems = clips.decode([c for c in chunks if c.video.endswith("a.mp4")])
    assert set(problems) == {""}
    clips.assert_same(frames, reference)
    with pytest.raises(UnreadableVideoError, match="memory://cams/"):
        probe_videos("memory://cams/*.avi")
    (missing,) = probe_videos("memory://cams/missing.mp4")
    assert "FileNotFoundError" in missing.error


def test_file_url(folder):
    assert videos(probe_videos(f"file://{folder}/a.mp4")) == ["a.mp4"]


def test_storage_options_travel_with_the_chunk_but_are_not_shown(folder):
    memory = fsspec.filesystem("memory")
    memory.pipe("/one.mp4", (folder / "a.mp4").read_bytes())
    (chunk,) = probe_videos("memory://one.mp4", storage_options={"token": "secret"})
    assert chunk.storage_options == {"token": "secret"}
    assert "secret" not in repr(chunk)


def test_with_a_dask_client_files_are_indexed_on_the_cluster(folder, monkeypatch):
    from distributed import Client

    with (
        Client(processes=False, n_workers=1, threads_per_worker=2, dashboard_address=":0") as c,
        monkeypatch.context() as patch,
    ):
        # The threads of this process must stay unused.
        patch.setattr("daskshare.video.probe.ThreadPoolExecutor", None)
        assert videos(probe_videos([folder / "b.mp4", folder / "a.mp4"])) == ["b.mp4", "a.mp4"]
        assert c.status == "running"
