"""A CPU worker under a nanny keeps freed memory for its next batch."""

from __future__ import annotations

import platform

import dask
import numpy as np
import pytest
from distributed import Client

import daskshare
from daskshare.worker_plugin import local_share
from tests.cluster.conftest import TIMEOUT

MIB = 2**20
#: No huge page fits in, so that each page of a block is faulted in by itself.
BLOCK_BYTES = MIB
BLOCKS = 50


def faults_per_block():
    """Page faults of this thread for each block that it takes, fills and frees."""
    import resource

    local_share()
    np.ones(BLOCK_BYTES, np.uint8)
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    for _ in range(BLOCKS):
        np.ones(BLOCK_BYTES, np.uint8)
    return (resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before) / BLOCKS


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is no glibc")
@pytest.mark.parametrize("retained", ["64 MiB", None])
def test_freed_memory_is_faulted_in_once(retained):
    import resource

    pages = BLOCK_BYTES / resource.getpagesize()
    with (
        dask.config.set({"daskshare.worker.retain-memory": retained}),
        daskshare.local_cluster(device="cpu", dashboard_address=":0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        daskshare.install(client)
        faults = client.submit(faults_per_block, pure=False).result(TIMEOUT)
    if retained is None:
        # As the nanny left malloc. Once this is no longer so, the option has lost its reason.
        assert faults > 0.9 * pages
    else:
        assert faults < 0.1 * pages
