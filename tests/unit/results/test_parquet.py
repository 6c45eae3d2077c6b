import dataclasses
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from daskshare.errors import OutputError
from daskshare.models.spec import Detections
from daskshare.results.parquet import (
    ChunkRecord,
    OutputFolder,
    PartWriter,
    part_name,
    read_detections,
    read_record,
    video_slug,
)
from daskshare.results.schema import CHUNKS_SCHEMA, DETECTIONS_SCHEMA, detections_batch


def found(*rows):
    """Detections of one frame from (class_id, confidence, x_min, y_min, x_max, y_max)."""
    values = np.array(rows, dtype=np.float32).reshape(-1, 6)
    class_id = values[:, 0].astype(np.int16)
    return Detections(values[:, 2:], values[:, 1], class_id, ("person", "car", "bus"))


def record(name="a.mp4", chunk=0, fingerprint="ab" * 32, **changes):
    file = part_name(name, chunk, fingerprint)
    base = ChunkRecord(
        video=name,
        chunk=chunk,
        first_frame=10 * chunk,
        num_frames=10,
        num_detections=2,
        status="ok",
        decoder="pyav",
        file=file,
        class_counts={"car": 1, "person": 1},
        fingerprint=fingerprint,
    )
    return dataclasses.replace(base, **changes)


def write_part(folder, row):
    with PartWriter(folder.detections / row.file) as part:
        part.write(
            detections_batch(
                row.video,
                row.first_frame,
                np.array([0.5]),
                [found((1, 0.9, 1, 2, 3, 4), (0, 0.5, 5, 6, 7, 8))],
            )
        )
        part.finish(row)
    return folder.detections / row.file


def test_part_holds_rows_and_record(tmp_path):
    folder = OutputFolder(tmp_path / "out")
    row = record()
    path = write_part(folder, row)
    assert pq.read_table(path).schema.equals(DETECTIONS_SCHEMA)
    assert pq.read_table(path)["class_name"].to_pylist() == ["car", "person"]
    assert read_record(path) == row
    assert folder.scan() == {row.file: row}


def test_writer_counts_rows_and_classes_over_batches(tmp_path):
    with PartWriter(tmp_path / "p.parquet") as part:
        for _ in range(3):
            part.write(detections_batch("a", 0, np.zeros(1), [found((1, 0.9, 1, 2, 3, 4))]))
        part.write(detections_batch("a", 0, np.zeros(1), [found((2, 0.9, 1, 2, 3, 4))]))
        assert (part.num_rows, part.class_counts) == (4, {"car": 3, "bus": 1})
        part.finish(record())
    assert pq.read_metadata(tmp_path / "p.parquet").num_rows == 4


def test_an_empty_part_has_the_schema(tmp_path):
    with PartWriter(tmp_path / "p.parquet") as part:
        part.finish(record(num_detections=0))
    assert pq.read_table(tmp_path / "p.parquet").schema.equals(DETECTIONS_SCHEMA)


def test_a_part_that_is_not_finished_leaves_nothing(tmp_path):
    part = PartWriter(tmp_path / "p.parquet")
    part.__enter__()
    part.write(detections_batch("a", 0, np.zeros(1), [found((1, 0.9, 1, 2, 3, 4))]))
    (partial,) = tmp_path.iterdir()
    assert partial.name.endswith(".partial")
    error = ZeroDivisionError()
    part.__exit__(type(error), error, None)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_an_output_error(tmp_path):
    with pytest.raises(OutputError, match="all workers share"):
        PartWriter(tmp_path / "missing" / "p.parquet").__enter__()


def test_scan_removes_what_a_kill_left_and_ignores_damaged_parts(tmp_path):
    folder = OutputFolder(tmp_path)
    whole, damaged = record(), record(chunk=1)
    write_part(folder, whole)
    path = write_part(folder, damaged)
    path.write_bytes(path.read_bytes()[:-9])
    left = folder.detections / f".{whole.file}.{'0' * 32}.partial"
    left.write_bytes(b"PAR1")
    table_left = folder.path / f".chunks.parquet.{'0' * 32}.partial"
    table_left.write_bytes(b"PAR1")
    assert set(folder.scan()) == {whole.file}
    assert not left.exists()
    assert not table_left.exists()
    assert not path.exists()


def test_scan_refuses_foreign_parquet_files_and_leaves_them(tmp_path):
    folder = OutputFolder(tmp_path)
    foreign = folder.detections / "mine.parquet"
    pq.write_table(pa.table({"x": [1]}), foreign)
    with pytest.raises(OutputError, match=r"mine\.parquet"):
        folder.scan()
    assert foreign.exists()


def test_begin_moves_aside_and_brings_back_without_touching(tmp_path):
    folder = OutputFolder(tmp_path)
    old, kept = record(), record(chunk=1)
    before = {row.file: write_part(folder, row).stat() for row in (old, kept)}
    folder.complete([old, kept])
    folder.begin([kept.file], work_left=True)
    assert [p.name for p in folder.detections.iterdir()] == [kept.file]
    assert not folder.chunks.exists()
    assert set(folder.scan()) == {old.file, kept.file}
    folder.begin([old.file, kept.file], work_left=False)
    for name, stat in before.items():
        now = (folder.detections / name).stat()
        assert (now.st_ino, now.st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)


def test_complete_writes_the_chunks_and_drops_what_is_superseded(tmp_path):
    folder = OutputFolder(tmp_path)
    old, new = record(), record(fingerprint="cd" * 32)
    write_part(folder, old)
    folder.begin([], work_left=True)
    (folder.path / ".superseded" / "notes.txt").write_text("not ours")
    write_part(folder, new)
    failed = record(chunk=1, status="error", error="broken", file="", num_frames=0)
    folder.complete([new, failed])
    table = pq.read_table(folder.chunks)
    assert table.schema.equals(CHUNKS_SCHEMA)
    assert table["status"].to_pylist() == ["ok", "error"]
    assert table["file"].to_pylist() == [new.file, ""]
    left = [p.name for p in (folder.path / ".superseded").iterdir()]
    assert left == ["notes.txt"]


def test_complete_refuses_parts_that_are_not_here(tmp_path):
    folder = OutputFolder(tmp_path)
    with pytest.raises(OutputError, match="share"):
        folder.complete([record()])
    assert not folder.chunks.exists()


def test_read_detections_follows_the_order_of_chunks(tmp_path):
    folder = OutputFolder(tmp_path)
    rows = [record("b.mp4", 0), record("a.mp4", 1), record("a.mp4", 0)]
    for row in rows:
        write_part(folder, row)
    folder.complete(rows)
    table = read_detections(tmp_path)
    assert table["video"].to_pylist() == ["b.mp4"] * 2 + ["a.mp4"] * 4
    assert table["frame"].to_pylist() == [0, 0, 10, 10, 0, 0]
    assert read_detections(tmp_path, video="b.mp4").num_rows == 2
    assert read_detections(tmp_path, video="c.mp4").schema.equals(DETECTIONS_SCHEMA)


def test_read_detections_of_an_incomplete_folder_is_refused(tmp_path):
    with pytest.raises(OutputError, match="no run completed"):
        read_detections(OutputFolder(tmp_path).path)


def test_names_sort_by_chunk_and_differ_by_video_and_fingerprint():
    names = [part_name("x/a.mp4", i, "ab" * 32) for i in (9, 10, 100)]
    assert names == sorted(names)
    assert part_name("x/a.mp4", 0, "ab" * 32) != part_name("y/a.mp4", 0, "ab" * 32)
    assert part_name("x/a.mp4", 0, "ab" * 32) != part_name("x/a.mp4", 0, "cd" * 32)


@pytest.mark.parametrize(
    ("video", "slug"),
    [
        ("cams/north gate.mp4", "north_gate"),
        ("s3://bucket/a.b.mkv", "a_b"),
        ("/", "video"),
        (".mp4", "mp4"),
        ("Straße 1.avi", "Stra_e_1"),
    ],
)
def test_slugs_are_plain(video, slug):
    assert video_slug(video) == slug


def test_a_second_run_into_the_folder_is_refused_and_a_killed_one_does_not_block(tmp_path):
    folder = OutputFolder(tmp_path)
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from daskshare.results.parquet import OutputFolder\n"
            f"with OutputFolder({str(tmp_path)!r}).lock():\n"
            "    print('held', flush=True); sys.stdin.read()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(OutputError, match=f"process {holder.pid}"), folder.lock():
            pass
        holder.kill()
        holder.wait(timeout=30)
    with folder.lock():
        assert str(os.getpid()) in (tmp_path / ".daskshare.lock").read_text()


@pytest.mark.parametrize("path", ["s3://bucket/out", "https://host/out"])
def test_remote_outputs_are_refused_with_advice(path):
    with pytest.raises(OutputError, match="all workers"):
        OutputFolder(path)


def test_an_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(OutputError, match="Cannot make"):
        OutputFolder(tmp_path / "out")
