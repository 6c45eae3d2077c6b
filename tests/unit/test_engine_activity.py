from __future__ import annotations

import threading

import pytest

from daskshare._engine_activity import DeviceActivity, Switch


class Recorder:
    def __init__(self):
        self.log = []

    def begin(self, activity):
        self.log.append(f"+{activity}")

    def end(self, activity):
        self.log.append(f"-{activity}")


def test_a_switch_says_each_change_once():
    recorder = Recorder()
    switch = Switch(recorder, "busy")
    for on in (False, True, True, False, False, True):
        switch.set(on)
    assert recorder.log == ["+busy", "-busy", "+busy"]


def test_a_retired_switch_is_off_for_good():
    recorder = Recorder()
    switch = Switch(recorder, "busy")
    switch.set(True)
    switch.retire()
    switch.set(True)
    switch.retire()
    assert recorder.log == ["+busy", "-busy"]


def test_a_switch_without_a_device_does_nothing():
    switch = Switch(None, "busy")
    switch.set(True)
    switch.retire()


def test_an_activity_ends_with_its_block_whatever_happens():
    activity = DeviceActivity()
    with pytest.raises(OSError, match="gone"), activity.during("loading"):
        raise OSError("gone")
    with pytest.raises(ValueError, match="loading"):
        activity.end("loading")


def test_threads_lose_no_change():
    activity = DeviceActivity()

    def work():
        for _ in range(500):
            activity.begin("input")
            activity.end("input")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with pytest.raises(ValueError, match="input ends more often"):
        activity.end("input")
    assert set(activity.spent_seconds()) == {"busy", "loading", "decoding", "input", "scheduler"}
