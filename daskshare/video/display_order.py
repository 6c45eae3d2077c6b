"""Which picture a decoder shows, when packets are handed to it several at a time.

A decoder that gets many packets in one piece keeps the time of the first alone, and makes up those
of the others. But it shows pictures in the order of their times, so the one that comes next is the
earliest of those it was given; and whenever the first of a piece comes, which carries a number that
is its own, that must be so. A lost picture shifts all that follow, which the next first one tells.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

__all__ = ["DisplayOrder", "OrderLost"]


class OrderLost(Exception):
    """A decoder showed other pictures than it was given."""


class DisplayOrder:
    """Gives the pictures of one chunk their times.

    Attributes
    ----------
    certain_until : int or None
        Time up to which no picture can have been mistaken for another, ticks; ``None``: none yet.
    waiting : int
        Pictures of pieces that have not been shown.
    """

    def __init__(self) -> None:
        self._first: list[int] = []
        self._several: list[bool] = []
        self._seen: list[bool] = []
        self._times: list[int] = []
        self.certain_until: int | None = None

    @property
    def waiting(self) -> int:
        return len(self._times)

    def feed(self, times: Sequence[int]) -> int:
        """Note a piece that the decoder is given.

        Parameters
        ----------
        times : sequence of int
            Presentation times of its packets in the order of decoding, at least one. A packet that
            may show nothing must come alone.

        Returns
        -------
        int
            The piece's number, from 0 on, which its first picture must carry.
        """
        several = len(times) > 1
        self._first.append(times[0])
        self._several.append(several)
        self._seen.append(False)
        if several:
            for time in times:
                heapq.heappush(self._times, time)
        return len(self._first) - 1

    def shown(self, number: int) -> int:
        """Time of the picture that the decoder shows next.

        Parameters
        ----------
        number : int
            Of the piece whose first picture it is, or that of the picture before when the decoder
            made its time up.

        Returns
        -------
        int
            Presentation time, ticks.

        Raises
        ------
        OrderLost
        """
        if not 0 <= number < len(self._first):
            raise OrderLost(f"a picture of piece {number} came; {len(self._first)} were given")
        if self._seen[number]:
            if not self._times:
                raise OrderLost("more pictures came than packets were given")
            return heapq.heappop(self._times)
        self._seen[number] = True
        time = self._first[number]
        if self._times and (self._times[0] < time or self._several[number]):
            earliest = heapq.heappop(self._times)
            if earliest != time:
                raise OrderLost(f"the picture of time {time} came where that of {earliest} should")
        self.certain_until = time
        return time
