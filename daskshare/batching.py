"""Which waiting frames make up the next batch. Pure: no clock, no threads, no torch, no Dask."""

from __future__ import annotations

import bisect
import math
from collections import Counter, OrderedDict, deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from daskshare.errors import ConfigurationError, InvalidInputError

__all__ = ["Batch", "DynamicBatcher", "Part"]


_NONE = object()  # None may be a group.


class Part(NamedTuple):
    """Items ``start`` to ``stop`` (exclusive) of one request."""

    request_id: Hashable
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Batch:
    """What to run next.

    Parameters
    ----------
    parts : tuple of Part
        In the order of the batch's rows; all of one group.
    num_items : int
        Rows that hold items.
    padded_size : int
        Rows to run: the smallest preferred size that holds ``num_items``.
    group : hashable
        The group that all parts were admitted with.
    """

    parts: tuple[Part, ...]
    num_items: int
    padded_size: int
    group: Hashable


class _Request:
    __slots__ = ("arrived_seconds", "next_item", "num_items", "request_id", "task")

    def __init__(
        self, request_id: Hashable, num_items: int, arrived_seconds: float, task: Hashable
    ) -> None:
        self.request_id = request_id
        self.num_items = num_items
        self.arrived_seconds = arrived_seconds
        self.task = task
        self.next_item = 0


class _Group:
    """Requests that may share a batch: one queue a task, and the order of arrival over all."""

    __slots__ = ("arrivals", "num_items", "tasks", "turn_items")

    def __init__(self) -> None:
        self.tasks: OrderedDict[Hashable, deque[_Request]] = OrderedDict()
        self.arrivals: OrderedDict[Hashable, _Request] = OrderedDict()
        self.num_items = 0
        self.turn_items = 0

    def add(self, request: _Request) -> None:
        self.tasks.setdefault(request.task, deque()).append(request)
        self.arrivals[request.request_id] = request
        self.num_items += request.num_items

    def oldest_seconds(self) -> float:
        return next(iter(self.arrivals.values())).arrived_seconds

    def remove(self, request: _Request) -> int:
        items = request.num_items - request.next_item
        queue = self.tasks[request.task]
        if queue[0] is request and next(iter(self.tasks)) == request.task:
            self.turn_items = 0
        queue.remove(request)
        if not queue:
            del self.tasks[request.task]
        del self.arrivals[request.request_id]
        self.num_items -= items
        return items

    def take(self, num_items: int) -> list[Part]:
        parts: list[Part] = []
        room = num_items
        while room and self.tasks:
            task, queue = next(iter(self.tasks.items()))
            request = queue[0]
            left = request.num_items - request.next_item
            count = min(room, left, num_items - self.turn_items)
            start = request.next_item
            if parts and parts[-1].request_id == request.request_id:
                # Alone in its group, a large request takes a second turn in the same batch.
                start = parts.pop().start
            request.next_item += count
            parts.append(Part(request.request_id, start, request.next_item))
            room -= count
            self.turn_items += count
            if count == left:
                queue.popleft()
                del self.arrivals[request.request_id]
            if count == left or self.turn_items >= num_items:
                self.turn_items = 0
                if queue:
                    self.tasks.move_to_end(task)
                else:
                    del self.tasks[task]
        self.num_items -= num_items - room
        return parts


class DynamicBatcher:
    """Queue of requests of many items that comes out as batches.

    A batch is due when it is full, when its oldest item has waited ``max_wait_seconds``, or when
    the device is idle and no task is expected: one whose last request was done less than
    ``max_wait_seconds`` ago and that has none now is about to come with its next one, and half a
    batch run too early costs more than the moment that the device waits.

    Tasks take turns: a turn is one request, and at most one batch of it, so a task that floods the
    queue delays another task's small request by one batch. (Strict order of arrival would delay it
    by the whole queue.) Requests of one task keep their order. Groups (items of equal shape and
    dtype) take turns as well, a batch each.

    Parameters
    ----------
    max_batch_size : int
        Most items in a batch.
    max_wait_seconds : float
        How long an item waits for its batch to fill while the device is busy, or while tasks that
        were just served are expected with more.
    max_queue_items : int
        Most items that wait; :meth:`admit` refuses more.
    batch_sizes : sequence of int
        Preferred sizes to which a batch is padded. Those above ``max_batch_size`` are left out and
        ``max_batch_size`` is always one. Empty: no padding.

    Raises
    ------
    ConfigurationError
        When a number is out of range.

    Notes
    -----
    Not thread-safe: the engine calls it under its lock. ``now_seconds`` must not decrease.
    """

    def __init__(
        self,
        *,
        max_batch_size: int,
        max_wait_seconds: float,
        max_queue_items: int,
        batch_sizes: Sequence[int] = (),
    ) -> None:
        if max_batch_size < 1 or max_queue_items < 1 or not max_wait_seconds >= 0:
            raise ConfigurationError(
                f"Got max_batch_size={max_batch_size}, max_queue_items={max_queue_items}, "
                f"max_wait_seconds={max_wait_seconds}; expected sizes >= 1 and a wait >= 0. "
                "Correct the engine's options."
            )
        if any(size < 1 for size in batch_sizes):
            raise ConfigurationError(
                f"Got batch_sizes={tuple(batch_sizes)}; expected sizes >= 1. Correct the model."
            )
        self.max_batch_size = max_batch_size
        self.max_wait_seconds = max_wait_seconds
        self.max_queue_items = max_queue_items
        self._preferred = sorted(set(batch_sizes))
        self._groups: OrderedDict[Hashable, _Group] = OrderedDict()
        self._group_of: dict[Hashable, Hashable] = {}
        self._num_items = 0
        # Tasks with requests that are not done, and tasks without, by the time of their last one.
        self._unfinished: Counter[Hashable] = Counter()
        self._expected: OrderedDict[Hashable, float] = OrderedDict()
        self._ceiling = max_batch_size
        self._sizes: list[int] = []
        self.set_ceiling(max_batch_size)

    @property
    def num_items(self) -> int:
        """Items that wait."""
        return self._num_items

    @property
    def ceiling(self) -> int:
        """Most items in a batch now."""
        return self._ceiling

    def set_ceiling(self, ceiling: int) -> None:
        """Bound batches (padding included) to ``ceiling`` items from now on.

        Raises
        ------
        ConfigurationError
            When it is not in 1 to ``max_batch_size``.
        """
        if not 1 <= ceiling <= self.max_batch_size:
            raise ConfigurationError(
                f"Got ceiling={ceiling}; expected 1 to {self.max_batch_size} (max_batch_size)."
            )
        self._ceiling = ceiling
        self._sizes = [s for s in self._preferred if s < ceiling] + [ceiling]
        for group in self._groups.values():
            group.turn_items = 0

    def set_batch_sizes(self, batch_sizes: Sequence[int]) -> None:
        """Pad to these sizes, or to ``max_batch_size``, from now on.

        Raises
        ------
        ConfigurationError
            When one is not in 1 to ``max_batch_size``.
        """
        if not all(1 <= size <= self.max_batch_size for size in batch_sizes):
            raise ConfigurationError(
                f"Got batch_sizes={tuple(batch_sizes)}; expected 1 to {self.max_batch_size} "
                "(max_batch_size)."
            )
        self._preferred = sorted({*batch_sizes, self.max_batch_size})
        self.set_ceiling(self._ceiling)

    def padded_size(self, num_items: int) -> int:
        """Smallest preferred size that holds ``num_items`` (itself when there are none)."""
        if not self._preferred:
            return num_items
        return self._sizes[bisect.bisect_left(self._sizes, num_items)]

    def admit(
        self,
        request_id: Hashable,
        num_items: int,
        now_seconds: float,
        *,
        task: Hashable = None,
        group: Hashable = None,
    ) -> bool:
        """Queue a request.

        Parameters
        ----------
        request_id : hashable
            Not among the waiting ones.
        num_items : int
            At least 1, at most ``max_queue_items``.
        now_seconds : float
            Its time of arrival.
        task : hashable
            Whose request it is; tasks take turns.
        group : hashable
            Only requests of equal groups share a batch.

        Returns
        -------
        bool
            False when the queue has no room for all of it now; then nothing changed.

        Raises
        ------
        InvalidInputError
            When the id waits already or the size could never be admitted.
        """
        if not 1 <= num_items <= self.max_queue_items or request_id in self._group_of:
            raise InvalidInputError(
                f"Got request {request_id!r} of {num_items} items; expected a new id and 1 to "
                f"{self.max_queue_items} items. Split larger requests."
            )
        if self._num_items + num_items > self.max_queue_items:
            return False
        if group not in self._groups:
            self._groups[group] = _Group()
        self._groups[group].add(_Request(request_id, num_items, now_seconds, task))
        self._group_of[request_id] = group
        self._num_items += num_items
        self._unfinished[task] += 1
        self._expected.pop(task, None)
        return True

    def finished(self, task: Hashable, now_seconds: float) -> None:
        """Say that a request of ``task`` is done or was cancelled; its next is expected now.

        Parameters
        ----------
        task : hashable
            As it was admitted.
        now_seconds : float
            The time.
        """
        self._unfinished[task] -= 1
        if self._unfinished[task] <= 0:
            del self._unfinished[task]
            self._expected[task] = now_seconds
            self._expected.move_to_end(task)
        self._forget_late(now_seconds)

    def cancel(self, request_id: Hashable) -> int:
        """Forget what still waits of a request and return its number of items (0: nothing)."""
        if request_id not in self._group_of:
            return 0
        group_key = self._group_of.pop(request_id)
        group = self._groups[group_key]
        items = group.remove(group.arrivals[request_id])
        self._num_items -= items
        self._drop_if_empty(group_key)
        return items

    def next_batch(
        self, now_seconds: float, *, device_idle: bool, not_before_seconds: float = -math.inf
    ) -> Batch | None:
        """Take the next batch that is due, or None.

        Parameters
        ----------
        now_seconds : float
            The time.
        device_idle : bool
            Whether nothing runs on the device: then what waits is due unless more is expected.
        not_before_seconds : float
            Time before which a busy device could not start a batch anyway: until then one that is
            not full may go on filling, however long its items have waited.
        """
        chosen = self._due(now_seconds, device_idle, not_before_seconds)
        if chosen is _NONE:
            return None
        group = self._groups[chosen]
        parts = group.take(self._ceiling)
        num_items = sum(part.stop - part.start for part in parts)
        self._num_items -= num_items
        for part in parts:
            if part.request_id not in group.arrivals:
                self._group_of.pop(part.request_id, None)
        self._groups.move_to_end(chosen)
        self._drop_if_empty(chosen)
        return Batch(tuple(parts), num_items, self.padded_size(num_items), chosen)

    def oldest_seconds(self) -> float | None:
        """Time at which the oldest waiting item came; None when nothing waits."""
        return min((group.oldest_seconds() for group in self._groups.values()), default=None)

    def deadline(self) -> float | None:
        """Time from which a batch is due though nothing else comes; None when nothing waits.

        A time in the past means that one is due already.
        """
        if not self._groups:
            return None
        due_seconds = min(
            group.oldest_seconds()
            + (0.0 if group.num_items >= self._ceiling else self.max_wait_seconds)
            for group in self._groups.values()
        )
        if self._expected:
            last_seconds = next(reversed(self._expected.values()))
            due_seconds = min(due_seconds, last_seconds + self.max_wait_seconds)
        return due_seconds

    def _due(self, now_seconds: float, device_idle: bool, not_before_seconds: float) -> Hashable:
        may_start = now_seconds >= not_before_seconds
        for key, group in self._groups.items():
            if group.num_items >= self._ceiling:
                return key
            # The sum, as in deadline(): the difference may round to just below the wait.
            if may_start and group.oldest_seconds() + self.max_wait_seconds <= now_seconds:
                return key
        self._forget_late(now_seconds)
        if self._expected or not device_idle:
            return _NONE
        return next(iter(self._groups), _NONE)

    def _forget_late(self, now_seconds: float) -> None:
        while self._expected:
            task, done_seconds = next(iter(self._expected.items()))
            if done_seconds + self.max_wait_seconds > now_seconds:
                break
            del self._expected[task]

    def _drop_if_empty(self, key: Hashable) -> None:
        if not self._groups[key].arrivals:
            del self._groups[key]
