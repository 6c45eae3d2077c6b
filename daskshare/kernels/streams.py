"""Order between torch's streams, asking torch for as little as can be.

Most of its functions give the interpreter's lock away: among a dozen threads that decode, each then
waits for several turns.
"""

from __future__ import annotations

import threading
from collections import Counter

import torch

from daskshare.kernels.transfer import stream_is_idle

__all__ = ["STREAMS", "CurrentStream", "StreamPool", "pending_work", "wait_for_current"]

# Torch makes so many a device, and hands them out in turn again and again.
_TORCH_STREAMS = 32


class StreamPool:
    """Streams that nobody else uses meanwhile, as long as torch has any.

    Two users of one stream would wait for each other, and what one of them does while the other
    captures a graph would get into the graph.

    Notes
    -----
    Thread-safe.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: dict[tuple[int, str], list[torch.cuda.Stream]] = {}
        self._known: dict[int, torch.cuda.Stream] = {}
        self._users: Counter[int] = Counter()

    def take(self, device_index: int, purpose: str) -> torch.cuda.Stream:
        """Return a stream.

        Parameters
        ----------
        device_index : int
        purpose : str
            A library's workspaces (cuBLAS takes 32 MiB) belong to a stream and stay when its user
            is gone: who comes next for the same purpose gets the same stream.

        Returns
        -------
        torch.cuda.Stream
            To be handed to :meth:`give_back`.
        """
        with self._lock:
            stream = self._choose(device_index, purpose)
            self._users[stream.cuda_stream] += 1
            return stream

    def give_back(self, stream: torch.cuda.Stream, purpose: str) -> None:
        """Keep a stream for who comes next; nothing must be under way on it."""
        with self._lock:
            self._users[stream.cuda_stream] -= 1
            if not self._users[stream.cuda_stream]:
                self._idle.setdefault((stream.device_index, purpose), []).append(stream)

    def _choose(self, device_index: int, purpose: str) -> torch.cuda.Stream:
        idle = self._idle.get((device_index, purpose))
        if idle:
            return idle.pop()
        for _ in range(_TORCH_STREAMS):
            stream = torch.cuda.Stream(device_index)  # type: ignore[no-untyped-call]
            if stream.cuda_stream not in self._known:
                self._known[stream.cuda_stream] = stream
                return stream
        for (index, _), idle in self._idle.items():
            if index == device_index and idle:
                return idle.pop()
        here = [s for s in self._known.values() if s.device_index == device_index]
        return min(here, key=lambda s: self._users[s.cuda_stream])


#: Of this process.
STREAMS = StreamPool()


class CurrentStream:
    """Makes a stream, and its device, current in the calling thread for a ``with`` block.

    Parameters
    ----------
    stream : torch.cuda.Stream

    Notes
    -----
    What ``torch.cuda.stream`` does. That asks, each time, which device is meant and whether there
    is any.
    """

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream

    def __enter__(self) -> None:
        self._device = torch.cuda.current_device()
        self._before = torch.cuda.current_stream(self._stream.device_index)
        torch.cuda.set_stream(self._stream)

    def __exit__(self, *exc_info: object) -> None:
        torch.cuda.set_stream(self._before)
        if self._device != self._stream.device_index:
            torch.cuda.set_device(self._device)


def pending_work(device_index: int) -> torch.cuda.Event | None:
    """Mark the end of what the thread's current stream holds.

    Parameters
    ----------
    device_index : int
        Whose current stream.

    Returns
    -------
    torch.cuda.Event or None
        ``None`` when all is done.
    """
    stream = torch.cuda.current_stream(device_index)
    if torch.cuda.current_device() == device_index and stream_is_idle(stream.cuda_stream):
        return None
    event: torch.cuda.Event = stream.record_event()
    return event


def wait_for_current(stream: torch.cuda.Stream) -> None:
    """Let a stream wait for what the current stream of its device holds.

    Parameters
    ----------
    stream : torch.cuda.Stream
    """
    pending = pending_work(stream.device_index)
    if pending is not None:
        stream.wait_event(pending)
