"""The doctor on a machine with a GPU: a made-up one is not enough to know that it looks right."""

from __future__ import annotations

import pytest

from daskshare.doctor.checks import diagnose
from daskshare.doctor.findings import Status
from daskshare.doctor.probe import probe_machine

pytestmark = pytest.mark.gpu


def test_a_machine_with_a_gpu_is_whole():
    machine = probe_machine()
    assert machine.gpus
    assert machine.cupy_problem == ""
    assert machine.gpus[0].decodes["h264"] == ""
    by_name = {check.name: check for check in diagnose(machine, needs=["gpu", "nvdec"])}
    assert by_name["GPU"].status is Status.OK, by_name["GPU"]
    assert by_name["NVDEC"].status is Status.OK, by_name["NVDEC"]
    assert by_name["CuPy"].status is Status.OK, by_name["CuPy"]
