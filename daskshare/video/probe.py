"""Index videos: read their packets, decode one frame, cut them into chunks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from daskshare.chunking import PacketIndex, distrust, plan_chunks
from daskshare.config import VideoOptions
from daskshare.video.chunk import VideoChunk, pack_pts
from daskshare.video.sources import Paths, expand_paths, fingerprint, is_process_local, open_av

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.stream import VideoStream

__all__ = ["probe_video", "probe_videos"]

# Codecs whose keyframes reset the decoder, with one displayed frame in each packet.
# fmt: off
_CUTTABLE = frozenset({
    "av1", "dnxhd", "ffv1", "ffvhuff", "h264", "hevc", "huffyuv", "mjpeg", "mpeg1video",
    "mpeg2video", "mpeg4", "prores", "rawvideo", "vp8", "vp9",
})
# fmt: on
# Long enough for any decoder's delay; a file that shows nothing by then is not a video for us.
_PACKETS_TO_FIRST_FRAME = 400
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
        client = default_client()  # type: ignore[no-untyped-call]
    except ValueError:
        return None
    return None if client.asynchronous else client


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
            scan = _scan(container)
    except (OSError, av.error.FFmpegError, ImportError) as error:
        # fsspec wraps a store's answers in OSError and a missing driver in ImportError.
        reason = f"{type(error).__name__}: {error}"
        scan = _Scan(error=f"{video} cannot be read as a video: {reason}")
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


@dataclass(slots=True)
class _Scan:
    """What one pass over a file's packets found."""

    error: str = ""
    codec: str = ""
    width: int = 0
    height: int = 0
    pixel_format: str = ""
    rotation: int = 0
    time_base: Fraction = Fraction(1)
    average_rate: Fraction | None = None
    num_packets: int = 0
    lost_frames: int = 0
    damage: str = ""
    distrust: str = ""
    index: PacketIndex | None = None
    dts: list[int | None] | None = None
    start_seconds: float = 0.0
    end_seconds: float = 0.0


def _video_stream(container: InputContainer) -> VideoStream | None:
    from av.stream import Disposition

    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            return stream
    return None


def _scan(container: InputContainer) -> _Scan:
    import av

    stream = _video_stream(container)
    if stream is None or container.format.name == "tty":
        kinds = sorted({s.type for s in container.streams})
        found = f"its format is {container.format.name} with streams: {', '.join(kinds) or 'none'}"
        return _Scan(error=f"holds no video stream; {found}.")
    context = stream.codec_context
    scan = _Scan(
        codec=context.name,
        time_base=stream.time_base or Fraction(1, 1000),
        average_rate=stream.average_rate,
    )
    context.thread_count = 1
    rows: list[tuple[int | None, int | None, bool, bool]] = []
    smallest, damaged, last_end = 1 << 60, 0, None
    first_frame, failure = None, ""
    try:
        for packet in container.demux(stream):
            if packet.size == 0 and packet.pts is None and packet.dts is None:
                continue
            if packet.is_corrupt:
                damaged += 1
                continue
            if first_frame is None and len(rows) < _PACKETS_TO_FIRST_FRAME:
                first_frame, failure = _try_decode(stream, packet, failure)
            rows.append((packet.pts, packet.dts, *_classify(scan.codec, packet, context.extradata)))
            smallest = min(smallest, packet.size)
            if packet.pts is not None:
                last_end = max(last_end or packet.pts, packet.pts + (packet.duration or 0))
    except (OSError, av.error.FFmpegError) as error:
        scan.damage = f"reading stopped with {type(error).__name__}: {error}"
    if first_frame is None:
        first_frame, failure = _try_decode(stream, None, failure)
    if first_frame is None:
        scan.error = (
            f"holds {len(rows)} {scan.codec} packets but no frame could be decoded"
            f"{': ' + failure if failure else ''}. It is damaged or no video."
        )
        return scan
    _describe_frame(scan, first_frame)
    scan.num_packets = len(rows)
    scan.dts = [row[1] for row in rows]
    scan.distrust = _distrust_container(scan, container, stream, rows, smallest)
    _find_damage(scan, container, stream, damaged, last_end)
    if not scan.distrust:
        scan.index = PacketIndex(
            pts=np.array([row[0] for row in rows], np.int64),
            keyframe=np.array([row[2] for row in rows], bool),
            shown=np.array([row[3] for row in rows], bool),
            time_base=scan.time_base,
        )
        scan.distrust = distrust(scan.index)
    seconds = float(scan.time_base)
    times = [row[0] for row in rows if row[0] is not None and row[3]]
    scan.start_seconds = min(times, default=0) * seconds
    scan.end_seconds = max(last_end or 0, max(times, default=0)) * seconds
    if not times and scan.average_rate:
        scan.end_seconds = float(len(rows) / scan.average_rate)
    return scan


def _try_decode(stream: VideoStream, packet: Packet[Any] | None, failure: str) -> tuple[Any, str]:
    import av

    try:
        frames = stream.codec_context.decode(packet)
    except (av.error.FFmpegError, EOFError) as error:
        return None, f"{type(error).__name__}: {error}"
    return (frames[0] if frames else None), failure


def _describe_frame(scan: _Scan, frame: Any) -> None:
    turned = round(frame.rotation / 90) * 90 % 360
    # A slant that is no quarter turn cannot be undone without resampling.
    scan.rotation = turned if abs(frame.rotation % 360 - turned) % 360 < 1 else 0
    scan.width, scan.height = frame.width, frame.height
    scan.pixel_format = frame.format.name
    if scan.rotation in (90, 270):
        scan.width, scan.height = scan.height, scan.width


def _classify(codec: str, packet: Packet[Any], extradata: bytes | None) -> tuple[bool, bool]:
    """Whether decoding can start at the packet, and whether its picture is displayed."""
    keyframe, shown = packet.is_keyframe, not packet.is_discard
    if codec == "h264" and keyframe:
        keyframe = _h264_starts_cleanly(bytes(packet), extradata)
    elif codec == "vp8" and packet.size:
        # Alternate reference pictures of VP8 travel in packets of their own and stay invisible.
        shown = shown and bool(memoryview(packet)[0] & 0x10)
    return keyframe, shown


def _h264_starts_cleanly(data: bytes, extradata: bytes | None) -> bool:
    """Whether a keyframe is an IDR picture or an exact recovery point.

    With periodic intra refresh the recovery point's picture is only complete some frames later.
    """
    for unit in _h264_units(data, extradata):
        kind = unit[0] & 0x1F
        if kind == 5:
            return True
        if kind == 6 and _recovers_at_once(unit):
            return True
    return False


def _h264_units(data: bytes, extradata: bytes | None) -> list[bytes]:
    units = []
    if extradata and extradata[0] == 1 and len(extradata) > 4:
        length_bytes, position = (extradata[4] & 3) + 1, 0
        while position + length_bytes < len(data):
            size = int.from_bytes(data[position : position + length_bytes], "big")
            position += length_bytes
            # Slices are long and only their first byte matters.
            units.append(data[position : position + min(size, 256)])
            position += size
    else:
        units = [unit[:256] for unit in data.split(b"\x00\x00\x01")[1:]]
    return [unit for unit in units if unit]


def _recovers_at_once(sei: bytes) -> bool:
    position = 1
    while position + 2 < len(sei):
        kind = size = 0
        while position < len(sei) and sei[position] == 0xFF:
            kind, position = kind + 255, position + 1
        kind, position = kind + sei[position], position + 1
        while position < len(sei) and sei[position] == 0xFF:
            size, position = size + 255, position + 1
        if position + 1 >= len(sei):
            return False
        size, position = size + sei[position], position + 1
        if kind == 6:
            # recovery_frame_cnt is Exp-Golomb coded: zero is the single bit 1.
            return bool(sei[position] & 0x80)
        position += size
    return False


def _distrust_container(
    scan: _Scan,
    container: InputContainer,
    stream: VideoStream,
    rows: list[tuple[int | None, int | None, bool, bool]],
    smallest: int,
) -> str:
    if scan.codec not in _CUTTABLE:
        return f"the codec {scan.codec} is not known to restart at keyframes"
    if any(row[0] is None for row in rows):
        return "packets have no presentation time"
    # Two fields may travel as two packets, and then packets are not frames.
    if int(stream.codec_context.field_order) > 1:
        return "it is interlaced"
    if container.format.name == "avi" and (
        any(row[0] != row[1] for row in rows) or (scan.codec == "mpeg4" and smallest < 8)
    ):
        return "AVI stores no presentation times and the frames are reordered"
    return ""


def _find_damage(
    scan: _Scan,
    container: InputContainer,
    stream: VideoStream,
    damaged: int,
    last_end: int | None,
) -> None:
    if stream.frames > scan.num_packets:
        scan.lost_frames = stream.frames - scan.num_packets
        scan.damage = scan.damage or "the file is cut: its header lists more frames than it holds"
        return
    if damaged:
        scan.lost_frames = damaged
        scan.damage = scan.damage or "packets are damaged"
    declared = _declared_seconds(container, stream)
    if declared is None or last_end is None or scan.average_rate is None:
        return
    start = stream.start_time or 0
    missing_seconds = declared - float((last_end - start) * scan.time_base)
    # Headers round their durations: less than two frames is no loss.
    if missing_seconds * scan.average_rate > 2:
        scan.lost_frames = max(scan.lost_frames, round(missing_seconds * scan.average_rate))
        scan.damage = (
            f"the file is cut: it ends {missing_seconds:.2f} s before the end that its header gives"
        )


def _declared_seconds(container: InputContainer, stream: VideoStream) -> float | None:
    """Length that the file's header promises, where a cut file still has the header."""
    if "matroska" not in container.format.name and container.format.name != "flv":
        return None
    tag = stream.metadata.get("DURATION", "")
    parts = tag.split(":")
    if len(parts) == 3:
        hours, minutes, seconds = (float(part) for part in parts)
        return hours * 3600 + minutes * 60 + seconds
    # The container's length covers the sound too, which may outlast the picture.
    if len(container.streams) == 1 and container.duration:
        return container.duration / 1e6
    return None


def _chunks(
    video: str, version: str, scan: _Scan, chunk_seconds: float, options: dict[str, Any]
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
    if scan.distrust or scan.index is None or scan.dts is None:
        return [
            VideoChunk(
                index=0,
                num_frames=scan.num_packets + scan.lost_frames,
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
                num_frames=plan.num_frames + (scan.lost_frames if last else 0),
                start_seconds=start * seconds,
                end_seconds=end,
                damage=scan.damage if last else "",
                seek_pts=int(scan.index.pts[plan.first_packet]) if number else None,
                seek_dts=scan.dts[plan.first_packet] if number else None,
                num_packets=plan.num_packets,
                packed_pts=pack_pts(plan.pts),
                threads=(
                    _THREADS_WHEN_UNCUT
                    if len(plans) == 1 and whole_seconds > 2 * chunk_seconds
                    else 1
                ),
                **common,
            )
        )
    return chunks
