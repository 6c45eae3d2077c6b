from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from daskshare.config import EngineOptions, ShareOptions
from daskshare.device import current_device, list_devices
from daskshare.errors import ModelTooLargeError
from daskshare.models.spec import Prepared
from daskshare.share import ModelShare

pytestmark = pytest.mark.gpu

TIMEOUT = 60.0
MODEL_BYTES = 256 * 2**20
# So wide that the outputs, and with them the engine's buffers, are small beside the weights.
SIDE = 1024


class WideProgram:
    """A quarter of a GiB of weights, multiplied with little frames."""

    item_shape = (SIDE,)
    max_batch_size = 16
    batch_sizes = (4, 16)
    graph_capturable = True
    model_bytes = MODEL_BYTES

    def __init__(self):
        self.weight = nn.Parameter(
            torch.ones((SIDE, MODEL_BYTES // 4 // SIDE), device="cuda"), requires_grad=False
        )

    def prepare(self, inputs):
        return Prepared(np.asarray(inputs, np.float32))

    def forward(self, batch):
        return (batch @ self.weight).amax(1)

    def compile(self, batch_size):
        return None

    def finish(self, outputs, context):
        return outputs


@dataclass
class WideSpec:
    name: str = "wide"
    estimate: int = MODEL_BYTES
    loads: int = 0

    @property
    def key(self):
        return self.name

    def estimated_bytes(self):
        return self.estimate

    def load(self, device):
        self.loads += 1
        return WideProgram()


@pytest.fixture
def make():
    shares = []

    def make(limit):
        share = ModelShare(
            current_device(),
            options=ShareOptions(memory_limit=limit),
            engine_options=EngineOptions(max_wait_seconds=0.001),
        )
        shares.append(share)
        return share

    yield make
    for share in shares:
        share.close()


def used_bytes():
    gc.collect()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def use(share, spec, times=6):
    with share.lease(spec) as lease:
        for n in range(1, times + 1):
            outputs = lease.infer(np.full((n, SIDE), n, np.float32))
            np.testing.assert_allclose(outputs, np.full(n, n * SIDE), rtol=1e-3)


def test_the_device_is_this_gpu():
    device = current_device()
    assert device == list_devices()[0]
    assert device.kind == "cuda"
    assert device.uuid.startswith(("GPU-", "MIG-"))
    assert 0 < device.free_bytes() <= device.total_bytes


def test_unload_gives_the_memory_back(make):
    share = make(0.8)
    spec = WideSpec()
    # The first use also loads kernels and libraries, which stay.
    use(share, spec)
    assert share.unload(spec.key)
    allocated = used_bytes()
    free = current_device().free_bytes()
    for _ in range(3):
        use(share, spec)
        assert torch.cuda.memory_allocated() >= allocated + MODEL_BYTES
        assert current_device().free_bytes() <= free - MODEL_BYTES
        assert share.unload(spec.key)
        assert used_bytes() == allocated
        assert current_device().free_bytes() >= free - MODEL_BYTES // 4
    assert spec.loads == 4


def test_one_copy_for_many_threads(make):
    share = make(0.8)
    spec = WideSpec()
    before = used_bytes()
    start = threading.Barrier(32)

    def task(i):
        start.wait(TIMEOUT)
        use(share, spec, 10)

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(task, range(32)))
    assert spec.loads == 1
    # Buffers and graphs of this little model take a few MiB; a second copy would take 256.
    assert torch.cuda.memory_allocated() - before < 1.5 * MODEL_BYTES
    assert share.stats()[spec.key].frames == 32 * 55


def test_the_budget_holds_on_the_device(make):
    share = make(int(2.5 * MODEL_BYTES))
    before = used_bytes()
    specs = [WideSpec(name) for name in "abcd"]
    for spec in specs + specs:
        use(share, spec)
        # Weights alone count; the engines of the two that fit have buffers as well.
        assert torch.cuda.memory_allocated() - before < 3 * MODEL_BYTES
    assert [spec.loads for spec in specs] == [2, 2, 2, 2]


def test_a_model_larger_than_said_is_given_back(make):
    share = make(MODEL_BYTES // 2)
    before = used_bytes()
    with pytest.raises(ModelTooLargeError):
        share.load(WideSpec(estimate=0))
    assert used_bytes() <= before


def test_close_gives_the_memory_back(make):
    before = used_bytes()
    share = make(0.8)
    use(share, WideSpec("a"))
    use(share, WideSpec("b"))
    share.close()
    assert used_bytes() <= before
