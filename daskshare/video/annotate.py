"""Videos and contact sheets with the detected objects drawn in. Runs on the CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from daskshare.errors import OutputError, UnreadableVideoError
from daskshare.video.draw import add_caption, draw_boxes
from daskshare.video.probe import probe_video

if TYPE_CHECKING:
    import pyarrow as pa

    from daskshare.models.spec import FrameBatch
    from daskshare.video.chunk import VideoChunk

__all__ = ["write_annotated", "write_contact_sheet"]

# Fine enough for every frame rate, and small enough that an hour fits into 32 bits.
_TIME_BASE = Fraction(1, 90000)


def write_annotated(
    video: str | os.PathLike[str],
    detections: pa.Table,
    output: str | os.PathLike[str],
    *,
    crf: int = 20,
    preset: str = "veryfast",
    storage_options: Mapping[str, Any] | None = None,
) -> int:
    """Write an H.264 MP4 with boxes, class names and confidences drawn in.

    Parameters
    ----------
    video : str or os.PathLike
        Path or URL of the source.
    detections : pyarrow.Table
        Rows of :data:`daskshare.models.spec.DETECTION_COLUMNS`; rows of other videos are left out.
    output : str or os.PathLike
        The MP4 file; written under another name first, then renamed.
    crf : int
        x264's quality: lower is better and larger.
    preset : str
        x264's speed.
    storage_options : mapping, optional
        For fsspec.

    Returns
    -------
    int
        Frames written.

    Raises
    ------
    UnreadableVideoError
        The video cannot be read, or no frame can be decoded.
    OutputError
        The file cannot be written.

    Notes
    -----
    Frames keep their times, so that a variable frame rate stays as it is; sound is left out.
    An odd width or height is extended by one pixel, because 4:2:0 needs even ones.
    """
    name = os.fspath(video)
    objects = _Objects(detections, name)
    with _replacing(output) as unfinished:
        count = 0
        writer = _Mp4Writer(unfinished, crf=crf, preset=preset)
        try:
            for batch in _all_frames(name, storage_options):
                for offset in range(len(batch.frames)):
                    number = batch.first_frame + offset
                    frame = np.ascontiguousarray(batch.frames[offset])
                    draw_boxes(frame, *objects.of_frame(number))
                    writer.write(frame, float(batch.pts_seconds[offset]))
                    count += 1
        finally:
            writer.close()
        if not count:
            raise UnreadableVideoError(
                f"No frame of {name} could be decoded; nothing to annotate.", video=name
            )
    return count


def write_contact_sheet(
    video: str | os.PathLike[str],
    detections: pa.Table,
    output_png: str | os.PathLike[str],
    *,
    columns: int = 4,
    rows: int = 3,
    tile_width: int = 480,
    storage_options: Mapping[str, Any] | None = None,
) -> list[int]:
    """Write a PNG with the frames that show most objects, spread over the video's time.

    Parameters
    ----------
    video : str or os.PathLike
        Path or URL of the source.
    detections : pyarrow.Table
        Rows of :data:`daskshare.models.spec.DETECTION_COLUMNS`; rows of other videos are left out.
    output_png : str or os.PathLike
        Where to write.
    columns, rows : int
        Most tiles across and down; fewer where the video has fewer frames.
    tile_width : int
        Width of a tile, pixels.
    storage_options : mapping, optional
        For fsspec.

    Returns
    -------
    list of int
        Numbers of the frames shown.

    Raises
    ------
    UnreadableVideoError
        The video cannot be read, or none of the chosen frames can be decoded.
    OutputError
        The file cannot be written.
    """
    import cv2

    name = os.fspath(video)
    objects = _Objects(detections, name)
    chunks = _readable_chunks(name, storage_options)
    chosen = _busiest(objects.counts(), sum(c.num_frames for c in chunks), columns * rows)
    tiles = []
    shown = []
    for number, frame, seconds in _frames_at(chunks, chosen):
        height = max(1, round(frame.shape[0] * tile_width / frame.shape[1]))
        boxes, labels, class_ids = objects.of_frame(number)
        method = cv2.INTER_AREA if tile_width < frame.shape[1] else cv2.INTER_LINEAR
        tile = cv2.resize(np.ascontiguousarray(frame), (tile_width, height), interpolation=method)
        # Drawn after scaling, so that the text is as sharp as the sheet.
        draw_boxes(tile, boxes * (tile_width / frame.shape[1]), labels, class_ids)
        caption = f"{_clock(seconds)}  frame {number}  {_objects_text(len(labels))}"
        tiles.append(add_caption(tile, caption))
        shown.append(number)
    if not tiles:
        raise UnreadableVideoError(
            f"No frame of {name} could be decoded; nothing to show.", video=name
        )
    sheet = _grid(tiles, min(columns, len(tiles)))
    done, data = cv2.imencode(".png", cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR))
    if not done:
        raise OutputError(f"OpenCV could not encode a PNG of {sheet.shape[1]}x{sheet.shape[0]}.")
    with _replacing(output_png) as unfinished:
        unfinished.write_bytes(data.tobytes())
    return shown


class _Objects:
    """Detections of one video by frame."""

    def __init__(self, table: pa.Table, video: str) -> None:
        import pyarrow as pa
        import pyarrow.compute as pc

        if "video" in table.column_names and table.num_rows:
            names = table["video"].cast(pa.string())
            table = table.filter(pc.equal(names, video))
        frames = table["frame"].to_numpy().astype(np.int64)
        order = np.argsort(frames, kind="stable")
        self._frames = frames[order]
        corners = [table[c].to_numpy() for c in ("x_min", "y_min", "x_max", "y_max")]
        self._boxes = np.stack(corners, axis=1).astype(np.float64)[order]
        self._class_ids = table["class_id"].to_numpy()[order]
        names = table["class_name"].cast(pa.string()).to_pylist()
        confidence = table["confidence"].to_numpy()
        self._labels = [f"{names[i]} {confidence[i]:.2f}" for i in order]

    def of_frame(self, number: int) -> tuple[np.ndarray, list[str], np.ndarray]:
        here = slice(*np.searchsorted(self._frames, [number, number + 1]))
        return self._boxes[here], self._labels[here], self._class_ids[here]

    def counts(self) -> dict[int, int]:
        numbers, counts = np.unique(self._frames, return_counts=True)
        return dict(zip(numbers.tolist(), counts.tolist(), strict=True))


def _busiest(counts: dict[int, int], num_frames: int, tiles: int) -> list[int]:
    """The frame with most objects in each of ``tiles`` equal stretches of the video."""
    bounds = np.linspace(0, num_frames, min(tiles, max(num_frames, 1)) + 1).round().astype(int)
    chosen = []
    for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        middle = (begin + end - 1) / 2
        chosen.append(max(range(begin, end), key=lambda n: (counts.get(n, 0), -abs(n - middle))))
    return chosen


def _readable_chunks(video: str, storage_options: Mapping[str, Any] | None) -> list[VideoChunk]:
    chunks = probe_video(video, chunk_seconds=0.0, storage_options=storage_options)
    if chunks[0].error:
        raise UnreadableVideoError(chunks[0].error, video=video)
    return chunks


def _all_frames(video: str, storage_options: Mapping[str, Any] | None) -> Iterator[FrameBatch]:
    (chunk,) = probe_video(video, chunk_seconds=float("inf"), storage_options=storage_options)
    if chunk.error:
        raise UnreadableVideoError(chunk.error, video=video)
    with chunk.open_frames(decoder="pyav") as stream:
        yield from stream


def _frames_at(
    chunks: list[VideoChunk], numbers: list[int]
) -> Iterator[tuple[int, np.ndarray, float]]:
    for chunk in chunks:
        wanted = {n for n in numbers if 0 <= n - chunk.first_frame < chunk.num_frames}
        if not wanted:
            continue
        with chunk.open_frames(decoder="pyav") as stream:
            for batch in stream:
                for number in sorted(wanted):
                    offset = number - batch.first_frame
                    if 0 <= offset < len(batch.frames):
                        yield number, batch.frames[offset], float(batch.pts_seconds[offset])
                        wanted.discard(number)
                if not wanted:
                    break


def _clock(seconds: float) -> str:
    minutes, rest = divmod(max(seconds, 0.0), 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02d}:{rest:04.1f}" if hours else f"{minutes:02d}:{rest:04.1f}"


def _objects_text(count: int) -> str:
    return "1 object" if count == 1 else f"{count or 'no'} objects"


def _grid(tiles: list[np.ndarray], columns: int) -> np.ndarray:
    gap = 8
    height = max(tile.shape[0] for tile in tiles)
    width = tiles[0].shape[1]
    rows = -(-len(tiles) // columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 24, np.uint8)
    for number, tile in enumerate(tiles):
        row, column = divmod(number, columns)
        top, left = gap + row * (height + gap), gap + column * (width + gap)
        sheet[top : top + tile.shape[0], left : left + width] = tile
    return sheet


class _Mp4Writer:
    """Encodes frames at their own times; the size is the first frame's."""

    def __init__(self, path: Path, *, crf: int, preset: str) -> None:
        import av

        # The index goes to the front, so that browsers start before they have everything.
        self._container = av.open(
            f"file:{path}", "w", format="mp4", options={"movflags": "+faststart"}
        )
        self._options = {"crf": str(crf), "preset": preset}
        self._stream: Any = None
        self._origin_seconds = 0.0
        self._last_ticks = -1
        self._step_ticks = 1

    def write(self, frame: np.ndarray, seconds: float) -> None:
        """Append one RGB frame shown at ``seconds``."""
        import av
        import cv2

        height, width = frame.shape[:2]
        even = (height + height % 2, width + width % 2)
        if self._stream is None:
            stream = self._container.add_stream("libx264", rate=30, options=self._options)
            stream.height, stream.width = even
            stream.pix_fmt = "yuv420p"
            stream.time_base = stream.codec_context.time_base = _TIME_BASE
            # Unmarked colours are guessed from the size, differently by each player.
            context = stream.codec_context
            context.colorspace = context.color_primaries = context.color_trc = 1
            context.color_range = 1
            self._stream, self._origin_seconds = stream, seconds
        if even != (self._stream.height, self._stream.width):
            # The size changed in the middle of the stream; a file has one size only.
            frame = cv2.resize(frame, (self._stream.width, self._stream.height))
        elif even != (height, width):
            frame = cv2.copyMakeBorder(
                frame, 0, even[0] - height, 0, even[1] - width, cv2.BORDER_REPLICATE
            )
        picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
            format="yuv420p",
            src_colorspace=1,
            dst_colorspace=1,
            src_color_range=2,
            dst_color_range=1,
        )
        # Two frames never share a time, not even where the source's times are broken.
        ticks = round((seconds - self._origin_seconds) / _TIME_BASE)
        ticks = max(ticks, self._last_ticks + 1)
        if self._last_ticks >= 0:
            self._step_ticks = ticks - self._last_ticks
        picture.pts = self._last_ticks = ticks
        picture.time_base = _TIME_BASE
        self._mux(picture)

    def _mux(self, picture: Any) -> None:
        for packet in self._stream.encode(picture):
            # Only the last packet's length counts: the others end where the next one begins.
            packet.duration = self._step_ticks
            self._container.mux(packet)

    def close(self) -> None:
        """Write what the encoder holds, and the index."""
        try:
            if self._stream is not None:
                self._mux(None)
        finally:
            self._container.close()


@contextmanager
def _replacing(output: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to, renamed to ``output`` when all went well, else removed."""
    target = Path(output)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        unfinished.replace(target)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            f"{target} could not be written: {error}. Check the folder and the space left."
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)
