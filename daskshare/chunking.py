"""From an index of packets to chunks that can be decoded independently. Pure: no I/O, no clock.

A video stores its pictures in decoding order; viewers see them in presentation order. A chunk is a
run of frames in presentation order that begins at a keyframe, together with the run of packets
that must be decoded to get them. Pictures stored after a keyframe but shown before it (an open
group of pictures) belong to the chunk before, which therefore decodes past the keyframe.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from daskshare.errors import ConfigurationError

__all__ = ["ChunkPlan", "PacketIndex", "distrust", "plan_chunks"]


@dataclass(frozen=True, slots=True, eq=False)
class PacketIndex:
    """What a container tells about its packets, in decoding order.

    Parameters
    ----------
    pts : numpy.ndarray, shape (n,), int64
        Presentation time of each packet, ticks of ``time_base``.
    keyframe : numpy.ndarray, shape (n,), bool
        Whether decoding can start here and gives every later-shown frame exactly.
    shown : numpy.ndarray, shape (n,), bool
        False for pictures that are decoded but never displayed.
    time_base : fractions.Fraction
        Seconds in one tick.
    """

    pts: np.ndarray
    keyframe: np.ndarray
    shown: np.ndarray
    time_base: Fraction

    def __len__(self) -> int:
        return len(self.pts)


@dataclass(frozen=True, slots=True, eq=False)
class ChunkPlan:
    """One chunk.

    Parameters
    ----------
    first_packet : int
        Where decoding starts, as a position in decoding order; a keyframe.
    num_packets : int
        Packets to decode from there.
    first_frame : int
        0-based number of the first frame in presentation order.
    pts : numpy.ndarray, shape (num_frames,), int64
        Presentation times of the chunk's frames, ascending, ticks.
    """

    first_packet: int
    num_packets: int
    first_frame: int
    pts: np.ndarray

    @property
    def num_frames(self) -> int:
        """Frames in this chunk."""
        return len(self.pts)


def distrust(index: PacketIndex) -> str:
    """Say why an index cannot be used for cutting, or ``""`` when it can.

    Parameters
    ----------
    index : PacketIndex
    """
    if not index.shown.any():
        return "it shows no frame"
    if not index.keyframe[0]:
        return "it does not begin with a keyframe"
    shown = np.sort(index.pts[index.shown])
    if (shown[1:] == shown[:-1]).any():
        return "several frames have the same presentation time"
    if index.shown[0] and shown[0] < index.pts[0]:
        return "frames are shown before the first keyframe"
    return ""


def plan_chunks(index: PacketIndex, *, chunk_seconds: float) -> list[ChunkPlan]:
    """Cut a video at keyframes into chunks of about ``chunk_seconds``.

    Parameters
    ----------
    index : PacketIndex
        Must pass :func:`distrust`.
    chunk_seconds : float
        Aim: each chunk ends at the keyframe (or end) nearest to this length; ``inf`` makes one
        chunk, 0 the shortest possible ones.

    Returns
    -------
    list of ChunkPlan
        In presentation order; together they hold every shown frame once.

    Raises
    ------
    ConfigurationError
        ``chunk_seconds`` is negative or no number.
    """
    if math.isnan(chunk_seconds) or chunk_seconds < 0:
        raise ConfigurationError(
            f"chunk_seconds is {chunk_seconds!r}; expected zero or more seconds.",
            option="chunk_seconds",
        )
    frames = np.sort(index.pts[index.shown])
    bounds = _choose_cuts(_valid_cuts(index), index, chunk_seconds)
    chunks = []
    for number, cut in enumerate(bounds):
        begin = np.searchsorted(frames, index.pts[cut]) if number else 0
        if number + 1 < len(bounds):
            next_pts = index.pts[bounds[number + 1]]
            end = int(np.searchsorted(frames, next_pts))
            # Beyond the next keyframe lie the pictures that are shown before it.
            last_packet = int(np.flatnonzero(index.pts < next_pts)[-1])
        else:
            end, last_packet = len(frames), len(index) - 1
        chunks.append(
            ChunkPlan(
                first_packet=int(cut),
                num_packets=last_packet + 1 - int(cut),
                first_frame=int(begin),
                pts=frames[begin:end],
            )
        )
    return chunks


def _valid_cuts(index: PacketIndex) -> np.ndarray:
    """Positions of keyframes before which only earlier-shown frames are stored."""
    latest_before = np.maximum.accumulate(index.pts)[:-1]
    later = index.keyframe[1:] & index.shown[1:] & (index.pts[1:] > latest_before)
    return np.concatenate([[0], 1 + np.flatnonzero(later)])


def _choose_cuts(cuts: np.ndarray, index: PacketIndex, chunk_seconds: float) -> list[int]:
    if math.isinf(chunk_seconds):
        return [int(cuts[0])]
    origin = int(index.pts[index.shown].min())
    ticks = index.pts[cuts] - origin
    ticks[0] = 0
    end_ticks = int(index.pts.max()) - origin + 1
    boundaries = np.append(ticks, end_ticks).astype(np.float64) * float(index.time_base)
    chosen = [0]
    while True:
        here = chosen[-1]
        target = boundaries[here] + chunk_seconds
        following = int(np.searchsorted(boundaries, target, side="left"))
        following = min(max(following, here + 1), len(boundaries) - 1)
        before = following - 1
        if before > here and target - boundaries[before] <= boundaries[following] - target:
            following = before
        if following == len(boundaries) - 1:
            return [int(cuts[i]) for i in chosen]
        chosen.append(following)
