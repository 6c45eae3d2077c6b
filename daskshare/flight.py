"""A Dask worker's models for processes on other machines, by Arrow Flight.

The operations are those of a host (:mod:`daskshare.host`); only the transport differs. Dask's own
connections would do, but its scheduler would move every frame: a whole cluster tops out there.
"""

from __future__ import annotations

import hmac
import itertools
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.flight

from daskshare._host_ledger import Ledger
from daskshare._host_link import Link, Segment
from daskshare._host_session import Session
from daskshare._host_wire import MAX_BODY_BYTES, PROTOCOL_VERSION
from daskshare.config import FlightOptions, HostOptions
from daskshare.errors import HostError, InvalidInputError
from daskshare.host import HostClient

if TYPE_CHECKING:
    from daskshare.share import ModelShare

__all__ = ["FlightEndpoint", "connect_flight"]

logger = logging.getLogger("daskshare.flight")

#: A message's body is the one value of the one column; its header is the batch's metadata.
_SCHEMA = pa.schema([("body", pa.large_binary())])
_COMMAND = json.dumps({"daskshare": PROTOCOL_VERSION}).encode()
_HEADER = "authorization"


def _pack(request: int, header: dict[str, Any], body: Any) -> tuple[pa.RecordBatch, bytes]:
    data = b"".join(bytes(part) for part in body)
    if len(data) > MAX_BODY_BYTES:
        raise InvalidInputError(
            f"A message's body would be {len(data)} bytes; expected at most {MAX_BODY_BYTES}. "
            "Hand over fewer rows at a time.",
            got_bytes=len(data),
        )
    offsets = pa.py_buffer(b"".join(n.to_bytes(8, "little") for n in (0, len(data))))
    # Built from its buffers: pa.array would copy the data once more.
    column = pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, pa.py_buffer(data)])
    batch = pa.RecordBatch.from_arrays([column], schema=_SCHEMA)
    return batch, json.dumps({"request": request, "header": header}).encode()


def _unpack(chunk: Any) -> tuple[int, dict[str, Any], memoryview]:
    message = json.loads(chunk.app_metadata.to_pybytes())
    data = chunk.data.column(0).buffers()[2]
    # Arrow leaves an empty value's buffer out.
    return message["request"], message["header"], memoryview(data or b"")


class _Guard(pyarrow.flight.ServerMiddlewareFactory):  # type: ignore[misc]
    """Lets in who shows the token."""

    def __init__(self, token: str) -> None:
        super().__init__()
        self._expected = f"Bearer {token}".encode()

    def start_call(self, info: Any, headers: dict[str, list[str]]) -> None:
        shown = headers.get(_HEADER, [""])[0].encode()
        if not hmac.compare_digest(shown, self._expected):
            raise pyarrow.flight.FlightUnauthenticatedError(
                "the token is missing or wrong; set daskshare.flight.token to the workers'"
            )


class FlightEndpoint:
    """Serves a worker's :class:`~daskshare.share.ModelShare` by Arrow Flight.

    Parameters
    ----------
    share : ModelShare
        What to serve; stays its owner's.
    options : FlightOptions
        Port, token, TLS.
    host_options : HostOptions
        Bounds and extensions, as for processes of the same machine.
    host : str
        Address to listen at, where the options name none.

    Attributes
    ----------
    location : str
        Where clients reach it, "grpc://10.0.0.7:41233" for example.

    Notes
    -----
    gRPC's own threads read; each client has up to ``window`` threads that work, as in a host. A
    client's leases end with its stream.
    """

    def __init__(
        self, share: ModelShare, options: FlightOptions, host_options: HostOptions, *, host: str
    ) -> None:
        self._ledger = Ledger(lambda: share, options=host_options, owner="worker")
        self._allow_code = options.allow_code
        self._numbers = itertools.count(1)
        self._sessions: set[Session] = set()
        self._lock = threading.Lock()
        certificates = []
        if options.tls_certificate is not None and options.tls_key is not None:
            certificates = [
                (Path(options.tls_certificate).read_bytes(), Path(options.tls_key).read_bytes())
            ]
        scheme = "grpc+tls" if certificates else "grpc"
        host = options.host or host
        bracketed = f"[{host}]" if ":" in host else host
        self._server = _FlightServer(
            self._exchange,
            f"{scheme}://{bracketed}:{options.port or 0}",
            tls_certificates=certificates,
            middleware={} if options.token is None else {"guard": _Guard(options.token)},
        )
        self.location = f"{scheme}://{bracketed}:{self._server.port}"

    def report(self) -> dict[str, Any]:
        """Say where it is and how many use it, as plain data."""
        with self._lock:
            return {"location": self.location, "sessions": len(self._sessions)}

    def close(self) -> None:
        """Send new requests elsewhere and end when the streams have; may take their time."""
        self._ledger.retire()
        with self._lock:
            for session in self._sessions:
                session.cancelled.set()
        self._ledger.stop_unloading()
        self._server.shutdown()

    def _exchange(self, context: Any, reader: Any, writer: Any) -> None:
        """Serve one client's stream, in one of gRPC's threads."""

        def answer(request: int, header: dict[str, Any], body: Any) -> None:
            try:
                writer.write_with_metadata(*_pack(request, header, body))
            except pa.ArrowException as error:
                raise ConnectionError(str(error)) from error

        session = Session(self._ledger, next(self._numbers), answer, allow_code=self._allow_code)
        with self._lock:
            self._sessions.add(session)
        try:
            writer.begin(_SCHEMA)
            for chunk in _chunks(reader):
                session.take(*_unpack(chunk))
        finally:
            session.end()
            with self._lock:
                self._sessions.discard(session)


def _chunks(reader: Any) -> Iterator[Any]:
    while True:
        try:
            yield reader.read_chunk()
        except StopIteration:
            return


class _FlightServer(pyarrow.flight.FlightServerBase):  # type: ignore[misc]
    def __init__(self, exchange: Callable[[Any, Any, Any], None], location: str, **options: Any):
        super().__init__(location, **options)
        self._exchange = exchange

    def list_actions(self, context: Any) -> list[Any]:
        """Return none: answering at all tells that the endpoint is there and takes the token."""
        return []

    def do_exchange(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        if descriptor.command != _COMMAND:
            raise pyarrow.flight.FlightServerError(
                f"got {descriptor.command!r}, expected {_COMMAND!r}: install the same daskshare "
                "on both sides"
            )
        self._exchange(context, reader, writer)


class FlightLink:
    """A stream to an endpoint; see :class:`daskshare._host_link.Link`.

    Parameters
    ----------
    location : str
        Of the endpoint.
    options : FlightOptions
        Token, certificate authority, timeout.

    Raises
    ------
    ConnectionError
        When it cannot be reached in time.

    Notes
    -----
    A machine that vanishes says nothing, and its stream would be waited for without end. So a
    thread looks whether the endpoint still takes calls when an answer is late, and breaks the
    stream off when it does not; a model may take as long as it likes.
    """

    shares_memory = False

    def __init__(self, location: str, options: FlightOptions) -> None:
        self.location = location
        self._timeout_seconds = options.timeout_seconds
        self._unanswered: set[int] = set()
        self._heard_seconds = time.monotonic()
        self._silent = False
        self._ended = threading.Event()
        self._extra: dict[str, Any] = {}
        if options.tls_ca is not None:
            self._extra["tls_root_certs"] = Path(options.tls_ca).read_bytes()
        self._headers = []
        if options.token is not None:
            self._headers.append((_HEADER.encode(), f"Bearer {options.token}".encode()))
        self._client = pyarrow.flight.FlightClient(location, **self._extra)
        descriptor = pyarrow.flight.FlightDescriptor.for_command(_COMMAND)
        try:
            # Nothing is sent before the first write; asking for actions tells whether it is there.
            self._ask(self._client, self._timeout_seconds)
            self._writer, self._reader = self._client.do_exchange(
                descriptor, pyarrow.flight.FlightCallOptions(headers=self._headers)
            )
            self._writer.begin(_SCHEMA)
        except pa.ArrowException as error:
            self._client.close()
            raise _lost(location, error) from error
        threading.Thread(target=self._watch, name="daskshare-flight-watch", daemon=True).start()

    def send(
        self, request: int, header: dict[str, Any], body: Any = (), segment: Segment | None = None
    ) -> None:
        """Send a message; what is in a segment is copied out of it."""
        if segment is not None:
            # Filled for a host of this machine, which ended before it answered.
            header = {name: value for name, value in header.items() if name != "segment"}
            body = [segment.memory]
        batch, metadata = _pack(request, header, body)
        if request:
            if not self._unanswered:
                self._heard_seconds = time.monotonic()
            self._unanswered.add(request)
        try:
            self._writer.write_with_metadata(batch, metadata)
        except pa.ArrowException as error:
            raise self._broken(error) from error

    def receive(self) -> tuple[int, dict[str, Any], memoryview] | None:
        """Wait for an answer."""
        try:
            message = _unpack(self._reader.read_chunk())
        except StopIteration:
            return None
        except pa.ArrowException as error:
            raise self._broken(error) from error
        self._heard_seconds = time.monotonic()
        self._unanswered.discard(message[0])
        return message

    def has_ended(self) -> bool:
        """Say no: a stream tells only when it is used."""
        return False

    def close(self) -> None:
        """End the stream; what the endpoint still works on is dropped."""
        self._ended.set()
        if self._unanswered:
            self._reader.cancel()
        try:
            self._writer.close()
        except pa.ArrowException as error:
            logger.debug("The stream to %s had ended: %s", self.location, error)
        self._client.close()

    def _ask(self, client: Any, timeout_seconds: float) -> None:
        deadline = pyarrow.flight.FlightCallOptions(timeout=timeout_seconds, headers=self._headers)
        list(client.list_actions(deadline))

    def _watch(self) -> None:
        # Half of the time until it asks, half for the answer; the next one may take as long again.
        step_seconds = self._timeout_seconds / 4
        while not self._ended.wait(step_seconds):
            if self._unanswered and time.monotonic() - self._heard_seconds > step_seconds:
                with pyarrow.flight.FlightClient(self.location, **self._extra) as client:
                    try:
                        self._ask(client, 2 * step_seconds)
                    except pyarrow.flight.FlightError as error:
                        logger.debug("%s takes no calls any more: %s", self.location, error)
                        self._silent = True
                        self._reader.cancel()
                        return

    def _broken(self, error: pa.ArrowException) -> Exception:
        if self._silent:
            return ConnectionError(
                f"{self.location}: no answer, and no new call taken within "
                f"{self._timeout_seconds / 2:g} s"
            )
        return _lost(self.location, error)


def _lost(location: str, error: pa.ArrowException) -> Exception:
    if isinstance(error, pyarrow.flight.FlightUnauthenticatedError):
        return HostError(f"{location} refuses this client: {error}", address=location)
    return ConnectionError(f"{location}: {error}")


def connect_flight(
    find: Callable[[], list[str]],
    name: str,
    *,
    allow_code: bool = False,
    nearer: Callable[[], Link | None] = lambda: None,
) -> HostClient:
    """Return a client of one of several endpoints, which moves to another when that one ends.

    Parameters
    ----------
    find : callable
        Returns the locations of the endpoints that are there now, best first.
    name : str
        Of the cluster, for messages.
    allow_code : bool
        Whether this client may hand over models as pickled code.
    nearer : callable
        Returns a link that is better than any endpoint, or None.

    Raises
    ------
    HostError
        When no endpoint is there or can be reached; names each and why.
    """
    options = FlightOptions.from_config()

    def connect() -> Link:
        link = nearer()
        if link is not None:
            return link
        reasons = []
        locations = find()
        for location in locations:
            try:
                return FlightLink(location, options)
            except ConnectionError as error:
                reasons.append(str(error))
        raise HostError(
            f"No Arrow Flight endpoint of the Dask cluster at {name} can be used: "
            f"{'; '.join(reasons) or 'it has none'}. Start its workers with daskshare installed "
            "and daskshare.flight.port set.",
            address=name,
            endpoints=locations,
        )

    return HostClient(connect=connect, address=name, allow_code=allow_code)
