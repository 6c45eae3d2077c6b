"""Find a device's host, or start one; however many processes try at once, one starts."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import time

import dask.config
import filelock

from daskshare._host_address import CPU, HostAddress, check_peer
from daskshare._host_process import READY
from daskshare.config import HostOptions
from daskshare.errors import HostError

__all__ = ["connect", "connect_or_start"]

# Of Spark's workers: a secret, and a thread count made for one of many computing processes.
_NOT_FOR_HOSTS = ("OMP_NUM_THREADS", "PYTHON_WORKER_FACTORY_SECRET", "PYTHON_WORKER_FACTORY_PORT")
_LOG_TAIL_BYTES = 2000


def connect(address: HostAddress) -> socket.socket | None:
    """Connect to a device's host; None when nobody listens.

    Raises
    ------
    HostError
        When who listens is of another user.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(str(address))
        check_peer(connection)
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        return None
    except BaseException:
        connection.close()
        raise
    return connection


def connect_or_start(address: HostAddress, options: HostOptions) -> socket.socket:
    """Connect to a device's host; starts one when there is none.

    Raises
    ------
    HostError
        When it cannot be started, or not in time; the message has the end of its log.

    Notes
    -----
    Only one process at a time starts a host; the others wait for it, and the lock is the kernel's,
    so that one that is killed meanwhile blocks nobody.
    """
    if sys.platform != "linux":
        raise HostError(
            f"Got platform {sys.platform!r}; a host needs Linux (memfd, SO_PEERCRED).",
            address=str(address),
        )
    deadline = time.monotonic() + options.start_timeout_seconds
    address.make_directory()
    while (connection := connect(address)) is None:
        left = deadline - time.monotonic()
        try:
            if left <= 0:
                raise _not_in_time(address, options)
            with filelock.FileLock(address.start_lock, timeout=left, thread_local=False):
                connection = connect(address)
                if connection is None:
                    _start(address, options, deadline)
        except filelock.Timeout:
            raise _not_in_time(address, options) from None
        if connection is not None:
            break
    return connection


def _not_in_time(address: HostAddress, options: HostOptions) -> HostError:
    return HostError(
        f"No host of device {address.device} listens at {address} after "
        f"{options.start_timeout_seconds:g} s. See {address.log}; raise "
        f"daskshare.host.start-timeout on a slow machine.{_log_tail(address)}",
        address=str(address),
    )


def _start(address: HostAddress, options: HostOptions, deadline: float) -> None:
    read, write = os.pipe()
    try:
        try:
            _spawn(address, write)
        finally:
            os.close(write)
        ready, _, _ = select.select([read], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise _not_in_time(address, options)
        told = os.read(read, len(READY))
    finally:
        os.close(read)
    if not told:
        raise HostError(
            f"The host of device {address.device} ended before it listened at {address}. "
            f"See {address.log}.{_log_tail(address)}",
            address=str(address),
        )


def _spawn(address: HostAddress, ready: int) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in _NOT_FOR_HOSTS}
    if address.device == CPU:
        # Threads that call models and threads that serve would each keep as much as the largest
        # pass left free in an arena of their own.
        environment.setdefault("MALLOC_ARENA_MAX", "1")
    # The package may have come to this process by its path alone.
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    environment["DASK_INTERNAL_INHERIT_CONFIG"] = dask.config.serialize(dask.config.global_config)
    command = [sys.executable, "-m", "daskshare._host_process"]
    with open(address.log, "wb") as log:
        # A session of its own, so that signals to the starter's group spare it; and a folder that
        # stays, as the starter's working directory may be deleted after its job.
        done = subprocess.run(
            [*command, address.device, str(address.directory), str(ready)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            env=environment,
            pass_fds=[ready],
            start_new_session=True,
            check=False,
        )
    if done.returncode:
        raise HostError(
            f"The host of device {address.device} could not be started: {command} ended with "
            f"status {done.returncode}. See {address.log}.{_log_tail(address)}",
            address=str(address),
        )


def _log_tail(address: HostAddress) -> str:
    try:
        text = address.log.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace").strip()
    except FileNotFoundError:
        return ""
    return f" Its end:\n{text}" if text else ""
