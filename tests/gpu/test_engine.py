from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

from daskshare._engine_staging import Cells
from daskshare.config import EngineOptions
from daskshare.device import current_device
from daskshare.engine import InferenceEngine
from daskshare.errors import (
    EngineDiedError,
    InferenceError,
    InvalidInputError,
    OutOfDeviceMemoryError,
)
from daskshare.models.spec import Prepared

pytestmark = pytest.mark.gpu

TIMEOUT = 60.0
SHAPE = (32, 32, 3)


class ConvProgram:
    """Small network on uint8 NHWC frames; two outputs."""

    item_shape = SHAPE
    max_batch_size = 16
    batch_sizes = (4, 16)
    graph_capturable = True

    def __init__(self, *, precision=torch.float32, width=16):
        torch.manual_seed(0)
        self.net = (
            nn.Sequential(
                nn.Conv2d(3, width, 3, padding=1),
                nn.LeakyReLU(0.1),
                nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
                nn.LeakyReLU(0.1),
                nn.Conv2d(2 * width, 8, 1),
            )
            .to(device="cuda", dtype=precision, memory_format=torch.channels_last)
            .eval()
            .requires_grad_(False)
        )
        self.precision = precision
        self.model_bytes = sum(p.numel() * p.element_size() for p in self.net.parameters())
        self.forwards = 0
        self.hook = None
        self.compiled = None

    def prepare(self, inputs):
        return Prepared(inputs)

    def forward(self, batch):
        self.forwards += 1
        if self.hook is not None:
            self.hook(batch)
        return self.compute(batch)

    def compute(self, batch):
        x = batch.permute(0, 3, 1, 2).to(self.precision) / 255
        y = self.net(x)
        return {"map": y, "mean": y.float().mean((1, 2, 3))}

    def compile(self, batch_size):
        return self.compiled(batch_size) if self.compiled else None

    def finish(self, outputs, context):
        return outputs

    def reference(self, frames):
        with torch.inference_mode():
            out = self.compute(torch.from_numpy(np.ascontiguousarray(frames)).cuda())
            return {k: v.float().cpu().numpy() for k, v in out.items()}


@pytest.fixture
def start():
    engines = []

    def start(program=None, **options):
        program = program or ConvProgram()
        options = {"max_wait_seconds": 0.001, "compile": False, "slots": 2} | options
        engine = InferenceEngine(
            program, current_device(), options=EngineOptions(**options), name="conv"
        )
        engines.append(engine)
        return engine, program

    yield start
    for engine in engines:
        engine.close(timeout_seconds=TIMEOUT)


def frames(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, *SHAPE), dtype=np.uint8)


def run(engine, items, task=None):
    return engine.submit(Prepared(items), task=task).result(TIMEOUT)


def assert_close(got, expected, *, atol=2e-3):
    assert got.keys() == expected.keys()
    for key in expected:
        np.testing.assert_allclose(got[key], expected[key], atol=atol, rtol=0)


@pytest.mark.parametrize("precision", [torch.float32, torch.float16, torch.bfloat16])
def test_graphs_compute_what_the_eager_model_does(start, precision):
    program = ConvProgram(precision=precision)
    engine, _ = start(program)
    atol = 2e-3 if precision is torch.float32 else 2e-2
    for seed in range(8):
        for n in (1, 3, 4, 7, 16):
            got = run(engine, frames(n, seed))
            assert_close(got, program.reference(frames(n, seed)), atol=atol)
            expected = np.float16 if precision is torch.float16 else np.float32
            assert got["map"].dtype == expected
    stats = engine.stats()
    assert stats.graph_error == ""
    # Two batch sizes in two slots.
    assert stats.graphs == 4
    # Each graph was captured with two or three calls; all else were replays.
    assert program.forwards <= 12
    assert stats.batches == 40


def test_without_graphs(start):
    engine, program = start(cuda_graphs=False)
    for seed in range(4):
        assert_close(run(engine, frames(5, seed)), program.reference(frames(5, seed)))
    assert engine.stats().graphs == 0
    assert program.forwards == 4


def test_a_model_that_does_not_allow_capture(start):
    program = ConvProgram()
    program.graph_capturable = False
    engine, _ = start(program)
    for seed in range(4):
        run(engine, frames(5, seed))
    assert engine.stats().graphs == 0
    assert engine.stats().graph_error == ""


def test_a_failed_capture_is_remembered_and_harmless(start):
    program = ConvProgram()
    program.hook = lambda batch: batch.sum().item()
    engine, _ = start(program)
    for seed in range(6):
        assert_close(run(engine, frames(5, seed)), program.reference(frames(5, seed)))
    stats = engine.stats()
    assert stats.graphs == 0
    assert "captur" in stats.graph_error
    assert engine.alive
    # Memory that another stream used is freed again: the allocator no longer records.
    before = torch.cuda.memory_allocated()
    side = torch.cuda.Stream()
    block = torch.empty(64 * 2**20, dtype=torch.uint8, device="cuda")
    block.record_stream(side)
    del block
    torch.cuda.synchronize()
    torch.empty(1, device="cuda")
    assert torch.cuda.memory_allocated() <= before


def test_another_engine_captures_after_one_failed(start):
    bad = ConvProgram()
    bad.hook = lambda batch: batch.sum().item()
    first, _ = start(bad)
    second, program = start()
    for seed in range(6):
        run(first, frames(5, seed))
        assert_close(run(second, frames(5, seed)), program.reference(frames(5, seed)))
    assert first.stats().graph_error
    assert second.stats().graphs == 2


def test_sixteen_threads(start):
    engine, program = start(queue_batches=2)
    expected = {
        (i, k): program.reference(frames(1 + (i + k) % 9, 100 * i + k))
        for i in range(16)
        for k in range(20)
    }

    def task(i):
        for k in range(20):
            got = run(engine, frames(1 + (i + k) % 9, 100 * i + k))
            assert_close(got, expected[i, k])
        return True

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(task, range(16)))
    stats = engine.stats()
    assert stats.frames == sum(1 + (i + k) % 9 for i in range(16) for k in range(20))
    assert stats.mean_batch_size > 1
    assert engine.alive


def test_two_engines_at_once(start):
    pairs = [start(), start(ConvProgram(width=8))]

    def task(i):
        engine, _ = pairs[i % 2]
        for k in range(30):
            got = run(engine, frames(1 + k % 16, k))
            assert_close(got, references[i % 2, k])
        return True

    references = {
        (i, k): pairs[i][1].reference(frames(1 + k % 16, k)) for i in range(2) for k in range(30)
    }
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(task, range(8)))
    for engine, _ in pairs:
        assert engine.stats().graphs > 0
        assert engine.stats().graph_error == ""


def test_requests_larger_than_the_staging_memory(start):
    engine, program = start(queue_batches=1)
    given = frames(200)
    assert_close(run(engine, given), program.reference(given))


def test_host_items_may_change_after_submit(start):
    engine, program = start()
    given = frames(16)
    expected = program.reference(given)
    future = engine.submit(Prepared(given))
    given[:] = 0
    assert_close(future.result(TIMEOUT), expected)


def test_device_items_are_not_copied_to_the_host(start, monkeypatch):
    engine, program = start()

    def fill(self, items):
        raise AssertionError("staged")

    monkeypatch.setattr(Cells, "fill", fill)
    for seed in range(4):
        given = torch.from_numpy(frames(7, seed)).cuda()
        assert_close(run(engine, given), program.reference(frames(7, seed)))
        assert_close(run(engine, given.flip(0)[::2]), program.reference(frames(7, seed)[::-2]))


def test_device_items_are_read_after_the_callers_stream(start):
    engine, program = start()
    run(engine, frames(16))
    expected = program.reference(frames(16, 1))
    source = torch.from_numpy(frames(16, 1)).pin_memory()
    side = torch.cuda.Stream()
    for _ in range(5):
        with torch.cuda.stream(side):
            given = torch.zeros((16, *SHAPE), dtype=torch.uint8, device="cuda")
            torch.cuda._sleep(50_000_000)
            given.copy_(source, non_blocking=True)
            future = engine.submit(Prepared(given))
            # The engine keeps what it reads, although the caller forgets it.
            del given
            torch.zeros((16, *SHAPE), dtype=torch.uint8, device="cuda")
        assert_close(future.result(TIMEOUT), expected)


def test_device_items_are_read_after_blocking_streams_that_the_default_one_waits_for(start):
    import cupy

    engine, program = start()
    run(engine, frames(16))
    expected = program.reference(frames(16, 1))
    source = torch.from_numpy(frames(16, 1)).cuda()
    blocking = cupy.cuda.Stream()
    for _ in range(5):
        given = torch.zeros((16, *SHAPE), dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.ExternalStream(blocking.ptr)):
            torch.cuda._sleep(50_000_000)
            given.copy_(source)
        assert_close(run(engine, given), expected)


def test_dlpack_items(start):
    import cupy

    engine, program = start()
    given = cupy.asarray(frames(5))
    assert_close(run(engine, given), program.reference(frames(5)))


def test_host_and_device_items_share_a_batch(start):
    program = ConvProgram()
    entered, gate = threading.Event(), threading.Event()

    def hold(batch):
        entered.set()
        assert gate.wait(TIMEOUT)

    program.hook = hold
    engine, _ = start(program, max_wait_seconds=TIMEOUT)
    first = engine.submit(Prepared(frames(1)))
    assert entered.wait(TIMEOUT)
    given = frames(16)
    futures = [
        engine.submit(Prepared(given[:4]), task=0),
        engine.submit(Prepared(torch.from_numpy(given[4:8]).cuda()), task=1),
        engine.submit(Prepared(given[8:]), task=2),
    ]
    gate.set()
    whole = program.reference(given)
    for future, part in zip(futures, (slice(0, 4), slice(4, 8), slice(8, 16)), strict=True):
        assert_close(future.result(TIMEOUT), {k: v[part] for k, v in whole.items()})
    first.result(TIMEOUT)
    assert engine.stats().batch_size_counts == {1: 1, 16: 1}


class MixedProgram(ConvProgram):
    """Outputs of several kinds and sizes, one of them with nothing in it."""

    def compute(self, batch):
        first = batch[:, 0, 0, 0]
        pixels = batch[:, :2, :3].float()
        return {
            "bright": batch[:, 0, :3, 1] > 127,
            "half": (pixels[:, 0, :, 2] / 4).to(torch.bfloat16),
            "first": first.to(torch.int64) * 2**33,
            "nothing": pixels[:, 0, :0, 0],
            "pixels": pixels,
        }


def test_outputs_of_several_kinds_and_sizes(start):
    engine, program = start(MixedProgram())
    for seed in range(4):
        # In a batch of sixteen with padding; each caller keeps its part of the arrays, or copies.
        given = [frames(n, 10 * seed + n) for n in (9, 1, 3)]
        futures = [engine.submit(Prepared(part), task=i) for i, part in enumerate(given)]
        for future, part in zip(futures, given, strict=True):
            got, expected = future.result(TIMEOUT), program.reference(part)
            assert got.keys() == expected.keys()
            for name, array in expected.items():
                assert got[name].shape == array.shape
                np.testing.assert_array_equal(got[name].astype(np.float64), array, strict=False)
            assert got["bright"].dtype == bool
            assert got["first"].dtype == np.int64
            assert got["half"].dtype == np.float32


def test_conjugates_are_computed_before_they_are_read(start):
    class Complex(ConvProgram):
        item_shape = (4,)
        batch_sizes = ()

        def compute(self, batch):
            return {"imaginary": batch.imag}

    engine, _ = start(Complex())
    items = torch.full((3, 4), 1 + 2j, device="cuda")
    got = [run(engine, x)["imaginary"] for x in (items, items.conj())]
    np.testing.assert_array_equal(got, np.stack([np.full((3, 4), 2.0), np.full((3, 4), -2.0)]))


def test_items_on_another_device_are_refused(start):
    engine, _ = start()
    with pytest.raises(InvalidInputError, match="meta"):
        engine.submit(Prepared(torch.empty((1, *SHAPE), device="meta")))


def test_a_bad_frame_fails_its_caller_only(start):
    program = ConvProgram()
    program.graph_capturable = False

    def hook(batch):
        if (batch.flatten(1) == 255).all(1).any():
            raise ValueError("white frame")

    program.hook = hook
    engine, _ = start(program)
    bad = frames(5)
    bad[3] = 255
    good = [engine.submit(Prepared(frames(3, i)), task=i) for i in range(3)]
    failing = engine.submit(Prepared(bad), task="bad")
    more = engine.submit(Prepared(frames(3, 9)), task=9)
    with pytest.raises(InferenceError, match="white frame") as caught:
        failing.result(TIMEOUT)
    assert caught.value.frame == 3
    for i, future in enumerate(good):
        assert_close(future.result(TIMEOUT), program.reference(frames(3, i)))
    assert_close(more.result(TIMEOUT), program.reference(frames(3, 9)))


def test_out_of_memory_lowers_the_ceiling(start):
    program = ConvProgram()
    program.graph_capturable = False
    program.batch_sizes = ()
    # Two rows fit, four do not, whatever else is on the device.
    row_bytes = int(torch.cuda.mem_get_info()[1] * 0.3)
    program.hook = lambda batch: torch.empty(
        batch.shape[0] * row_bytes, dtype=torch.uint8, device="cuda"
    )
    engine, _ = start(program)
    given = frames(16)
    assert_close(run(engine, given), program.reference(given))
    assert engine.stats().ceiling == 2
    assert engine.stats().errors == 0
    program.hook = None
    assert_close(run(engine, given), program.reference(given))
    assert engine.stats().batch_size_counts == {2: 16}


def test_out_of_memory_for_one_frame(start):
    program = ConvProgram()
    program.graph_capturable = False
    total = torch.cuda.mem_get_info()[1]
    program.hook = lambda batch: torch.empty(2 * total, dtype=torch.uint8, device="cuda")
    engine, _ = start(program)
    with pytest.raises(OutOfDeviceMemoryError):
        run(engine, frames(3))
    program.hook = None
    assert_close(run(engine, frames(3)), program.reference(frames(3)))


def test_swapping_the_compiled_model_in(start):
    release = threading.Event()
    compiled_calls = []
    program = ConvProgram()

    def compile(batch_size):
        assert release.wait(TIMEOUT)

        def forward(batch):
            compiled_calls.append(batch.shape[0])
            return program.compute(batch)

        return forward

    program.compiled = compile
    engine, _ = start(program, compile="auto")
    for seed in range(4):
        assert_close(run(engine, frames(16, seed)), program.reference(frames(16, seed)))
    assert engine.stats().mode == "eager"
    assert engine.stats().graphs == 2
    release.set()
    assert engine.wait_compiled(TIMEOUT)
    assert engine.stats().mode == "compiled"
    # Captured for both slots before the first batch.
    assert engine.stats().graphs == 2
    # Behind the runs that tell which sizes to pad to.
    run(engine, frames(16))
    calls, eager = len(compiled_calls), program.forwards
    assert set(compiled_calls) == {16}
    for seed in range(4):
        assert_close(run(engine, frames(16, seed)), program.reference(frames(16, seed)))
    assert (len(compiled_calls), program.forwards) == (calls, eager)


def slowly(batch):
    torch.cuda._sleep(20_000_000)


@pytest.mark.parametrize("slow", ["eager", "compiled"])
def test_batches_are_padded_to_the_compiled_size_where_that_is_faster(start, slow):
    program = ConvProgram()

    def compile(batch_size):
        def forward(batch):
            if slow == "compiled":
                slowly(batch)
            return program.compute(batch)

        return forward

    program.compiled = compile
    if slow == "eager":
        program.hook = slowly
    engine, _ = start(program, compile="auto")
    run(engine, frames(4))
    assert engine.wait_compiled(TIMEOUT)
    run(engine, frames(16))
    eager = program.forwards
    assert_close(run(engine, frames(4, 1)), program.reference(frames(4, 1)))
    assert (program.forwards == eager) == (slow == "eager")


def test_a_disturbed_capture_is_tried_again(start, monkeypatch):
    failures = []
    capture = torch.cuda.graph

    def disturbed_at_first(*args, **options):
        if len(failures) < 2:
            failures.append("disturbed")
            raise RuntimeError(
                "CUDA error: operation failed due to a previous error during capture"
            )
        return capture(*args, **options)

    monkeypatch.setattr(torch.cuda, "graph", disturbed_at_first)
    engine, program = start()
    for seed in range(12):
        assert_close(run(engine, frames(16, seed)), program.reference(frames(16, seed)))
    assert failures == ["disturbed"] * 2
    assert engine.stats().graph_error == ""
    assert engine.stats().graphs == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_torch_compile(start):
    program = ConvProgram(precision=torch.float16)

    def compile(batch_size):
        compiled = torch.compile(program.compute, dynamic=False)
        compiled(torch.zeros((batch_size, *SHAPE), dtype=torch.uint8, device="cuda"))
        return compiled

    program.compiled = compile
    engine, _ = start(program, compile="auto")
    for seed in range(4):
        run(engine, frames(16, seed))
    assert engine.wait_compiled(10 * TIMEOUT), engine.stats().compile_error
    for seed in range(6):
        assert_close(run(engine, frames(16, seed)), program.reference(frames(16, seed)), atol=2e-2)
    assert engine.stats().graph_error == ""


def test_close_frees_the_buffers(start):
    engine, _ = start()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    before = torch.cuda.memory_allocated()
    for seed in range(6):
        run(engine, frames(16, seed))
    assert torch.cuda.memory_allocated() > before
    engine.close(timeout_seconds=TIMEOUT)
    torch._C._cuda_clearCublasWorkspaces()
    assert torch.cuda.memory_allocated() <= before


def test_a_thread_that_dies(start):
    program = ConvProgram()
    program.graph_capturable = False
    engine, _ = start(program)

    def hook(batch):
        raise SystemExit("gone")

    program.hook = hook
    with pytest.raises(EngineDiedError, match="gone"):
        run(engine, frames(3))
    assert not engine.alive
