"""Kernels where CuPy is missing; where it is there, tests/gpu runs them."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from daskshare.errors import ConfigurationError
from daskshare.kernels.cupy_kernel import CudaKernel


@pytest.mark.skipif(importlib.util.find_spec("cupy") is not None, reason="CuPy is installed")
def test_without_cupy_the_error_says_what_to_install():
    with pytest.raises(ConfigurationError, match=r"daskshare\[gpu\]"):
        CudaKernel("", "nothing").compile(torch.device("cuda", 0))
