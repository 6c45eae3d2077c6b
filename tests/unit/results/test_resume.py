from dataclasses import dataclass, replace

import pytest

from daskshare.results.parquet import ChunkRecord
from daskshare.results.resume import chunk_fingerprint, plan_run


@dataclass(frozen=True)
class Chunk:
    video: str = "a.mp4"
    index: int = 0
    first_frame: int = 0
    num_frames: int = 25
    start_seconds: float = 0.0
    end_seconds: float = 1.0
    fingerprint: str = "size=5"
    error: str = ""


def done(job):
    return ChunkRecord(
        video=job.chunk.video,
        chunk=job.chunk.index,
        first_frame=0,
        num_frames=25,
        num_detections=0,
        status="ok",
        file=job.file,
        fingerprint=job.fingerprint,
    )


CHUNKS = [Chunk(), Chunk(index=1, first_frame=25), Chunk("b.mp4")]


def plan(chunks, existing, model_key="m", decoder="auto"):
    return plan_run(chunks, existing, model_key=model_key, decoder=decoder)


def test_a_first_run_does_everything_in_order():
    got = plan(CHUNKS, {})
    assert [job.chunk for job in got.todo] == CHUNKS
    assert [job.file for job in got.todo] == got.order
    assert got.keep == {}


def test_a_second_run_does_only_what_is_missing():
    jobs = plan(CHUNKS, {}).todo
    existing = {job.file: done(job) for job in jobs if job.chunk is not CHUNKS[1]}
    got = plan(CHUNKS, existing)
    assert [job.chunk for job in got.todo] == [CHUNKS[1]]
    assert got.keep == existing
    assert got.order == [job.file for job in jobs]


@pytest.mark.parametrize(
    "change",
    [
        {"video": "c.mp4"},
        {"index": 7},
        {"first_frame": 1},
        {"num_frames": 26},
        {"start_seconds": 0.1},
        {"end_seconds": 1.1},
        {"fingerprint": "size=6"},
    ],
)
def test_a_changed_chunk_is_not_reused(change):
    jobs = plan(CHUNKS[:1], {}).todo
    got = plan([replace(CHUNKS[0], **change)], {job.file: done(job) for job in jobs})
    assert len(got.todo) == 1
    assert got.keep == {}


@pytest.mark.parametrize("change", [{"model_key": "n"}, {"decoder": "pyav"}])
def test_a_changed_model_or_decoder_is_not_reused(change):
    jobs = plan(CHUNKS, {}).todo
    assert len(plan(CHUNKS, {job.file: done(job) for job in jobs}, **change).todo) == 3


def test_a_file_whose_footer_tells_another_fingerprint_is_not_reused():
    (job,) = plan(CHUNKS[:1], {}).todo
    assert plan(CHUNKS[:1], {job.file: replace(done(job), fingerprint="x")}).todo == [job]


def test_what_is_no_longer_asked_for_is_not_kept():
    jobs = plan(CHUNKS, {}).todo
    got = plan(CHUNKS[:1], {job.file: done(job) for job in jobs})
    assert (list(got.keep), got.todo) == ([jobs[0].file], [])


def test_unreadable_videos_get_a_record_and_no_work():
    bad = Chunk("bad.mp4", num_frames=0, error="bad.mp4 is no video")
    got = plan([bad, CHUNKS[0]], {})
    (record,) = got.unreadable.values()
    assert (record.status, record.error, record.file) == ("error", "bad.mp4 is no video", "")
    assert list(got.unreadable) == got.order[:1]
    assert [job.chunk for job in got.todo] == CHUNKS[:1]


def test_a_chunk_named_twice_counts_once():
    assert len(plan([CHUNKS[0], CHUNKS[0]], {}).order) == 1


def test_fingerprints_do_not_depend_on_the_process():
    # Another value here means that every earlier result is worked out again: raise SCHEMA_VERSION
    # with intent, never by accident.
    assert chunk_fingerprint(CHUNKS[0], model_key="m", decoder="auto") == (
        "075163e7edb65020b8523b67a2c5808343ac84c68d3bbaa5e543fa6348fef4bc"
    )
