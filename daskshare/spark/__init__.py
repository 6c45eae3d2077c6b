"""daskshare for Spark: every Python worker of a machine uses the device's one copy of a model.

Needs ``pip install 'daskshare[spark]'`` on the driver and on the executors, but no Dask cluster:
the first task on a machine starts a host for the device, unless a Dask worker is it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from daskshare.spark.detections import detect
    from daskshare.spark.handoff import register, to_dask, to_spark
    from daskshare.spark.predict import predict_batch_udf

__all__ = ["detect", "predict_batch_udf", "register", "to_dask", "to_spark"]

# Imported when asked for: Python workers need little of what the driver needs, and there are many.
_HOMES = {
    "detect": "daskshare.spark.detections",
    "predict_batch_udf": "daskshare.spark.predict",
    "register": "daskshare.spark.handoff",
    "to_dask": "daskshare.spark.handoff",
    "to_spark": "daskshare.spark.handoff",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'daskshare.spark' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
