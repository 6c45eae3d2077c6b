"""Tasks of a pool, what restricts where each may run, and the queues in which they wait."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Hashable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from daskshare._placement_books import Model, Replica
    from daskshare._placement_types import Dispatch

__all__ = ["ANYWHERE", "UNRESTRICTED", "Queue", "Signature", "Task", "urgency"]


class Signature(NamedTuple):
    """What restricts where a task may run."""

    #: The user's own choice; None: any.
    addresses: frozenset[str] | None = None
    #: Sorted pairs of name and amount.
    resources: tuple[tuple[str, float], ...] = ()
    #: With nothing beside it in flight on its worker.
    alone: bool = False


UNRESTRICTED = Signature()

#: Priority, number, task.
Entry: TypeAlias = "tuple[Any, int, Task]"

#: Instead of an address: for queues that ask for resources but name no worker.
ANYWHERE = ""


class Task:
    """A task that waits (``replica`` is None) or is in flight.

    There may be very many: one object for each, which whoever owns them may extend.

    Parameters
    ----------
    key : hashable
        Its key.
    """

    __slots__ = (
        "decision",
        "dependencies",
        "frames",
        "key",
        "model",
        "priority",
        "queue",
        "replica",
        "seconds",
        "sent_seconds",
        "sequence",
    )

    def __init__(self, key: Hashable) -> None:
        self.key = key
        # What it is, set whenever it comes to the pool.
        self.model: Model
        self.queue: Queue
        self.priority: Any
        self.frames: float | None = None
        self.dependencies: dict[str, int] | None = None
        # Of its one valid entry in a queue; None in flight and when gone.
        self.sequence: int | None = None
        # Where it is in flight, set with the three that follow.
        self.replica: Replica | None = None
        self.seconds: float
        self.sent_seconds: float
        self.decision: Dispatch | None = None


class Queue:
    """Waiting tasks of one model and one restriction, by priority and then age.

    Tasks that come in order, as most do, stand in a line; the others in a heap. Deleting is lazy:
    an entry counts while its number is the task's ``sequence``. The line's numbers stand in a line
    of their own, so that a waiting task takes no further object that Python's garbage collector
    must look at.
    """

    __slots__ = ("heap", "homes", "last", "line", "model", "num_waiting", "numbers", "signature")

    def __init__(self, model: Model, signature: Signature) -> None:
        self.model = model
        self.signature = signature
        self.line: deque[Task] = deque()
        self.numbers: deque[int] = deque()
        # Priority and number with which the line ends; a task that left may have new ones.
        self.last: tuple[Any, int] | None = None
        self.heap: list[Entry] = []
        self.num_waiting = 0
        # Tasks with large dependencies, once more by the worker that holds most of them.
        self.homes: dict[str, list[Entry]] = {}

    def push(self, task: Task, sequence: int, home: str | None) -> None:
        """Add a task under a number that no other entry of its queue has."""
        task.sequence = sequence
        order = (task.priority, sequence)
        if not self.line or self.last is None or order > self.last:
            self.line.append(task)
            self.numbers.append(sequence)
            self.last = order
        else:
            heapq.heappush(self.heap, (*order, task))
        if home is not None:
            heapq.heappush(self.homes.setdefault(home, []), (*order, task))
        self.num_waiting += 1

    def discard(self, task: Task) -> None:
        """Take a waiting task out."""
        task.sequence = None
        self.num_waiting -= 1
        line, heap = self.line, self.heap
        if not self.num_waiting:
            line.clear()
            self.numbers.clear()
            self.last = None
            heap.clear()
            self.homes.clear()
        elif line and line[0] is task:
            line.popleft()
            self.numbers.popleft()
        elif heap and heap[0][2] is task:
            heapq.heappop(heap)
        elif len(line) + len(heap) > 2 * self.num_waiting + 64:
            kept = [(t, number) for t, number in self._in_line() if t.sequence == number]
            self.line = deque(t for t, _ in kept)
            self.numbers = deque(number for _, number in kept)
            self.heap = [entry for entry in heap if entry[2].sequence == entry[1]]
            heapq.heapify(self.heap)

    def head(self) -> Task | None:
        """The next task."""
        line, numbers, heap = self.line, self.numbers, self.heap
        while line and line[0].sequence != numbers[0]:
            line.popleft()
            numbers.popleft()
        if not heap:
            return line[0] if line else None
        while heap and heap[0][2].sequence != heap[0][1]:
            heapq.heappop(heap)
        if heap and (not line or heap[0][:2] < (line[0].priority, numbers[0])):
            return heap[0][2]
        return line[0] if line else None

    def head_at(self, address: str) -> Task | None:
        """The next task for a worker: one whose data lie there, among equals in urgency."""
        head = self.head()
        heap = self.homes.get(address)
        if heap is None or head is None:
            return head
        while heap and heap[0][2].sequence != heap[0][1]:
            heapq.heappop(heap)
        if not heap:
            del self.homes[address]
            return head
        local = heap[0][2]
        return local if urgency(local.priority) == urgency(head.priority) else head

    def tasks(self) -> Iterator[Task]:
        """All of them, in no order."""
        yield from (task for task, number in self._in_line() if task.sequence == number)
        yield from (task for _, number, task in self.heap if task.sequence == number)

    def _in_line(self) -> Iterator[tuple[Task, int]]:
        return zip(self.line, self.numbers, strict=True)


def urgency(priority: Any) -> Any:
    """What the user asked for: the first part of Dask's priorities; the rest is order."""
    return priority[0] if isinstance(priority, tuple) and priority else priority
