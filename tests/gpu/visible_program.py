"""Tell as JSON which GPUs this process's CUDA_VISIBLE_DEVICES gives to daskshare, and to CUDA.

``python -m tests.gpu.visible_program [--cluster]``; the environment has to be set before.
"""

from __future__ import annotations

import json
import sys

from daskshare.cluster import count_gpus, local_cluster
from daskshare.device import list_devices
from daskshare.host import local_devices

TIMEOUT = 120


def device_here() -> dict[str, object]:
    """Describe the device of the worker that runs this; waits while it starts."""
    from daskshare.worker_plugin import local_share

    device = local_share().device
    return {"kind": device.kind, "uuid": device.uuid, "name": device.name}


def workers() -> list[dict[str, object]]:
    """Start a cluster and describe each worker's device."""
    from distributed import Client

    import daskshare

    with (
        local_cluster(dashboard_address=":0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        daskshare.install(client)
        client.wait_for_workers(max(1, count_gpus()), timeout=TIMEOUT)
        addresses = client.scheduler_info(n_workers=-1)["workers"]
        found = [client.submit(device_here, workers=[address], pure=False) for address in addresses]
        devices = [future.result(TIMEOUT) for future in found]
        stats = daskshare.stats(client)
        assert {stats[a]["device"]["uuid"] for a in addresses} == {d["uuid"] for d in devices}
    return devices


def devices_of_cuda() -> list[dict[str, str]]:
    """What CUDA itself makes of the variable: torch alone would count without asking it."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.init()
    return [{"uuid": device.uuid, "name": device.name} for device in list_devices()]


if __name__ == "__main__":
    # CUDA first: a cluster rewrites the variable.
    answer = {
        "cuda": devices_of_cuda(),
        "count": count_gpus(),
        "local_devices": local_devices(),
        "workers": workers() if "--cluster" in sys.argv else [],
    }
    print(json.dumps(answer))
