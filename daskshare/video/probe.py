"""Index videos: read their packets, decode one frame, cut them into chunks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Any

import numpy as np

from daskshare.chunking import PacketIndex, plan_chunks
from daskshare.config import VideoOptions
from daskshare.video.chunk import VideoChunk, pack_pts
from daskshare.video.index import Scan, scan_container
from daskshare.video.nvdec_session import CODECS
from daskshare.video.packets import pack_table
from daskshare.video.sources import (
    Paths,
    expand_paths,
    fingerprint,
    is_process_local,
    is_url,
    open_av,
)

__all__ = ["probe_video", "probe_videos"]

_THREADS_WHEN_UNCUT = 4


def probe_videos(
    paths: Paths,
    *,
    chunk_seconds: float | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> list[VideoChunk]:
    """Index videos and cut them into chunks.

    Parameters
    ----------
    paths : str, os.PathLike, or an iterable of them
        Files, folders (searched recursively), globs, fsspec URLs.
    chunk_seconds : float, optional
        Aim for a chunk's length; the default is configured as ``daskshare.video.chunk-duration``.
    storage_options : mapping, optional
        For fsspec.

    Returns
    -------
    list of VideoChunk
        In the order of the videos and of their frames. A file that cannot be read gives one chunk
        whose ``error`` says why.

    Raises
    ------
    UnreadableVideoError
        A glob or folder holds no video.
    ConfigurationError
        ``paths`` is empty or ``chunk_seconds`` is negative.

    Notes
    -----
    With a Dask client in this process each file is a task on its cluster, otherwise threads of
    this process are used. Files are read through once (packets are not decoded).
    """
    if chunk_seconds is None:
        chunk_seconds = VideoOptions.from_config().chunk_seconds
    # An empty plan validates chunk_seconds here instead of on every worker.
    plan_chunks(_single_packet(), chunk_seconds=chunk_seconds)
    videos = expand_paths(paths, storage_options=storage_options)
    options = dict(storage_options or {})
    here = [v for v in videos if is_process_local(v)]
    away = [v for v in videos if not is_process_local(v)]
    found: dict[str, list[VideoChunk]] = {}
    client = _current_client()
    if client is None or not away:
        here, away = videos, []
    if away:
        futures = client.map(
            probe_video,
            away,
            chunk_seconds=chunk_seconds,
            storage_options=options,
            pure=False,
            key="daskshare-probe",
        )
        found.update(zip(away, client.gather(futures), strict=True))
    if here:
        with ThreadPoolExecutor(min(len(here), 4 + (os.cpu_count() or 1))) as pool:
            results = pool.map(
                lambda v: probe_video(v, chunk_seconds=chunk_seconds, storage_options=options),
                here,
            )
            found.update(zip(here, results, strict=True))
    return [chunk for video in videos for chunk in found[video]]


def _single_packet() -> PacketIndex:
    one = np.ones(1, bool)
    return PacketIndex(np.zeros(1, np.int64), one, one, Fraction(1))


def _current_client() -> Any:
    from distributed import default_client

    try:
        client = default_client()
    except ValueError:
        return None
    # A client that lost its scheduler would wait for ever.
    usable = client.status == "running" and not client.asynchronous
    return client if usable else None


def probe_video(
    video: str, *, chunk_seconds: float, storage_options: Mapping[str, Any] | None = None
) -> list[VideoChunk]:
    """Index one video and cut it into chunks.

    Parameters
    ----------
    video : str
        Path or URL of a file.
    chunk_seconds : float
        Aim for a chunk's length.
    storage_options : mapping, optional

    Returns
    -------
    list of VideoChunk
        One with ``error`` set when the file cannot be read.
    """
    import av

    options = dict(storage_options or {})
    version = ""
    try:
        version = fingerprint(video, storage_options=options)
        with open_av(video, storage_options=options) as container:
            scan = scan_container(container)
    except (OSError, av.error.FFmpegError, ImportError) as error:
        # fsspec wraps a store's answers in OSError and a missing driver in ImportError.
        reason = f"{type(error).__name__}: {error}"
        scan = Scan(error=f"{video} cannot be read as a video: {reason}")
    if scan.error:
        message = scan.error if video in scan.error else f"{video} {scan.error}"
        return [
            VideoChunk(
                video=video,
                index=0,
                error=message,
                fingerprint=version,
                storage_options=options,
            )
        ]
    return _chunks(video, version, scan, chunk_seconds, options)


def _chunks(
    video: str, version: str, scan: Scan, chunk_seconds: float, options: dict[str, Any]
) -> list[VideoChunk]:
    common: dict[str, Any] = {
        "video": video,
        "fingerprint": version,
        "width": scan.width,
        "height": scan.height,
        "codec": scan.codec,
        "pixel_format": scan.pixel_format,
        "rotation": scan.rotation,
        "time_base": scan.time_base,
        "storage_options": options,
    }
    whole_seconds = scan.end_seconds - scan.start_seconds
    if scan.distrust or scan.index is None:
        return [
            VideoChunk(
                index=0,
                num_frames=scan.expected_frames,
                start_seconds=scan.start_seconds,
                end_seconds=scan.end_seconds,
                damage=scan.damage,
                exact=False,
                threads=_THREADS_WHEN_UNCUT if whole_seconds > 2 * chunk_seconds else 1,
                **common,
            )
        ]
    plans = plan_chunks(scan.index, chunk_seconds=chunk_seconds)
    seconds = float(scan.time_base)
    chunks = []
    for number, plan in enumerate(plans):
        last = number + 1 == len(plans)
        start = int(plan.pts[0])
        end = scan.end_seconds if last else int(plans[number + 1].pts[0]) * seconds
        chunks.append(
            VideoChunk(
                index=number,
                first_frame=plan.first_frame,
                num_frames=scan.expected_frames - plan.first_frame if last else plan.num_frames,
                start_seconds=start * seconds,
                end_seconds=end,
                damage=scan.damage if last else "",
                seek_pts=int(scan.index.pts[plan.first_packet]) if number else None,
                seek_dts=scan.dts[plan.first_packet] if number else None,
                num_packets=plan.num_packets,
                packed_pts=pack_pts(plan.pts),
                packed_packets=_table(video, scan, plan.first_packet, plan.num_packets),
                threads=(
                    _THREADS_WHEN_UNCUT
                    if len(plans) == 1 and whole_seconds > 2 * chunk_seconds
                    else 1
                ),
                **common,
            )
        )
    return chunks


def _table(video: str, scan: Scan, first_packet: int, num_packets: int) -> bytes:
    # Where it could not be used it would only make graphs larger.
    if not scan.places or scan.index is None or is_url(video) or scan.codec not in CODECS:
        return b""
    end = first_packet + num_packets
    positions, sizes = np.array(scan.places[first_packet:end], np.int64).T
    return pack_table(positions, sizes, scan.index.pts[first_packet:end])
