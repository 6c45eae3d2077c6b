"""A Spark job that looks at images and at rows of its own, with one model for all its tasks.

    python examples/07_spark_images.py [FOLDER]

Needs Java and pip install 'daskshare[spark]'; no Dask cluster. Without a folder it takes frames
of the demo's clip. The line that an existing Spark job changes is the import of predict_batch_udf.
"""

import sys
import tempfile
from pathlib import Path

import av
import numpy as np
from pyspark.sql import SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import FloatType

from daskshare.demo import demo_clip
from daskshare.spark import detect, predict_batch_udf


def some_images() -> Path:
    folder = Path(tempfile.mkdtemp())
    with av.open(str(demo_clip())) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number % 25 == 0:
                frame.to_image().save(folder / f"{number:04}.jpg")
    return folder


def make_brightness():
    """Load a model here; this runs once for each device of a machine."""

    def brightness(images: np.ndarray) -> np.ndarray:
        return np.array([np.frombuffer(i, np.uint8).mean() for i in images], np.float32)

    return brightness


def main() -> None:
    folder = Path(sys.argv[1]) if sys.argv[1:] else some_images()
    spark = (
        SparkSession.builder.master("local[4]")
        .config("spark.sql.execution.arrow.maxRecordsPerBatch", 32)
        .getOrCreate()
    )
    images = spark.read.format("binaryFile").load(folder.absolute().as_uri())
    images = images.withColumn("image", F.element_at(F.split("path", "/"), -1))

    found = detect(images, "yolov3-tiny", input_col="content", key_cols=["image"])
    found.groupBy("image", "class_name").count().orderBy("image", F.desc("count")).show()

    mean_byte = predict_batch_udf(make_brightness, return_type=FloatType(), batch_size=16)
    images.select("image", mean_byte("content").alias("mean_byte")).orderBy("image").show()
    spark.stop()


if __name__ == "__main__":
    main()
