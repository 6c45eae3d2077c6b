"""A Dask worker's models for processes on other machines, by Arrow Flight.

The operations are those of a host (:mod:`daskshare.host`); only the transport differs. Dask's own
connections would do, but its scheduler would move every frame: a whole cluster tops out there.
"""

from __future__ import annotations

import hmac
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.flight

from daskshare._flight_link import COMMAND, SCHEMA, TOKEN_HEADER, FlightLink, pack, unpack
from daskshare._host_ledger import Ledger
from daskshare._host_link import Link
from daskshare._host_session import Session
from daskshare.config import FlightOptions, HostOptions
from daskshare.errors import HostError
from daskshare.host import HostClient

if TYPE_CHECKING:
    from daskshare.share import ModelShare

__all__ = ["FlightEndpoint", "connect_flight"]

logger = logging.getLogger("daskshare.flight")

_POLL_SECONDS = 0.2


class _Guard(pyarrow.flight.ServerMiddlewareFactory):  # type: ignore[misc]
    """Lets in who shows the token."""

    def __init__(self, token: str) -> None:
        super().__init__()
        self._expected = f"Bearer {token}".encode()

    def start_call(self, info: Any, headers: dict[str, list[str]]) -> None:
        shown = headers.get(TOKEN_HEADER, [""])[0].encode()
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
                writer.write_with_metadata(*pack(request, header, body))
            except pa.ArrowException as error:
                raise ConnectionError(str(error)) from error

        session = Session(self._ledger, next(self._numbers), answer, allow_code=self._allow_code)
        with self._lock:
            self._sessions.add(session)
        try:
            writer.begin(SCHEMA)
            for chunk in _chunks(reader):
                session.take(*unpack(chunk))
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
        if descriptor.command != COMMAND:
            raise pyarrow.flight.FlightServerError(
                f"got {descriptor.command!r}, expected {COMMAND!r}: install the same daskshare "
                "on both sides"
            )
        self._exchange(context, reader, writer)


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
    return HostClient(
        connect=_Connector(find, name, nearer).connect, address=name, allow_code=allow_code
    )


class _Connector:
    """Connects to the best endpoint that answers; see :func:`connect_flight`."""

    def __init__(
        self, find: Callable[[], list[str]], name: str, nearer: Callable[[], Link | None]
    ) -> None:
        self._find = find
        self._name = name
        self._nearer = nearer
        self._options = FlightOptions.from_config()
        self._last: FlightLink | None = None

    def connect(self) -> Link:
        """Return a link, within the timeout for all endpoints together.

        A worker that was killed is started again by its nanny, so an endpoint that is lost is
        waited for, as long; not where a machine fell silent, which has cost that time already.
        """
        lost = self._last is not None and not self._last.silent
        deadline = time.monotonic() + (self._options.timeout_seconds if lost else 0.0)
        while True:
            link = self._nearer()
            if link is not None:
                return link
            locations = self._find()
            reasons: list[str] = []
            found = self._first_that_answers(locations, reasons)
            if found is not None:
                self._last = found
                return found
            if time.monotonic() >= deadline:
                break
            time.sleep(_POLL_SECONDS)
        raise HostError(
            f"No Arrow Flight endpoint of the Dask cluster at {self._name} can be used: "
            f"{'; '.join(reasons) or 'it has none'}. Start its workers with daskshare installed "
            "and daskshare.flight.port set.",
            address=self._name,
            endpoints=locations,
        )

    def _first_that_answers(self, locations: list[str], reasons: list[str]) -> FlightLink | None:
        left_seconds = self._options.timeout_seconds
        for place, location in enumerate(locations):
            if self._last is not None and self._last.silent and self._last.location == location:
                # Dask misses a machine that vanished only after minutes.
                reasons.append(f"{location} no longer answers")
                continue
            is_last = place == len(locations) - 1
            started = time.monotonic()
            try:
                return FlightLink(
                    location,
                    self._options,
                    timeout_seconds=left_seconds if is_last else left_seconds / 2,
                )
            except ConnectionError as error:
                reasons.append(str(error))
                left_seconds = max(0.1, left_seconds - (time.monotonic() - started))
        return None
