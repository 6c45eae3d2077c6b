"""Spark's daemon of Python workers, with everything imported before it forks them.

A test that fails a task on purpose ends its worker; importing pandas anew took most of the time.
"""

import pandas  # noqa: F401
import pyarrow  # noqa: F401
import pyspark.ml.functions
import pyspark.sql.pandas.serializers
import pyspark.worker  # noqa: F401
from pyspark.daemon import manager

import daskshare.spark.partition
import daskshare.spark.predict  # noqa: F401

if __name__ == "__main__":
    manager()
