"""A network made ready for fused kernels on a GPU: what can run, what is worth it, what is kept."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch

from daskshare.kernels.cudnn_convolution import CudnnConvolutions
from daskshare.kernels.hopper import is_hopper
from daskshare.kernels.residual_unit import RESIDUAL_UNIT_VARIANTS
from daskshare.kernels.residual_unit import SOURCE as unit_source
from daskshare.kernels.stem import SOURCE as stem_source
from daskshare.models.fused import FusedNetwork
from daskshare.models.fused_cuda import DTYPES, MAX_PLANS, CudaOperations, NoVariantError
from daskshare.models.fusion import fuse
from daskshare.models.network import Candidates, YoloNetwork
from daskshare.models.tuning import TuningFile

__all__ = ["FusedUnavailableError", "build_fused"]

logger = logging.getLogger(__name__)


class FusedUnavailableError(Exception):
    """Why a network cannot run fused here; it is compiled instead."""


def build_fused(
    network: YoloNetwork,
    batch_size: int,
    *,
    folder: Path,
    stem: bool = True,
    units: Collection[int] = tuple(RESIDUAL_UNIT_VARIANTS),
    strided: bool = True,
    max_plans: int | None = None,
) -> tuple[Callable[[torch.Tensor], Candidates], CudaOperations, FusedNetwork]:
    """Fuse a network for batches of one size.

    Parameters
    ----------
    network : YoloNetwork
        On a CUDA device.
    batch_size : int
        Frames of every batch.
    folder : Path
        Where measured choices are kept.
    stem, units, strided : bool
        What to make use of; see :func:`daskshare.models.fusion.fuse`.
    max_plans : int, optional
        Plans of cuDNN's to try for a convolution; :data:`MAX_PLANS` by default.

    Returns
    -------
    tuple
        From uint8 frames (batch_size, height, width, 3) to candidates; the operations, whose
        ``report`` says what runs; the executor.

    Raises
    ------
    FusedUnavailableError
        When the device, the precision or an installed package does not allow it.

    Notes
    -----
    Runs for seconds, or up to minutes where nothing was measured before. What it returns can be
    captured in a CUDA graph and serves one thread at a time.
    """
    device = network.device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        raise FusedUnavailableError("needs a GPU of compute capability 9.0 or newer")
    if network.dtype not in DTYPES:
        raise FusedUnavailableError(f"needs float16 or bfloat16, got {network.dtype}")
    if len(network.plan.heads) > 4:
        raise FusedUnavailableError(f"needs at most four heads, got {len(network.plan.heads)}")
    try:
        cudnn = CudnnConvolutions(device)
    except ImportError as error:
        raise FusedUnavailableError(
            f"needs nvidia-cudnn-frontend ({error}): pip install 'daskshare[gpu]'"
        ) from error
    own = is_hopper(device)
    started = time.monotonic()
    tuning = TuningFile(
        folder,
        gpu=torch.cuda.get_device_name(device),
        cudnn=cudnn.versions[0],
        frontend=cudnn.versions[1],
        torch=str(torch.__version__),
        dtype=DTYPES[network.dtype],
        # Other kernels of our own may want other tiles.
        kernels=hashlib.sha256((stem_source + unit_source).encode()).hexdigest()[:16],
    )
    with tuning.locked():
        choices = tuning.read()
        known = json.dumps(choices, sort_keys=True)
        attempts: list[CudaOperations] = []

        def attempt(stem: bool, units: Collection[int]) -> tuple[CudaOperations, FusedNetwork]:
            try:
                plan = fuse(network.plan, stem=stem, units=units, strided=strided)
            except ValueError as error:
                raise FusedUnavailableError(str(error)) from error
            operations = CudaOperations(network, cudnn, choices, max_plans=max_plans or MAX_PLANS)
            attempts.append(operations)
            return operations, FusedNetwork(network, plan, batch_size, operations)

        try:
            try:
                with_stem = partial(attempt, stem and own)
                kept = _worthwhile(network, batch_size, units if own else (), choices, with_stem)
                operations, fused = with_stem(kept)
            except NoVariantError as error:
                logger.warning("Using cuDNN alone: %s", error)
                operations, fused = attempt(False, ())
            operations.finish()
        finally:
            # Also when it failed: the next try need not measure again.
            if json.dumps(choices, sort_keys=True) != known:
                tuning.write(choices)
        if any(tried.report.measured for tried in attempts):
            # What was only tried.
            torch.cuda.empty_cache()
    operations.report.measured = sum(tried.report.measured for tried in attempts)
    operations.report.seconds = time.monotonic() - started

    def forward(batch: torch.Tensor) -> Candidates:
        cudnn.bind()
        return fused(batch)

    return forward, operations, fused


def _worthwhile(
    network: YoloNetwork,
    batch_size: int,
    units: Collection[int],
    choices: dict[str, Any],
    attempt: Callable[[Collection[int]], tuple[CudaOperations, FusedNetwork]],
) -> tuple[int, ...]:
    """Those of ``units`` whose kernel is faster than two convolutions of cuDNN's."""
    if not units:
        return ()
    plan = network.plan
    name = f"units-{batch_size}-{plan.height}-{plan.width}-{plan.num_parameters}-{sorted(units)}"
    if name not in choices:
        everything = attempt(units)[0].report.total
        choices[name] = [
            count
            for count in sorted(units)
            if attempt(set(units) - {count})[0].report.total > everything
        ]
    return tuple(choices[name])
