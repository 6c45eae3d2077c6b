"""Arrow Flight endpoints and their clients in one process."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor

import cloudpickle
import numpy as np
import pytest

from daskshare._flight_link import FlightLink
from daskshare._host_predict import PredictProgram
from daskshare.config import EngineOptions, FlightOptions, HostOptions, ShareOptions
from daskshare.device import Device
from daskshare.errors import ConfigurationError, HostError, InvalidInputError
from daskshare.flight import FlightEndpoint, connect_flight
from daskshare.host import PredictSpec
from daskshare.share import ModelShare
from daskshare.testing import FakeSpec

#: Bound of every wait; nothing here should come near it.
TIMEOUT = 60


class Place:
    def __init__(self, stack, monkeypatch):
        self._stack = stack
        self._monkeypatch = monkeypatch
        self.share = ModelShare(
            Device.cpu(), options=ShareOptions(), engine_options=EngineOptions()
        )
        stack.callback(self.share.close)

    def endpoint(self, **options):
        endpoint = FlightEndpoint(
            self.share, FlightOptions(port=0, **options), HostOptions(), host="127.0.0.1"
        )
        self._stack.callback(endpoint.close)
        return endpoint

    def client(self, *locations, allow_code=True, **options):
        self._monkeypatch.setattr(
            FlightOptions, "from_config", classmethod(lambda cls: FlightOptions(**options))
        )
        client = connect_flight(
            lambda: list(locations), "tcp://10.0.0.1:8786", allow_code=allow_code
        )
        self._stack.callback(client.close)
        return client


@pytest.fixture
def place(monkeypatch):
    with contextlib.ExitStack() as stack:
        yield Place(stack, monkeypatch)


def adding():
    return lambda x: x + 1


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_model_runs_on_arrays_of_any_size(place):
    endpoint = place.endpoint(allow_code=True)
    client = place.client(endpoint.location)
    model = client.open(PredictSpec("mine", "k", cloudpickle.dumps(adding), 10**6))
    assert model.info["parameters"] == 1
    for rows in (0, 3, 300_000):
        assert np.array_equal(model.infer([np.arange(rows)]), np.arange(rows) + 1)
    assert client.host["owner"] == "worker"
    assert endpoint.report() == {"location": endpoint.location, "sessions": 1}
    with pytest.raises(InvalidInputError, match="equally long"):
        model.infer([np.zeros(1), np.zeros(2)])


def test_several_requests_at_once(place):
    endpoint = place.endpoint(allow_code=True)
    client = place.client(endpoint.location)
    model = client.open(FakeSpec(factor=3.0))
    numbers = [
        client.submit("infer", value=np.full((1, 1000), i, np.float32), model=model)
        for i in range(20)
    ]
    assert [client.result(n)[0, 0] for n in numbers] == [3.0 * i for i in range(20)]


def test_leases_end_with_the_stream(place):
    endpoint = place.endpoint(allow_code=True)
    client = place.client(endpoint.location)
    client.open(FakeSpec())
    client.close()
    place._stack.pop_all()
    endpoint.close()
    assert next(iter(place.share.stats().values())).leases == 0
    place.share.close()


def test_code_from_other_machines_is_refused_by_default(place):
    client = place.client(place.endpoint().location)
    with pytest.raises(ConfigurationError, match=r"flight\.allow-code"):
        client.open(FakeSpec())


def test_the_token_is_asked_for(place):
    endpoint = place.endpoint(token="right", allow_code=True)
    for wrong in ({}, {"token": "wrong"}):
        with pytest.raises(HostError, match="token is missing or wrong"):
            place.client(endpoint.location, **wrong)
    client = place.client(endpoint.location, token="right")
    assert client.open(FakeSpec()).infer(np.ones((1, 1))).tolist() == [[2.0]]


def test_a_dead_endpoint_is_left_and_another_taken(place):
    gone = f"grpc://127.0.0.1:{free_port()}"
    endpoint = place.endpoint(allow_code=True)
    client = place.client(gone, endpoint.location)
    assert client.open(FakeSpec()).infer(np.ones((1, 1))).tolist() == [[2.0]]


def test_no_endpoint_is_an_error_that_names_all(place):
    gone = f"grpc://127.0.0.1:{free_port()}"
    with pytest.raises(HostError, match=gone) as caught:
        place.client(gone)
    assert caught.value.address == "tcp://10.0.0.1:8786"
    assert caught.value.endpoints == [gone]
    with pytest.raises(HostError, match="it has none"):
        place.client()


def test_requests_go_on_at_the_next_endpoint_when_one_retires(place):
    first, second = place.endpoint(allow_code=True), place.endpoint(allow_code=True)
    locations = [first.location, second.location]
    client = connect_flight(lambda: locations, "cluster", allow_code=True)
    place._stack.callback(client.close)
    model = client.open(FakeSpec())
    first._ledger.retire()
    locations.pop(0)
    assert model.infer(np.ones((1, 1))).tolist() == [[2.0]]
    assert second.report()["sessions"] == 1


@pytest.fixture
def deaf():
    """An address that takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"grpc://127.0.0.1:{listener.getsockname()[1]}"


def test_what_takes_connections_and_never_answers_is_named(place, deaf):
    with pytest.raises(HostError, match=f"{deaf} does not answer within") as caught:
        place.client(deaf, timeout_seconds=0.5)
    assert caught.value.endpoints == [deaf]


def test_time_is_left_for_the_others_when_the_first_does_not_answer(place, deaf):
    endpoint = place.endpoint(allow_code=True)
    client = place.client(deaf, deaf, endpoint.location, timeout_seconds=4.0)
    assert client.open(FakeSpec()).infer(np.ones((1, 1))).tolist() == [[2.0]]


def serve_until(locations, stop):
    share = ModelShare(Device.cpu(), options=ShareOptions(), engine_options=EngineOptions())
    options = FlightOptions(port=0, allow_code=True)
    endpoint = FlightEndpoint(share, options, HostOptions(), host="127.0.0.1")
    locations.put(endpoint.location)
    stop.wait()


@pytest.fixture
def stoppable():
    """An endpoint in a process of its own: its location and its pid."""
    context = multiprocessing.get_context("spawn")
    locations, stop = context.Queue(), context.Event()
    process = context.Process(target=serve_until, args=(locations, stop))
    process.start()
    try:
        yield locations.get(timeout=TIMEOUT), process.pid
    finally:
        process.kill()
        process.join(TIMEOUT)


def test_an_endpoint_that_was_killed_is_waited_for(place, stoppable):
    location, pid = stoppable
    endpoint = place.endpoint(allow_code=True)
    # As while a nanny starts the worker again: the old one is still known, then none, then the new.
    answers = [[location], [location], [], [endpoint.location]]
    client = connect_flight(lambda: answers.pop(0), "cluster", allow_code=True)
    place._stack.callback(client.close)
    model = client.open(FakeSpec())
    os.kill(pid, signal.SIGKILL)
    assert model.infer(np.ones((1, 1))).tolist() == [[2.0]]
    assert answers == []


def test_closing_does_not_wait_for_a_machine_that_fell_silent(place, stoppable):
    location, pid = stoppable
    client = place.client(location, timeout_seconds=1.0)
    assert client.open(FakeSpec()).infer(np.ones((1, 1))).tolist() == [[2.0]]
    os.kill(pid, signal.SIGSTOP)
    client.close()


def test_a_slow_model_is_waited_for_as_long_as_its_machine_answers(place):
    asked, answered = threading.Semaphore(0), threading.Event()

    class Slow:
        def __call__(self):
            def predict(rows):
                assert answered.wait(TIMEOUT)
                return rows

            return predict

    probe = FlightLink._probe

    def counting(self, timeout_seconds):
        probe(self, timeout_seconds)
        asked.release()

    place._monkeypatch.setattr(FlightLink, "_probe", counting)
    place._monkeypatch.setattr(PredictSpec, "load", lambda *_: PredictProgram(Slow()(), spec))
    spec = PredictSpec("slow", "slow", b"", 8)
    endpoint = place.endpoint(allow_code=True)
    client = place.client(endpoint.location, timeout_seconds=1.0)
    model = client.open(spec)
    number = client.submit("infer", value=[np.ones(2)], model=model)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.result, number)
        # The first was for connecting.
        for _ in range(4):
            assert asked.acquire(timeout=TIMEOUT)
        assert not waiting.done()
        answered.set()
        assert waiting.result(TIMEOUT).tolist() == [1.0, 1.0]


class Cable:
    """A way to an endpoint that can be cut: afterwards it takes connections and moves nothing."""

    def __init__(self, port):
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.location = f"grpc://127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: list[socket.socket] = [self._listener]
        self._cut = False
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self):
        self._cut = True

    def close(self):
        for end in self._open:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self):
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self._open.append(near)
            if not self._cut:
                far = socket.create_connection(("127.0.0.1", self._port))
                self._open.append(far)
                for source, target in ((near, far), (far, near)):
                    threading.Thread(target=self._move, args=(source, target), daemon=True).start()

    def _move(self, source, target):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if not self._cut:
                    target.sendall(data)


@pytest.fixture
def cable():
    cables = []

    def make(endpoint):
        cables.append(Cable(int(endpoint.location.rpartition(":")[2])))
        return cables[-1]

    yield make
    for cable in cables:
        cable.close()


def test_requests_go_on_elsewhere_when_a_machine_vanishes(place, cable):
    first, second = place.endpoint(allow_code=True), place.endpoint(allow_code=True)
    way = cable(first)
    client = place.client(way.location, second.location, timeout_seconds=2.0)
    model = client.open(FakeSpec())
    assert first.report()["sessions"] == 1
    way.cut()
    assert model.infer(np.ones((1, 1))).tolist() == [[2.0]]
    assert second.report()["sessions"] == 1


def test_nobody_left_is_an_error_that_names_the_address(place, cable):
    way = cable(place.endpoint(allow_code=True))
    model = place.client(way.location, timeout_seconds=2.0).open(FakeSpec())
    way.cut()
    with pytest.raises(HostError, match=way.location):
        model.infer(np.ones((1, 1)))


@pytest.fixture
def certificate(tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"),
            *("-keyout", tmp_path / "key.pem", "-out", tmp_path / "cert.pem"),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"),
        ],
        check=True,
        capture_output=True,
    )
    return tmp_path


def test_tls_with_a_certificate_that_the_client_knows(place, certificate):
    endpoint = place.endpoint(
        host="localhost",
        allow_code=True,
        tls_certificate=str(certificate / "cert.pem"),
        tls_key=str(certificate / "key.pem"),
    )
    assert endpoint.location.startswith("grpc+tls://localhost:")
    client = place.client(endpoint.location, tls_ca=str(certificate / "cert.pem"))
    assert client.open(FakeSpec()).infer(np.ones((1, 1))).tolist() == [[2.0]]
    with pytest.raises(HostError):
        place.client(endpoint.location, timeout_seconds=2.0)
    with pytest.raises(HostError):
        place.client(endpoint.location.replace("+tls", ""), timeout_seconds=2.0)
