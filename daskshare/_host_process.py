"""A host as a process of its own: ``python -m daskshare._host_process DEVICE DIRECTORY READY_FD``.

Started on demand by :mod:`daskshare._host_start`; ends itself when nobody has been connected for a
while, or when a Dask worker takes its place.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import filelock

from daskshare._host_address import CPU, HostAddress
from daskshare._host_server import HostServer
from daskshare.config import EngineOptions, HostOptions, ShareOptions

if TYPE_CHECKING:
    from daskshare.share import ModelShare

__all__ = ["READY", "TAKEN", "main", "serves"]

#: What a new host says through its pipe: it listens; somebody else does.
READY, TAKEN = b"ready", b"taken"

_POLL_SECONDS = 0.05

logger = logging.getLogger("daskshare.host")


def serves(address: HostAddress) -> bool:
    """Whether somebody listens at the address."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(address))
        except OSError:
            return False
        return True


def _own(address: HostAddress, timeout_seconds: float) -> filelock.BaseFileLock | None:
    """Wait for the device's owner lock; None when its owner serves."""
    lock = filelock.FileLock(address.owner_lock, thread_local=False)
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            # Held by one that serves, or by one that is just ending.
            if serves(address) or time.monotonic() > deadline:
                return None
            time.sleep(_POLL_SECONDS)
        else:
            return lock


def _make_share() -> ModelShare:
    from daskshare.device import current_device
    from daskshare.share import ModelShare

    return ModelShare(
        current_device(),
        options=ShareOptions.from_config(),
        engine_options=EngineOptions.from_config(),
    )


def main(device: str, directory: str, ready: int) -> None:
    """Serve a device until it is no longer used.

    Parameters
    ----------
    device : str
        ``"cpu"`` or a GPU's UUID.
    directory : str
        Folder of the sockets.
    ready : int
        Descriptor to tell through that it listens.
    """
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(process)d %(name)s %(levelname)s %(message)s"
    )
    options = HostOptions.from_config()
    address = HostAddress(device, directory)
    lock = _own(address, options.start_timeout_seconds)
    if lock is None:
        os.write(ready, TAKEN)
        return
    server = HostServer(address, _make_share, options=options, owner="process")
    logger.info("Serving %s at %s", device, address)
    os.write(ready, READY)
    os.close(ready)
    server.wait_unused()
    server.close()
    logger.info("Ending: %s", "a Dask worker takes over" if server.retiring else "nobody is left")
    sys.stdout.flush()
    sys.stderr.flush()
    # At once, without the libraries' own farewells: the driver takes the device's memory back, and
    # whoever comes next waits for the lock.
    os._exit(0)


if __name__ == "__main__":
    # The parent ends at once, so that no zombie of the host ever waits for whoever started it.
    if os.fork():
        os._exit(0)
    if sys.argv[1] != CPU:
        os.environ["CUDA_VISIBLE_DEVICES"] = sys.argv[1]
    main(sys.argv[1], str(Path(sys.argv[2])), int(sys.argv[3]))
