"""read_video: videos as a dask.bag of chunks. Imports neither av nor torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dask.bag

from daskshare.models.spec import DETECTION_COLUMNS
from daskshare.video.chunk import VideoChunk
from daskshare.video.probe import probe_videos
from daskshare.video.sources import Paths

__all__ = ["DETECTION_DTYPES", "DetectionBag", "VideoBag", "read_video"]

#: pandas dtypes of a DataFrame of detections, by column.
DETECTION_DTYPES: dict[str, str] = dict(
    zip(
        DETECTION_COLUMNS,
        ("string", "int64", "float64", "int16", "string", *5 * ("float32",)),
        strict=True,
    )
)


class VideoBag(dask.bag.Bag):
    """A dask.bag of :class:`~daskshare.video.chunk.VideoChunk`, one a partition."""

    def map_partitions(self, func: Any, *args: Any, **kwargs: Any) -> dask.bag.Bag:
        """Apply a function to each partition.

        Parameters
        ----------
        func : callable
            Called with a list of one VideoChunk. A shared model gives a bag of detections.
        *args, **kwargs
            Passed on to ``func``.

        Returns
        -------
        dask.bag.Bag
            A :class:`DetectionBag` where ``func`` is a shared model of detections.
        """
        result = super().map_partitions(func, *args, **kwargs)  # type: ignore[no-untyped-call]
        kind = DetectionBag if getattr(func, "__daskshare_model__", False) else dask.bag.Bag
        return kind(result.dask, result.name, result.npartitions)


class DetectionBag(dask.bag.Bag):
    """A dask.bag of rows (dicts), one an object that a model found in a frame."""

    def map_partitions(self, func: Any, *args: Any, **kwargs: Any) -> dask.bag.Bag:
        """Apply a function to each partition's rows; the result is an ordinary bag.

        Parameters
        ----------
        func : callable
            Called with a list of dicts.
        *args, **kwargs
            Passed on to ``func``.
        """
        result = super().map_partitions(func, *args, **kwargs)  # type: ignore[no-untyped-call]
        return dask.bag.Bag(result.dask, result.name, result.npartitions)

    def to_dataframe(
        self, meta: Any = None, columns: Any = None, optimize_graph: bool = True
    ) -> Any:
        """Make a dask.dataframe; its columns are known without computing anything.

        Parameters
        ----------
        meta, columns, optimize_graph
            As for dask.bag; without ``meta`` and ``columns`` they are :data:`DETECTION_DTYPES`.

        Returns
        -------
        dask.dataframe.DataFrame
        """
        if meta is None and columns is None:
            meta = DETECTION_DTYPES
        return super().to_dataframe(  # type: ignore[no-untyped-call]
            meta=meta, columns=columns, optimize_graph=optimize_graph
        )


def read_video(
    paths: Paths,
    *,
    chunk_seconds: float | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> VideoBag:
    """Read videos as a dask.bag of chunks that can be decoded independently.

    Parameters
    ----------
    paths : str, os.PathLike, or an iterable of them
        Files, folders (searched recursively), globs, fsspec URLs.
    chunk_seconds : float, optional
        Aim for a chunk's length; chunks begin at keyframes. The default is configured as
        ``daskshare.video.chunk-duration``.
    storage_options : mapping, optional
        For fsspec.

    Returns
    -------
    VideoBag
        One :class:`~daskshare.video.chunk.VideoChunk` a partition, in the order of the videos
        and of their frames. All chunks together give each frame once.

    Raises
    ------
    UnreadableVideoError
        A glob or folder holds no video.
    ConfigurationError
        ``paths`` is empty or ``chunk_seconds`` is negative.

    Notes
    -----
    The files are indexed at once (each read through, not decoded), by the current Dask client's
    workers or else by threads. Pixels are decoded only in the tasks.
    """
    chunks: list[VideoChunk] = probe_videos(
        paths, chunk_seconds=chunk_seconds, storage_options=storage_options
    )
    bag = dask.bag.from_sequence(chunks, partition_size=1)
    return VideoBag(bag.dask, bag.name, bag.npartitions)
