"""A session over a Unix socket, with arrays in memory that the client shares."""

from __future__ import annotations

import logging
import os
import socket
import threading
from typing import Any, Protocol

from daskshare._host_address import check_peer
from daskshare._host_session import Server, Session
from daskshare._host_wire import Message, PeerSegment, receive, send
from daskshare.errors import HostError

__all__ = ["Connection"]

logger = logging.getLogger("daskshare.host")


class _SocketServer(Server, Protocol):
    def connection_ended(self, connection: Connection) -> None: ...


class Connection:
    """Serves one client.

    Parameters
    ----------
    server : HostServer
        Whose it is.
    peer : socket.socket
        Connected.
    number : int
        For names of threads and for taking turns.

    Notes
    -----
    ``thread`` reads; the session's threads work and answer.
    """

    def __init__(self, server: _SocketServer, peer: socket.socket, number: int) -> None:
        self._server = server
        self._peer = peer
        self._segments: dict[int, PeerSegment] = {}
        self._session = Session(server, number, self._answer, allow_code=server.options.allow_code)
        self.thread = threading.Thread(
            target=self._read, name=f"daskshare-host-read-{number}", daemon=True
        )

    def cut(self) -> None:
        """End the connection; from any thread."""
        try:
            self._peer.shutdown(socket.SHUT_RDWR)
        except OSError:
            logger.debug("The connection had ended before")

    def _answer(self, request: int, header: dict[str, Any], body: Any) -> None:
        send(self._peer, request, header, body)

    def _read(self) -> None:
        try:
            check_peer(self._peer)
            while (message := receive(self._peer)) is not None:
                self._take(message)
        except HostError as error:
            logger.warning("%s", error)
            self._session.answer_error(0, error)
        except OSError as error:
            logger.debug("The connection ended: %s", error)
        finally:
            self._session.end()
            self._segments.clear()
            self._peer.close()
            self._server.connection_ended(self)

    def _take(self, message: Message) -> None:
        header = message.header
        if header["op"] == "segment":
            if message.descriptor is None:
                raise HostError("A segment came without its file.")
            self._segments[header["segment"]] = PeerSegment(message.descriptor)
            return
        if message.descriptor is not None:
            os.close(message.descriptor)
        if header["op"] == "drop-segment":
            del self._segments[header["segment"]]
            return
        segment = header.get("segment")
        if segment is not None and segment not in self._segments:
            raise HostError(f"A request names segment {segment}, which was not handed over.")
        memory = message.body if segment is None else self._segments[segment].memory
        self._session.take(message.request, header, memory)
