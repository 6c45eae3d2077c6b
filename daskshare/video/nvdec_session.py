"""One decoding session of a GPU's video decoder, and what such a decoder can do."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from daskshare.config import VideoOptions
from daskshare.kernels.capture import CAPTURE_GATE
from daskshare.kernels.colour import YuvConversion, surface_to_rgb

if TYPE_CHECKING:
    import torch

    from daskshare.kernels.transfer import Event

__all__ = [
    "BIT_DEPTHS",
    "CODECS",
    "NvdecFailed",
    "NvdecSession",
    "SessionKey",
    "capabilities",
    "session_limit",
]

# Only codecs whose standards define every bit of the output: MPEG-2 leaves room for rounding.
CODECS = {"av1": "AV1", "h264": "H264", "hevc": "HEVC", "vp8": "VP8", "vp9": "VP9"}
BIT_DEPTHS = {"yuv420p": 8, "yuvj420p": 8, "yuv420p10le": 10, "yuv420p12le": 12}


# A decoder adds to the time of the picture before where it was given none: milliseconds, which must
# not reach the next piece's number.
_MADE_UP_BITS = 24


class NvdecFailed(Exception):
    """NVDEC cannot go on with this chunk."""


@dataclass(frozen=True, slots=True)
class SessionKey:
    """What a decoding session depends on; chunks with equal keys use the same ones in turn.

    Parameters
    ----------
    device_index : int
        CUDA ordinal in this process.
    codec : str
        FFmpeg's name.
    bit_depth : int
    width, height : int
        Size as stored, pixels.
    """

    device_index: int
    codec: str
    bit_depth: int
    width: int
    height: int


@functools.cache
def capabilities(device_index: int, codec: str, bit_depth: int) -> dict[str, int]:
    import PyNvVideoCodec

    return dict(
        PyNvVideoCodec.GetDecoderCaps(
            gpuid=device_index,
            codec=getattr(PyNvVideoCodec.cudaVideoCodec, CODECS[codec]),
            chromaformat=getattr(PyNvVideoCodec.cudaVideoChromaFormat, "420"),
            bitdepth=bit_depth,
        )
    )


def session_limit(key: SessionKey) -> tuple[int, int]:
    """What the sessions of a key share, a device, and how many of them may be in use at once.

    Each session takes memory, and each thread that decodes takes the interpreter from the others:
    one more than the chip has decoding engines keeps these busy.
    """
    wanted = VideoOptions.from_config().decoder_sessions
    if wanted is None:
        engines = capabilities(key.device_index, key.codec, key.bit_depth)["num_decoder_engines"]
        wanted = engines + 1
    return key.device_index, wanted


class NvdecSession:
    """One NVDEC session with its own CUDA stream."""

    def __init__(self, key: SessionKey) -> None:
        import cupy
        import PyNvVideoCodec
        import torch

        from daskshare.kernels.streams import STREAMS

        self.key = key
        self._base = self._latest = 0
        self._open = False
        self._marks: list[Event] = []
        self._new_packet_data = PyNvVideoCodec.PacketData
        self.stream = STREAMS.take(key.device_index, "decode")
        try:
            with CAPTURE_GATE.disturbing(), torch.cuda.device(key.device_index):
                # Frees nothing, and makes torch's (the primary) context current in this thread.
                cupy.cuda.runtime.free(0)
                self._decoder = PyNvVideoCodec.CreateDecoder(
                    gpuid=key.device_index,
                    codec=getattr(PyNvVideoCodec.cudaVideoCodec, CODECS[key.codec]),
                    cudacontext=cupy.cuda.driver.ctxGetCurrent(),
                    cudastream=self.stream.cuda_stream,
                    usedevicememory=True,
                )
        except BaseException:
            STREAMS.give_back(self.stream, "decode")
            raise

    def decode(self, data: bytes, piece: int) -> list[tuple[Any, int]]:
        """Feed a piece of one or more packets (empty: drain); returns surfaces in display order.

        Parameters
        ----------
        data : bytes
        piece : int
            Its number within the chunk, 0 or more, ascending with the times of first pictures.

        Returns
        -------
        list of (surface, int)
            Valid until the next call. The number is that of the piece whose first picture it is,
            or that of the picture before. Draining does not bring all of a chunk's pictures out of
            the decoder at once: those that come during the next chunk are left out.
        """
        packet = self._new_packet_data()
        if data:
            packet.bsl = len(data)
            packet.bsl_data = np.frombuffer(data, np.uint8).ctypes.data
            self._latest = max(self._latest, self._base + piece)
            packet.pts = (self._base + piece) << _MADE_UP_BITS
        if self._open:
            surfaces = self._decoder.Decode(packet)
        else:
            # The decoder takes its memory while it sees the first pictures.
            with CAPTURE_GATE.disturbing():
                surfaces = self._decoder.Decode(packet)
            self._open = bool(surfaces)
        base = self._base
        return [
            (surface, number - base)
            for surface in surfaces
            if (number := surface.timestamp >> _MADE_UP_BITS) >= base
        ]

    def empty_frames(self, count: int, height: int, width: int) -> torch.Tensor:
        """Memory for RGB frames, uint8 (count, height, width, 3), to be filled on the stream.

        It belongs to the thread's current stream, as the frames will. So torch may give it to
        others as soon as it is dropped, which must not happen before :meth:`mark` was waited for
        or the session was drained or closed.
        """
        import torch

        from daskshare.kernels.streams import wait_for_current

        # On their own streams, each of a dozen sessions would keep what was freed for itself.
        frames = torch.empty(
            (count, height, width, 3), dtype=torch.uint8, device=self.stream.device
        )
        wait_for_current(self.stream)
        return frames

    def turned(self, frames: torch.Tensor, quarter_turns: int) -> torch.Tensor:
        """Frames turned counter-clockwise, on the stream, in memory like theirs."""
        import torch

        count, height, width = frames.shape[:3]
        size = (width, height) if quarter_turns % 2 else (height, width)
        out = self.empty_frames(count, *size)
        with torch.cuda.stream(self.stream):
            out.copy_(torch.rot90(frames, quarter_turns, dims=(1, 2)))
        # They are dropped before the stream has read them.
        frames.record_stream(self.stream)
        return out

    def converter(
        self, surface: Any, conversion: YuvConversion, input_size: tuple[int, int] | None
    ) -> Callable[[list[Any], torch.Tensor, int], None]:
        """Return what queues the conversion of surfaces like ``surface`` into a batch's frames."""
        import torch

        luma, chroma = int(surface.GetPtrToPlane(0)), int(surface.GetPtrToPlane(1))
        sample_bytes = 1 if self.key.bit_depth == 8 else 2
        format_name = str(getattr(surface.format, "name", surface.format))
        # Chroma follows luma in one allocation, which tells the distance between rows.
        distance = chroma - luma
        pitch, rest = divmod(distance, self.key.height)
        expected = "NV12" if sample_bytes == 1 else "P016"
        if format_name != expected or rest or pitch < self.key.width * sample_bytes:
            raise NvdecFailed(
                f"got a {format_name} surface of shape {surface.shape} with {distance} bytes "
                f"before its chroma; expected {expected} of {self.key.width}x{self.key.height}"
            )
        queue: Callable[[list[int], torch.Tensor, int], None]
        if input_size is not None:
            queue = self._letterboxes(conversion, input_size, pitch, distance, sample_bytes)
        else:

            def queue(lumas: list[int], batch: torch.Tensor, position: int) -> None:
                for place, luma in enumerate(lumas, position):
                    surface_to_rgb(
                        luma,
                        luma + distance,
                        batch[place],
                        conversion,
                        luma_pitch_bytes=pitch,
                        chroma_pitch_bytes=pitch,
                        sample_bytes=sample_bytes,
                        stream=self.stream.cuda_stream,
                    )

        def convert(surfaces: list[Any], batch: torch.Tensor, position: int) -> None:
            lumas = [int(surface.GetPtrToPlane(0)) for surface in surfaces]
            # All tasks share one interpreter: no tensor is made, and no device is set that is
            # already current.
            if torch.cuda.current_device() == self.key.device_index:
                queue(lumas, batch, position)
            else:
                with torch.cuda.device(self.key.device_index):
                    queue(lumas, batch, position)

        return convert

    def _letterboxes(
        self,
        conversion: YuvConversion,
        input_size: tuple[int, int],
        pitch: int,
        distance: int,
        sample_bytes: int,
    ) -> Callable[[list[int], torch.Tensor, int], None]:
        import torch

        from daskshare.kernels.preprocess import Letterbox
        from daskshare.kernels.surface import SurfaceLetterbox

        with torch.cuda.device(self.key.device_index):
            to_input = SurfaceLetterbox(
                Letterbox(self.key.height, self.key.width, *input_size),
                conversion,
                pitch_bytes=pitch,
                chroma_offset=distance,
                sample_bytes=sample_bytes,
                device_index=self.key.device_index,
                stream=self.stream.cuda_stream,
            )
        frame_bytes = 3 * input_size[0] * input_size[1]

        def queue(lumas: list[int], batch: torch.Tensor, position: int) -> None:
            to_input(lumas, batch.data_ptr() + position * frame_bytes)

        return queue

    def mark(self) -> Callable[[], None]:
        """Return what waits for all that is queued on the stream up to now; to be called once."""
        from daskshare.kernels.transfer import Event

        event = self._marks.pop() if self._marks else Event(blocking=True)
        event.record(self.stream)

        def wait() -> None:
            event.synchronize()
            self._marks.append(event)

        return wait

    def drain(self) -> None:
        """Drop the rest of a chunk; see :class:`daskshare.video.sessions.Session`."""
        self.decode(b"", 0)
        self._base = self._latest + 1
        self.stream.synchronize()

    def close(self) -> None:
        """Give the decoder's surfaces back, after the kernels that still read them."""
        from daskshare.kernels.streams import STREAMS

        self.stream.synchronize()
        with CAPTURE_GATE.disturbing():
            self._decoder = None
        STREAMS.give_back(self.stream, "decode")
