"""The workers of a Dask cluster for Spark tasks: which there are, and which is nearest."""

from __future__ import annotations

import asyncio
import random
from typing import Any
from urllib.parse import urlsplit

import psutil

from daskshare.config import FlightOptions
from daskshare.errors import HostError
from daskshare.flight import connect_flight
from daskshare.host import HostAddress, HostClient, Link, SocketLink, connect
from daskshare.spark.connection import task_device

__all__ = ["connect_cluster", "find_endpoints"]


def connect_cluster(scheduler: str, *, allow_code: bool = False) -> HostClient:
    """Return a client of a Dask cluster's workers.

    Parameters
    ----------
    scheduler : str
        Its address.
    allow_code : bool
        Whether the client may hand over models as pickled code.

    Raises
    ------
    HostError
        When the scheduler or all endpoints cannot be reached, within about ten seconds.

    Notes
    -----
    Runs in a Python worker. The worker that serves this machine's device comes first, through
    shared memory; then endpoints on this machine; then those with the fewest clients. When one
    ends, the scheduler is asked anew, so that workers that were restarted are found.
    """
    device = task_device()

    def beside() -> Link | None:
        connection = connect(HostAddress(device))
        return None if connection is None else SocketLink(connection)

    return connect_flight(
        lambda: find_endpoints(scheduler), scheduler, allow_code=allow_code, nearer=beside
    )


def find_endpoints(scheduler: str) -> list[str]:
    """Ask a Dask scheduler for its workers' endpoints, best first.

    Raises
    ------
    HostError
        When it does not answer in time.
    """
    seconds = FlightOptions.from_config().timeout_seconds
    try:
        workers = asyncio.run(_workers(scheduler, seconds))
    except (OSError, TimeoutError, ValueError) as error:
        raise HostError(
            f"The Dask scheduler at {scheduler} does not answer within {seconds:g} s "
            f"({type(error).__name__}: {error}). Check the address and that it runs.",
            address=scheduler,
        ) from error
    mine = _own_addresses()
    found = []
    for worker in workers.values():
        flight = (worker.get("metrics", {}).get("daskshare") or {}).get("flight")
        if flight is not None:
            away = urlsplit(flight["location"]).hostname not in mine
            # Chance parts tasks that begin at the same time.
            found.append((away, flight["sessions"], random.random(), flight["location"]))
    return [location for *_, location in sorted(found)]


async def _workers(scheduler: str, seconds: float) -> dict[str, Any]:
    from distributed.core import rpc
    from distributed.security import Security

    arguments = Security().get_connection_args("client")
    async with asyncio.timeout(seconds):
        async with rpc(scheduler, timeout=seconds, connection_args=arguments) as remote:
            answer = await remote.identity(n_workers=-1)
    workers: dict[str, Any] = answer["workers"]
    return workers


def _own_addresses() -> set[str]:
    return {address.address for found in psutil.net_if_addrs().values() for address in found}
