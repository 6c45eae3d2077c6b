"""Which picture a decoder shows, when packets are handed to it several at a time.

A decoder that gets many packets in one piece keeps the time of the first alone, and makes up those
of the others. But it shows pictures in the order of their times, so the one that comes next is the
earliest of those it was given; and whenever the first of a piece comes, which carries a number that
is its own, that must be so. A lost picture shifts all that follow, which the next first one tells.

NVDEC's parser takes the numbers for presentation times: it hands them out in ascending order, so
they must ascend as the pictures are shown.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
from collections import Counter
from collections.abc import Sequence

__all__ = ["DisplayOrder", "OrderLost"]

# Numbers kept for pictures before a chunk's first frame and after its last one.
_MARGIN = 1024


class OrderLost(Exception):
    """A decoder showed other pictures than it was given."""


class DisplayOrder:
    """Gives the pictures of one chunk their times.

    Parameters
    ----------
    expected : sequence of int
        Presentation times of the chunk's frames, ascending, at least one, ticks.

    Attributes
    ----------
    certain_until : int or None
        Time up to which no picture can have been mistaken for another, ticks; ``None``: none yet.
    waiting : int
        Pictures of pieces that have not been shown.
    """

    def __init__(self, expected: Sequence[int]) -> None:
        self._expected = expected
        steps = [after - before for before, after in itertools.pairwise(expected)]
        self._step = min(steps, default=1)
        self._first: dict[int, int] = {}
        self._several: set[int] = set()
        # Pieces whose first picture has not come. Pictures far outside of the chunk share numbers.
        self._unseen: Counter[int] = Counter()
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
            The piece's number, 0 or more, which its first picture must carry. A later time's is
            no smaller, and larger within the chunk.
        """
        number = self._number(times[0])
        self._first[number] = times[0]
        self._unseen[number] += 1
        if len(times) > 1:
            self._several.add(number)
            for time in times:
                heapq.heappush(self._times, time)
        return number

    def _number(self, time: int) -> int:
        position = bisect.bisect_left(self._expected, time)
        if position == len(self._expected):
            late = (time - self._expected[-1] - 1) // self._step
            return _MARGIN + 2 * position - 1 + min(late, _MARGIN)
        if position == 0 and time < self._expected[0]:
            early = (self._expected[0] - time - 1) // self._step
            return max(0, _MARGIN - 1 - early)
        # Odd ones belong to pictures that are decoded and not shown.
        return _MARGIN + 2 * position - (time != self._expected[position])

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
        if number not in self._first:
            raise OrderLost(f"a picture of piece {number} came, which was not given")
        if not self._unseen[number]:
            if not self._times:
                raise OrderLost("more pictures came than packets were given")
            return heapq.heappop(self._times)
        self._unseen[number] -= 1
        time = self._first[number]
        if self._times and (self._times[0] < time or number in self._several):
            earliest = heapq.heappop(self._times)
            if earliest != time:
                raise OrderLost(f"the picture of time {time} came where that of {earliest} should")
        self.certain_until = time
        return time
