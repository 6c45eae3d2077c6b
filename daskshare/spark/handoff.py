"""Tables between Spark and Dask, through files that both can read; nothing passes the driver."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daskshare.errors import ConfigurationError

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

__all__ = ["register", "to_dask", "to_spark"]


def register(spark: SparkSession) -> None:
    """Make ``spark.read.format("daskshare")`` known to a session; Spark 4.0 and newer.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        Classic or Connect.

    Raises
    ------
    ConfigurationError
        When its Spark has no Python data sources.
    """
    try:
        from daskshare.spark.source import DetectionSource
    except ImportError as error:
        raise ConfigurationError(
            f"pyspark has no Python data sources ({error}); expected pyspark 4.0 or newer. Use "
            "daskshare.spark.detect with this one."
        ) from error
    spark.dataSource.register(DetectionSource)


def to_spark(
    spark: SparkSession, data: Any, *, path: str | os.PathLike[str] | None = None
) -> DataFrame:
    """Read in Spark what Dask made.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        Where to.
    data : dask.dataframe.DataFrame, DetectSummary, str or os.PathLike
        A table of Dask, which its workers write into a new folder below ``path``; or what
        :func:`daskshare.detect` returned, or its output folder, which is read where it is.
    path : str or os.PathLike
        Folder that Dask's workers can write to and Spark's executors can read from; needed for a
        table.

    Returns
    -------
    pyspark.sql.DataFrame

    Raises
    ------
    ConfigurationError
        When ``data`` is nothing of the kind, or a table comes without ``path``.

    Notes
    -----
    Runs in the program that has both the Spark session and the Dask client. Rows go from the
    workers into Parquet files and from there into executors, never through this program.
    """
    if hasattr(data, "to_parquet") and hasattr(data, "__dask_graph__"):
        if path is None:
            raise ConfigurationError(
                "Got a table of Dask and no path; expected path=FOLDER that Dask's workers can "
                "write to and Spark's executors can read from.",
                option="path",
            )
        folder = os.path.join(os.fspath(path), f"from-dask-{uuid.uuid4().hex}")
        data.to_parquet(folder, write_index=False)
        return spark.read.parquet(_for_spark(folder))
    output = getattr(data, "output", data)
    if not isinstance(output, (str, os.PathLike)):
        raise ConfigurationError(
            f"Got {type(data).__name__}; expected a dask.dataframe.DataFrame, the summary of "
            "daskshare.detect or the path of its output folder.",
            option="data",
        )
    return spark.read.parquet(_for_spark(os.path.join(os.fspath(output), "detections")))


def to_dask(df: DataFrame, *, path: str | os.PathLike[str]) -> Any:
    """Read in Dask what Spark made.

    Parameters
    ----------
    df : pyspark.sql.DataFrame
        A table; its executors write it into a new folder below ``path``.
    path : str or os.PathLike
        Folder that Spark's executors can write to and Dask's workers can read from.

    Returns
    -------
    dask.dataframe.DataFrame
    """
    import dask.dataframe as dd

    folder = os.path.join(os.fspath(path), f"from-spark-{uuid.uuid4().hex}")
    df.write.parquet(_for_spark(folder))
    return dd.read_parquet(folder)


def _for_spark(path: str) -> str:
    # Spark takes a bare path for one of its default file system, which may be HDFS.
    return path if "://" in path else Path(path).absolute().as_uri()
