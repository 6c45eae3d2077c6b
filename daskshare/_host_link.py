"""How a client is connected to a host: what it needs of any transport, and the Unix socket."""

from __future__ import annotations

import select
import socket
from typing import Any, Protocol

from daskshare._host_wire import OwnSegment, receive, send

__all__ = ["Link", "Segment", "SocketLink"]


class Segment(OwnSegment):
    """A segment with its number and the link whose other end knows it."""

    __slots__ = ("link", "number")

    def __init__(self, capacity_bytes: int, number: int) -> None:
        super().__init__(capacity_bytes)
        self.number = number
        self.link: Link | None = None


class Link(Protocol):
    """A connection to one host. OSError means that it is lost.

    Attributes
    ----------
    shares_memory : bool
        Whether it takes segments.
    """

    shares_memory: bool

    def send(
        self, request: int, header: dict[str, Any], body: Any = (), segment: Segment | None = None
    ) -> None:
        """Send a message; its body is in ``segment`` or in ``body``."""
        ...

    def receive(self) -> tuple[int, dict[str, Any], memoryview] | None:
        """Wait for an answer; None when the host has closed."""
        ...

    def has_ended(self) -> bool:
        """Whether the host has closed, as far as can be told without waiting."""
        ...

    def close(self) -> None: ...


class SocketLink:
    """A Unix socket.

    Parameters
    ----------
    connection : socket.socket
        Connected.
    """

    shares_memory = True

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def send(
        self, request: int, header: dict[str, Any], body: Any = (), segment: Segment | None = None
    ) -> None:
        """Send a message, and the segment's file before it where the host does not know it."""
        if segment is not None and segment.link is not self:
            announce = {"op": "segment", "segment": segment.number}
            send(self._connection, 0, announce, descriptor=segment.descriptor)
            segment.link = self
        send(self._connection, request, header, body)

    def receive(self) -> tuple[int, dict[str, Any], memoryview] | None:
        """Wait for an answer."""
        message = receive(self._connection)
        return None if message is None else (message.request, message.header, message.body)

    def has_ended(self) -> bool:
        """Whether the host has closed, with nothing left to read."""
        readable, _, _ = select.select([self._connection], [], [], 0)
        if not readable:
            return False
        try:
            return not self._connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except OSError:
            return True

    def close(self) -> None:
        """Close the socket."""
        self._connection.close()
