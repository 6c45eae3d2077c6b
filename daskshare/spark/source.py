"""A Python data source for Spark 4: files of videos and images to rows of detections."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyspark.sql.datasource import DataSource, DataSourceReader, InputPartition
from pyspark.sql.types import StructField, StructType

from daskshare.errors import ConfigurationError
from daskshare.models.yolov3 import yolov3_spec
from daskshare.spark.columns import INPUT, SPARK_TYPES, Columns, spark_type
from daskshare.spark.partition import Partition
from daskshare.video.sources import VIDEO_SUFFIXES

__all__ = ["DetectionSource"]

#: Names that count as images when a folder is given.
IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})

_DEFAULT_PARTITIONS = 8
_BATCH_IMAGES = 16


class DetectionSource(DataSource):  # type: ignore[misc]
    """``spark.read.format("daskshare").option("model", "yolov3-tiny").load("videos/*.mp4")``.

    Images are read in the Python workers and go from there to the device's host: they never pass
    through the JVM. Options: ``model`` (name; default "yolov3"), ``cfg``, ``weights`` and ``names``
    (paths of your own), ``inputSize``, ``confidence``, ``iou``, ``classes`` ("car,bus"),
    ``chunkSeconds``, ``numPartitions`` (default 8), ``errorColumn`` (a name: files that cannot be
    read give a row with the reason) and ``scheduler`` (a Dask cluster's address).

    Notes
    -----
    Spark 4.0 and newer. Make it known with :func:`daskshare.spark.register`. The paths must mean
    the same on the driver, which lists them, and on the executors.
    """

    @classmethod
    def name(cls) -> str:
        """Return what ``format()`` takes."""
        return "daskshare"

    def schema(self) -> StructType:
        """Columns of detections, ``video`` being the file whatever it is."""
        schema = StructType()
        for name, kind in SPARK_TYPES.items():
            schema.add(StructField(name, spark_type(kind)))
        if self._error is not None:
            schema.add(StructField(self._error, spark_type("string")))
        return schema

    @property
    def _error(self) -> str | None:
        value: str | None = self.options.get("errorColumn")
        return value

    def reader(self, schema: StructType) -> DetectionReader:
        """Return the reader; checks the options and lists the files."""
        return DetectionReader(dict(self.options), self._error)


class _Files(InputPartition):  # type: ignore[misc]
    def __init__(self, kind: str, paths: list[str]) -> None:
        super().__init__(None)
        self.kind = kind
        self.paths = paths


class DetectionReader(DataSourceReader):  # type: ignore[misc]
    """Reads one set of files.

    Parameters
    ----------
    options : dict
        Of the source; Spark writes their names in small letters.
    error : str or None
        Name of the column of reasons.

    Raises
    ------
    ConfigurationError
        When an option is wrong, or nothing is found.
    """

    def __init__(self, options: dict[str, str], error: str | None) -> None:
        options = {name.lower(): value for name, value in options.items()}
        known = ("classes", "cfg", "weights", "names", "inputsize", "confidence", "iou", "model")
        other = ("path", "chunkseconds", "numpartitions", "errorcolumn", "scheduler")
        unknown = sorted(set(options) - set(known) - set(other))
        if unknown:
            raise ConfigurationError(
                f"Got the options {unknown}; expected some of {sorted((*known, *other))}.",
                option=unknown[0],
            )
        if "path" not in options:
            raise ConfigurationError(
                "No path was given; expected .load(path) with a file, a folder or a glob.",
                option="path",
            )
        self._paths = _list_files(options["path"])
        self._partitions = _number(options, "numpartitions", _DEFAULT_PARTITIONS)
        chunk_seconds = options.get("chunkseconds")
        classes = options.get("classes")
        # Also in the driver: a wrong option must not wait for the first task.
        spec = yolov3_spec(
            options.get("model", "yolov3"),
            cfg=options.get("cfg"),
            weights=options.get("weights"),
            names=options.get("names"),
            input_size=_number(options, "inputsize", None),
            confidence_threshold=float(options.get("confidence", 0.25)),
            iou_threshold=float(options.get("iou", 0.45)),
            classes=None if classes is None else classes.split(","),
        )
        self._work = {
            kind: Partition(
                spec,
                Columns(kind=kind, keys=keys, error=error),
                input_shape=None,
                chunk_seconds=None if chunk_seconds is None else float(chunk_seconds),
                rows_per_request=_BATCH_IMAGES,
                requests_in_flight=4,
                allow_code=False,
                scheduler=options.get("scheduler"),
            )
            # An image's own column of paths takes the place of the empty one.
            for kind, keys in (("videos", ()), ("images", ("video",)))
        }

    def partitions(self) -> list[InputPartition]:
        """Deal the files out; in the driver."""
        dealt: list[InputPartition] = []
        for kind, paths in self._paths.items():
            count = min(len(paths), self._partitions)
            dealt += [_Files(kind, paths[i::count]) for i in range(count)]
        return dealt

    def read(self, partition: InputPartition) -> Iterator[pa.RecordBatch]:
        """Find objects in some files; in a Python worker."""
        batches = _images if partition.kind == "images" else _videos
        yield from self._work[partition.kind](batches(partition.paths))


def _videos(paths: list[str]) -> Iterator[pa.RecordBatch]:
    for path in paths:
        yield pa.record_batch({INPUT: [path]})


def _images(paths: list[str]) -> Iterator[pa.RecordBatch]:
    for start in range(0, len(paths), _BATCH_IMAGES):
        some = paths[start : start + _BATCH_IMAGES]
        contents = pa.array([Path(path).read_bytes() for path in some], pa.binary())
        yield pa.record_batch({"video": pa.array(some), INPUT: contents})


def _number(options: dict[str, str], name: str, default: Any) -> Any:
    text = options.get(name)
    if text is None:
        return default
    if not text.isdigit() or int(text) < 1:
        raise ConfigurationError(
            f"Got option {name}={text!r}; expected a whole number of 1 or more.", option=name
        )
    return int(text)


def _list_files(path: str) -> dict[str, list[str]]:
    path = path.removeprefix("file://")
    if os.path.isdir(path):
        names = [os.path.join(at, name) for at, _, files in os.walk(path) for name in files]
    else:
        names = glob.glob(path, recursive=True) or [path]
    found: dict[str, list[str]] = {"videos": [], "images": []}
    for name in sorted(names):
        suffix = Path(name).suffix.lower()
        if suffix in IMAGE_SUFFIXES:
            found["images"].append(name)
        elif suffix in VIDEO_SUFFIXES or not os.path.isdir(path):
            found["videos"].append(name)
    if not any(found.values()):
        raise ConfigurationError(
            f"No video and no image found in {path!r}; expected a file, a folder or a glob.",
            option="path",
        )
    return {kind: paths for kind, paths in found.items() if paths}
