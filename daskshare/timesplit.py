"""What a device's time was spent on: busy, or idle for which reason. Pure: time is an argument."""

from __future__ import annotations

__all__ = ["STATES", "TimeSplit"]

#: What a device can be doing, the first that applies:
#: at least one batch on it; a model being loaded onto it; idle while some task decodes video; idle
#: while tasks hold models and do something else (read, prepare, write); idle and no task here.
STATES = ("busy", "loading", "decoding", "input", "scheduler")


class TimeSplit:
    """Attributes each moment to one of :data:`STATES`.

    Parameters
    ----------
    now_seconds : float
        When the account begins.

    Notes
    -----
    Not thread-safe. One call for each begin and end of an activity, so its cost follows batches,
    requests and tasks, never frames.
    """

    __slots__ = ("_active", "_since_seconds", "_spent_seconds", "_state")

    def __init__(self, now_seconds: float) -> None:
        self._active = dict.fromkeys(STATES[:-1], 0)
        self._spent_seconds = dict.fromkeys(STATES, 0.0)
        self._since_seconds = now_seconds
        self._state = STATES[-1]

    @property
    def state(self) -> str:
        """What the device does now."""
        return self._state

    def change(self, activity: str, by: int, now_seconds: float) -> None:
        """Begin (``by=1``) or end (``by=-1``) an activity.

        Parameters
        ----------
        activity : str
            One of :data:`STATES` but the last, which is the absence of all others.
        by : int
            How many more of it there are.
        now_seconds : float
            The time; an earlier one than the last counts as the last.

        Raises
        ------
        ValueError
            When more end than began.
        """
        self._settle(now_seconds)
        self._active[activity] += by
        if self._active[activity] < 0:
            self._active[activity] -= by
            raise ValueError(f"{activity} ends more often than it began")
        for state, active in self._active.items():
            if active:
                self._state = state
                return
        self._state = STATES[-1]

    def spent_seconds(self, now_seconds: float) -> dict[str, float]:
        """Return the seconds spent in each state until now; they add up to the account's age."""
        self._settle(now_seconds)
        return dict(self._spent_seconds)

    def _settle(self, now_seconds: float) -> None:
        # Threads read the clock before they get the lock, so times may come out of order.
        if now_seconds > self._since_seconds:
            self._spent_seconds[self._state] += now_seconds - self._since_seconds
            self._since_seconds = now_seconds
