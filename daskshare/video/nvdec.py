"""Decode a chunk on a CUDA device with PyNvVideoCodec; frames never visit the host.

Packets are those that PyAV would decode, read by their places in local MP4 files and by PyAV from
all else. NVDEC decodes them into NV12 or P016 surfaces; one CuPy kernel turns several into RGB,
letterboxed for the network where that is asked for. Whatever NVDEC cannot do, or fails to do
half-way, goes to PyAV, and the stream says so.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from daskshare.errors import VideoError
from daskshare.models.spec import FrameBatch
from daskshare.video import decode
from daskshare.video.display_order import DisplayOrder, OrderLost
from daskshare.video.nvdec_session import (
    BIT_DEPTHS,
    CODECS,
    NvdecFailed,
    NvdecSession,
    SessionKey,
    capabilities,
    session_limit,
)
from daskshare.video.packets import read_packets
from daskshare.video.sessions import SessionPool
from daskshare.video.sources import open_av
from daskshare.video.start_codes import StartCodes

if TYPE_CHECKING:
    import torch
    from av.container import InputContainer
    from av.video.stream import VideoStream

    from daskshare.device import Device
    from daskshare.video.chunk import VideoChunk

__all__ = ["NvdecFrames", "SessionKey", "close_idle_sessions", "open_frames", "refusal"]

# In one call, so that a dozen decoding threads ask for the interpreter's lock less often. More
# keep more surfaces.
_PACKETS_PER_PIECE = 4


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
                del batch
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
        chunk, key = self._chunk, _key(self._chunk, self._device)
        stream = decode.video_stream(self._container, chunk)
        conversion = decode.stream_conversion(stream)
        pts = chunk.pts()
        expected = pts.tolist()
        height, width = self._input_size or (key.height, key.width)
        capacity = self._batch_frames
        placed = begun = 0
        # Batches wait until none of their frames can have been mistaken for another.
        complete: deque[tuple[int, FrameBatch, Callable[[], None]]] = deque()
        with _sessions.use(key) as session:
            batch: torch.Tensor | None = None
            convert: Callable[[list[Any], torch.Tensor, int], None] | None = None
            for pictures, certain_until in self._pictures(session, stream, expected):
                surfaces = self._wanted(pictures, expected, placed)
                while surfaces:
                    if batch is None:
                        batch, begun = session.empty_frames(capacity, height, width), placed
                        end = min(begun + capacity, len(expected))
                    if convert is None:
                        convert = session.converter(surfaces[0], conversion, self._input_size)
                    some = surfaces[: end - placed]
                    convert(some, batch, placed - begun)
                    placed += len(some)
                    del surfaces[: len(some)]
                    if placed == end:
                        if end - begun < capacity:
                            batch = batch[: end - begun]
                        finished = self._finished(batch, begun, pts, session)
                        complete.append((end, finished, session.mark()))
                        del finished
                        batch = None
                while complete and expected[complete[0][0] - 1] <= certain_until:
                    complete[0][2]()
                    yield complete.popleft()[1]
                if placed == len(expected) and not complete:
                    break
            if placed < len(expected):
                raise NvdecFailed(f"frame {chunk.first_frame + placed} did not come")
            if complete:
                raise NvdecFailed(
                    f"pictures from frame {complete[0][1].first_frame} on cannot be told apart: "
                    "fewer came than packets were given"
                )
        self.problem = decode.FrameNumbers(chunk).problem_when_complete()

    def _wanted(
        self, pictures: list[tuple[Any, int]], expected: list[int], placed: int
    ) -> list[Any]:
        """Surfaces of the frames that come next; those of neighbouring chunks are left out."""
        surfaces: list[Any] = []
        for surface, time in pictures:
            position = placed + len(surfaces)
            if position == len(expected) or time < expected[position]:
                continue
            if time != expected[position]:
                raise NvdecFailed(f"frame {self._chunk.first_frame + position} did not come")
            surfaces.append(surface)
        return surfaces

    def _pictures(
        self, session: NvdecSession, stream: VideoStream, expected: list[int]
    ) -> Iterator[tuple[list[tuple[Any, int]], float]]:
        """Decode the chunk; yields pictures with their times, and until when these are certain."""
        order = DisplayOrder(expected)

        def decoded(data: bytes, piece: int) -> tuple[list[tuple[Any, int]], float]:
            try:
                shown = [(s, order.shown(number)) for s, number in session.decode(data, piece)]
            except OrderLost as error:
                raise NvdecFailed(str(error)) from error
            certain = order.certain_until
            return shown, -math.inf if certain is None else certain

        for packets in self._pieces(stream, expected[0], expected[-1]):
            piece = order.feed([time for _, time in packets])
            yield decoded(b"".join([data for data, _ in packets]), piece)
        shown, certain = decoded(b"", 0)
        yield shown, certain if order.waiting else math.inf

    def _pieces(
        self, stream: VideoStream, origin: int, end: int
    ) -> Iterator[list[tuple[bytes | memoryview, int]]]:
        """Packets as the decoder takes them, as many at a time as it can tell apart."""
        to_start_codes = _start_codes(self._chunk.codec, stream)
        # Without start codes it cannot tell where a packet ends.
        most = _PACKETS_PER_PIECE if to_start_codes else 1
        # A chunk may begin at a picture before which packets do not repeat them.
        prefix = to_start_codes.parameter_sets if to_start_codes else b""
        piece: list[tuple[bytes | memoryview, int]] = []
        keyframe: int | None = None
        alone = False
        for data, time in self._packets(stream):
            keyframe = time if keyframe is None else keyframe
            if time < keyframe and self._chunk.codec == "hevc":
                # NVDEC's parser drops HEVC's leading pictures where decoding begins, as the
                # standard says, but gives their times to the pictures that follow.
                continue
            if to_start_codes is not None:
                data = _converted(data, to_start_codes)
            if prefix:
                data, prefix = prefix + bytes(data), b""
            # H.264's leading pictures may be shown or not, and those of the next chunk may come out
            # of the decoder when that is decoded.
            alone, before = time < origin or time > end, alone
            if piece and (alone or before or len(piece) == most):
                yield piece
                piece = []
            piece.append((data, time))
        if piece:
            yield piece

    def _packets(self, stream: VideoStream) -> Iterator[tuple[bytes | memoryview, int]]:
        chunk = self._chunk
        if chunk.packed_packets and chunk.is_unchanged_file():
            try:
                yield from read_packets(chunk.video, chunk.packed_packets)
            except OSError as error:
                raise NvdecFailed(f"reading broke off: {error}") from error
            return
        numbers = decode.FrameNumbers(chunk)
        for packet in decode.chunk_packets(self._container, stream, chunk, numbers):
            # Trusted files have a time for each.
            if packet is not None and packet.pts is not None:
                yield memoryview(packet), packet.pts
        if numbers.errors:
            raise NvdecFailed(f"reading broke off: {numbers.last_error}")

    def _finished(
        self, frames: torch.Tensor, emitted: int, pts: Any, session: NvdecSession
    ) -> FrameBatch:
        count = len(frames)
        if self._chunk.rotation:
            frames = session.turned(frames, self._chunk.rotation // 90)
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


def _converted(packet: bytes | memoryview, to_start_codes: StartCodes) -> bytes | memoryview:
    try:
        data = to_start_codes.convert(memoryview(packet))
    except ValueError as error:
        raise NvdecFailed(str(error)) from error
    return packet if data is None else data
