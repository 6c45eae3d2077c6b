"""The workers of a Dask cluster for Spark tasks: which there are, and which is nearest."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import psutil

from daskshare._allocator_endpoints import rank_endpoints
from daskshare.config import FlightOptions
from daskshare.errors import HostError
from daskshare.flight import connect_flight
from daskshare.host import HostAddress, HostClient, Link, SocketLink, connect
from daskshare.spark.connection import task_device

if TYPE_CHECKING:
    from daskshare.models.spec import ModelSpec

__all__ = ["connect_cluster", "find_endpoints"]


def connect_cluster(
    scheduler: str, *, model: ModelSpec | str | None = None, allow_code: bool = False
) -> HostClient:
    """Return a client of a Dask cluster's workers.

    Parameters
    ----------
    scheduler : str
        Its address.
    model : ModelSpec or str, optional
        What the client is going to use: a device that has it is preferred.
    allow_code : bool
        Whether the client may hand over models as pickled code.

    Raises
    ------
    HostError
        When the scheduler or all endpoints cannot be reached, within about ten seconds.

    Notes
    -----
    Runs in a Python worker. The worker that serves this machine's device comes first, through
    shared memory; then endpoints as the scheduler ranks them. When one ends, or no longer answers,
    the scheduler is asked anew, so that workers that were restarted are found.
    """
    device = task_device()
    wanted = model if model is None or isinstance(model, str) else model.key

    def beside() -> Link | None:
        connection = connect(HostAddress(device))
        return None if connection is None else SocketLink(connection)

    return connect_flight(
        lambda: find_endpoints(scheduler, wanted), scheduler, allow_code=allow_code, nearer=beside
    )


def find_endpoints(scheduler: str, model: str | None = None) -> list[str]:
    """Ask a Dask scheduler for its workers' endpoints, best first.

    Parameters
    ----------
    scheduler : str
        Its address.
    model : str, optional
        Key or name of the model that is going to be used.

    Raises
    ------
    HostError
        When it does not answer in time, or has no daskshare.
    """
    seconds = FlightOptions.from_config().timeout_seconds
    try:
        return asyncio.run(_ask(scheduler, model, seconds))
    except (OSError, TimeoutError, ValueError) as error:
        raise HostError(
            f"The Dask scheduler at {scheduler} does not answer within {seconds:g} s "
            f"({type(error).__name__}: {error}). Check the address and that it runs.",
            address=scheduler,
        ) from error
    except ImportError as error:
        raise HostError(
            f"The Dask scheduler at {scheduler} has another daskshare, or none ({error}). Install "
            "the same version there.",
            address=scheduler,
        ) from error


async def _ask(scheduler: str, model: str | None, seconds: float) -> list[str]:
    from distributed.core import clean_exception, rpc
    from distributed.protocol.pickle import dumps
    from distributed.security import Security

    security = Security().get_connection_args("client")
    arguments = {"model": model, "hosts": sorted(_own_addresses())}
    async with asyncio.timeout(seconds):
        async with rpc(scheduler, timeout=seconds, connection_args=security) as remote:
            answer = await remote.run_function(
                function=dumps(rank_endpoints), kwargs=dumps(arguments)
            )
    if answer["status"] != "OK":
        _, exception, traceback = clean_exception(**answer)
        assert exception is not None
        raise exception.with_traceback(traceback)
    found: list[str] = answer["result"]
    return found


def _own_addresses() -> set[str]:
    return {address.address for found in psutil.net_if_addrs().values() for address in found}
