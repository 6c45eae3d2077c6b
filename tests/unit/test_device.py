from __future__ import annotations

import pickle
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from daskshare.device import Device, current_device, list_devices

UUID = "8932f937-d72c-4106-c12f-20bd9faed9f6"


def fake_gpus(monkeypatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda i: SimpleNamespace(uuid=UUID[:-1] + str(i), name=f"GPU {i}", total_memory=100 + i),
    )


def test_cpu():
    device = Device.cpu()
    assert device.kind == "cpu"
    assert not device.is_cuda
    assert device.uuid == f"cpu-{socket.gethostname()}"
    assert device.torch_device() == torch.device("cpu")
    assert 0 < device.free_bytes() <= device.total_bytes
    device.release_cached_memory()


def test_pickles_and_hashes_by_content():
    device = Device.cpu()
    again = pickle.loads(pickle.dumps(device))  # noqa: S301
    assert again == device
    assert hash(again) == hash(device)


def test_without_gpu(monkeypatch):
    fake_gpus(monkeypatch, 0)
    assert list_devices() == []
    assert current_device() == Device.cpu()


def test_gpus_are_named_by_uuid(monkeypatch):
    fake_gpus(monkeypatch, 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    devices = list_devices()
    assert [d.uuid for d in devices] == ["GPU-" + UUID[:-1] + "0", "GPU-" + UUID[:-1] + "1"]
    assert [d.index for d in devices] == [0, 1]
    assert current_device() == devices[0]
    assert devices[1].total_bytes == 101
    assert devices[1].torch_device() == torch.device("cuda", 1)


@pytest.mark.parametrize("visible", ["", None])
def test_gpus_without_the_variable(monkeypatch, visible):
    fake_gpus(monkeypatch, 1)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [d.uuid for d in list_devices()] == ["GPU-" + UUID[:-1] + "0"]


def test_mig_slices_keep_their_own_uuid(monkeypatch):
    fake_gpus(monkeypatch, 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"MIG-{UUID}")
    assert [d.uuid for d in list_devices()] == [f"MIG-{UUID}"]


def test_free_bytes_of_a_gpu_is_the_drivers(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (7 + index, 9))
    assert Device("cuda", 1, "GPU-x", "x", 9).free_bytes() == 8


def test_import_needs_no_torch():
    code = "import sys, daskshare.device; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
