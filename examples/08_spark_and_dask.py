"""An existing Spark job that lists and filters videos, Dask that looks at them, Spark SQL again.

    python examples/08_spark_and_dask.py [VIDEO ...]

Needs Java and pip install 'daskshare[spark]'. Without arguments it takes the demo's clip. Only
paths go from Spark to Dask and only Parquet files come back, so that nothing large passes through
this program. Offline, the two halves are two jobs: the first writes its list of videos as Parquet,
the second reads it (to_dask does both), and Spark reads Dask's output folder whenever it likes.
"""

import sys
import tempfile

from distributed import Client
from pyspark.sql import SparkSession

import daskshare
from daskshare.demo import demo_clip
from daskshare.spark import to_dask, to_spark


def main() -> None:
    videos = sys.argv[1:] or [str(demo_clip())]
    spark = SparkSession.builder.master("local[2]").getOrCreate()
    cameras = spark.createDataFrame(
        [(path, f"camera {i}", True) for i, path in enumerate(videos)],
        schema="path string, camera string, active boolean",
    )
    cameras.createOrReplaceTempView("cameras")
    wanted = spark.sql("SELECT path, camera FROM cameras WHERE active")

    # On your own cluster: Client("tcp://...") instead of local_cluster.
    with daskshare.local_cluster(threads_per_worker=4) as cluster, Client(cluster) as client:
        # For jobs in one program the list of paths may as well be collected; through files it may
        # be as long as it likes, and the second job may run another day.
        listed = to_dask(wanted, path=tempfile.mkdtemp())
        paths = listed["path"].compute().tolist()
        yolo = daskshare.yolov3("yolov3-tiny", classes=["car", "bus", "truck", "person"])
        summary = daskshare.detect(paths, yolo, "demo-output/spark", client=client)
    print(summary)

    to_spark(spark, summary).createOrReplaceTempView("detections")
    spark.sql(
        """
        SELECT camera, class_name, count(*) AS boxes, count(DISTINCT frame) AS frames
        FROM detections JOIN cameras ON detections.video = cameras.path
        GROUP BY camera, class_name ORDER BY camera, boxes DESC
        """
    ).show()
    spark.stop()


if __name__ == "__main__":
    main()
