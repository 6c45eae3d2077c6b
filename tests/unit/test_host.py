"""A host and its clients in one process, over a real socket; tests/cluster has real processes."""

from __future__ import annotations

import contextlib
import socket
import struct
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor

import cloudpickle
import dask.config
import numpy as np
import pytest

from daskshare import _device_names, _host_address, _host_operations, _host_start
from daskshare._host_link import SocketLink
from daskshare._host_predict import PredictProgram
from daskshare._host_start import connect
from daskshare._host_values import BytesRows
from daskshare._host_wire import MAX_BODY_BYTES, PROTOCOL_VERSION, OwnSegment, receive, send
from daskshare.config import EngineOptions, HostOptions, ShareOptions
from daskshare.device import Device
from daskshare.errors import (
    ConfigurationError,
    HostError,
    InferenceError,
    InvalidInputError,
    ModelLoadError,
    RemoteCodeError,
)
from daskshare.host import (
    Call,
    HostAddress,
    HostClient,
    HostServer,
    PredictSpec,
    WorkerHost,
    local_devices,
    operation,
)
from daskshare.models.torch_model import torch_model_spec
from daskshare.share import ModelShare
from daskshare.testing import FakeSpec

TIMEOUT = 20.0


class Place:
    """A share, and the servers and clients that a test makes."""

    def __init__(self, folder):
        self.folder = str(folder)
        self.share = ModelShare(
            Device.cpu(), options=ShareOptions(), engine_options=EngineOptions()
        )
        self.stack = contextlib.ExitStack()
        self.stack.callback(self.share.close)

    @property
    def address(self):
        return HostAddress("cpu", self.folder)

    def serve(self, *, owner="process", **options):
        server = HostServer(
            self.address, lambda: self.share, options=HostOptions(**options), owner=owner
        )
        self.stack.callback(server.close)
        return server

    def connect(self):
        """Wait for a server, as a client waits for the host that it has started."""
        found = []
        assert wait_until(lambda: found.append(connect(self.address)) or found[-1] is not None)
        return found[-1]

    def client(self, **options):
        client = HostClient(
            connect=lambda: SocketLink(self.connect()), address=str(self.address), **options
        )
        self.stack.callback(client.close)
        return client


@pytest.fixture
def place(tmp_path):
    place = Place(tmp_path)
    with place.stack:
        yield place


def predict_spec(make, *, key="k", max_batch_size=8):
    return PredictSpec("mine", key, cloudpickle.dumps(make), max_batch_size)


def doubling():
    return lambda x: x * 2


def test_a_model_by_its_description_runs_on_arrays(place):
    place.serve()
    client = place.client(allow_code=True)
    model = client.open(FakeSpec(factor=3.0))
    assert model.infer(np.ones((2, 5))).tolist() == [[3.0] * 5] * 2
    assert client.host["owner"] == "process"


def test_many_clients_share_one_load_and_their_rows_one_batch(place):
    place.serve()
    inside, go = threading.Semaphore(0), threading.Event()

    def make():
        def predict(x):
            inside.release()
            assert go.wait(TIMEOUT)
            return np.full(len(x), len(x))

        return predict

    # Locks cannot be pickled, and need not be: everything here is one process.
    spec = predict_spec(doubling)
    program_made = []

    def load(self, device):
        program_made.append(1)
        return PredictProgram(make(), self)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(4) as pool:
        patch.setattr(PredictSpec, "load", load)
        clients = [place.client(allow_code=True) for _ in range(4)]
        models = list(pool.map(lambda client: client.open(spec), clients))
        first = pool.submit(models[0].infer, [np.zeros(2)])
        assert inside.acquire(timeout=TIMEOUT)
        others = [pool.submit(model.infer, [np.zeros(2)]) for model in models[1:]]
        engine = place.share.lease(spec).engine
        while engine.stats().queue_frames < 6:
            assert not others[0].done()
        go.set()
        assert first.result(TIMEOUT).tolist() == [2, 2]
        assert [other.result(TIMEOUT).tolist() for other in others] == [[6, 6]] * 3
    assert program_made == [1]
    assert place.share.stats()["k"].loads == 1


def test_rows_of_bytes_that_wait_for_their_turn_are_not_copied(place, monkeypatch):
    place.serve()
    made, inside, go = [], threading.Semaphore(0), threading.Event()
    as_array = BytesRows.__array__
    monkeypatch.setattr(
        BytesRows, "__array__", lambda rows, *args, **kw: made.append(1) or as_array(rows)
    )

    def predict(rows):
        inside.release()
        assert go.wait(TIMEOUT)
        result = np.array([len(row) for row in rows])
        rows[:] = None
        return result

    monkeypatch.setattr(PredictSpec, "load", lambda spec, device: PredictProgram(predict, spec))
    spec = predict_spec(doubling, max_batch_size=2)
    clients = [place.client(allow_code=True) for _ in range(3)]
    models = [client.open(spec) for client in clients]
    rows = np.array([b"a" * 100_000, b"bc"], object)
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(models[0].infer, [rows])
        assert inside.acquire(timeout=TIMEOUT)
        others = [pool.submit(model.infer, [rows]) for model in models[1:]]
        engine = place.share.lease(spec).engine
        while engine.stats().queue_frames < 4:
            assert not others[0].done()
        assert len(made) == 1
        go.set()
        for call in (first, *others):
            assert call.result(TIMEOUT).tolist() == [100_000, 2]
    assert len(made) == 3
    assert rows[1] == b"bc"


def test_an_array_of_rows_of_bytes_is_one_input_for_each_of_its_rows(place, monkeypatch):
    place.serve()
    monkeypatch.setattr(
        PredictSpec, "load", lambda spec, device: PredictProgram(lambda a, b: a + b, spec)
    )
    with place.client(allow_code=True) as client:
        model = client.open(predict_spec(doubling, max_batch_size=2))
        inputs = np.array([[b"a", b"b"], [b"c", b"d"]], object)
        assert model.infer(inputs).tolist() == [b"ac", b"bd"]
        with pytest.raises(InvalidInputError, match="equally long"):
            model.infer(np.array([b"a", b"b"], object))


def test_a_client_knows_what_its_requests_hold_in_shared_memory(place):
    place.serve()
    client = place.client(allow_code=True)
    model = client.open(predict_spec(doubling, max_batch_size=10**6))
    small = client.submit("infer", value=[np.zeros(10)], model=model)
    assert client.num_pending_bytes == 0
    client.result(small)
    large = client.submit("infer", value=[np.zeros(10**5)], model=model)
    assert client.num_pending_bytes >= 8 * 10**5
    client.result(large)
    assert client.num_pending_bytes == 0


@pytest.mark.parametrize(
    ("device", "inherited", "expected"),
    [("cpu", None, "1"), ("cpu", "4", "4"), ("GPU-1", None, None)],
)
def test_the_threads_of_a_cpus_host_share_one_arena(
    tmp_path, monkeypatch, device, inherited, expected
):
    if inherited is None:
        monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    else:
        monkeypatch.setenv("MALLOC_ARENA_MAX", inherited)
    given = []

    def run(command, *, env, **options):
        given.append(env.get("MALLOC_ARENA_MAX"))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(_host_start.subprocess, "run", run)
    _host_start._spawn(HostAddress(device, str(tmp_path)), 1)
    assert given == [expected]


def test_large_arrays_go_through_memory_that_is_used_again(place):
    place.serve()
    client = place.client(allow_code=True)
    model = client.open(predict_spec(doubling, max_batch_size=1000))
    for rows in (1000, 900, 2000, 10):
        array = np.arange(rows * 1000, dtype=np.float64).reshape(rows, 1000)
        assert np.array_equal(model.infer([array]), array * 2)
    assert len(client._free) == 1


def test_several_requests_at_once_and_no_more_than_the_window(place):
    place.serve(window=2)
    client = place.client(allow_code=True)
    model = client.open(predict_spec(doubling))
    arrays = [np.full(30_000, i, np.float32) for i in range(7)]
    numbers = []
    for array in arrays:
        numbers.append(client.submit("infer", value=[array], model=model))
        assert client.num_pending <= 2
        array[:] = -1
    assert [client.result(n)[0] for n in numbers] == [2.0 * i for i in range(7)]


def test_errors_keep_their_kind_and_say_where(place):
    def make():
        class Own(Exception):
            pass

        def predict(x):
            raise [ValueError("bad value"), KeyError("gone"), Own("mine")][int(x[0])]

        return predict

    place.serve()
    client = place.client(allow_code=True)
    model = client.open(predict_spec(make))
    with pytest.raises(ValueError, match=r"^bad value\n") as caught:
        model.infer([np.zeros(1)])
    assert "in predict" in caught.value.__notes__[0]
    with pytest.raises(RemoteCodeError, match="KeyError: 'gone'"):
        model.infer([np.ones(1)])
    with pytest.raises(RemoteCodeError, match="Own: mine") as own:
        model.infer([np.full(1, 2)])
    assert own.value.type == "Own"
    fake = client.open(FakeSpec(poison=7.0))
    with pytest.raises(InferenceError, match="an item holds") as failed:
        fake.infer(np.full((1, 1), 7.0))
    assert failed.value.model == "fake"
    with pytest.raises(InvalidInputError, match=r"rows of \[1, 2\]|arrays of \[1, 2\] rows"):
        model.infer([np.zeros(1), np.zeros(2)])
    assert fake.infer(np.ones((1, 1))).tolist() == [[2.0]]


def test_a_model_that_fails_to_load_can_be_tried_again(place):
    place.serve()
    client = place.client(allow_code=True)
    with pytest.raises(ModelLoadError, match="no such file"):
        client.open(FakeSpec(load_error="no such file"))
    with pytest.raises(ModelLoadError, match="returned int"):
        client.open(predict_spec(lambda: 3))
    assert client.open(FakeSpec()).infer(np.ones((1, 1))).tolist() == [[2.0]]


def test_code_needs_the_permission_of_both_sides(place):
    place.serve()
    spec = predict_spec(doubling)
    for forbidden in (spec, FakeSpec(), torch_model_spec(lambda device: abs, name="t")):
        with pytest.raises(ConfigurationError, match="allow_code"):
            place.client().open(forbidden)
    assert place.client(allow_code=True).open(spec).info["parameters"] == 1


def test_a_host_may_refuse_code(place):
    place.serve(allow_code=False)
    with pytest.raises(ConfigurationError, match=r"it is False"):
        place.client(allow_code=True).open(predict_spec(doubling))


def test_nothing_that_needs_no_code_is_unpickled(place, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    monkeypatch.setattr(cloudpickle, "loads", refuse)
    place.serve()
    with pytest.raises(ConfigurationError, match="no-such"):
        place.client().open("no-such")


def test_leases_end_with_the_connection_and_with_the_model(place):
    server = place.serve(idle_timeout_seconds=0.0)
    client = place.client(allow_code=True)
    model = client.open(FakeSpec())
    other = place.client(allow_code=True)
    kept = other.open(FakeSpec())
    key = FakeSpec().key
    assert place.share.stats()[key].leases == 2
    model.release()
    client.report()
    assert place.share.stats()[key].leases == 1
    del kept
    other.close()
    client.close()
    server.wait_unused()
    assert place.share.stats()[key].leases == 0
    assert place.share.stats()[key].state == "ready"


def test_a_callers_function_is_unloaded_when_nobody_has_used_it_for_a_while(place):
    server = place.serve(idle_timeout_seconds=0.0)
    client = place.client(allow_code=True)
    client.open(predict_spec(doubling))
    client.close()
    server.wait_unused()
    assert wait_until(lambda: place.share.stats()["k"].state == "unloaded")


def wait_until(condition):
    done = threading.Event()
    for _ in range(int(TIMEOUT / 0.02)):
        if condition():
            return True
        done.wait(0.02)
    return False


def test_a_killed_host_is_replaced_and_the_request_sent_again(place):
    first = place.serve()
    client = place.client(allow_code=True)
    model = client.open(predict_spec(doubling, max_batch_size=10**6))
    big = np.arange(50_000.0)
    assert model.infer([big])[1] == 2.0
    first.close()
    place.serve()
    assert model.infer([big])[2] == 4.0


def test_a_host_killed_in_the_middle_is_replaced_once(place):
    servers = [place.serve()]

    @operation("test-die")
    def die(call: Call):
        servers[-1].close(timeout_seconds=0.0)
        if call.arguments["last"] > len(servers):
            servers.append(place.serve())
        else:
            raise AssertionError("nobody reads this")
        return None

    @operation("test-die-once")
    def die_once(call: Call):
        if len(servers) < 2:
            servers[-1].close(timeout_seconds=0.0)
            servers.append(place.serve())
        return call.value.sum()

    try:
        client = place.client()
        array = np.ones(50_000)
        assert client.call("test-die-once", value=array) == 50_000
        with pytest.raises(HostError, match="ended twice") as caught:
            client.call("test-die", {"last": 99})
        assert str(place.address) in str(caught.value)
        assert caught.value.address == str(place.address)
    finally:
        for name in ("test-die", "test-die-once"):
            _host_operations._operations.pop(name)


def test_a_retiring_host_finishes_what_it_has_begun_and_the_rest_goes_to_the_next(place):
    begun, go = threading.Event(), threading.Event()

    @operation("test-wait")
    def wait(call: Call):
        begun.set()
        assert go.wait(TIMEOUT)
        return "first"

    try:
        first = place.serve(owner="process")
        client, other = place.client(), place.client()
        number = client.submit("test-wait")
        assert begun.wait(TIMEOUT)
        assert other.call("retire") is True
        late = client.submit("test-wait")
        with ThreadPoolExecutor(1) as pool:
            unused = pool.submit(first.wait_unused)
            assert not unused.done()
            go.set()
            unused.result(TIMEOUT)
        first.close()
        place.serve(owner="worker")
        assert client.result(number) == "first"
        assert client.result(late) == "first"
        assert client.host["owner"] == "worker"
        assert client.call("retire") is False
    finally:
        _host_operations._operations.pop("test-wait")


def test_a_worker_takes_over_from_a_process_and_waits_for_another_worker(place):
    import filelock

    lock = filelock.FileLock(place.address.owner_lock, thread_local=False)
    lock.acquire()
    process = place.serve(owner="process")
    client = place.client(allow_code=True)
    model = client.open(FakeSpec())
    options = HostOptions(directory=place.folder)
    worker = WorkerHost(place.share, options)
    process.wait_unused()
    process.close()
    lock.release()
    assert worker.wait_serving(TIMEOUT)
    assert model.infer(np.ones((1, 1))).tolist() == [[2.0]]
    assert client.host["owner"] == "worker"
    second = WorkerHost(place.share, options)
    assert not second.wait_serving(0.1)
    worker.stop()
    assert second._stopped.is_set() is False
    second.stop()
    assert not place.address.socket.exists()


def test_idle_is_counted_from_the_last_connection(place):
    server = place.serve(idle_timeout_seconds=0.0)
    client = place.client()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(server.wait_unused)
        assert client.report()["connections"] == 1
        assert not waiting.done()
        client.close()
        waiting.result(TIMEOUT)


def test_cutting_the_connection_cancels_what_runs(place):
    begun, cancelled = threading.Event(), threading.Event()

    @operation("test-cancel")
    def run(call: Call):
        begun.set()
        assert call.cancelled.wait(TIMEOUT)
        cancelled.set()

    try:
        place.serve()
        client = place.client()
        client.submit("test-cancel")
        assert begun.wait(TIMEOUT)
        client.close()
        assert cancelled.wait(TIMEOUT)
    finally:
        _host_operations._operations.pop("test-cancel")


def test_unknown_operations_and_models_are_named(place):
    place.serve(extensions=())
    client = place.client()
    with pytest.raises(HostError, match="no operation 'dance'"):
        client.call("dance")
    with pytest.raises(InvalidInputError, match="names no model"):
        client.call("infer", value=[1])


@pytest.mark.parametrize(
    ("prefix", "reason"),
    [
        (struct.pack("<4sHHIQQ", b"DSHO", 99, 0, 2, 1, 0), "version 99"),
        (struct.pack("<4sHHIQQ", b"HTTP", 1, 0, 2, 1, 0), "HTTP"),
        (
            struct.pack("<4sHHIQQ", b"DSHO", PROTOCOL_VERSION, 0, 2, 1, MAX_BODY_BYTES + 1),
            "at most",
        ),
    ],
)
def test_a_stranger_is_told_what_was_expected(place, prefix, reason):
    place.serve()
    with place.connect() as connection:
        connection.sendall(prefix)
        answer = receive(connection)
        assert answer is not None
        assert reason in answer.header["error"]["message"]
        assert receive(connection) is None


def test_a_segment_that_could_shrink_is_refused(place, monkeypatch):
    place.serve()
    monkeypatch.setattr("daskshare._host_wire._SEALS", 0)
    segment = OwnSegment(1000)
    monkeypatch.undo()
    with place.connect() as connection:
        announce = {"op": "segment", "segment": 1}
        send(connection, 0, announce, descriptor=segment.descriptor)
        answer = receive(connection)
        assert "sealed" in answer.header["error"]["message"]
    segment.close()


def test_a_message_that_is_too_large_is_not_begun(place):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with pytest.raises(InvalidInputError, match="fewer rows"):
            send(ours, 1, {"text": "x" * (16 * 2**20)})
        send(ours, 2, {"op": "ok"}, [b"body"])
        message = receive(theirs)
        assert (message.request, bytes(message.body)) == (2, b"body")


def test_a_message_cut_short_is_an_error_and_a_clean_end_is_none():
    ours, theirs = socket.socketpair()
    with theirs:
        with ours:
            ours.sendall(b"DSHO")
        with pytest.raises(ConnectionError):
            receive(theirs)
        assert receive(theirs) is None


def test_only_the_same_user_is_served(place, monkeypatch):
    place.serve()
    ours, theirs = socket.socketpair()
    with ours, theirs, monkeypatch.context() as patch:
        uid = _host_address.os.getuid()
        patch.setattr(_host_address.os, "getuid", lambda: uid + 1)
        with pytest.raises(HostError, match=f"user {uid}") as caught:
            _host_address.check_peer(ours)
        assert caught.value.expected_uid == uid + 1
    with monkeypatch.context() as patch:
        patch.setattr(
            "daskshare._host_connection.check_peer",
            lambda peer: (_ for _ in ()).throw(HostError("not you")),
        )
        with pytest.raises(HostError, match="not you"):
            place.client()


def test_the_folder_must_be_ours_alone(tmp_path):
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(HostError, match="nobody else may write"):
        HostAddress("cpu", str(folder)).make_directory()
    with pytest.raises(HostError, match="too long"):
        HostAddress("cpu", str(tmp_path / ("x" * 120)))


def test_default_folder_is_the_same_in_every_process_of_a_user(monkeypatch):
    monkeypatch.setenv("TMPDIR", "/elsewhere")
    with dask.config.set({"daskshare.host.directory": None}):
        assert str(HostAddress("cpu")) == f"/tmp/daskshare-{_host_address.os.getuid()}/cpu.sock"
    with dask.config.set({"daskshare.host.directory": "/run/x"}):
        assert str(HostAddress("GPU-1")) == "/run/x/GPU-1.sock"


@pytest.mark.parametrize(
    ("visible", "expected"),
    [(None, ["GPU-aa", "GPU-bb"]), ("1,0", ["GPU-bb", "GPU-aa"]), ("-1", ["cpu"])],
)
def test_devices_are_named_as_cuda_would_choose_them(monkeypatch, visible, expected):
    monkeypatch.setattr(_device_names, "driver_uuids", lambda: (["GPU-aa", "GPU-bb"], []))
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert local_devices() == expected


def test_without_a_gpu_the_device_is_the_cpu(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(_device_names, "driver_uuids", lambda: ([], []))
    assert local_devices() == ["cpu"]
