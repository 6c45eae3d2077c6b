import io

from daskshare.results.progress import FrameReporter, ProgressBar


def test_reporter_sends_at_most_once_an_interval():
    sent = []
    now = 0.0
    reporter = FrameReporter(sent.append, "r", "t", interval_seconds=1.0, clock=lambda: now)
    for step in range(1, 36):
        now = step / 10
        reporter.advance(16)
    assert [m["frames"] for m in sent] == [160, 320, 480]
    assert sent[0] == {"run": "r", "task": "t", "frames": 160}
    assert reporter.frames == 35 * 16


def bar(total=100, **options):
    out = io.StringIO()
    return ProgressBar(total, file=out, mininterval=0, ncols=100, **options), out


def test_bar_shows_frames_rate_and_remaining_time():
    progress, out = bar()
    progress.start("t")
    progress.advance("t", 40)
    progress.close()
    last = out.getvalue().split("\r")[-1]
    assert "detect:  40%" in last
    assert "40/100 frames" in last
    assert "frames/s]" in last
    assert "<" in last


def test_messages_and_ends_count_each_frame_once():
    progress, _ = bar()
    for task in ("a", "b"):
        progress.start(task)
    progress.advance("a", 10)
    progress.advance("b", 30)
    progress.advance("a", 25)
    progress.end("a", 50, 50)
    assert progress.frames == 80
    progress.end("b", 50, 50)
    assert progress.frames == 100


def test_a_repeated_task_does_not_move_the_bar_back():
    progress, _ = bar()
    progress.start("a")
    progress.advance("a", 40)
    progress.advance("a", 10)
    assert progress.frames == 40
    progress.advance("a", 50)
    assert progress.frames == 50


def test_late_and_unknown_messages_change_nothing():
    progress, _ = bar()
    progress.start("a")
    progress.end("a", 50, 50)
    progress.advance("a", 60)
    progress.advance("other", 60)
    assert progress.frames == 50


def test_a_chunk_shorter_than_announced_corrects_the_total():
    progress, out = bar()
    progress.start("a")
    progress.advance("a", 30)
    progress.end("a", 30, 50)
    assert (progress.frames, progress.total_frames) == (30, 80)
    progress.close()
    assert "30/80 frames" in out.getvalue()


def test_frames_of_an_earlier_run_count_as_done():
    progress, out = bar(initial_frames=60)
    progress.close()
    assert "60/100 frames" in out.getvalue()


def test_a_note_stands_behind_the_bar():
    progress, out = bar()
    progress.tick("waiting for workers")
    assert "waiting for workers" in out.getvalue()


def test_disabled_bar_prints_nothing(capfd):
    progress = ProgressBar(100, enabled=False)
    progress.start("a")
    progress.advance("a", 10)
    progress.tick("note")
    progress.end("a", 20, 50)
    progress.close()
    assert capfd.readouterr() == ("", "")
    assert progress.frames == 20
