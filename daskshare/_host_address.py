"""Where a device's host is found, who may use it, and which device to take."""

from __future__ import annotations

import os
import socket
import stat
import struct
from pathlib import Path

from daskshare._device_names import visible_gpus
from daskshare.config import HostOptions
from daskshare.errors import HostError

__all__ = ["CPU", "HostAddress", "check_peer", "local_devices"]

#: Name of the device on a machine without a GPU.
CPU = "cpu"

# What the kernel takes for a Unix socket's path, its closing zero included.
_MAX_PATH_BYTES = 108


class HostAddress:
    """The files through which the processes of a machine find the host of one device.

    Parameters
    ----------
    device : str
        ``"cpu"``, or a GPU's UUID.
    directory : str, optional
        Folder of the sockets; default ``daskshare.host.directory`` of Dask's configuration.

    Attributes
    ----------
    socket, owner_lock, start_lock, log : pathlib.Path
        The socket; the lock that a host holds while it lives; the lock of whoever starts one;
        what a host that was started on demand writes.
    """

    def __init__(self, device: str, directory: str | None = None) -> None:
        directory = directory or HostOptions.from_config().directory
        # Not TMPDIR: a cluster manager gives each of its processes another one.
        self.directory = Path(directory or f"/tmp/daskshare-{os.getuid()}")
        self.device = device
        self.socket = self.directory / f"{device}.sock"
        self.owner_lock = self.directory / f"{device}.lock"
        self.start_lock = self.directory / f"{device}.start"
        self.log = self.directory / f"{device}.log"
        if len(os.fsencode(self.socket)) >= _MAX_PATH_BYTES:
            raise HostError(
                f"The socket's path {self.socket} is too long; expected fewer than "
                f"{_MAX_PATH_BYTES} bytes. Set daskshare.host.directory to a shorter folder.",
                address=str(self.socket),
            )

    def __str__(self) -> str:
        return str(self.socket)

    def make_directory(self) -> None:
        """Make the folder, and make sure that nobody else can put a socket there.

        Raises
        ------
        HostError
            When it belongs to another user, or others may write into it.
        """
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = os.lstat(self.directory)
        if (
            not stat.S_ISDIR(status.st_mode)
            or status.st_uid != os.getuid()
            or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        ):
            raise HostError(
                f"{self.directory} belongs to user {status.st_uid} with mode "
                f"{stat.filemode(status.st_mode)}; expected a folder of user {os.getuid()} that "
                "nobody else may write to. Remove it or set daskshare.host.directory.",
                address=str(self.socket),
            )


def check_peer(connection: socket.socket) -> int:
    """Make sure that the process at the other end is of the same user.

    Returns
    -------
    int
        Its process id.

    Raises
    ------
    HostError
        When it is not.
    """
    size = struct.calcsize("3i")
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    pid, uid, _ = struct.unpack("3i", credentials)
    if uid != os.getuid():
        raise HostError(
            f"The process at the other end (pid {pid}) is of user {uid}; expected "
            f"{os.getuid()}. A host serves only the user who started it.",
            got_uid=uid,
            expected_uid=os.getuid(),
        )
    return int(pid)


def local_devices() -> list[str]:
    """Name the devices that this process may use, as CUDA would choose them.

    Returns
    -------
    list of str
        UUIDs of GPUs, in the order of ``CUDA_VISIBLE_DEVICES``; ``["cpu"]`` without a GPU.

    Notes
    -----
    Starts no CUDA: a process that only hands work over must not take device memory.
    """
    return [gpu.uuid for gpu in visible_gpus()] or [CPU]
