"""Which columns go into detect and which come out of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from daskshare.errors import ConfigurationError
from daskshare.models.spec import DETECTION_COLUMNS

if TYPE_CHECKING:
    from pyspark.sql.types import StructType

__all__ = ["INPUT", "SPARK_TYPES", "Columns", "input_kind", "output_schema", "spark_type"]

#: Name of the input column on its way to the tasks.
INPUT = "__daskshare_input"

#: Columns of detections with Spark's types.
SPARK_TYPES: dict[str, str] = dict(
    zip(
        DETECTION_COLUMNS,
        ("string", "bigint", "double", "smallint", "string", *5 * ("float",)),
        strict=True,
    )
)
_ARROW_TYPES = {
    "string": pa.string(),
    "bigint": pa.int64(),
    "double": pa.float64(),
    "smallint": pa.int16(),
    "float": pa.float32(),
}
# What says where an object was found; the input's own column of that name says it better.
_REPLACEABLE = ("video", "frame", "pts_seconds")


@dataclass(frozen=True, slots=True)
class Columns:
    """The layout of a detect.

    Parameters
    ----------
    kind : {"videos", "images", "frames"}
        What the input column holds.
    keys : tuple of str
        Columns that come along.
    error : str or None
        Name of the column of reasons.
    """

    kind: str
    keys: tuple[str, ...]
    error: str | None

    @property
    def detections(self) -> list[str]:
        """Names of the columns of detections that come out."""
        taken = set(self.keys) & set(_REPLACEABLE)
        return [name for name in DETECTION_COLUMNS if name not in taken]

    def assemble(
        self, keys: pa.RecordBatch, places: pa.Array, rows: pa.RecordBatch, video: str | None
    ) -> pa.RecordBatch:
        """Put key columns and detections side by side.

        Parameters
        ----------
        keys : pyarrow.RecordBatch
            Of the input.
        places : pyarrow.Array
            For each detection its row of ``keys``, int64.
        rows : pyarrow.RecordBatch
            Columns of DETECTIONS_SCHEMA.
        video : str or None
            Path of the video, as the input has it; None: these are images.
        """
        count = len(rows)
        found = {name: rows.column(name) for name in self.detections}
        if "video" in found:
            found["video"] = pa.array([video], pa.string()).take(
                pa.array(np.zeros(count, np.int64))
            )
        if video is None and "frame" in found:
            found["frame"] = pa.array(np.zeros(count, np.int64))
        found["class_name"] = found["class_name"].cast(pa.string())
        error = [pa.nulls(count, pa.string())]
        return self._batch(keys.take(places), list(found.values()), error)

    def failure(
        self, keys: pa.RecordBatch, place: int, reason: str, video: str | None
    ) -> pa.RecordBatch:
        """One row with a reason and no detection."""
        found = {name: pa.nulls(1, _ARROW_TYPES[SPARK_TYPES[name]]) for name in self.detections}
        if "video" in found:
            found["video"] = pa.array([video], pa.string())
        return self._batch(keys.slice(place, 1), list(found.values()), [pa.array([reason])])

    def _batch(
        self, keys: pa.RecordBatch, found: list[pa.Array], error: list[pa.Array]
    ) -> pa.RecordBatch:
        names = [*self.keys, *self.detections]
        arrays = [*keys.columns, *found]
        if self.error is not None:
            names.append(self.error)
            arrays += error
        return pa.RecordBatch.from_arrays(arrays, names=names)


def input_kind(schema: StructType, input_col: str, input_shape: tuple[int, int, int] | None) -> str:
    """Tell what a column holds: "videos", "images" or "frames".

    Raises
    ------
    ConfigurationError
        When there is no such column, or it holds nothing that can be looked at.
    """
    from pyspark.sql.types import ArrayType, BinaryType, ByteType, ShortType, StringType

    if input_col not in schema.names:
        raise ConfigurationError(
            f"Got input_col={input_col!r}; expected one of the columns {schema.names}.",
            option="input_col",
        )
    got = schema[input_col].dataType
    if input_shape is not None and (
        len(input_shape) != 3 or input_shape[2] != 3 or any(side < 1 for side in input_shape)
    ):
        raise ConfigurationError(
            f"Got input_shape={input_shape!r}; expected (height, width, 3).", option="input_shape"
        )
    if isinstance(got, StringType) and input_shape is None:
        return "videos"
    if isinstance(got, BinaryType):
        return "images" if input_shape is None else "frames"
    # Spark's byte is signed: bytes of 128 and more come as negative ones, or as shorts.
    if isinstance(got, ArrayType) and isinstance(got.elementType, (ByteType, ShortType)):
        if input_shape is not None:
            return "frames"
        raise ConfigurationError(
            f"Column {input_col!r} holds arrays; expected input_shape=(height, width, 3) with it.",
            option="input_shape",
        )
    raise ConfigurationError(
        f"Column {input_col!r} is of type {got.simpleString()}"
        f"{'' if input_shape is None else ' and input_shape is given'}; expected string (paths of "
        "videos), binary (encoded images; raw frames with input_shape) or array<tinyint> (raw "
        "frames).",
        option="input_col",
    )


def output_schema(schema: StructType, columns: Columns, input_col: str) -> StructType:
    """Spark's schema of what comes out.

    Raises
    ------
    ConfigurationError
        When a key column does not exist or two columns would have one name.
    """
    from pyspark.sql.types import StructField, StructType

    out = StructType()
    for name in columns.keys:
        if name not in schema.names:
            raise ConfigurationError(
                f"Got key column {name!r}; expected one of {schema.names}.", option="key_cols"
            )
        out.add(schema[name])
    for name in columns.detections:
        out.add(StructField(name, spark_type(SPARK_TYPES[name])))
    if columns.error is not None:
        out.add(StructField(columns.error, spark_type("string")))
    twice = sorted({name for name in out.names if out.names.count(name) > 1})
    if twice:
        raise ConfigurationError(
            f"The columns {twice} would come out twice; rename them in the input, or leave them "
            "out with key_cols.",
            option="key_cols",
        )
    return out


def spark_type(name: str) -> Any:
    """Spark's type of a column of detections, by its name in SQL."""
    from pyspark.sql import types

    kinds = {
        "string": types.StringType,
        "bigint": types.LongType,
        "double": types.DoubleType,
        "smallint": types.ShortType,
        "float": types.FloatType,
    }
    return kinds[name]()
