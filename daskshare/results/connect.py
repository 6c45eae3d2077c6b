"""Clients for a run of ``detect``: of a cluster made for it, or of one at an address."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any

from daskshare.errors import DaskshareError

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["local_client", "remote_client"]


def local_client(
    stack: contextlib.ExitStack,
    *,
    workers: int | None = None,
    threads: int | None = None,
    dashboard: bool = False,
) -> Client:
    """Start a cluster on this machine and connect to it, until ``stack`` is left.

    With GPUs, one worker process for each. Without, one worker in this very process, because
    another would import torch first, which takes longer than a short clip; ask for ``workers`` to
    have processes, so that a decoder that crashes on a damaged file takes only its worker down.

    Parameters
    ----------
    stack : contextlib.ExitStack
        Closes client and cluster.
    workers, threads : int or None
        Worker processes, and tasks at once in each; ``None`` takes ``local_cluster``'s defaults.
    dashboard : bool
        Whether to serve Dask's pages on any free port; without them the cluster starts sooner.
    """
    from distributed import Client

    from daskshare.cluster import count_gpus, local_cluster

    options: dict[str, Any] = {"dashboard_address": ":0" if dashboard else None}
    if workers is not None:
        options["n_workers"] = workers
    elif not count_gpus():
        options["processes"] = False
    if threads is not None:
        options["threads_per_worker"] = threads
    if logging.getLogger("daskshare").isEnabledFor(logging.INFO):
        # Dask quiets the handler of a cluster of this machine, which is daskshare's too.
        options["silence_logs"] = False
    cluster = stack.enter_context(local_cluster(**options))
    client: Client = stack.enter_context(Client(cluster, set_as_default=False))
    return client


def remote_client(stack: contextlib.ExitStack, address: str) -> Client:
    """Connect to the scheduler at ``address``, until ``stack`` is left.

    Raises
    ------
    DaskshareError
        When none answers there.
    """
    from distributed import Client

    try:
        client: Client = stack.enter_context(Client(address, set_as_default=False))
    except (OSError, ValueError) as error:
        raise DaskshareError(
            f"No Dask scheduler answers at {address!r}: {error}. Give its address, such as "
            "tcp://10.0.0.5:8786, or leave it out to work on this machine.",
            scheduler=address,
        ) from error
    return client
