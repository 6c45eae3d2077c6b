"""Decode a chunk on a CUDA device with PyNvVideoCodec; frames never visit the host.

PyAV demultiplexes, so that both decoders follow the same plan of packets; NVDEC decodes into
NV12 or P016 surfaces; one CuPy kernel turns each into RGB, letterboxed for the network where that
is asked for. Whatever NVDEC cannot do, or fails to do half-way, goes to PyAV, and the stream says
so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from daskshare.errors import VideoError
from daskshare.models.spec import FrameBatch
from daskshare.video import decode
from daskshare.video.nvdec_session import (
    BIT_DEPTHS,
    CODECS,
    NvdecFailed,
    NvdecSession,
    SessionKey,
    capabilities,
    session_limit,
)
from daskshare.video.sessions import SessionPool
from daskshare.video.sources import open_av
from daskshare.video.start_codes import StartCodes

if TYPE_CHECKING:
    import torch
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.stream import VideoStream

    from daskshare.device import Device
    from daskshare.video.chunk import VideoChunk

__all__ = ["NvdecFrames", "SessionKey", "close_idle_sessions", "open_frames", "refusal"]


def _key(chunk: VideoChunk, device: Device) -> SessionKey:
    size = (chunk.width, chunk.height)
    width, height = size[::-1] if chunk.rotation in (90, 270) else size
    return SessionKey(
        device_index=device.index,
        codec=chunk.codec,
        bit_depth=BIT_DEPTHS[chunk.pixel_format],
        width=width,
        height=height,
    )


def refusal(chunk: VideoChunk, device: Device) -> str:
    """Why NVDEC cannot decode a chunk, or ``""`` when it can.

    Parameters
    ----------
    chunk : VideoChunk
    device : Device
        A CUDA device.
    """
    if not chunk.exact:
        return "the file's index cannot be trusted"
    if chunk.codec not in CODECS:
        return f"the codec {chunk.codec} is not decoded on the GPU"
    if chunk.pixel_format not in BIT_DEPTHS:
        return f"the pixel format {chunk.pixel_format} is not 4:2:0"
    if chunk.width % 2 or chunk.height % 2:
        return f"the size {chunk.width}x{chunk.height} is odd"
    try:
        import PyNvVideoCodec
    except (ImportError, RuntimeError, OSError) as error:
        # It looks for the driver's libraries while it is imported.
        return f"PyNvVideoCodec cannot be imported: {str(error).splitlines()[0]}"
    key = _key(chunk, device)
    try:
        caps = capabilities(key.device_index, key.codec, key.bit_depth)
    except (RuntimeError, PyNvVideoCodec.PyNvVCException) as error:
        return f"the GPU's decoder cannot be asked: {error}"
    if caps.get("num_decoder_engines", 0) < 1:
        return f"the GPU does not decode {key.codec} with {key.bit_depth} bits"
    for axis, size in (("width", key.width), ("height", key.height)):
        low, high = caps.get(f"{axis}_min", 0), caps.get(f"{axis}_max", size)
        if not low <= size <= high:
            return f"the {axis} {size} is outside of the GPU's {low} to {high} for {key.codec}"
    return ""


_sessions: SessionPool[SessionKey, NvdecSession] = SessionPool(NvdecSession, limit=session_limit)


def close_idle_sessions() -> None:
    """Close the decoding sessions of this process that no chunk uses; from any thread."""
    _sessions.close_idle()


@contextmanager
def open_frames(
    chunk: VideoChunk,
    device: Device,
    *,
    batch_frames: int,
    fall_back: bool,
    input_size: tuple[int, int] | None = None,
) -> Iterator[NvdecFrames]:
    """Open a chunk for decoding on a CUDA device.

    Parameters
    ----------
    chunk : VideoChunk
        One that :func:`refusal` does not refuse.
    device : Device
    batch_frames : int
        Most frames in a batch.
    fall_back : bool
        Whether PyAV goes on where NVDEC fails; otherwise VideoError is raised.
    input_size : tuple of int, optional
        Height and width to which frames are letterboxed; not those of rotated video.

    Yields
    ------
    NvdecFrames
    """
    with open_av(chunk.video, storage_options=chunk.storage_options) as container:
        yield NvdecFrames(
            chunk,
            container,
            device,
            batch_frames=batch_frames,
            fall_back=fall_back,
            input_size=None if chunk.rotation else input_size,
        )


class NvdecFrames:
    """Stream of batches in the memory of a CUDA device.

    Parameters
    ----------
    chunk : VideoChunk
    container : av.container.InputContainer
    device : Device
    batch_frames : int
    fall_back : bool
    input_size : tuple of int or None

    Attributes
    ----------
    problem : str
        Why frames are missing; valid after the end.
    decoder : str
        ``"nvdec"``, or ``"pyav"`` once PyAV had to take over.
    decoder_note : str
        Why PyAV took over.
    """

    def __init__(
        self,
        chunk: VideoChunk,
        container: InputContainer,
        device: Device,
        *,
        batch_frames: int,
        fall_back: bool,
        input_size: tuple[int, int] | None = None,
    ) -> None:
        self._input_size = input_size
        self.decoder = "nvdec"
        self.decoder_note = ""
        self.problem = ""
        self._chunk = chunk
        self._container = container
        self._device = device
        self._batch_frames = batch_frames
        self._fall_back = fall_back

    def __iter__(self) -> Iterator[FrameBatch]:
        import av
        import PyNvVideoCodec

        failures = (NvdecFailed, RuntimeError, PyNvVideoCodec.PyNvVCException, av.FFmpegError)
        done = 0
        try:
            for batch in self._from_gpu():
                done += len(batch.pts_seconds)
                yield batch
            return
        except failures as error:
            reason = f"NVDEC failed after {done} frames: {error}"
            if not self._fall_back:
                raise VideoError(
                    f"{self._chunk.video}: {reason}. Set daskshare.video.decoder to 'auto' or "
                    "'pyav' in Dask's configuration.",
                    video=self._chunk.video,
                ) from error
        self.decoder, self.decoder_note = "pyav", reason
        with decode.open_frames(
            self._chunk, batch_frames=self._batch_frames, note=reason, skip_frames=done
        ) as rest:
            yield from rest
        self.problem = rest.problem

    def _from_gpu(self) -> Iterator[FrameBatch]:
        import torch

        chunk, key = self._chunk, _key(self._chunk, self._device)
        stream = decode.video_stream(self._container, chunk)
        conversion = decode.stream_conversion(stream)
        pts = chunk.pts()
        expected = pts.tolist()
        capacity = self._batch_frames
        height, width = self._input_size or (key.height, key.width)
        emitted = size = 0
        with _sessions.use(key) as session:
            batch: torch.Tensor | None = None
            convert: Callable[[Any, torch.Tensor, int], None] | None = None
            for surface, ticks in self._surfaces(session, stream, expected[0]):
                position = emitted + size
                if position == len(pts) or ticks < expected[position]:
                    continue
                if ticks != expected[position]:
                    raise NvdecFailed(f"frame {chunk.first_frame + position} did not come")
                if batch is None:
                    batch = session.empty_frames(capacity, height, width)
                if convert is None:
                    convert = session.converter(surface, conversion, self._input_size)
                convert(surface, batch, size)
                size += 1
                if size == capacity or emitted + size == len(pts):
                    with torch.cuda.stream(session.stream):
                        finished = self._finished(batch[:size], emitted, pts)
                    session.stream.synchronize()
                    yield finished
                    batch, emitted, size = None, emitted + size, 0
                if emitted == len(pts):
                    break
        if emitted < len(pts):
            raise NvdecFailed(f"frame {chunk.first_frame + emitted} did not come")
        self.problem = decode.FrameNumbers(chunk).problem_when_complete()

    def _surfaces(
        self, session: NvdecSession, stream: VideoStream, origin: int
    ) -> Iterator[tuple[Any, int]]:
        to_start_codes = _start_codes(self._chunk.codec, stream)
        # A chunk may begin at a picture before which packets do not repeat them.
        prefix = to_start_codes.parameter_sets if to_start_codes else b""
        numbers = decode.FrameNumbers(self._chunk)
        for packet in decode.chunk_packets(self._container, stream, self._chunk, numbers):
            if self._refers_past_the_keyframe(packet, origin):
                continue
            if packet is not None and to_start_codes is not None:
                packet = _converted(packet, to_start_codes, prefix)
                prefix = b""
            # Times are counted from the chunk's start, whatever a session did before.
            ticks = 0 if packet is None or packet.pts is None else packet.pts - origin
            for surface, time in session.decode(packet, ticks):
                yield surface, time + origin
        if numbers.errors:
            raise NvdecFailed(f"reading broke off: {numbers.last_error}")

    def _refers_past_the_keyframe(self, packet: Packet[Any] | None, origin: int) -> bool:
        # NVDEC's parser drops HEVC's leading pictures where decoding begins, as the standard says,
        # but gives their times to the pictures that follow.
        return (
            self._chunk.codec == "hevc"
            and packet is not None
            and packet.pts is not None
            and packet.pts < origin
        )

    def _finished(self, frames: torch.Tensor, emitted: int, pts: Any) -> FrameBatch:
        import torch

        turns = self._chunk.rotation // 90
        count = len(frames)
        if turns:
            frames = torch.rot90(frames, turns, dims=(1, 2)).contiguous()
        return FrameBatch(
            frames=frames,
            first_frame=self._chunk.first_frame + emitted,
            pts_seconds=pts[emitted : emitted + count] * float(self._chunk.time_base),
            source_size=(self._chunk.height, self._chunk.width) if self._input_size else None,
        )


def _start_codes(codec: str, stream: VideoStream) -> StartCodes | None:
    if codec not in ("h264", "hevc"):
        return None
    try:
        return StartCodes(codec, bytes(stream.codec_context.extradata or b""))
    except ValueError as error:
        raise NvdecFailed(str(error)) from error


def _converted(packet: Packet[Any], to_start_codes: StartCodes, prefix: bytes) -> Packet[Any]:
    import av

    try:
        data = to_start_codes.convert(memoryview(packet))
    except ValueError as error:
        raise NvdecFailed(str(error)) from error
    if data is None and not prefix:
        return packet
    joined = av.Packet(prefix + (bytes(packet) if data is None else data))
    joined.pts, joined.dts, joined.is_keyframe = packet.pts, packet.dts, packet.is_keyframe
    return joined
