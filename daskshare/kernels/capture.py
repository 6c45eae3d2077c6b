"""CUDA graphs captured in a process whose other threads use the device meanwhile.

What waits for the whole device, as opening or closing a video decoder does, makes every capture
under way in the process invalid. What daskshare itself does of that kind is kept apart from
captures by :data:`CAPTURE_GATE`; what others do is told by :func:`was_disturbed`, and the capture
is tried again.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

__all__ = ["CAPTURE_GATE", "CaptureGate", "undisturbed", "was_disturbed"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

_MAX_TRIES = 6


class CaptureGate:
    """Lets one thread capture, or any number do what would disturb a capture.

    Notes
    -----
    Thread-safe. A thread may enter :meth:`disturbing` again while it is inside.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._capturing = False
        self._waiting_captures = 0
        self._disturbing = 0
        self._mine = threading.local()

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Hold the gate for a capture."""
        with self._changed:
            self._waiting_captures += 1
            self._changed.wait_for(lambda: not self._capturing and not self._disturbing)
            self._waiting_captures -= 1
            self._capturing = True
        try:
            yield
        finally:
            with self._changed:
                self._capturing = False
                self._changed.notify_all()

    @contextmanager
    def disturbing(self) -> Iterator[None]:
        """Hold the gate, with others, for what would disturb a capture."""
        depth = getattr(self._mine, "depth", 0)
        if not depth:
            with self._changed:
                # Captures are rare and short: whoever waits for one is not kept waiting.
                self._changed.wait_for(lambda: not self._capturing and not self._waiting_captures)
                self._disturbing += 1
        self._mine.depth = depth + 1
        try:
            yield
        finally:
            self._mine.depth = depth
            if not depth:
                with self._changed:
                    self._disturbing -= 1
                    self._changed.notify_all()


#: Of this process.
CAPTURE_GATE = CaptureGate()

# What a capture does not allow, and would not allow the next time either.
_FORBIDDEN = ("cudaErrorStreamCaptureUnsupported", "not permitted when stream is capturing")
_OF_THE_DRIVER = ("CUDA error", "cudaError", "CUDNN_STATUS", "error during capture")


def was_disturbed(error: BaseException) -> bool:
    """Whether a capture may have failed by something that another thread did.

    Parameters
    ----------
    error : BaseException
        What the capture raised.

    Returns
    -------
    bool
        True for errors of CUDA, unless one says that what was captured did something that a
        capture does not allow: it would fail again.
    """
    texts: list[str] = []
    seen: BaseException | None = error
    while seen is not None and len(texts) < 20:
        texts.append(str(seen))
        seen = seen.__cause__ or seen.__context__
    return any(sign in text for sign in _OF_THE_DRIVER for text in texts) and not any(
        sign in text for sign in _FORBIDDEN for text in texts
    )


def undisturbed(work: Callable[[], T]) -> T:
    """Do what captures graphs, or works beside threads that do, again when that was spoilt.

    Parameters
    ----------
    work : callable
        Works on a stream of its own. cuDNN captures plans that run as CUDA graphs.

    Returns
    -------
    object
        What ``work`` returns.

    Raises
    ------
    Exception
        Whatever ``work`` raises that is not such an error, or the last of several.
    """
    tries = 0
    while True:
        try:
            return work()
        except Exception as error:
            tries += 1
            if tries == _MAX_TRIES or not was_disturbed(error) or "out of memory" in str(error):
                raise
            # Its frames hold what was made so far.
            traceback.clear_frames(error.__traceback__)
            logger.info("Disturbed by the capture of a CUDA graph, and tried again: %s", error)
        with CAPTURE_GATE.disturbing():
            # The captures of now have ended.
            _forget_last_error()


def _forget_last_error() -> None:
    # What failed in a library's call is kept by CUDA's runtime for whoever asks next in this
    # thread, as torch does after each kernel.
    import torch

    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device="cuda")
