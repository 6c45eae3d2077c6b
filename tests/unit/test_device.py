from __future__ import annotations

import pickle
import socket
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from daskshare import _device_names
from daskshare._device_names import driver_uuids, visible_gpus
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


def test_mig_slices_have_one_name_however_short_they_are_given(monkeypatch):
    fake_gpus(monkeypatch, 1)
    monkeypatch.setattr(_device_names, "driver_uuids", lambda: ([f"GPU-{UUID}"], [f"MIG-{UUID}"]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"MIG-{UUID[:6]}")
    assert [d.uuid for d in list_devices()] == [f"MIG-{UUID}"]


def test_short_and_spaced_uuids_are_the_runtimes_in_full(monkeypatch):
    fake_gpus(monkeypatch, 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"GPU-{UUID[:-1]}0, GPU-{UUID[:-1]}1")
    assert [d.uuid for d in list_devices()] == [f"GPU-{UUID[:-1]}0", f"GPU-{UUID[:-1]}1"]


GPUS = ["GPU-aa11", "GPU-bb22", "GPU-bc33"]
SLICES = ["MIG-dd44", "MIG-de55"]


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        (None, GPUS),
        ("2,0", ["GPU-bc33", "GPU-aa11"]),
        (" 2 , 0 ", ["GPU-bc33", "GPU-aa11"]),
        ("1,9,0", ["GPU-bb22"]),
        ("1,-1,0", ["GPU-bb22"]),
        ("0,", ["GPU-aa11"]),
        (",0", []),
        ("0,0", []),
        ("1,0,1", []),
        ("GPU-bc33,GPU-aa11", ["GPU-bc33", "GPU-aa11"]),
        ("GPU-bb,GPU-a", ["GPU-bb22", "GPU-aa11"]),
        ("GPU-bb, GPU-a", ["GPU-bb22", "GPU-aa11"]),
        # Which of the two is not said.
        ("GPU-aa,GPU-b", ["GPU-aa11"]),
        ("GPU-", []),
        ("GPU-aa,GPU-aa11", []),
        ("GPU-ff", []),
        ("GPU-aa,1", ["GPU-aa11"]),
        ("1,GPU-aa", ["GPU-bb22"]),
        ("MIG-de55,MIG-dd", ["MIG-de55", "MIG-dd44"]),
        ("MIG-d", []),
        ("MIG-dd,MIG-dd44", []),
        ("MIG-GPU-aa11/1/0", ["MIG-GPU-aa11/1/0"]),
        ("MIG-dd44,GPU-aa11", ["MIG-dd44"]),
        ("x", []),
        ("", []),
        (" -1 ", []),
    ],
)
def test_the_variable_is_read_as_cuda_reads_it(monkeypatch, variable, expected):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(_device_names, "driver_uuids", lambda: (GPUS, SLICES))
    assert [gpu.uuid for gpu in visible_gpus(variable)] == expected
    if variable is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
        assert [gpu.uuid for gpu in visible_gpus()] == expected


def test_slices_that_the_driver_does_not_list_keep_their_names(monkeypatch):
    monkeypatch.setattr(_device_names, "driver_uuids", lambda: (GPUS, []))
    assert [gpu.uuid for gpu in visible_gpus("MIG-dd44")] == ["MIG-dd44"]
    monkeypatch.setattr(_device_names, "driver_uuids", lambda: ([], []))
    assert visible_gpus("MIG-dd44") == []


class FakeNvml(ModuleType):
    """Two GPUs; the second is cut into slices, of which one place is empty."""

    class NVMLError(Exception):
        pass

    def __init__(self, *, driver=True):
        super().__init__("pynvml")
        self.driver = driver
        self.open = 0

    def nvmlInit(self):
        if not self.driver:
            raise self.NVMLError("no driver")
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlDeviceGetCount(self):
        return 2

    def nvmlDeviceGetHandleByIndex(self, index):
        return f"GPU-{index}"

    def nvmlDeviceGetUUID(self, handle):
        return handle.encode()

    def nvmlDeviceGetMaxMigDeviceCount(self, handle):
        if handle == "GPU-0":
            raise self.NVMLError("not supported")
        return 3

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle, place):
        if place == 1:
            raise self.NVMLError("not found")
        return f"MIG-{place}"


def test_the_driver_lists_gpus_and_their_slices(monkeypatch):
    nvml = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert driver_uuids() == (["GPU-0", "GPU-1"], ["MIG-0", "MIG-2"])
    assert nvml.open == 0


def test_a_gpu_that_was_lost_keeps_its_number_and_is_no_device(monkeypatch):
    class OneLost(FakeNvml):
        def nvmlDeviceGetHandleByIndex(self, index):
            if index == 0:
                raise self.NVMLError("GPU is lost")
            return super().nvmlDeviceGetHandleByIndex(index)

    nvml = OneLost()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert driver_uuids() == (["", "GPU-1"], ["MIG-0", "MIG-2"])
    assert nvml.open == 0
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [(gpu.entry, gpu.uuid) for gpu in visible_gpus()] == [(1, "GPU-1")]
    assert visible_gpus("0,1") == []
    assert [gpu.uuid for gpu in visible_gpus("1,0")] == ["GPU-1"]


@pytest.mark.parametrize("nvml", [FakeNvml(driver=False), None])
def test_without_the_driver_or_its_library_there_are_no_gpus(monkeypatch, nvml):
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert driver_uuids() == ([], [])
    assert visible_gpus() == []


def test_free_bytes_of_a_gpu_is_the_drivers(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (7 + index, 9))
    assert Device("cuda", 1, "GPU-x", "x", 9).free_bytes() == 8


def test_import_needs_no_torch():
    code = "import sys, daskshare.device; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
