"""Rules for all tests: no thread and no GPU memory of daskshare stays behind; the GPU rule."""

from __future__ import annotations

import gc
import importlib.util
import threading
import time

import pytest

#: What a machine with a GPU must have: a missing one is a failure there, not a skip.
GPU_PACKAGES = ("cupy", "PyNvVideoCodec", "cudnn")
#: Rounding and lazily made constants of libraries; a model that stays behind is larger.
GPU_LEAK_BYTES = 4 * 2**20


def cuda_available() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None:
        return
    if not cuda_available():
        pytest.skip("needs a CUDA GPU")
    missing = [name for name in GPU_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        pytest.fail(f"this machine has a GPU but not {', '.join(missing)}", pytrace=False)


def our_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("daskshare-")}


@pytest.fixture(autouse=True)
def no_leaked_threads():
    """Fail a test that leaves a thread of daskshare behind."""
    before = our_threads()
    yield
    deadline = time.monotonic() + 10.0
    left = our_threads() - before
    for thread in left:
        thread.join(max(0.0, deadline - time.monotonic()))
    left = {thread for thread in left if thread.is_alive()}
    assert not left, f"threads left behind: {sorted(thread.name for thread in left)}"


@pytest.fixture(autouse=True, scope="module")
def no_leaked_gpu_memory(request):
    """Fail a module of GPU tests that leaves memory allocated by torch behind."""
    marks = [mark.name for mark in getattr(request.node, "iter_markers", lambda: [])()]
    if "gpu" not in marks or not cuda_available():
        yield
        return
    before = gpu_bytes()
    yield
    left = gpu_bytes() - before
    assert left <= GPU_LEAK_BYTES, f"{left} bytes of GPU memory left allocated"


def gpu_bytes() -> int:
    import torch

    gc.collect()
    torch.cuda.synchronize()
    # Workspaces belong to streams, not to models.
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()
