"""Measured choices on disk: several processes, several versions, damaged files."""

from __future__ import annotations

import logging
import threading

import pytest

from daskshare.models.tuning import TuningFile

TIMEOUT = 20


def test_what_is_written_is_read_by_others_with_the_same_subject(tmp_path):
    TuningFile(tmp_path / "new", gpu="A", cudnn=91900).write({"x": {"plan": "p", "time": 1.5}})
    assert TuningFile(tmp_path / "new", gpu="A", cudnn=91900).read() == {
        "x": {"plan": "p", "time": 1.5}
    }


@pytest.mark.parametrize("subject", [{"gpu": "B", "cudnn": 91900}, {"gpu": "A", "cudnn": 92000}])
def test_other_devices_and_versions_have_files_of_their_own(tmp_path, subject):
    first = TuningFile(tmp_path, gpu="A", cudnn=91900)
    first.write({"x": 1})
    other = TuningFile(tmp_path, **subject)
    assert other.read() == {}
    other.write({"x": 2})
    assert first.read() == {"x": 1}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"choices": {}}', '{"subject": 1}'])
def test_a_damaged_file_counts_as_empty_and_is_replaced(tmp_path, content, caplog):
    tuning = TuningFile(tmp_path, gpu="A")
    tuning.path.write_text(content)
    with caplog.at_level(logging.WARNING):
        assert tuning.read() == {}
    assert "measuring anew" in caplog.text
    tuning.write({"x": 1})
    assert tuning.read() == {"x": 1}


def test_a_missing_file_is_no_problem(tmp_path, caplog):
    assert TuningFile(tmp_path, gpu="A").read() == {}
    assert caplog.text == ""


def test_those_who_start_together_measure_once(tmp_path):
    measured = []
    inside = threading.Event()
    release = threading.Event()

    def start(name):
        tuning = TuningFile(tmp_path, gpu="A")
        with tuning.locked():
            choices = tuning.read()
            if not choices:
                inside.set()
                assert release.wait(TIMEOUT)
                measured.append(name)
                tuning.write({"x": name})

    threads = [threading.Thread(target=start, args=(name,)) for name in "ab"]
    threads[0].start()
    assert inside.wait(TIMEOUT)
    threads[1].start()
    release.set()
    for thread in threads:
        thread.join(TIMEOUT)
    assert measured == ["a"]
    assert TuningFile(tmp_path, gpu="A").read() == {"x": "a"}


def test_nothing_but_the_file_and_its_lock_stays(tmp_path):
    tuning = TuningFile(tmp_path, gpu="A")
    with tuning.locked():
        tuning.write({"x": 1})
    left = {path.name for path in tmp_path.iterdir()}
    assert left - {f"{tuning.path.name}.lock"} == {tuning.path.name}


def test_a_folder_that_cannot_be_written_is_only_logged(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    tuning = TuningFile(tmp_path / "file" / "folder", gpu="A")
    with caplog.at_level(logging.WARNING), tuning.locked():
        tuning.write({"x": 1})
    assert "every start measures anew" in caplog.text
    assert "cannot be written" in caplog.text
    assert tuning.read() == {}
