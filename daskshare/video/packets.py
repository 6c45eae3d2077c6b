"""Where a chunk's packets lie in its file, and reading many of them at once.

A demultiplexer returns packets one by one, and each gives the interpreter's lock away and waits to
get it back; a dozen decoding threads notice. MP4 lists where packets lie, so that one read brings
many of them.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import numpy as np

__all__ = ["pack_table", "read_packets", "unpack_table"]

_WINDOW_BYTES = 512 << 10


def pack_table(positions: np.ndarray, sizes: np.ndarray, times: np.ndarray) -> bytes:
    """Compress a list of packets.

    Parameters
    ----------
    positions : numpy.ndarray, shape (n,), int64
        Of packets in the file, in the order of decoding, bytes.
    sizes : numpy.ndarray, shape (n,), int64
        Bytes.
    times : numpy.ndarray, shape (n,), int64
        Presentation times, ticks.

    Returns
    -------
    bytes
        About four a packet.
    """
    ends = positions + sizes
    gaps = positions - np.concatenate(([0], ends[:-1]))
    table = np.stack([gaps, sizes, np.diff(times, prepend=0)])
    return zlib.compress(table.astype("<i8").tobytes())


def unpack_table(packed: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Undo :func:`pack_table`; three int64 arrays of positions, sizes and times."""
    gaps, sizes, steps = np.frombuffer(zlib.decompress(packed), "<i8").reshape(3, -1)
    return np.cumsum(gaps + sizes) - sizes, sizes.astype(np.int64), np.cumsum(steps)


def read_packets(path: str, packed: bytes) -> Iterator[tuple[memoryview, int]]:
    """Read a chunk's packets.

    Parameters
    ----------
    path : str
        Of a local file.
    packed : bytes
        By :func:`pack_table`.

    Yields
    ------
    data : memoryview
        Of one packet, writable.
    time : int
        Presentation time, ticks.

    Raises
    ------
    OSError
        The file cannot be read, or ends before a packet does.
    """
    positions, sizes, times = (column.tolist() for column in unpack_table(packed))
    with open(path, "rb") as file:
        done = 0
        while done < len(positions):
            begin, last = positions[done], done
            # Sound lies between the packets; it is read along.
            while (
                last + 1 < len(positions)
                and positions[last + 1] >= positions[last] + sizes[last]
                and positions[last + 1] + sizes[last + 1] - begin <= _WINDOW_BYTES
            ):
                last += 1
            window = memoryview(bytearray(positions[last] + sizes[last] - begin))
            file.seek(begin)
            got = file.readinto(window)
            if got != len(window):
                raise OSError(
                    f"{path}: got {got} bytes at byte {begin}, expected {len(window)}; the file "
                    "changed since it was indexed"
                )
            for number in range(done, last + 1):
                offset = positions[number] - begin
                yield window[offset : offset + sizes[number]], times[number]
            done = last + 1
