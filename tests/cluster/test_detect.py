"""detect() on a real cluster: in one process with a small detector, and the command itself."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
from distributed import Client, LocalCluster

import daskshare
from daskshare.client import SharedModel
from daskshare.demo import demo_clip
from daskshare.errors import (
    ConfigurationError,
    ModelLoadError,
    OutputError,
    UnreadableVideoError,
)
from daskshare.models.spec import Detections, Prepared
from daskshare.results.parquet import read_detections
from daskshare.results.schema import CHUNKS_SCHEMA, DETECTIONS_SCHEMA
from tests.reference import disagreements, expected_detections


@dataclass(frozen=True)
class BrightnessSpec:
    """Finds as many objects in a frame as its brightness says; exact, whatever the batches."""

    name: str = "brightness"
    key: str = "brightness-1"
    failure: str = ""

    def estimated_bytes(self):
        return 1000

    def load(self, device):
        if self.failure == "load":
            raise ModelLoadError("no such weights", model=self.name)
        return BrightnessProgram(self.failure)


class BrightnessProgram:
    item_shape = (1,)
    max_batch_size = 8
    batch_sizes = ()
    model_bytes = 1000
    graph_capturable = False

    def __init__(self, failure):
        self.failure = failure

    def prepare(self, inputs):
        items = np.stack([np.asarray(f, np.float32).mean(keepdims=True).reshape(1) for f in inputs])
        return Prepared(items)

    def forward(self, batch):
        return batch * 1

    def compile(self, batch_size):
        return None

    def finish(self, outputs, context):
        if self.failure == "bright" and float(np.max(outputs)) > 100:
            raise RuntimeError("too bright")
        if self.failure == "outputs":
            return outputs
        return [self.detections(float(value)) for value in np.asarray(outputs)[:, 0]]

    def detections(self, value):
        count = round(value) // 10 % 4
        boxes = np.full((count, 4), value, np.float32)
        confidence = np.linspace(0.9, 0.5, count, dtype=np.float32)
        return Detections(boxes, confidence, np.arange(count, dtype=np.int16), NAMES)


NAMES = ("person", "car", "bus")


def make_video(path, *, frames=60, start=0):
    """25 frames/s, a keyframe every ten frames, each frame one grey, growing brighter."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.options = {"g": "10", "keyint_min": "10", "sc_threshold": "0", "preset": "fast"}
        for i in range(frames):
            grey = np.full((48, 64, 3), (start + 3 * i) % 200, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture
def client():
    with (
        LocalCluster(
            n_workers=1, threads_per_worker=4, processes=False, dashboard_address=":0"
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


@pytest.fixture
def videos(tmp_path):
    folder = tmp_path / "cams"
    folder.mkdir()
    return [make_video(folder / "a.mp4"), make_video(folder / "b.mp4", frames=35, start=50)]


@pytest.fixture
def detect(client, tmp_path):
    def detect(paths, *, key="brightness-1", failure="", **options):
        model = SharedModel(BrightnessSpec(key=key, failure=failure))
        options = {"progress": False, "chunk_seconds": 0.4} | options
        return daskshare.detect(paths, model, tmp_path / "out", client=client, **options)

    return detect


def parts(output):
    """Identity of each part file: unchanged only if nobody wrote it again."""
    return {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in (Path(output) / "detections").glob("[!.]*")
    }


def expected_rows(video, frames, start):
    """What the detector says about the frames as decoded from the start of the file."""
    program = BrightnessProgram("")
    rows = []
    with av.open(str(video)) as container:
        for i, frame in enumerate(container.decode(video=0)):
            value = float(frame.to_ndarray(format="rgb24").astype(np.float32).mean())
            found = program.detections(value)
            rows += [(str(video), i, frame.time, c) for c in found.class_id.tolist()]
    assert i + 1 == frames
    return rows


def test_all_frames_of_all_videos_are_found_in_order(detect, videos):
    summary = detect(videos)
    table = read_detections(summary.output)
    assert table.schema.equals(DETECTIONS_SCHEMA)
    got = zip(
        *(table[c].to_pylist() for c in ("video", "frame", "pts_seconds", "class_id")), strict=True
    )
    want = expected_rows(videos[0], 60, 0) + expected_rows(videos[1], 35, 50)
    assert [(v, f, pytest.approx(p), c) for v, f, p, c in want] == list(got)
    chunks = pq.read_table(summary.chunks_path)
    assert chunks.schema.equals(CHUNKS_SCHEMA)
    assert chunks["video"].to_pylist() == [str(videos[0])] * 6 + [str(videos[1])] * 4
    assert chunks["first_frame"].to_pylist() == [0, 10, 20, 30, 40, 50, 0, 10, 20, 30]
    assert chunks["num_frames"].to_pylist() == [10] * 9 + [5]
    assert set(chunks["status"].to_pylist()) == {"ok"}
    assert sum(chunks["num_detections"].to_pylist()) == table.num_rows
    assert (summary.frames, summary.videos, summary.chunks) == (95, 2, 10)
    assert (summary.new_frames, summary.new_chunks) == (95, 10)
    assert summary.num_detections == table.num_rows
    names = table["class_name"].to_pylist()
    assert summary.counts_by_class == {name: names.count(name) for name in NAMES}
    assert summary.decoders == {"pyav": 95}


def test_concurrent_tasks_share_one_load(detect, videos, client):
    summary = detect(videos, key="counted-once")
    assert (summary.model_loads, summary.model_copies, summary.model_bytes) == (1, 1, 1000)
    assert 1 <= summary.concurrent_tasks <= 4
    assert summary.memory_saved_bytes == 1000 * (summary.concurrent_tasks - 1)


def test_a_second_call_does_nothing_again(detect, videos):
    first = detect(videos)
    before = parts(first.output)
    table = read_detections(first.output)
    second = detect(videos)
    assert (second.new_chunks, second.new_frames, second.concurrent_tasks) == (0, 0, 0)
    assert (second.frames, second.counts_by_class) == (first.frames, first.counts_by_class)
    assert parts(second.output) == before
    assert read_detections(second.output).equals(table)


def test_only_what_is_missing_is_done(detect, videos):
    first = detect(videos)
    before = parts(first.output)
    table = read_detections(first.output)
    lost = sorted(before)[3]
    (first.detections_path / lost).unlink()
    first.chunks_path.unlink()
    second = detect(videos)
    assert second.new_chunks == 1
    after = parts(second.output)
    assert after.keys() == before.keys()
    assert {n for n in after if after[n] != before[n]} == {lost}
    assert read_detections(second.output).equals(table)


def test_overwrite_does_everything_again(detect, videos):
    before = parts(detect(videos).output)
    again = detect(videos, overwrite=True)
    assert again.new_chunks == 10
    after = parts(again.output)
    assert after.keys() == before.keys()
    assert not {n for n in after if after[n] == before[n]}
    assert not (again.output / ".superseded").exists()


@pytest.mark.parametrize("change", [{"key": "brightness-2"}, {"chunk_seconds": 0.8}])
def test_a_changed_model_or_option_reuses_nothing(detect, videos, change):
    first = detect(videos)
    before = parts(first.output)
    second = detect(videos, **change)
    assert second.new_frames == 95
    assert not parts(second.output).keys() & before.keys()
    assert not (second.output / ".superseded").exists()
    assert pq.read_table(second.chunks_path)["num_frames"].to_pylist() == (
        [10] * 9 + [5] if "key" in change else [20, 20, 20, 20, 15]
    )


def test_a_changed_source_is_done_again_and_the_others_kept(detect, videos):
    before = parts(detect(videos).output)
    make_video(videos[1], frames=25, start=90)
    second = detect(videos)
    assert second.new_chunks == 3
    after = parts(second.output)
    assert {n for n in after if after[n] == before.get(n)} == {n for n in before if n[0] == "a"}
    assert len(after) == 9


def test_videos_no_longer_asked_for_leave_the_folder(detect, videos):
    detect(videos)
    second = detect(videos[:1])
    assert second.new_chunks == 0
    assert set(read_detections(second.output)["video"].to_pylist()) == {str(videos[0])}
    assert len(parts(second.output)) == 6


def test_a_call_that_can_read_nothing_leaves_earlier_results_alone(detect, videos):
    first = detect(videos)
    before, chunks = parts(first.output), first.chunks_path.read_bytes()
    with pytest.raises(OutputError, match=rf"nofile\.mp4.*{len(before)} parts"):
        detect([videos[0].with_name("nofile.mp4")])
    assert parts(first.output) == before
    assert first.chunks_path.read_bytes() == chunks


def test_a_file_that_is_no_video_is_one_row_and_the_others_go_on(detect, videos):
    bad = videos[0].with_name("bad.mp4")
    bad.write_bytes(b"no video at all")
    summary = detect([bad, *videos])
    (failed,) = summary.failed
    assert failed.video == str(bad)
    assert str(bad) in failed.error
    assert summary.frames == 95
    first = pq.read_table(summary.chunks_path).to_pylist()[0]
    assert (first["video"], first["status"], first["num_frames"]) == (str(bad), "error", 0)
    assert first["error"] == failed.error
    assert "FAILED" in str(summary)


def test_a_truncated_file_yields_its_good_frames_and_says_so(detect, videos):
    whole = make_video(videos[0].with_name("whole.mkv"))
    cut = videos[0].with_name("cut.mkv")
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 2 // 3])
    summary = detect(cut)
    rows = pq.read_table(summary.chunks_path).to_pylist()
    assert rows[-1]["status"] == "truncated"
    assert rows[-1]["error"]
    assert 0 < summary.frames < 60
    assert [r.chunk for r in summary.truncated] == [rows[-1]["chunk"]]
    assert summary.failed == ()


def test_failing_chunks_are_recorded_and_tried_again(detect, videos):
    summary = detect(videos[0], failure="bright", key="bright")
    assert {r.first_frame for r in summary.failed} == {30, 40, 50}
    assert all("too bright" in r.error for r in summary.failed)
    assert summary.frames == 30
    kept = parts(summary.output)
    again = detect(videos[0], key="bright", failure="bright")
    assert len(again.failed) == 3
    assert parts(again.output) == kept


def test_a_model_that_cannot_be_loaded_stops_the_run(detect, videos, client, tmp_path):
    with pytest.raises(ModelLoadError, match="no such weights"):
        detect(videos, failure="load", key="unloadable")
    assert not (tmp_path / "out" / "chunks.parquet").exists()
    assert parts(tmp_path / "out") == {}


def test_a_model_that_is_no_detector_stops_the_run(detect, videos):
    with pytest.raises(ConfigurationError, match="one Detections a frame"):
        detect(videos, failure="outputs", key="no-detector")


def test_earlier_results_survive_a_run_that_fails(detect, videos):
    before = parts(detect(videos).output)
    with pytest.raises(ModelLoadError):
        detect(videos, failure="load", key="unloadable")
    back = detect(videos)
    assert back.new_chunks == 0
    assert parts(back.output) == before


def test_chunks_can_be_given_in_place_of_paths(detect, videos):
    from daskshare.video.probe import probe_videos

    chunks = probe_videos(videos[0], chunk_seconds=0.4)
    summary = detect(chunks[2:4])
    assert pq.read_table(summary.chunks_path)["first_frame"].to_pylist() == [20, 30]


def test_no_file_found_is_an_error(detect, tmp_path):
    with pytest.raises(UnreadableVideoError):
        detect(str(tmp_path / "*.mp4"))


def test_a_model_that_is_not_shared_is_refused(client, videos, tmp_path):
    with pytest.raises(ConfigurationError, match="expected a SharedModel"):
        daskshare.detect(videos, "yolov3-tiny", tmp_path / "out", client=client)


def test_two_runs_into_one_folder_are_refused(detect, videos, tmp_path):
    from daskshare.results.parquet import OutputFolder

    with OutputFolder(tmp_path / "out").lock(), pytest.raises(OutputError, match="Another run"):
        detect(videos)


def test_progress_counts_all_frames(detect, videos, capsys):
    detect(videos, progress=True)
    last = capsys.readouterr().err.split("\r")[-1]
    assert "100%" in last
    assert "95/95 frames" in last


def test_without_progress_nothing_is_printed(detect, videos, capfd):
    detect(videos, progress=False)
    assert capfd.readouterr() == ("", "")


def test_the_log_tells_loads_and_what_is_kept(detect, videos, caplog):
    with caplog.at_level("INFO", logger="daskshare"):
        count = detect(videos).chunks
        detect(videos)
    done = [r.getMessage() for r in caplog.records if r.name == "daskshare.results.detect"]
    assert done[0].endswith(
        f"{count} chunks to do, 0 kept of an earlier run, 0 that cannot be read"
    )
    assert done[1].endswith(
        f"0 chunks to do, {count} kept of an earlier run, 0 that cannot be read"
    )
    loads = [r.getMessage() for r in caplog.records if r.name == "daskshare.share"]
    assert [text.partition(" onto ")[0] for text in loads] == ["Loading model brightness"]


def test_two_runs_at_once_through_one_client(client, videos, tmp_path):
    model = SharedModel(BrightnessSpec())
    summaries = {}

    def run(name, video):
        summaries[name] = daskshare.detect(
            video, model, tmp_path / name, client=client, progress=False, chunk_seconds=0.4
        )

    threads = [
        threading.Thread(target=run, args=(name, video))
        for name, video in zip("ab", videos, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert {name: s.frames for name, s in summaries.items()} == {"a": 60, "b": 35}


def test_annotated_pictures_are_made_once(detect, videos):
    first = detect(videos, annotate=True)
    names = [path.name for path in first.annotated]
    assert names == [f"{v}{s}" for v in "ab" for s in (".mp4", "-contact-sheet.png", "-counts.png")]
    stats = {path: path.stat() for path in first.annotated}
    assert all(stat.st_size > 0 for stat in stats.values())
    with av.open(str(first.annotated[0])) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        assert sum(1 for _ in container.decode(video=0)) == 60
    make_video(videos[1], frames=25, start=90)
    again = detect(videos, annotate=True)
    same = {p for p in again.annotated if p.stat().st_mtime_ns == stats[p].st_mtime_ns}
    assert same == set(first.annotated[:3])
    detect(videos[:1], annotate=True)
    assert not any(path.exists() for path in first.annotated[3:])


def command(*args):
    return [sys.executable, "-m", "daskshare", "detect", *map(str, args)]


def wait_for_part(ended, folder):
    """Look for the first part file until it appears; ``ended()`` tells that none will."""
    deadline = time.monotonic() + 90
    pause = threading.Event()
    while time.monotonic() < deadline:
        if any(folder.glob("[!.]*.parquet")):
            return
        assert not ended()
        pause.wait(0.005)
    raise AssertionError("no part file within 90 s")


@pytest.mark.slow
def test_verbose_shows_the_log_of_worker_processes(tmp_path):
    clip = make_video(tmp_path / "a.mp4", frames=10)
    verbose = command(clip, "--output", tmp_path / "out", "--workers", 1)
    verbose.insert(verbose.index("detect"), "-v")
    done = subprocess.run(verbose, capture_output=True, text=True, timeout=120, check=True)
    assert "daskshare.results.detect - INFO" in done.stderr
    assert "daskshare.share - INFO - Loading model yolov3-tiny onto" in done.stderr
    assert "distributed.scheduler" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_command_goes_on_where_it_was(tmp_path, sign):
    clips = [tmp_path / f"{name}.mp4" for name in "ab"]
    for clip in clips:
        os.symlink(demo_clip(), clip)
    options = ("--chunk-seconds", 1, "--no-progress", "--threads", 2, "--input-size", 160)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    with subprocess.Popen(
        command(*clips, "-o", killed, *options),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore Ctrl-C, and so would their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        wait_for_part(lambda: process.poll() is not None, killed / "detections")
        process.send_signal(sign)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == (-signal.SIGKILL if sign == signal.SIGKILL else 130), stderr
    if sign != signal.SIGKILL:
        assert "the same call does the rest" in stderr
    assert not (killed / "chunks.parquet").exists()
    before = parts(killed)
    assert before
    done = subprocess.run(
        command(*clips, "-o", killed, *options), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert f"kept {len(before)} of" in done.stdout
    after = parts(killed)
    assert {n: after.get(n) for n in before} == before
    done = subprocess.run(
        command(*clips, "-o", whole, *options), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert parts(whole).keys() == after.keys()
    assert read_chunks(killed).equals(read_chunks(whole))
    assert_same_rows(read_detections(killed), read_detections(whole))


def read_chunks(output):
    return pq.read_table(Path(output) / "chunks.parquet")


def assert_same_rows(got, want):
    for name in ("video", "frame", "pts_seconds", "class_id", "class_name"):
        assert got[name].to_pylist() == want[name].to_pylist()
    for name in ("confidence", "x_min", "y_min", "x_max", "y_max"):
        # Batches are composed as frames come; sums in another order differ in the last bits.
        np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-3)


@pytest.mark.slow
def test_a_killed_worker_costs_only_what_it_had_in_hand(tmp_path):
    with (
        daskshare.local_cluster(
            device="cpu", n_workers=2, threads_per_worker=2, dashboard_address=":0"
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        clips = [tmp_path / f"{name}.mp4" for name in "abc"]
        for clip in clips:
            os.symlink(demo_clip(), clip)
        victim = min(client.run(os.getpid).values())
        run = pool.submit(
            daskshare.detect,
            clips,
            daskshare.yolov3("yolov3-tiny", input_size=160),
            tmp_path / "out",
            client=client,
            chunk_seconds=1,
            progress=False,
        )
        wait_for_part(run.done, tmp_path / "out" / "detections")
        os.kill(victim, signal.SIGKILL)
        summary = run.result(timeout=90)
    assert summary.failed == ()
    assert summary.frames == 750
    assert not list(summary.detections_path.glob(".*"))


@pytest.mark.slow
def test_the_clip_agrees_with_the_reference(tmp_path, client):
    summary = daskshare.detect(
        demo_clip(),
        daskshare.yolov3("yolov3-tiny"),
        tmp_path,
        client=client,
        chunk_seconds=2,
        progress=False,
    )
    table = read_detections(tmp_path)
    columns = {name: table[name].to_numpy() for name in table.column_names if name != "class_name"}
    found = []
    for number in expected_detections():
        rows = columns["frame"] == number
        boxes = [columns[name][rows] for name in ("x_min", "y_min", "x_max", "y_max")]
        found.append(
            Detections(
                np.stack(boxes, axis=1), columns["confidence"][rows], columns["class_id"][rows], ()
            )
        )
    assert disagreements(found, min_iou=0.95, max_confidence_error=0.02) == []
    assert (summary.frames, summary.chunks, summary.model_loads) == (250, 6, 1)
    assert summary.concurrent_tasks > 1


@pytest.mark.slow
def test_a_scheduler_elsewhere_is_used_and_stays_up(tmp_path):
    with (
        LocalCluster(
            n_workers=1, threads_per_worker=2, processes=False, dashboard_address=":0",
            protocol="tcp",
        ) as cluster,
    ):  # fmt: skip
        options = ("--scheduler", cluster.scheduler_address, "--no-progress")
        done = subprocess.run(
            command(demo_clip(), "-o", tmp_path, *options),
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "250 frames of 1 video" in done.stdout
        assert cluster.scheduler.status.name == "running"


@pytest.mark.slow
def test_a_file_that_is_no_video_is_status_3(tmp_path):
    bad = tmp_path / "bad.mp4"
    bad.write_text("nothing")
    done = subprocess.run(
        command(bad, demo_clip(), "-o", tmp_path / "out", "--no-progress"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 3, done.stderr
    assert str(bad) in done.stderr
    assert "250 frames of 2 videos" in done.stdout
