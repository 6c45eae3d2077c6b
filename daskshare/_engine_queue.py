"""The bounded queue between callers and an engine's thread: room, turns, cancellation, refusal."""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Any, cast

import numpy as np
import torch

from daskshare._engine_input import host_tensor
from daskshare._engine_request import Group, Piece, Request, Segment
from daskshare._engine_staging import Cells, Staging
from daskshare.batching import DynamicBatcher
from daskshare.kernels.streams import pending_work

__all__ = ["RequestQueue"]


class RequestQueue:
    """Requests that wait, and those that run until their last item is done.

    Parameters
    ----------
    batcher : DynamicBatcher
        Decides what comes next.
    staging : Staging or None
        Where host items are copied (GPU); None: they are read where they are.

    Attributes
    ----------
    lock : threading.Lock
        Guards everything here and the engine's own state.
    work : threading.Condition
        Notified when there may be something to run.

    Notes
    -----
    :meth:`put` runs in callers' threads; methods that say so need the lock held.
    """

    def __init__(self, batcher: DynamicBatcher, *, staging: Staging | None) -> None:
        self.lock = threading.Lock()
        self.work = threading.Condition(self.lock)
        self.batcher = batcher
        self.requests: set[Request] = set()
        self._staging = staging
        self._pieces: dict[int, Piece] = {}
        self._last_id = 0
        self._copying_items = 0
        # Callers in the order in which they wait for room; each sleeps on its own condition.
        self._waiting: deque[threading.Condition] = deque()
        self._refusal: Callable[[], Exception] | None = None

    def put(self, items: np.ndarray | torch.Tensor, group: Group, task: Hashable) -> Future[Any]:
        """Queue items, in pieces as room comes free; blocks until the last is in.

        Raises
        ------
        Exception
            What was given to :meth:`refuse`.
        """
        request = Request(int(items.shape[0]), task)
        self._watch(request)
        with self.lock:
            self._check_open()
            self.requests.add(request)
        staged, ready = self._staging is not None, None
        if isinstance(items, torch.Tensor) and items.is_cuda:
            staged, ready = False, pending_work(items.device.index)
        offset = 0
        try:
            while offset < request.num_items and not request.finished:
                count, cells = self._reserve(request.num_items - offset, group, staged)
                part = items if count == request.num_items else items[offset : offset + count]
                try:
                    if cells is None:
                        piece_items = host_tensor(part)
                    else:
                        cells.fill(part)
                        piece_items = cells.tensor(group.shape, group.dtype)
                except BaseException:
                    self._unreserve(count, cells)
                    raise
                self._admit(request, offset, piece_items, cells, ready, group, task)
                offset += count
        except BaseException as error:
            self.fail(request, error)
            raise
        return request.future

    def take(
        self, *, device_idle: bool, not_before_seconds: float
    ) -> tuple[list[Segment], Group] | None:
        """Take what is due, without what was cancelled; under the lock."""
        batch = self.batcher.next_batch(
            time.monotonic(), device_idle=device_idle, not_before_seconds=not_before_seconds
        )
        if batch is None:
            return None
        segments = []
        for part in batch.parts:
            piece = self._pieces[cast("int", part.request_id)]
            segment = Segment(piece, part.start, part.stop)
            if self._start(piece.request):
                segments.append(segment)
            else:
                self.drop(piece.request)
                self.items_done(segment)
        self.room_made()
        return segments, cast("Group", batch.group)

    def age_seconds(self) -> float:
        """Tell how long the oldest waiting item has waited; 0.0 when none; under the lock."""
        oldest_seconds = self.batcher.oldest_seconds()
        return 0.0 if oldest_seconds is None else max(0.0, time.monotonic() - oldest_seconds)

    def items_done(self, segment: Segment) -> None:
        """Give back what a segment's items took; under the lock."""
        self._count_down(segment.piece, segment.num_items)

    def drop(self, request: Request) -> bool:
        """Take a request out; False when it was out already; under the lock.

        Items of it that run go on running; those that wait are forgotten.
        """
        if request.finished:
            return False
        request.finished = True
        self.requests.discard(request)
        for piece in request.pieces:
            self._count_down(piece, self.batcher.cancel(piece.piece_id))
        request.pieces.clear()
        self.room_made()
        return True

    def fail(self, request: Request, error: BaseException) -> bool:
        """End a request with an error; False when it had ended. Takes the lock."""
        with self.lock:
            if not self.drop(request) or not self._start(request):
                return False
        request.future.set_exception(error)
        return True

    def refuse(self, make_error: Callable[[], Exception]) -> None:
        """Raise ``make_error()`` in every caller that waits for room or comes; under the lock."""
        if self._refusal is None:
            self._refusal = make_error
        for turn in self._waiting:
            turn.notify()
        self.work.notify_all()

    def room_made(self) -> None:
        """Wake the first caller that waits for room; under the lock."""
        if self._waiting:
            self._waiting[0].notify()

    def _check_open(self) -> None:
        if self._refusal is not None:
            raise self._refusal()

    def _start(self, request: Request) -> bool:
        # From here on cancel() has no effect; a future cancelled before says False.
        if not request.running:
            request.running = request.future.set_running_or_notify_cancel()
        return request.running

    def _watch(self, request: Request) -> None:
        # A future that outlives the engine must not keep it, and a model's memory, alive.
        this = weakref.ref(self)

        def on_done(future: Future[Any]) -> None:
            queue = this() if future.cancelled() else None
            if queue is not None:
                with queue.lock:
                    queue.drop(request)

        request.future.add_done_callback(on_done)

    def _reserve(self, want: int, group: Group, staged: bool) -> tuple[int, Cells | None]:
        with self.lock:
            turn = threading.Condition(self.lock)
            self._waiting.append(turn)
            try:
                while True:
                    self._check_open()
                    if self._waiting[0] is turn:
                        got = self._take_room(want, group, staged)
                        if got is not None:
                            self._copying_items += got[0]
                            return got
                    turn.wait()
            finally:
                self._waiting.remove(turn)
                self.room_made()

    def _take_room(self, want: int, group: Group, staged: bool) -> tuple[int, Cells | None] | None:
        # Each piece costs a transfer, so a large request waits for some room.
        least = min(want, max(1, self.batcher.max_batch_size // 8))
        room = self.batcher.max_queue_items - self.batcher.num_items - self._copying_items
        if room < least:
            return None
        count = min(want, room)
        if not staged:
            return count, None
        assert self._staging is not None
        cells = self._staging.take(count, least, group.item_bytes)
        return None if cells is None else (cells.num_items, cells)

    def _unreserve(self, count: int, cells: Cells | None) -> None:
        with self.lock:
            self._copying_items -= count
            if cells is not None:
                cells.release()
            self.room_made()

    def _admit(
        self,
        request: Request,
        offset: int,
        items: torch.Tensor,
        cells: Cells | None,
        ready: torch.cuda.Event | None,
        group: Group,
        task: Hashable,
    ) -> None:
        with self.lock:
            self._last_id += 1
            piece = Piece(self._last_id, request, offset, items, cells, ready)
            self._copying_items -= piece.num_items
            if request.finished or self._refusal is not None:
                self._release(piece)
                self.room_made()
                self._check_open()
                return
            admitted = self.batcher.admit(
                piece.piece_id, piece.num_items, time.monotonic(), task=task, group=group
            )
            assert admitted, "room was reserved"
            self._pieces[piece.piece_id] = piece
            request.pieces.append(piece)
            self.work.notify()

    def _count_down(self, piece: Piece, num_items: int) -> None:
        piece.remaining -= num_items
        if num_items and piece.remaining == 0:
            self.batcher.finished(piece.request.task, time.monotonic())
            self._release(piece)

    def _release(self, piece: Piece) -> None:
        if piece.cells is not None:
            piece.cells.release()
            piece.cells = None
            self.room_made()
        self._pieces.pop(piece.piece_id, None)
