"""A stream to an Arrow Flight endpoint: its messages, and how its loss is noticed."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.flight

from daskshare._host_link import Segment
from daskshare._host_wire import MAX_BODY_BYTES, PROTOCOL_VERSION
from daskshare.config import FlightOptions
from daskshare.errors import HostError, InvalidInputError

__all__ = ["COMMAND", "SCHEMA", "TOKEN_HEADER", "FlightLink", "pack", "unpack"]

logger = logging.getLogger("daskshare.flight")

#: A message's body is the one value of the one column; its header is the batch's metadata.
SCHEMA = pa.schema([("body", pa.large_binary())])
COMMAND = json.dumps({"daskshare": PROTOCOL_VERSION}).encode()
TOKEN_HEADER = "authorization"


def pack(request: int, header: dict[str, Any], body: Any) -> tuple[pa.RecordBatch, bytes]:
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
    batch = pa.RecordBatch.from_arrays([column], schema=SCHEMA)
    return batch, json.dumps({"request": request, "header": header}).encode()


def unpack(chunk: Any) -> tuple[int, dict[str, Any], memoryview]:
    message = json.loads(chunk.app_metadata.to_pybytes())
    data = chunk.data.column(0).buffers()[2]
    # Arrow leaves an empty value's buffer out.
    return message["request"], message["header"], memoryview(data or b"")


class FlightLink:
    """A stream to an endpoint; see :class:`daskshare._host_link.Link`.

    Parameters
    ----------
    location : str
        Of the endpoint.
    options : FlightOptions
        Token, certificate authority, timeout.
    timeout_seconds : float, optional
        For reaching it, instead of the options' own.

    Raises
    ------
    ConnectionError
        When it cannot be reached in time.

    Notes
    -----
    A machine that vanishes closes nothing, and a stream has no deadline, as a model may take its
    time. So ``daskshare-flight-watch`` asks the endpoint now and then whether it is there while a
    call waits, and gives the stream up when no answer comes within the timeout. gRPC's own
    keepalive would not do: a server takes pings more often than every five minutes for an attack.
    """

    shares_memory = False

    def __init__(
        self, location: str, options: FlightOptions, *, timeout_seconds: float | None = None
    ) -> None:
        self.location = location
        self.silent = False
        self._timeout_seconds = options.timeout_seconds
        self._unanswered: set[int] = set()
        extra: dict[str, Any] = {}
        if options.tls_ca is not None:
            extra["tls_root_certs"] = Path(options.tls_ca).read_bytes()
        self._headers = []
        if options.token is not None:
            self._headers.append((TOKEN_HEADER.encode(), f"Bearer {options.token}".encode()))
        self._client = pyarrow.flight.FlightClient(location, **extra)
        self._watch = _Watch(self._is_there, self._give_up, options.timeout_seconds / 2)
        descriptor = pyarrow.flight.FlightDescriptor.for_command(COMMAND)
        try:
            # Nothing is sent before the first write; asking for actions tells whether it is there.
            self._probe(timeout_seconds or options.timeout_seconds)
            self._writer, self._reader = self._client.do_exchange(
                descriptor, pyarrow.flight.FlightCallOptions(headers=self._headers)
            )
            self._watch.start()
            with self._waiting():
                self._writer.begin(SCHEMA)
        except BaseException:
            self._watch.stop()
            self._client.close()
            raise

    def _probe(self, timeout_seconds: float) -> None:
        options = pyarrow.flight.FlightCallOptions(timeout=timeout_seconds, headers=self._headers)
        try:
            list(self._client.list_actions(options))
        except pyarrow.flight.FlightTimedOutError as error:
            raise ConnectionError(
                f"{self.location} does not answer within {timeout_seconds:.3g} s"
            ) from error
        except pa.ArrowException as error:
            raise _lost(self.location, error) from error

    def _is_there(self) -> bool:
        try:
            self._probe(self._timeout_seconds)
        except (ConnectionError, HostError) as error:
            logger.warning("The stream is given up: %s", error)
            return False
        return True

    def _give_up(self) -> None:
        self.silent = True
        self._reader.cancel()

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Watch the endpoint during a call, and say how the call was lost."""
        try:
            with self._watch:
                yield
        except pa.ArrowException as error:
            if self.silent:
                raise ConnectionError(
                    f"{self.location} has not answered for {self._timeout_seconds:.3g} s: its "
                    "process or its machine hangs or is gone"
                ) from error
            raise _lost(self.location, error) from error

    def send(
        self, request: int, header: dict[str, Any], body: Any = (), segment: Segment | None = None
    ) -> None:
        """Send a message; what is in a segment is copied out of it."""
        if segment is not None:
            # Filled for a host of this machine, which ended before it answered.
            header = {name: value for name, value in header.items() if name != "segment"}
            body = [segment.memory]
        batch, metadata = pack(request, header, body)
        if request:
            self._unanswered.add(request)
        with self._waiting():
            self._writer.write_with_metadata(batch, metadata)

    def receive(self) -> tuple[int, dict[str, Any], memoryview] | None:
        """Wait for an answer."""
        with self._waiting():
            try:
                message = unpack(self._reader.read_chunk())
            except StopIteration:
                return None
        self._unanswered.discard(message[0])
        return message

    def has_ended(self) -> bool:
        """Say no: a stream tells only when it is used."""
        return False

    def close(self) -> None:
        """End the stream; what the endpoint still works on is dropped."""
        if self._unanswered or self.silent:
            self._reader.cancel()
        try:
            with self._waiting():
                self._writer.close()
        except (ConnectionError, HostError) as error:
            logger.debug("The stream to %s had ended: %s", self.location, error)
        self._watch.stop()
        self._client.close()


class _Watch:
    """Looks, in a thread of its own, after whoever waits inside its ``with`` block.

    Parameters
    ----------
    is_there : callable
        Called when a wait has lasted some time, and again as long as it lasts.
    give_up : callable
        Called when ``is_there`` says no.
    interval_seconds : float
        How long a wait is none of its business.
    """

    def __init__(
        self,
        is_there: Callable[[], bool],
        give_up: Callable[[], None],
        interval_seconds: float,
    ) -> None:
        self._is_there = is_there
        self._give_up = give_up
        self._interval_seconds = interval_seconds
        self._changed = threading.Condition()
        self._since_seconds: float | None = None
        self._stopped = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to look."""
        self._thread = threading.Thread(
            target=self._run, name="daskshare-flight-watch", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """End; waits for a look that has begun."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> None:
        # No notice: the thread looks often enough, and this is called for each message.
        self._since_seconds = time.monotonic()

    def __exit__(self, *exc_info: object) -> None:
        self._since_seconds = None

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._stopped or self._changed.wait_for(
                    lambda: self._stopped, self._interval_seconds / 2
                ):
                    return
            since = self._since_seconds
            if since is None or time.monotonic() - since < self._interval_seconds:
                continue
            if not self._is_there() and self._since_seconds == since:
                self._give_up()
                return


def _lost(location: str, error: pa.ArrowException) -> Exception:
    if isinstance(error, pyarrow.flight.FlightUnauthenticatedError):
        return HostError(f"{location} refuses this client: {error}", address=location)
    return ConnectionError(f"{location}: {error}")
