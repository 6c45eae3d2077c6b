"""detect: a Spark DataFrame of videos, images or frames to a DataFrame of detections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from daskshare.client import SharedModel
from daskshare.errors import ConfigurationError
from daskshare.host import describe
from daskshare.models.spec import ModelSpec
from daskshare.spark.columns import INPUT, Columns, input_kind, output_schema
from daskshare.spark.connection import check_closure
from daskshare.spark.partition import Partition

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

__all__ = ["detect"]


def detect(
    df: DataFrame,
    model: SharedModel | ModelSpec | str,
    *,
    input_col: str,
    key_cols: Sequence[str] | None = None,
    input_shape: tuple[int, int, int] | None = None,
    error_col: str | None = None,
    chunk_seconds: float | None = None,
    rows_per_request: int = 16,
    requests_in_flight: int = 4,
    allow_code: bool = False,
    scheduler: str | None = None,
) -> DataFrame:
    """Find objects in the videos, images or frames of a column.

    Parameters
    ----------
    df : pyspark.sql.DataFrame
        Of a batch or a stream, in Spark classic or Spark Connect.
    model : SharedModel, ModelSpec or str
        A detector: ``daskshare.yolov3(...)``, or the name of a packaged one ("yolov3-tiny").
    input_col : str
        What to look at. A string column holds paths or URLs of videos, which the process that owns
        the GPU opens and decodes: they must mean the same on every machine. A binary column holds
        encoded images (JPEG, PNG; ``content`` of Spark's ``binaryFile``), or raw frames when
        ``input_shape`` is given. An array column of bytes holds raw frames.
    key_cols : sequence of str, optional
        Columns that come along with each detection. Default: all but ``input_col``.
    input_shape : (int, int, int), optional
        Height, width and 3 of raw frames: uint8, RGB.
    error_col : str, optional
        Name of a text column to add. An input that cannot be read then gives a row with the
        reason in it and null detections; without it, the task fails and names the input.
    chunk_seconds : float, optional
        Length of the pieces in which a video is worked on; the default is configured as
        ``daskshare.video.chunk-duration``.
    rows_per_request : int
        Images or frames handed over at a time.
    requests_in_flight : int
        Requests that a task keeps waiting; bounds its memory and keeps the GPU busy.
    allow_code : bool
        Whether the model may travel as pickled code; needed for models of your own.

    scheduler : str, optional
        Address of a Dask cluster ("tcp://10.0.0.1:8786") whose workers do the work, over Arrow
        Flight (``daskshare.flight.port`` must be set there); a worker on the task's own machine is
        used through shared memory. Default: the device of the task's own machine.

    Returns
    -------
    pyspark.sql.DataFrame
        The key columns, then ``video`` (string), ``frame`` (bigint), ``pts_seconds`` (double),
        ``class_id`` (smallint), ``class_name`` (string), ``confidence``, ``x_min``, ``y_min``,
        ``x_max``, ``y_max`` (float, pixels of the source), one row an object, in the order of the
        input. For images and frames ``video`` is null, ``frame`` and ``pts_seconds`` are 0. A key
        column called ``video``, ``frame`` or ``pts_seconds`` takes the place of ours.

    Raises
    ------
    ConfigurationError
        For a wrong option, an unknown column, or names that collide.

    Notes
    -----
    Lazy. In the executors a task's Python worker hands its rows to the host of its device (see
    :mod:`daskshare.host`) and keeps no model. Stateless: a retried task gives the same rows. Set
    ``spark.sql.execution.arrow.maxRecordsPerBatch`` to 16 to 64 for large rows.

    Examples
    --------
    >>> images = spark.read.format("binaryFile").load("photos/*.jpg")    # doctest: +SKIP
    >>> found = detect(images, "yolov3-tiny", input_col="content", key_cols=["path"])
    ... # doctest: +SKIP
    """
    spec = model.spec if isinstance(model, SharedModel) else model
    _, code = describe(spec)
    check_closure(f"The model {getattr(spec, 'name', spec)!r}", len(code))
    for option, value in (
        ("rows_per_request", rows_per_request),
        ("requests_in_flight", requests_in_flight),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigurationError(
                f"Got {option}={value!r}; expected a whole number of 1 or more.", option=option
            )
    kind = input_kind(df.schema, input_col, input_shape)
    keys = [name for name in df.columns if name != input_col] if key_cols is None else key_cols
    columns = Columns(kind=kind, keys=tuple(keys), error=error_col)
    schema = output_schema(df.schema, columns, input_col)
    work = Partition(
        spec,
        columns,
        input_shape=input_shape,
        chunk_seconds=chunk_seconds,
        rows_per_request=rows_per_request,
        requests_in_flight=requests_in_flight,
        allow_code=allow_code,
        scheduler=scheduler,
    )
    wanted = df.select(*(df[name] for name in keys), df[input_col].alias(INPUT))
    return wanted.mapInArrow(work, schema)
