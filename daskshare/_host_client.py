"""What a process does to use another process's models."""

from __future__ import annotations

import os
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, Self

from daskshare._host_address import HostAddress, local_devices
from daskshare._host_errors import as_exception
from daskshare._host_link import Link, Segment, SocketLink
from daskshare._host_spec import describe
from daskshare._host_start import connect_or_start
from daskshare._host_values import Encoded, decode, encode
from daskshare.config import HostOptions
from daskshare.errors import HostError
from daskshare.models.spec import ModelSpec

__all__ = ["HostClient", "HostedModel"]

# Less travels in the message itself: a segment's bookkeeping would cost more than the copy.
_INLINE_BYTES = 64 * 1024
# A request is sent again once when its host was killed; who kills two hosts is the cause.
_MAX_LOSSES = 1
_MAX_RECONNECTS = 5


class _Pending:
    """A request without an answer, in the form in which it can be sent again."""

    __slots__ = ("body", "header", "losses", "retired", "segment")

    def __init__(self, header: dict[str, Any], body: list[Any], segment: Segment | None) -> None:
        self.header = header
        self.body = body
        self.segment = segment
        self.losses = 0
        self.retired = False


class HostedModel:
    """A model in a host; stays loaded there while this object or its client lives.

    Parameters
    ----------
    client : HostClient
        Through which it was opened.
    number : int
        The client's number for it.
    info : dict
        ``key``, ``name`` and, for a caller's function, the number of its ``parameters``.
    """

    def __init__(self, client: HostClient, number: int, info: dict[str, Any]) -> None:
        self.client = client
        self.number = number
        self.info = info
        # Not the client's method: the end may come from the collector, in any thread.
        self._end = weakref.finalize(self, client._to_release.append, number)
        self._end.atexit = False

    def infer(self, inputs: Any) -> Any:
        """Run the model; as in :meth:`daskshare.share.Lease.infer`, in the other process."""
        return self.client.call("infer", value=inputs, model=self)

    def release(self) -> None:
        """Let the host know that it is not needed; again is nothing."""
        self._end()


class HostClient:
    """A connection to the host of a device; starts the host when there is none.

    Parameters
    ----------
    device : str, optional
        ``"cpu"`` or a GPU's UUID; default the first that this process may use.
    directory : str, optional
        Folder of the sockets; default ``daskshare.host.directory``.
    allow_code : bool
        Whether this client may hand over models as pickled code.
    connect : callable, optional
        Returns a :class:`~daskshare._host_link.Link`; default a Unix socket to the device's host.
    address : str, optional
        What ``connect`` connects to, for messages.

    Attributes
    ----------
    address : HostAddress or str
        Where the host is.
    host : dict
        What it said of itself: ``pid``, ``owner`` ("process" or "worker"), ``window``.

    Raises
    ------
    HostError
        When the host cannot be reached or started.

    Notes
    -----
    For one thread at a time, in the process that made it. When the host is killed, requests without
    an answer are sent again by themselves, once, to a new host, where their models are loaded anew;
    when it gives way to a Dask worker, as often as needed.
    """

    def __init__(
        self,
        device: str | None = None,
        *,
        directory: str | None = None,
        allow_code: bool = False,
        connect: Callable[[], Link] | None = None,
        address: str | None = None,
    ) -> None:
        options = HostOptions.from_config()
        self.address: HostAddress | str
        if connect is None:
            here = HostAddress(device or local_devices()[0], directory)
            self.address = here
            self._advice = f"See {here.log}."
            connect = lambda: SocketLink(connect_or_start(here, options))  # noqa: E731
        else:
            self.address = address or "the host"
            self._advice = "See the log of the process there."
        self.host: dict[str, Any] = {}
        self._allow_code = allow_code
        self._connect = connect
        self._pid = os.getpid()
        self._link: Link | None = None
        self._opened: dict[int, tuple[dict[str, Any], bytes]] = {}
        self._pending: dict[int, _Pending] = {}
        self._answers: dict[int, Any] = {}
        self._to_release: deque[int] = deque()
        self._free: list[Segment] = []
        self._next = 1
        self._reconnect()

    # -- what callers use --

    def open(self, spec: ModelSpec | str) -> HostedModel:
        """Load a model in the host, or find it loaded; blocks until it is there.

        Parameters
        ----------
        spec : ModelSpec or str
            A model, or the name of a packaged one.

        Raises
        ------
        ModelError
            When it cannot be loaded.
        ConfigurationError
            When it comes with code that this client or the host does not allow.
        """
        description, code = describe(spec)
        number = self._number()
        self._opened[number] = description, code
        try:
            request = self._submit(_Pending(_open(number, description), [code], None))
            info = self.result(request)
        except BaseException:
            del self._opened[number]
            raise
        return HostedModel(self, number, info)

    def submit(
        self,
        op: str,
        arguments: dict[str, Any] | None = None,
        *,
        value: Any = None,
        model: HostedModel | None = None,
    ) -> int:
        """Hand a request over; blocks while as many as the host's window are without an answer.

        Parameters
        ----------
        op : str
            "infer" or an extension's operation.
        arguments : dict, optional
            Plain JSON.
        value : object
            Arrays and the like; copied before this returns.
        model : HostedModel, optional
            The model to use.

        Returns
        -------
        int
            For :meth:`result`.

        Raises
        ------
        InvalidInputError
            When the value cannot be sent.
        HostError
            When the host is gone and no other can be had.
        """
        encoded = encode(value)
        header = {"op": op, "arguments": arguments or {}, "tree": encoded.tree}
        if model is not None:
            header["model"] = model.number
        while len(self._pending) >= self.host["window"]:
            self._read_one()
        return self._submit(self._filled(header, encoded))

    def result(self, request: int) -> Any:
        """Wait for a request's answer.

        Raises
        ------
        Exception
            What the operation raised in the host, with its traceback as a note.
        HostError
            When the host was killed twice while it worked on the request.
        """
        while request not in self._answers:
            self._read_one()
        answer = self._answers.pop(request)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def call(
        self,
        op: str,
        arguments: dict[str, Any] | None = None,
        *,
        value: Any = None,
        model: HostedModel | None = None,
    ) -> Any:
        """Submit and wait: see :meth:`submit` and :meth:`result`."""
        return self.result(self.submit(op, arguments, value=value, model=model))

    def report(self) -> dict[str, Any]:
        """Ask the host what it has done: ``pid``, ``owner``, ``connections``, ``models``."""
        report: dict[str, Any] = self.call("report")
        return report

    @property
    def num_pending(self) -> int:
        """Requests without an answer."""
        return len(self._pending)

    @property
    def num_pending_bytes(self) -> int:
        """Bytes of shared memory that hold requests without an answer."""
        segments = (pending.segment for pending in self._pending.values())
        return sum(segment.capacity_bytes for segment in segments if segment is not None)

    def close(self) -> None:
        """End the connection: the host drops what it still works on. Idempotent."""
        if self._link is not None:
            self._link.close()
            self._link = None
        for segment in [*self._free, *(p.segment for p in self._pending.values() if p.segment)]:
            segment.close()
        self._free.clear()
        self._pending.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # -- sending --

    def _number(self) -> int:
        self._next += 1
        return self._next

    def _filled(self, header: dict[str, Any], encoded: Encoded) -> _Pending:
        if encoded.num_bytes <= _INLINE_BYTES or not (self._link and self._link.shares_memory):
            # Copied: it may have to be sent again after the caller has changed its arrays.
            return _Pending(header, [b"".join(encoded.body())], None)
        segment = self._segment(encoded.num_bytes)
        encoded.write(segment.memory)
        header["segment"] = segment.number
        return _Pending(header, [], segment)

    def _segment(self, num_bytes: int) -> Segment:
        self._free.sort(key=lambda segment: segment.capacity_bytes)
        for i, segment in enumerate(self._free):
            if segment.capacity_bytes >= num_bytes:
                return self._free.pop(i)
        if self._free:
            # The largest that is too small makes way, so that there are never more than requests.
            old = self._free.pop()
            old.close()
            if old.link is self._link is not None:
                self._try_send(0, {"op": "drop-segment", "segment": old.number})
        # Rows come in batches of about the same size: a little more room serves the next ones too.
        return Segment(num_bytes + num_bytes // 4, self._number())

    def _submit(self, pending: _Pending) -> int:
        if os.getpid() != self._pid:
            raise HostError(
                f"This client was made in process {self._pid} and is used in {os.getpid()}; "
                "expected one client a process. Make it after the fork.",
                address=str(self.address),
            )
        if self._link is None or self._link.has_ended():
            self._reconnect()
        while self._to_release:
            number = self._to_release.popleft()
            if self._opened.pop(number, None) is not None:
                self._try_send(0, {"op": "release", "model": number})
        request = self._number()
        self._pending[request] = pending
        try:
            self._send(request, pending)
        except OSError as error:
            self._lost(error)
        except BaseException:
            del self._pending[request]
            raise
        return request

    def _send(self, request: int, pending: _Pending) -> None:
        assert self._link is not None
        self._link.send(request, pending.header, pending.body, pending.segment)

    def _try_send(self, request: int, header: dict[str, Any]) -> None:
        assert self._link is not None
        try:
            self._link.send(request, header)
        except OSError as error:
            self._lost(error)

    # -- receiving --

    def _read_one(self) -> None:
        """Take one answer in, or find out that the host is gone and begin again elsewhere."""
        if self._pending and all(pending.retired for pending in self._pending.values()):
            self._reconnect()
        link = self._link
        if link is None:
            raise HostError(
                f"The connection to {self.address} was closed.", address=str(self.address)
            )
        try:
            message = link.receive()
        except OSError as error:
            self._lost(error)
            return
        if message is None:
            self._lost(ConnectionError("the host closed the connection"))
            return
        request, header, body = message
        if request == 0:
            if not header["ok"]:
                raise as_exception(header["error"], self._where())
            return
        if header.get("retired"):
            self._pending[request].retired = True
            return
        pending = self._pending.pop(request, None)
        if pending is None:
            # Of a model that was opened again, about which nobody asked.
            return
        if pending.segment is not None:
            self._free.append(pending.segment)
        if header["ok"]:
            self._answers[request] = decode(header["tree"], body)
        else:
            self._answers[request] = as_exception(header["error"], self._where())

    def _where(self) -> str:
        return f"host {self.host.get('pid', '?')} at {self.address}"

    # -- losing the host --

    def _lost(self, cause: BaseException) -> None:
        """Count the loss for each request that was under way, and send them again."""
        for request, pending in list(self._pending.items()):
            if pending.retired:
                continue
            pending.losses += 1
            if pending.losses > _MAX_LOSSES:
                del self._pending[request]
                error = HostError(
                    f"The host at {self.address} ended twice "
                    f"while it worked on this request ({cause}). {self._advice}",
                    address=str(self.address),
                )
                error.__cause__ = cause
                self._answers[request] = error
        self._reconnect()

    def _reconnect(self) -> None:
        """Connect, open the models again and send again what has no answer."""
        cause: BaseException | None = None
        for _ in range(_MAX_RECONNECTS):
            if self._link is not None:
                self._link.close()
                self._link = None
            self._link = self._connect()
            try:
                if not self._greet(self._link):
                    continue
                opening = {p.header["model"] for p in self._pending.values() if _opens(p)}
                for number, (description, code) in self._opened.items():
                    if number not in opening:
                        message = _open(number, description)
                        self._link.send(self._number(), message, [code])
                for request, pending in self._pending.items():
                    pending.retired = False
                    self._send(request, pending)
            except OSError as error:
                cause = error
                continue
            except BaseException:
                self.close()
                raise
            return
        self.close()
        raise HostError(
            f"The host at {self.address} ended each of "
            f"{_MAX_RECONNECTS} times that it was connected to. {self._advice}",
            address=str(self.address),
        ) from cause

    def _greet(self, link: Link) -> bool:
        """Say hello; False when the host was just ending."""
        link.send(self._number(), {"op": "hello", "code": self._allow_code})
        answer = link.receive()
        if answer is None:
            return False
        _, header, body = answer
        if not header["ok"]:
            raise as_exception(header["error"], f"the host at {self.address}")
        self.host = decode(header["tree"], body)
        return True


def _open(number: int, description: dict[str, Any]) -> dict[str, Any]:
    return {"op": "open", "model": number, "spec": description}


def _opens(pending: _Pending) -> bool:
    return bool(pending.header["op"] == "open")
