"""A program against Spark Connect, for test_connect: prints one line of JSON."""

import json
import sys
from pathlib import Path

import cv2
import numpy as np
from pyspark.sql import SparkSession
from pyspark.sql.types import LongType

import daskshare
from daskshare.spark import detect, predict_batch_udf, register

SIZE = (48, 64, 3)


def make():
    import os

    pid = os.getpid()
    return lambda rows: np.full(len(rows), pid)


def main(folder: Path) -> None:
    spark = (
        SparkSession.builder.remote("local[2]").config("spark.driver.memory", "1g").getOrCreate()
    )
    found = {"session": type(spark).__module__}
    udf = predict_batch_udf(make, return_type=LongType(), batch_size=8)
    found["hosts"] = len({row[0] for row in spark.range(50).select(udf("id")).collect()})

    names = ["left", "right"]
    options = {"cfg": folder / "small.cfg", "weights": folder / "small.weights"}
    yolo = daskshare.yolov3(**options, names=names, confidence_threshold=0.3)
    frames = np.random.default_rng(0).integers(0, 256, (6, *SIZE), dtype=np.uint8)
    df = spark.createDataFrame(
        [(i, bytearray(frame.tobytes())) for i, frame in enumerate(frames)],
        schema="id bigint, pixels binary",
    )
    rows = detect(df, yolo, input_col="pixels", input_shape=SIZE)
    found["ids"] = sorted(row.id for row in rows.select("id").distinct().collect())

    (folder / "media").mkdir()
    for i, frame in enumerate(frames):
        cv2.imwrite(str(folder / "media" / f"{i}.png"), frame)
    (folder / "names").write_text("\n".join(names))
    register(spark)
    reader = spark.read.format("daskshare").option("confidence", 0.3)
    for name, value in {**options, "names": folder / "names"}.items():
        reader = reader.option(name, str(value))
    found["images"] = reader.load(str(folder / "media")).select("video").distinct().count()
    spark.stop()
    print("FOUND " + json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
