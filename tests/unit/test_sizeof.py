from __future__ import annotations

import subprocess
import sys

import torch
from dask.sizeof import sizeof
from dask.utils import Dispatch

from daskshare.sizeof import register


def registered():
    own = Dispatch("sizeof")
    own.register(object, lambda value: 0)
    register(own)
    return own


def test_a_tensor_counts_its_memory():
    assert 4000 <= registered()(torch.zeros(1000)) < 4200


def test_a_view_counts_what_it_keeps_alive():
    assert registered()(torch.zeros(1000)[:1]) >= 4000


def test_parameters_count_too():
    assert registered()(torch.nn.Parameter(torch.zeros(1000))) >= 4000


def test_tensors_without_host_memory_are_small():
    own = registered()
    assert own(torch.zeros(1000, device="meta")) < 200
    assert own(torch.zeros(1000).to_sparse()) < 200


def test_registering_with_dask_imports_no_torch():
    code = (
        "import sys, dask.sizeof\n"
        "from daskshare.sizeof import register\n"
        "register(dask.sizeof.sizeof)\n"
        "assert 'torch' not in sys.modules\n"
        "import torch\n"
        "print(dask.sizeof.sizeof(torch.zeros(1000)) >= 4000)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
    assert sizeof(1) > 0
