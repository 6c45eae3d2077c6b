"""Decode a chunk on the CPU with PyAV."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from daskshare.errors import UnreadableVideoError, VideoError
from daskshare.kernels.colour import YuvConversion, to_eight_bits, yuv_conversion
from daskshare.models.spec import FrameBatch
from daskshare.video.index import find_video_stream
from daskshare.video.sources import open_av

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

    from daskshare.video.chunk import VideoChunk

__all__ = [
    "FrameNumbers",
    "PyavFrames",
    "RgbConverter",
    "chunk_packets",
    "open_frames",
    "stream_conversion",
]


@contextmanager
def open_frames(
    chunk: VideoChunk, *, batch_frames: int, note: str, skip_frames: int = 0
) -> Iterator[PyavFrames]:
    """Open a chunk for decoding with PyAV.

    Parameters
    ----------
    chunk : VideoChunk
    batch_frames : int
        Most frames in a batch.
    note : str
        Why NVDEC was not used, or ``""``.
    skip_frames : int
        Leading frames that are decoded but left out, because another decoder gave them.

    Yields
    ------
    PyavFrames
    """
    with open_av(chunk.video, storage_options=chunk.storage_options) as container:
        yield PyavFrames(
            chunk, container, batch_frames=batch_frames, note=note, skip_frames=skip_frames
        )


class FrameNumbers:
    """Gives each decoded frame its number, and says in the end what is missing.

    Parameters
    ----------
    chunk : VideoChunk

    Attributes
    ----------
    errors : int
        Packets that could not be decoded; the decoder's user counts them.
    """

    def __init__(self, chunk: VideoChunk) -> None:
        self._chunk = chunk
        self._pts = chunk.pts() if chunk.exact else None
        self._next = 0
        self._got = 0
        self._stray = 0
        self.errors = 0
        self.last_error = ""

    @property
    def complete(self) -> bool:
        """Whether every frame of the index has come."""
        return self._pts is not None and self._next == len(self._pts)

    def place(self, pts: int | None) -> int | None:
        """Number of the frame shown at ``pts`` in the video, or ``None`` for one to leave out."""
        if self._pts is None:
            self._got += 1
            return self._chunk.first_frame + self._got - 1
        if pts is None:
            self._stray += 1
            return None
        position = int(np.searchsorted(self._pts, pts))
        inside = position < len(self._pts) and self._pts[position] == pts
        if not inside or position < self._next:
            # Frames of the neighbouring chunks are decoded for reference; others are strays.
            if len(self._pts) and self._pts[0] <= pts <= self._pts[-1]:
                self._stray += 1
            return None
        self._next = position + 1
        self._got += 1
        return self._chunk.first_frame + position

    def seconds(self, pts: int | None, number: int, rate: Any) -> float:
        """Presentation time; from the frame's number where the file holds no times."""
        if pts is not None:
            return float(pts * self._chunk.time_base)
        return float(number / rate) if rate else float(number)

    def problem_when_complete(self) -> str:
        """What :meth:`problem` says once every frame of the index has been placed."""
        self._next = self._got = 0 if self._pts is None else len(self._pts)
        return self.problem()

    def problem(self) -> str:
        """What is missing, ``""`` when nothing is."""
        expected = self._chunk.num_frames
        reasons = [self._chunk.damage] if self._chunk.damage else []
        if self.errors:
            reasons.append(f"{self.errors} packets could not be decoded ({self.last_error})")
        if self._stray:
            reasons.append(f"{self._stray} frames came with unknown or repeated times")
        # Without a trusted index the expected number is a guess that alone proves nothing.
        if self._got >= expected or (not self._chunk.exact and not reasons):
            return "; ".join(reasons) if self.errors or self._stray else ""
        return "; ".join([f"got {self._got} of {expected} frames", *reasons])


class PyavFrames:
    """Stream of batches from PyAV; a :class:`daskshare.models.spec.FrameStream`.

    Parameters
    ----------
    chunk : VideoChunk
    container : av.container.InputContainer
        Open, at its start; used only by the thread that iterates.
    batch_frames : int
    note : str
    skip_frames : int

    Attributes
    ----------
    problem : str
        Why frames are missing; valid after the end.
    decoder : str
        ``"pyav"``.
    decoder_note : str
        Why NVDEC was not used.
    """

    def __init__(
        self,
        chunk: VideoChunk,
        container: InputContainer,
        *,
        batch_frames: int,
        note: str,
        skip_frames: int = 0,
    ) -> None:
        self._first_wanted = chunk.first_frame + skip_frames
        self.decoder = "pyav"
        self.problem = ""
        self.decoder_note = note
        self._chunk = chunk
        self._container = container
        self._batch_frames = batch_frames

    def __iter__(self) -> Iterator[FrameBatch]:
        stream = video_stream(self._container, self._chunk)
        numbers = FrameNumbers(self._chunk)
        convert = RgbConverter(stream, self._chunk.rotation)
        batch = _Batch(self._batch_frames)
        for frame in _decode(self._container, stream, self._chunk, numbers):
            number = numbers.place(frame.pts)
            if number is None or number < self._first_wanted:
                continue
            rgb = convert(frame)
            if not batch.fits(number, rgb):
                yield batch.take()
            batch.add(number, rgb, numbers.seconds(frame.pts, number, stream.average_rate))
            if batch.full:
                yield batch.take()
            if numbers.complete:
                break
        if batch.size:
            yield batch.take()
        self.problem = numbers.problem()


def video_stream(container: InputContainer, chunk: VideoChunk) -> VideoStream:
    """The stream that was indexed."""
    stream = find_video_stream(container)
    if stream is not None:
        return stream
    raise UnreadableVideoError(
        f"{chunk.video} holds no video stream any more; it changed since it was indexed. "
        "Index it again with read_video.",
        video=chunk.video,
    )


def _decode(
    container: InputContainer, stream: VideoStream, chunk: VideoChunk, numbers: FrameNumbers
) -> Iterator[VideoFrame]:
    import av

    context = stream.codec_context
    context.thread_count = chunk.threads
    context.thread_type = "FRAME" if chunk.threads > 1 else "NONE"
    for packet in chunk_packets(container, stream, chunk, numbers):
        try:
            yield from context.decode(packet)
        except av.error.EOFError:
            return
        except av.error.FFmpegError as error:
            numbers.errors += 1
            numbers.last_error = f"{type(error).__name__}: {error}"


def chunk_packets(
    container: InputContainer, stream: VideoStream, chunk: VideoChunk, numbers: FrameNumbers
) -> Iterator[Packet[Any] | None]:
    """Packets to decode for a chunk, then ``None`` to drain the decoder.

    Parameters
    ----------
    container : av.container.InputContainer
        At its start.
    stream : av.video.stream.VideoStream
    chunk : VideoChunk
    numbers : FrameNumbers
        Its ``errors`` counts where reading broke off.

    Raises
    ------
    VideoError
        The keyframe where the chunk begins is not in the file.
    """
    import av

    left = chunk.num_packets
    try:
        for packet in _from_keyframe(container, stream, chunk):
            if left == 0:
                break
            if left is not None:
                left -= 1
            if packet.is_corrupt:
                continue
            yield packet
    except (OSError, av.error.FFmpegError) as error:
        numbers.errors += 1
        numbers.last_error = f"{type(error).__name__}: {error}"
    yield None


def _from_keyframe(
    container: InputContainer, stream: VideoStream, chunk: VideoChunk
) -> Iterator[Packet[Any]]:
    if chunk.seek_pts is None:
        yield from _real_packets(container, stream)
        return
    early = min(chunk.seek_pts, chunk.seek_pts if chunk.seek_dts is None else chunk.seek_dts)
    start = stream.start_time or 0
    # Containers seek by different clocks; what lies too early is skipped, too late is retried.
    for target in (early, early - int(5 / chunk.time_base), min(start, early) - 1):
        container.seek(target, stream=stream, backward=True)
        packets = _real_packets(container, stream)
        for packet in packets:
            if packet.is_keyframe and packet.pts == chunk.seek_pts:
                yield packet
                yield from packets
                return
            if packet.pts is not None and packet.is_keyframe and packet.pts > chunk.seek_pts:
                break
    raise VideoError(
        f"{chunk.video} has no keyframe at {chunk.start_seconds:.3f} s, where chunk {chunk.index} "
        "begins; the file changed since it was indexed. Index it again with read_video.",
        video=chunk.video,
    )


def _real_packets(container: InputContainer, stream: VideoStream) -> Iterator[Packet[Any]]:
    for packet in container.demux(stream):
        # PyAV ends with an empty packet, which would drain the decoder.
        if packet.size or packet.pts is not None or packet.dts is not None:
            yield packet


def stream_conversion(stream: VideoStream) -> YuvConversion:
    """The colour conversion that a stream's headers ask for."""
    context = stream.codec_context
    full = int(context.color_range) == 2 or str(context.pix_fmt).startswith("yuvj")
    return yuv_conversion(
        int(context.colorspace),
        full_range=full,
        width=context.width,
        height=context.height,
    )


class RgbConverter:
    """Frames to upright RGB arrays; planar 4:2:0 exactly as the GPU's kernel does it.

    Parameters
    ----------
    stream : av.video.stream.VideoStream
        Whose headers say which colours its frames have.
    rotation : int
        Degrees counter-clockwise, a multiple of 90.

    Notes
    -----
    Called with a frame, gives its pixels, uint8 (height, width, 3), which may be overwritten by the
    next call. For one thread, in a worker's process.
    """

    def __init__(self, stream: VideoStream, rotation: int) -> None:
        from av.video.reformatter import VideoReformatter

        self._reformatter = VideoReformatter()
        self._conversion = stream_conversion(stream)
        self._quarter_turns = rotation // 90
        self._even: VideoFrame | None = None

    def __call__(self, frame: VideoFrame) -> np.ndarray:
        height, width = frame.height, frame.width
        name = frame.format.name
        if name in ("yuv420p", "yuvj420p"):
            # With an odd size swscale would take another road with other chroma positions.
            if height % 2 or width % 2:
                frame = self._copy_even(frame, 8)
        elif name in ("yuv420p10le", "yuv420p12le"):
            frame = self._copy_even(frame, int(name[7:9]))
        rgb = self._reformat(frame)
        plane = rgb.planes[0]
        pixels = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)
        array = pixels[:height, : width * 3].reshape(height, width, 3)
        return np.rot90(array, self._quarter_turns) if self._quarter_turns else array

    def _reformat(self, frame: VideoFrame) -> VideoFrame:
        if frame.format.is_rgb or "pal" in frame.format.name:
            return self._reformatter.reformat(frame, format="rgb24", threads=1)
        conversion = self._conversion
        return self._reformatter.reformat(
            frame,
            format="rgb24",
            src_colorspace=conversion.sws_colorspace,
            dst_colorspace=conversion.sws_colorspace,
            src_color_range=2 if conversion.full_range else 1,
            dst_color_range=2,
            threads=1,
        )

    def _copy_even(self, frame: VideoFrame, bit_depth: int) -> VideoFrame:
        """Copy planes into an 8-bit frame of even size; the added row and column are cut off."""
        from av.video.frame import VideoFrame

        width, height = frame.width + frame.width % 2, frame.height + frame.height % 2
        if self._even is None or (self._even.width, self._even.height) != (width, height):
            self._even = VideoFrame(width, height, "yuv420p")
        dtype = np.uint8 if bit_depth == 8 else np.dtype("<u2")
        for number, (source, target) in enumerate(
            zip(frame.planes, self._even.planes, strict=True)
        ):
            # Some decoders give planes whose width field is rounded up.
            w = -(-frame.width // 2) if number else frame.width
            h = -(-frame.height // 2) if number else frame.height
            samples = (
                np.frombuffer(memoryview(source), np.uint8)
                .reshape(-1, source.line_size)
                .view(dtype)
            )
            out = np.frombuffer(memoryview(target), np.uint8).reshape(-1, target.line_size)
            visible = samples[:h, :w]
            out[:h, :w] = visible if bit_depth == 8 else to_eight_bits(visible, bit_depth)
        return self._even


class _Batch:
    """Frames that follow one another, copied into one array."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._frames: np.ndarray | None = None
        self._seconds = np.empty(capacity, np.float64)
        self._first = 0
        self.size = 0

    @property
    def full(self) -> bool:
        return self.size == self._capacity

    def fits(self, number: int, rgb: np.ndarray) -> bool:
        if self.size == 0 or self._frames is None:
            return True
        return number == self._first + self.size and rgb.shape == self._frames.shape[1:]

    def add(self, number: int, rgb: np.ndarray, seconds: float) -> None:
        if self.size == 0 or self._frames is None:
            self._first = number
            self._frames = np.empty((self._capacity, *rgb.shape), np.uint8)
            self._seconds = np.empty(self._capacity, np.float64)
        self._frames[self.size] = rgb
        self._seconds[self.size] = seconds
        self.size += 1

    def take(self) -> FrameBatch:
        if self._frames is None:
            raise AssertionError("an empty batch was taken")
        batch = FrameBatch(
            frames=self._frames[: self.size],
            first_frame=self._first,
            pts_seconds=self._seconds[: self.size],
        )
        self._frames, self.size = None, 0
        return batch
