"""One pass over a file's packets: what it holds, where it can be cut, what is missing."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from daskshare.chunking import PacketIndex, distrust

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.stream import VideoStream

__all__ = ["Scan", "find_video_stream", "scan_container"]

# Codecs whose keyframes reset the decoder, with one displayed frame in each packet.
# fmt: off
_CUTTABLE = frozenset({
    "av1", "dnxhd", "ffv1", "ffvhuff", "h264", "hevc", "huffyuv", "mjpeg", "mpeg1video",
    "mpeg2video", "mpeg4", "prores", "rawvideo", "vp8", "vp9",
})
# fmt: on
# Long enough for any decoder's delay; a file that shows nothing by then is not a video for us.
_PACKETS_TO_FIRST_FRAME = 400


@dataclass(slots=True)
class Scan:
    """What one pass over a file's packets found.

    Parameters
    ----------
    error : str
        Why the file cannot be read; then nothing else is set.
    codec, pixel_format : str
        FFmpeg's names.
    width, height : int
        Size as displayed, pixels.
    rotation : int
        Degrees counter-clockwise that make a frame upright.
    time_base : fractions.Fraction
        Seconds in a tick.
    average_rate : fractions.Fraction or None
        Frames a second.
    num_packets : int
        Packets read.
    expected_frames : int
        Frames that the undamaged file would show, as far as its header tells.
    damage : str
        What is missing, ``""`` for nothing.
    cut : bool
        Whether the end is missing.
    distrust : str
        Why the index cannot be used for cutting, ``""`` when it can.
    index : PacketIndex or None
    dts : list of (int or None)
        Decoding times in the order of ``index``, ticks.
    places : list of (int, int)
        Positions in the file and sizes of the packets in the same order, bytes. Of MP4 and MOV;
        empty for others, and where anything is damaged.
    start_seconds, end_seconds : float
    """

    error: str = ""
    codec: str = ""
    width: int = 0
    height: int = 0
    pixel_format: str = ""
    rotation: int = 0
    time_base: Fraction = Fraction(1)
    average_rate: Fraction | None = None
    num_packets: int = 0
    expected_frames: int = 0
    damage: str = ""
    cut: bool = False
    distrust: str = ""
    index: PacketIndex | None = None
    dts: list[int | None] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)
    start_seconds: float = 0.0
    end_seconds: float = 0.0


def find_video_stream(container: InputContainer) -> VideoStream | None:
    """First video stream that is no cover picture.

    Parameters
    ----------
    container : av.container.InputContainer
    """
    from av.stream import Disposition

    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            return stream
    return None


def scan_container(container: InputContainer) -> Scan:
    """Read all packets of a file's first video stream and decode one frame.

    Parameters
    ----------
    container : av.container.InputContainer
        At its start; left at its end.

    Returns
    -------
    Scan
    """
    import av

    stream = find_video_stream(container)
    if stream is None or container.format.name == "tty":
        kinds = sorted({s.type for s in container.streams})
        found = f"its format is {container.format.name} with streams: {', '.join(kinds) or 'none'}"
        return Scan(error=f"holds no video stream; {found}.")
    context = stream.codec_context
    scan = Scan(
        # Not the decoder's own name: AV1's is libdav1d.
        codec=context.codec.canonical_name,
        time_base=stream.time_base or Fraction(1, 1000),
        average_rate=stream.average_rate,
    )
    context.thread_count = 1
    rows: list[tuple[int | None, int | None, bool, bool]] = []
    smallest, damaged, unlisted, last_end = 1 << 60, 0, 0, None
    first_frame, failure = None, ""
    try:
        for packet in container.demux(stream):
            if packet.size == 0 and packet.pts is None and packet.dts is None:
                continue
            if packet.is_corrupt:
                damaged += 1
                if packet.pts is None:
                    unlisted += 1
                else:
                    # It keeps its place, so that the frames after it keep their numbers.
                    rows.append((packet.pts, packet.dts, False, not packet.is_discard))
                continue
            if first_frame is None and len(rows) < _PACKETS_TO_FIRST_FRAME:
                first_frame, failure = _try_decode(stream, packet, failure)
            rows.append((packet.pts, packet.dts, *_classify(scan.codec, packet, context.extradata)))
            smallest = min(smallest, packet.size)
            if packet.pts is not None:
                last_end = max(last_end or packet.pts, packet.pts + (packet.duration or 0))
            if packet.pos is not None and packet.pos >= 0:
                scan.places.append((packet.pos, packet.size))
    except (OSError, av.error.FFmpegError) as error:
        scan.cut = True
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
    transport_cut = _ends_inside_a_transport_packet(container)
    if transport_cut and len(rows) > 1:
        # Nothing marks the last packet as incomplete.
        rows.pop()
        unlisted += 1
        scan.cut, scan.damage = True, "the file is cut: it ends inside a transport packet"
    scan.num_packets = len(rows)
    if "mp4" not in container.format.name or scan.cut or len(scan.places) != len(rows):
        scan.places.clear()
    scan.dts = [row[1] for row in rows]
    scan.distrust = _distrust_container(scan, container, stream, rows, smallest)
    if not scan.distrust:
        scan.index = PacketIndex(
            pts=np.array([row[0] for row in rows], np.int64),
            keyframe=np.array([row[2] for row in rows], bool),
            shown=np.array([row[3] for row in rows], bool),
            time_base=scan.time_base,
        )
        scan.distrust = distrust(scan.index)
    times = [row[0] for row in rows if row[0] is not None and row[3]]
    _find_damage(scan, container, stream, damaged, unlisted, times)
    if scan.cut and not scan.distrust and scan.index is not None:
        _drop_uncertain_tail(scan.index, scan.dts)
        scan.distrust = distrust(scan.index)
        times = scan.index.pts[scan.index.shown].tolist()
    seconds = float(scan.time_base)
    scan.start_seconds = min(times, default=0) * seconds
    scan.end_seconds = max(last_end or 0, max(times, default=0)) * seconds
    if not times and scan.average_rate:
        scan.end_seconds = float(len(rows) / scan.average_rate)
    return scan


def _ends_inside_a_transport_packet(container: InputContainer) -> bool:
    size = container.size
    return container.format.name == "mpegts" and all(size % p for p in (188, 192, 204))


def _drop_uncertain_tail(index: PacketIndex, dts: list[int | None]) -> None:
    """Hide the frames of a cut file that may be shown after a lost one.

    Lost packets are stored later, so they are shown no earlier than the last decoding time; a
    frame beyond that could not be numbered.
    """
    known = [time for time in dts if time is not None]
    if known:
        index.shown[index.pts > known[-1]] = False


def _try_decode(stream: VideoStream, packet: Packet[Any] | None, failure: str) -> tuple[Any, str]:
    import av

    try:
        frames = stream.codec_context.decode(packet)
    except (av.error.FFmpegError, EOFError) as error:
        return None, f"{type(error).__name__}: {error}"
    return (frames[0] if frames else None), failure


def _describe_frame(scan: Scan, frame: Any) -> None:
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
    scan: Scan,
    container: InputContainer,
    stream: VideoStream,
    rows: list[tuple[int | None, int | None, bool, bool]],
    smallest: int,
) -> str:
    if scan.codec not in _CUTTABLE:
        return f"the codec {scan.codec} is not known to restart at keyframes"
    if any(row[0] is None for row in rows):
        return "packets have no presentation time"
    shown = [row[0] for row in rows if row[0] is not None and row[3]]
    first, last = min(shown, default=0), max(shown, default=-1)
    if scan.codec != "vp8" and any(
        first <= row[0] <= last for row in rows if row[0] is not None and not row[3]
    ):
        # Decoders know nothing of edit lists and show such pictures among the others.
        return "an edit list leaves out pictures in its midst"
    # Two fields may travel as two packets, and then packets are not frames.
    if int(stream.codec_context.field_order) > 1:
        return "it is interlaced"
    if container.format.name == "avi" and (
        any(row[0] != row[1] for row in rows) or (scan.codec == "mpeg4" and smallest < 8)
    ):
        return "AVI stores no presentation times and the frames are reordered"
    return ""


def _find_damage(
    scan: Scan,
    container: InputContainer,
    stream: VideoStream,
    damaged: int,
    unlisted: int,
    times: list[int],
) -> None:
    """Set ``damage`` and the number of frames that the whole file would show."""
    scan.expected_frames = sum(scan.index.shown) if scan.index else scan.num_packets
    if stream.frames > scan.num_packets:
        scan.expected_frames += stream.frames - scan.num_packets
        scan.cut = True
        scan.damage = scan.damage or "the file is cut: its header lists more frames than it holds"
        return
    scan.expected_frames += unlisted
    if damaged:
        scan.damage = scan.damage or f"{damaged} packets are damaged"
    declared = _declared_seconds(container, stream)
    if declared is None or len(times) < 2:
        return
    # Frames beyond the last decoding time may stand behind a hole.
    known = [time for time in scan.dts if time is not None]
    sure = [time for time in times if not known or time <= known[-1]]
    if len(sure) < 2:
        sure = times
    seconds = float(scan.time_base)
    frame_seconds = (max(sure) - min(sure)) * seconds / (len(sure) - 1)
    end_seconds = max(times) * seconds + frame_seconds
    # Headers round, and the last frame's length may count or not.
    if declared - end_seconds > 2 * frame_seconds:
        rest_seconds = declared - max(sure) * seconds - frame_seconds
        scan.expected_frames = len(sure) + round(rest_seconds / frame_seconds)
        scan.cut = True
        scan.damage = (
            f"the file is cut: it ends at {end_seconds:.2f} s, its header says {declared:.2f} s"
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
