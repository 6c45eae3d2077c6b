"""What one device does, kept by all who use it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from daskshare.timesplit import TimeSplit

__all__ = ["DeviceActivity", "Switch"]


class DeviceActivity:
    """The :class:`~daskshare.timesplit.TimeSplit` of a device, for many threads.

    Notes
    -----
    Thread-safe; its lock is taken last and held for a microsecond.
    """

    def __init__(self) -> None:
        # Reentrant: a forgotten lease may end in a collection that starts under the lock.
        self._lock = threading.RLock()
        self._split = TimeSplit(time.monotonic())

    def begin(self, activity: str) -> None:
        """Begin an activity; see :data:`daskshare.timesplit.STATES`."""
        with self._lock:
            self._split.change(activity, 1, time.monotonic())

    def end(self, activity: str) -> None:
        """End an activity that began."""
        with self._lock:
            self._split.change(activity, -1, time.monotonic())

    @contextmanager
    def during(self, activity: str) -> Iterator[None]:
        """Count what the ``with`` block does as an activity."""
        self.begin(activity)
        try:
            yield
        finally:
            self.end(activity)

    def spent_seconds(self) -> dict[str, float]:
        """Return the seconds spent in each state so far."""
        with self._lock:
            return self._split.spent_seconds(time.monotonic())


class Switch:
    """One party's share in an activity: on or off, however often it says so.

    Parameters
    ----------
    activity : DeviceActivity or None
        Where to count; None: nowhere.
    name : str
        Which activity.

    Notes
    -----
    Not thread-safe by itself: its owner calls it under the owner's lock.
    """

    __slots__ = ("_activity", "_name", "_on")

    def __init__(self, activity: DeviceActivity | None, name: str) -> None:
        self._activity = activity
        self._name = name
        self._on = False

    def retire(self) -> None:
        """End the activity for good."""
        self.set(False)
        self._activity = None

    def set(self, on: bool) -> None:
        """Begin or end the activity unless that is how it is."""
        if on == self._on or self._activity is None:
            return
        self._on = on
        if on:
            self._activity.begin(self._name)
        else:
            self._activity.end(self._name)
