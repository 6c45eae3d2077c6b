"""VideoChunk: the small description of a stretch of video that travels in task graphs."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from daskshare.config import VideoOptions
from daskshare.errors import VideoError
from daskshare.models.spec import FrameStream

if TYPE_CHECKING:
    from daskshare.device import Device

__all__ = ["VideoChunk"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoChunk:
    """A run of frames of one video, from a keyframe up to another; holds no pixels.

    Parameters
    ----------
    video : str
        Path or URL as found.
    index : int
        0-based number of the chunk within its video.
    first_frame : int
        0-based number of its first frame in the video's presentation order.
    num_frames : int
        Frames expected; 0 when ``error`` is set.
    start_seconds, end_seconds : float
        Presentation time of the first frame, and of what follows the last one.
    fingerprint : str
        Identifies the version of the source file.
    error : str
        Why nothing can be read, or ``""``.
    damage : str
        What the index shows to be missing at the end of the file, or ``""``.
    width, height : int
        Size of a frame as displayed (after rotation), pixels.
    codec : str
        FFmpeg's name of the codec.
    pixel_format : str
        FFmpeg's name of the decoded frames' layout.
    rotation : int
        Degrees, a multiple of 90, by which frames are turned counter-clockwise to be upright.
    time_base : fractions.Fraction
        Seconds in one tick of the presentation times.
    exact : bool
        Whether the file's index could be trusted; if not, the file is a single chunk and its
        frames are numbered as they come.
    seek_pts, seek_dts : int or None
        Times of the keyframe where decoding starts; both ``None``: at the file's start.
    num_packets : int or None
        Packets to decode from there; ``None``: all.
    threads : int
        Threads that decode; more than one only where a long file could not be cut.
    packed_pts : bytes
        The frames' presentation times, compressed; see :meth:`pts`.
    packed_packets : bytes
        Where the chunk's packets lie in the file, by :func:`daskshare.video.packets.pack_table`;
        empty where only a demultiplexer can tell.
    storage_options : dict
        For fsspec.

    Notes
    -----
    Implements :class:`daskshare.models.spec.FrameSource`.
    """

    video: str
    index: int
    first_frame: int = 0
    num_frames: int = 0
    start_seconds: float = 0.0
    end_seconds: float = 0.0
    fingerprint: str = ""
    error: str = ""
    damage: str = ""
    width: int = 0
    height: int = 0
    codec: str = ""
    pixel_format: str = ""
    rotation: int = 0
    time_base: Fraction = Fraction(1)
    exact: bool = True
    seek_pts: int | None = None
    seek_dts: int | None = None
    num_packets: int | None = None
    threads: int = 1
    packed_pts: bytes = field(default=b"", repr=False)
    packed_packets: bytes = field(default=b"", repr=False)
    storage_options: dict[str, Any] = field(default_factory=dict, repr=False, hash=False)

    def pts(self) -> np.ndarray:
        """Presentation times of the frames that the index lists, int64 ticks, ascending."""
        return unpack_pts(self.packed_pts)

    def is_unchanged_file(self) -> bool:
        """Whether the video is a local file and still the one that was indexed."""
        from daskshare.video.sources import fingerprint, is_url

        try:
            return not is_url(self.video) and fingerprint(self.video) == self.fingerprint
        except OSError:
            return False

    @contextmanager
    def open_frames(
        self,
        *,
        device: Device | None = None,
        batch_frames: int | None = None,
        decoder: str | None = None,
        input_size: tuple[int, int] | None = None,
    ) -> Iterator[FrameStream]:
        """Start decoding.

        Parameters
        ----------
        device : Device, optional
            With a CUDA device, frames may come in its memory.
        batch_frames : int, optional
            Most frames in a batch; the default is configured as
            ``daskshare.video.frames-per-request``.
        decoder : {"auto", "nvdec", "pyav"}, optional
            The default is configured as ``daskshare.video.decoder``.
        input_size : tuple of int, optional
            Height and width of a network's input. A decoder that can letterbox frames to it at no
            cost does, and says so in each batch's ``source_size``.

        Yields
        ------
        FrameStream
            Its batches are uint8 RGB (n, height, width, 3), of the video's size or of
            ``input_size``. A batch ends early before a missing
            frame and where the size changes. Can be iterated once.

        Raises
        ------
        VideoError
            ``decoder`` is ``"nvdec"`` and the GPU cannot decode this video, or the file is no
            longer the one that was indexed.
        OSError
            The file cannot be opened.

        Notes
        -----
        Decoding happens in the thread that iterates and releases the interpreter lock; at most
        one batch (on a GPU two) and the decoder's own pictures are in memory.
        """
        options = VideoOptions.from_config()
        decoder = decoder or options.decoder
        batch_frames = batch_frames or options.frames_per_request
        if self.error:
            yield _NoFrames(self.error)
            return
        frames: FrameStream
        from daskshare.video import decode

        note = ""
        if decoder != "pyav" and device is not None and device.kind == "cuda":
            from daskshare.video import nvdec

            note = nvdec.refusal(self, device)
            if not note:
                with nvdec.open_frames(
                    self,
                    device,
                    batch_frames=batch_frames,
                    fall_back=decoder == "auto",
                    input_size=input_size,
                ) as frames:
                    yield frames
                return
        if decoder == "nvdec":
            raise VideoError(
                f"{self.video} cannot be decoded by NVDEC: {note or 'no CUDA device'}. "
                "Set daskshare.video.decoder to 'auto' or 'pyav' in Dask's configuration.",
                video=self.video,
            )
        with decode.open_frames(self, batch_frames=batch_frames, note=note) as frames:
            yield frames


class _NoFrames:
    """The stream of a video that cannot be read."""

    def __init__(self, problem: str) -> None:
        self.problem = problem
        self.decoder = "pyav"
        self.decoder_note = ""

    def __iter__(self) -> Iterator[Any]:
        return iter(())


def pack_pts(pts: np.ndarray) -> bytes:
    """Compress ascending times; a constant frame rate takes a few dozen bytes."""
    return zlib.compress(np.diff(pts, prepend=0).astype("<i8").tobytes())


def unpack_pts(packed: bytes) -> np.ndarray:
    """Undo :func:`pack_pts`."""
    if not packed:
        return np.empty(0, np.int64)
    return np.cumsum(np.frombuffer(zlib.decompress(packed), "<i8").astype(np.int64))
