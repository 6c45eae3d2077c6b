"""A progress bar in frames: counted in the tasks, drawn by the client."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["FrameReporter", "ProgressBar", "subscribe"]

#: One topic for all runs, because the scheduler keeps the history of each topic for good.
TOPIC = "daskshare-detect"

_BAR = (
    "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} frames "
    "[{elapsed}<{remaining}, {rate_fmt}{postfix}]"
)


class FrameReporter:
    """Tell the client how far one task is, at most once an interval.

    Parameters
    ----------
    send : callable
        Takes ``{"run", "task", "frames"}``; on a worker, ``worker.log_event`` with the topic.
    run, task : str
        Which run and which of its tasks.
    interval_seconds : float
        Shortest time between two messages.
    clock : callable
        Monotonic seconds.

    Notes
    -----
    Runs in the task's thread; not thread-safe.
    """

    def __init__(
        self,
        send: Callable[[dict[str, Any]], None],
        run: str,
        task: str,
        *,
        interval_seconds: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._send = send
        self._run = run
        self._task = task
        self._interval_seconds = interval_seconds
        self._clock = clock
        self._next_seconds = clock() + interval_seconds
        self.frames = 0

    def advance(self, frames: int) -> None:
        """Count frames that are done."""
        self.frames += frames
        now_seconds = self._clock()
        if now_seconds >= self._next_seconds:
            self._next_seconds = now_seconds + self._interval_seconds
            self._send({"run": self._run, "task": self._task, "frames": self.frames})


class ProgressBar:
    """Frames done of all frames, frames/s and remaining time, in a terminal or a notebook.

    Parameters
    ----------
    total_frames : int
        Of the whole job, as the files' headers announce them.
    initial_frames : int
        Of those, the ones that an earlier run did; they do not count into frames/s.
    enabled : bool
        ``False`` draws nothing at all.
    description : str
        In front of the bar.
    **tqdm_options
        Passed on, for example ``file``.

    Notes
    -----
    All methods are to be called from one thread.
    """

    def __init__(
        self,
        total_frames: int,
        *,
        initial_frames: int = 0,
        enabled: bool = True,
        description: str = "detect",
        **tqdm_options: Any,
    ) -> None:
        self.frames = initial_frames
        self.total_frames = total_frames
        self._running: dict[str, int] = {}
        self._bar: Any = None
        if enabled:
            from tqdm.auto import tqdm

            self._bar = tqdm(
                total=total_frames,
                initial=initial_frames,
                desc=description,
                unit=" frames",
                bar_format=_BAR,
                dynamic_ncols=True,
                **tqdm_options,
            )

    def start(self, task: str) -> None:
        """Let ``task`` count from now on."""
        self._running[task] = 0

    def advance(self, task: str, frames: int) -> None:
        """Note that ``task`` has done ``frames`` so far.

        A task that Dask runs a second time counts again from zero: the bar waits for it. Messages
        that arrive after the task's end change nothing.
        """
        before = self._running.get(task, frames)
        if frames > before:
            self._running[task] = frames
            self._move(frames - before, 0)

    def end(self, task: str, frames: int, expected_frames: int) -> None:
        """Note that ``task`` is over with ``frames``, where ``expected_frames`` were announced."""
        self._move(frames - self._running.pop(task), frames - expected_frames)

    def _move(self, frames: int, more_total_frames: int) -> None:
        self.frames += frames
        self.total_frames += more_total_frames
        if self._bar is not None:
            self._bar.total = self.total_frames
            self._bar.update(frames)

    def tick(self, note: str = "") -> None:
        """Draw again, so that the clock runs while nothing arrives; ``note`` stands at the end."""
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.refresh()

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()


_Handler = Callable[[dict[str, Any]], None]
_handlers: weakref.WeakKeyDictionary[Client, dict[str, _Handler]] = weakref.WeakKeyDictionary()
_handlers_lock = threading.Lock()


@contextmanager
def subscribe(client: Client, run: str, handler: _Handler) -> Iterator[None]:
    """Call ``handler`` with every message of ``run`` while the block lasts.

    Several runs may go on at once through one client, which knows one handler a topic.

    Notes
    -----
    ``handler`` runs on the client's event loop and must return at once.
    """
    with _handlers_lock:
        handlers = _handlers.setdefault(client, {})
        first = not handlers
        handlers[run] = handler

    def dispatch(event: tuple[float, Any]) -> None:
        message = event[1]
        if isinstance(message, dict) and (handle := handlers.get(message.get("run", ""))):
            handle(message)

    if first:
        client.subscribe_topic(TOPIC, dispatch)
    try:
        yield
    finally:
        with _handlers_lock:
            del handlers[run]
            last = not handlers
        if last and client.status == "running":
            client.unsubscribe_topic(TOPIC)
