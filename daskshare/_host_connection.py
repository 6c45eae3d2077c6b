"""One connection to a host: reads its requests, works on several at once, answers as they end."""

from __future__ import annotations

import dataclasses
import logging
import os
import socket
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

from daskshare._host_address import HostAddress, check_peer
from daskshare._host_errors import describe_error
from daskshare._host_operations import Call, find_operation
from daskshare._host_predict import PredictSpec
from daskshare._host_spec import build, carries_code
from daskshare._host_values import decode, encode
from daskshare._host_wire import PROTOCOL_VERSION, Message, PeerSegment, receive, send
from daskshare.config import HostOptions
from daskshare.errors import ConfigurationError, HostError

if TYPE_CHECKING:
    from daskshare.models.spec import ModelSpec
    from daskshare.share import Lease

__all__ = ["Connection"]

logger = logging.getLogger("daskshare.host")


class Server(Protocol):
    """What a connection needs of its server."""

    address: HostAddress
    options: HostOptions
    owner: str

    @property
    def retiring(self) -> bool: ...
    def lease(self, spec: ModelSpec) -> Lease: ...
    def give_back(self, lease: Lease, *, unload: bool) -> None: ...
    def request_started(self) -> None: ...
    def request_ended(self) -> None: ...
    def connection_ended(self, connection: Connection) -> None: ...
    def retire(self) -> None: ...
    def report(self) -> dict[str, Any]: ...


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
    ``thread`` reads; it stops reading while ``options.window`` requests are being worked on, and
    that is the whole of the backpressure: the client's writes block then.
    """

    def __init__(self, server: Server, peer: socket.socket, number: int) -> None:
        self._server = server
        self._peer = peer
        self._name = f"connection-{number}"
        self._cancelled = threading.Event()
        self._writing = threading.Lock()
        self._room = threading.Semaphore(server.options.window)
        self._workers = ThreadPoolExecutor(
            server.options.window, thread_name_prefix=f"daskshare-host-work-{number}"
        )
        self._models: dict[int, Future[Lease]] = {}
        self._segments: dict[int, PeerSegment] = {}
        self._may_send_code = False
        self.thread = threading.Thread(
            target=self._read, name=f"daskshare-host-read-{number}", daemon=True
        )

    def cut(self) -> None:
        """End the connection; from any thread."""
        try:
            self._peer.shutdown(socket.SHUT_RDWR)
        except OSError:
            logger.debug("%s had ended before", self._name)

    # -- the reading thread --

    def _read(self) -> None:
        try:
            check_peer(self._peer)
            while (message := receive(self._peer)) is not None:
                self._take(message)
        except HostError as error:
            logger.warning("%s: %s", self._name, error)
            self._answer_error(0, error)
        except OSError as error:
            logger.debug("%s ended: %s", self._name, error)
        finally:
            self._end()

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
        if header["op"] == "release":
            self._release(header["model"])
            return
        if self._server.retiring and header["op"] != "hello":
            self._answer(message.request, {"ok": False, "retired": True})
            return
        if header["op"] == "open":
            # Known at once, so that requests that follow wait for the model.
            self._models[header["model"]] = Future()
        self._room.acquire()
        self._server.request_started()
        self._workers.submit(self._work, message)

    def _end(self) -> None:
        self._cancelled.set()
        self._workers.shutdown(wait=True)
        for model in list(self._models):
            self._release(model)
        self._segments.clear()
        self._peer.close()
        self._server.connection_ended(self)

    def _release(self, model: int) -> None:
        future = self._models.pop(model, None)
        if future is None:
            return

        def give_back(done: Future[Lease]) -> None:
            if done.exception() is None:
                lease = done.result()
                self._server.give_back(lease, unload=isinstance(lease.spec, PredictSpec))

        future.add_done_callback(give_back)

    # -- the working threads --

    def _work(self, message: Message) -> None:
        header = message.header
        try:
            if self._cancelled.is_set() and header["op"] != "open":
                return
            encoded = encode(self._operate(header, message))
            self._answer(message.request, {"ok": True, "tree": encoded.tree}, encoded.body())
        except BaseException as error:
            self._answer_error(message.request, error)
        finally:
            self._server.request_ended()
            self._room.release()

    def _operate(self, header: dict[str, Any], message: Message) -> Any:
        op = header["op"]
        if op == "hello":
            return self._hello(header)
        if op == "open":
            return self._open(header, bytes(message.body))
        if op == "report":
            return self._server.report()
        if op == "retire":
            return self._retire()
        segment = header.get("segment")
        memory = message.body if segment is None else self._segments[segment].memory
        value = decode(header["tree"], memory)
        model = header.get("model")
        lease = None if model is None else self._lease(model)
        call = Call(header.get("arguments", {}), value, lease, self._name, self._cancelled)
        if op == "infer":
            return call.lease.infer(call.value, task=call.task)
        return find_operation(op, self._server.options.extensions)(call)

    def _hello(self, header: dict[str, Any]) -> dict[str, Any]:
        self._may_send_code = bool(header.get("code")) and self._server.options.allow_code
        return {
            "pid": os.getpid(),
            "owner": self._server.owner,
            "window": self._server.options.window,
            "version": PROTOCOL_VERSION,
        }

    def _retire(self) -> bool:
        if self._server.owner == "worker":
            return False
        self._server.retire()
        return True

    def _open(self, header: dict[str, Any], code: bytes) -> dict[str, Any]:
        future = self._models[header["model"]]
        try:
            if carries_code(header["spec"]) and not self._may_send_code:
                raise ConfigurationError(
                    f"The model {header['spec'].get('fields', {}).get('name', '')!r} comes with "
                    "code, which this connection may not bring: the client must ask for it "
                    "(allow_code=True) and daskshare.host.allow-code must be true where the host "
                    f"runs (it is {self._server.options.allow_code}).",
                    option="daskshare.host.allow-code",
                )
            spec = build(header["spec"], code)
            if self._server.owner == "worker" and isinstance(spec, PredictSpec):
                # Tasks of a Dask worker rely on its working directory.
                spec = dataclasses.replace(spec, directory="")
            lease = self._server.lease(spec)
        except BaseException as error:
            future.set_exception(error)
            raise
        future.set_result(lease)
        parameters = getattr(lease.program, "num_parameters", None)
        return {"key": lease.spec.key, "name": lease.spec.name, "parameters": parameters}

    def _lease(self, model: int) -> Lease:
        try:
            future = self._models[model]
        except KeyError:
            raise HostError(f"The request names model {model}, which was not opened.") from None
        return future.result()

    def _answer_error(self, request: int, error: BaseException) -> None:
        self._answer(request, {"ok": False, "error": describe_error(error)})

    def _answer(self, request: int, header: dict[str, Any], body: Any = ()) -> None:
        try:
            with self._writing:
                send(self._peer, request, header, body)
        except OSError as error:
            logger.debug("%s is gone: %s", self._name, error)
            self._cancelled.set()
