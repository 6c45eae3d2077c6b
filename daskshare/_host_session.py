"""What one client of a host has open and may do, whatever it is connected by."""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

from daskshare._host_errors import describe_error
from daskshare._host_operations import Call, find_operation
from daskshare._host_predict import PredictSpec
from daskshare._host_spec import build, carries_code
from daskshare._host_values import decode, encode
from daskshare._host_wire import PROTOCOL_VERSION
from daskshare.config import HostOptions
from daskshare.errors import ConfigurationError, HostError

if TYPE_CHECKING:
    from collections.abc import Callable

    from daskshare.models.spec import ModelSpec
    from daskshare.share import Lease

__all__ = ["Server", "Session"]

logger = logging.getLogger("daskshare.host")


class Server(Protocol):
    """What a session needs of its server."""

    options: HostOptions
    owner: str

    @property
    def retiring(self) -> bool: ...
    def lease(self, spec: ModelSpec) -> Lease: ...
    def give_back(self, lease: Lease, *, unload: bool) -> None: ...
    def request_started(self) -> None: ...
    def request_ended(self) -> None: ...
    def retire(self) -> None: ...
    def report(self) -> dict[str, Any]: ...


class Session:
    """One client's models and requests.

    Parameters
    ----------
    server : Server
        Whose it is.
    number : int
        For names of threads and for taking turns.
    answer : callable
        ``answer(request, header, body)`` sends an answer; called in many threads, one at a time;
        raises OSError when the client is gone.
    allow_code : bool
        Whether a client that asks for it may hand over models as pickled code.

    Notes
    -----
    One thread feeds it by :meth:`take`, which blocks while ``window`` requests are being worked
    on; that is the whole of the backpressure, because the client's writes block then.
    """

    def __init__(
        self,
        server: Server,
        number: int,
        answer: Callable[[int, dict[str, Any], Any], None],
        *,
        allow_code: bool,
    ) -> None:
        self.cancelled = threading.Event()
        self._server = server
        self._name = f"connection-{number}"
        self._send = answer
        self._sending = threading.Lock()
        self._room = threading.Semaphore(server.options.window)
        self._workers = ThreadPoolExecutor(
            server.options.window, thread_name_prefix=f"daskshare-host-work-{number}"
        )
        self._models: dict[int, Future[Lease]] = {}
        self._allow_code = allow_code
        self._may_send_code = False

    # -- the thread that reads --

    def take(self, request: int, header: dict[str, Any], memory: memoryview) -> None:
        """Begin to work on a request.

        Parameters
        ----------
        request : int
            Its number.
        header : dict
            What is asked.
        memory : memoryview
            What the header's tree points into; the code of a model that is opened.
        """
        if header["op"] == "release":
            self._release(header["model"])
            return
        if self._server.retiring and header["op"] != "hello":
            self.answer(request, {"ok": False, "retired": True})
            return
        if header["op"] == "open":
            # Known at once, so that requests that follow wait for the model.
            self._models[header["model"]] = Future()
        self._room.acquire()
        self._server.request_started()
        self._workers.submit(self._work, request, header, memory)

    def end(self) -> None:
        """Cancel what runs, wait for it and give the leases back."""
        self.cancelled.set()
        self._workers.shutdown(wait=True)
        for model in list(self._models):
            self._release(model)

    def _release(self, model: int) -> None:
        future = self._models.pop(model, None)
        if future is None:
            return

        def give_back(done: Future[Lease]) -> None:
            if done.exception() is None:
                lease = done.result()
                self._server.give_back(lease, unload=isinstance(lease.spec, PredictSpec))

        future.add_done_callback(give_back)

    # -- the threads that work --

    def _work(self, request: int, header: dict[str, Any], memory: memoryview) -> None:
        try:
            if self.cancelled.is_set() and header["op"] != "open":
                return
            encoded = encode(self._operate(header, memory))
            self.answer(request, {"ok": True, "tree": encoded.tree}, encoded.body())
        except BaseException as error:
            self.answer_error(request, error)
        finally:
            self._server.request_ended()
            self._room.release()

    def _operate(self, header: dict[str, Any], memory: memoryview) -> Any:
        op = header["op"]
        if op == "hello":
            return self._hello(header)
        if op == "open":
            return self._open(header, bytes(memory))
        if op == "report":
            return self._server.report()
        if op == "retire":
            return self._retire()
        model = header.get("model")
        lease = None if model is None else self._lease(model)
        # A caller's function runs one call at a time; those that wait need no rows of their own.
        late = op == "infer" and lease is not None and isinstance(lease.spec, PredictSpec)
        value = decode(header["tree"], memory, late=late)
        call = Call(header.get("arguments", {}), value, lease, self._name, self.cancelled)
        if op == "infer":
            return call.lease.infer(call.value, task=call.task)
        return find_operation(op, self._server.options.extensions)(call)

    def _hello(self, header: dict[str, Any]) -> dict[str, Any]:
        self._may_send_code = bool(header.get("code")) and self._allow_code
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
                    "(allow_code=True), and daskshare.host.allow-code (on the same machine) or "
                    "daskshare.flight.allow-code must be true where the host runs (it is "
                    f"{self._allow_code}).",
                    option="allow-code",
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

    def answer_error(self, request: int, error: BaseException) -> None:
        """Tell the client what went wrong; request 0: with the connection itself."""
        self.answer(request, {"ok": False, "error": describe_error(error)})

    def answer(self, request: int, header: dict[str, Any], body: Any = ()) -> None:
        """Send an answer, if there is still somebody to get it."""
        try:
            with self._sending:
                self._send(request, header, body)
        except OSError as error:
            logger.debug("%s is gone: %s", self._name, error)
            self.cancelled.set()
