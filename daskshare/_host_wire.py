"""How a host and its clients talk: framed messages, values without pickle, shared segments.

A message is a fixed prefix, a JSON header and a body of bytes; a file descriptor may come with it.
Values (arrays, texts, bytes, tables, and lists, tuples and dicts of them) are a JSON tree in the
header whose leaves point into the body or into a memory segment that the client has shared.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from daskshare.errors import HostError, InvalidInputError

__all__ = [
    "MAX_BODY_BYTES",
    "MAX_HEADER_BYTES",
    "PROTOCOL_VERSION",
    "Message",
    "OwnSegment",
    "PeerSegment",
    "receive",
    "send",
]

#: Raised when the frames or the operations change, so that two versions never misread each other.
PROTOCOL_VERSION = 3
MAX_HEADER_BYTES = 16 * 2**20
MAX_BODY_BYTES = 2 * 2**30
MAX_SEGMENT_BYTES = 8 * 2**30

_MAGIC = b"DSHO"
_PREFIX = struct.Struct("<4sHHIQQ")
_HAS_DESCRIPTOR = 1
# One system call for what is small costs less than one a piece.
_JOIN_BYTES = 64 * 1024

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


@dataclass(slots=True)
class Message:
    """What came in.

    Parameters
    ----------
    request : int
        Number that ties an answer to its request.
    header : dict
        What is asked or answered, as JSON.
    body : memoryview
        Bytes that the header's tree points into.
    descriptor : int or None
        An open file that came along; whoever takes the message closes it.
    """

    request: int
    header: dict[str, Any]
    body: memoryview
    descriptor: int | None = None


def send(
    connection: socket.socket,
    request: int,
    header: dict[str, Any],
    body: Iterable[Any] = (),
    *,
    descriptor: int | None = None,
) -> None:
    """Send one message; blocks until the peer's buffers have taken it.

    Parameters
    ----------
    connection : socket.socket
        A Unix stream socket.
    request : int
        The request's number.
    header : dict
        Plain JSON.
    body : iterable of bytes-like
        Sent one after the other.
    descriptor : int, optional
        An open file that the peer gets a copy of.

    Raises
    ------
    InvalidInputError
        When header or body is too large; nothing was sent then.
    ConnectionError
        When the peer is gone.
    """
    text = json.dumps(header, separators=(",", ":")).encode()
    parts = [memoryview(part).cast("B") for part in body]
    length = sum(map(len, parts))
    for what, got, limit in (
        ("header", len(text), MAX_HEADER_BYTES),
        ("body", length, MAX_BODY_BYTES),
    ):
        if got > limit:
            raise InvalidInputError(
                f"A message's {what} would be {got} bytes; expected at most {limit}. Hand over "
                "fewer rows at a time.",
                got_bytes=got,
                limit_bytes=limit,
            )
    flags = 0 if descriptor is None else _HAS_DESCRIPTOR
    start = _PREFIX.pack(_MAGIC, PROTOCOL_VERSION, flags, len(text), request, length) + text
    if descriptor is not None:
        sent = socket.send_fds(connection, [start], [descriptor])
        start = start[sent:]
    if length <= _JOIN_BYTES:
        rest = b"".join((start, *parts))
        # The descriptor took all along where there is no body; then the peer may have closed.
        if rest:
            connection.sendall(rest)
        return
    connection.sendall(start)
    for part in parts:
        connection.sendall(part)


def receive(connection: socket.socket) -> Message | None:
    """Wait for one message.

    Returns
    -------
    Message or None
        None when the peer closed the connection between two messages.

    Raises
    ------
    ConnectionError
        When the connection ended within a message.
    HostError
        When the peer speaks another version or does not keep to the limits.
    """
    descriptor: int | None = None
    prefix = b""
    while len(prefix) < _PREFIX.size:
        data, descriptors, _, _ = socket.recv_fds(connection, _PREFIX.size - len(prefix), 1)
        for extra in descriptors:
            if descriptor is None:
                descriptor = extra
            else:
                os.close(extra)
        if not data:
            if not prefix:
                return None
            raise ConnectionError("the peer closed the connection within a message")
        prefix += data
    try:
        magic, version, flags, header_bytes, request, body_bytes = _PREFIX.unpack(prefix)
        if magic != _MAGIC or version != PROTOCOL_VERSION:
            raise HostError(
                f"Got a message of protocol {magic!r} version {version}; expected {_MAGIC!r} "
                f"version {PROTOCOL_VERSION}. Install the same daskshare everywhere on this "
                "machine and end the processes that still run the other one.",
                got_version=version,
                expected_version=PROTOCOL_VERSION,
            )
        if header_bytes > MAX_HEADER_BYTES or body_bytes > MAX_BODY_BYTES:
            raise HostError(
                f"Got a message of {header_bytes} + {body_bytes} bytes; expected at most "
                f"{MAX_HEADER_BYTES} + {MAX_BODY_BYTES}.",
                got_bytes=header_bytes + body_bytes,
            )
        header = json.loads(bytes(_exactly(connection, header_bytes)))
        body = _exactly(connection, body_bytes)
        if flags & _HAS_DESCRIPTOR and descriptor is None:
            raise HostError("A message was to bring a file descriptor and brought none.")
    except BaseException:
        if descriptor is not None:
            os.close(descriptor)
        raise
    return Message(request, header, body, descriptor)


def _exactly(connection: socket.socket, length: int) -> memoryview:
    buffer = memoryview(bytearray(length))
    got = 0
    while got < length:
        count = connection.recv_into(buffer[got:])
        if not count:
            raise ConnectionError("the peer closed the connection within a message")
        got += count
    return buffer


class OwnSegment:
    """Memory that this process fills and a host reads without copying.

    An anonymous file (memfd): it has no name, so nothing is left behind however its users end.
    It is sealed against changes of its size, because a host that maps it would be killed by a
    shrinking one.

    Parameters
    ----------
    capacity_bytes : int
        Its size, for good.

    Notes
    -----
    One thread at a time. The file ends with its last mapping.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = max(capacity_bytes, mmap.PAGESIZE)
        self.descriptor = os.memfd_create("daskshare", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.descriptor, self.capacity_bytes)
        fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, _SEALS)
        self.memory = memoryview(mmap.mmap(self.descriptor, self.capacity_bytes))

    def close(self) -> None:
        """Give up the file; a host's mapping of it stays valid."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class PeerSegment:
    """A client's :class:`OwnSegment`, mapped by the host.

    Parameters
    ----------
    descriptor : int
        Of the client's file; closed here.

    Raises
    ------
    HostError
        When it is not sealed against changes of its size, or too large.
    """

    def __init__(self, descriptor: int) -> None:
        try:
            size = os.fstat(descriptor).st_size
            try:
                seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
            except OSError:
                seals = 0
            if seals & _SEALS != _SEALS or not 0 < size <= MAX_SEGMENT_BYTES:
                raise HostError(
                    f"Got a segment of {size} bytes with seals {seals:#x}; expected at most "
                    f"{MAX_SEGMENT_BYTES} bytes, sealed against changes of its size.",
                    got_bytes=size,
                )
            self.memory = memoryview(mmap.mmap(descriptor, size))
        finally:
            os.close(descriptor)
