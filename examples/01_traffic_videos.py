"""Traffic videos to a table of detections, and a few questions to the table.

    python examples/01_traffic_videos.py [VIDEO ...]

Without arguments it takes the demo's clip (pip install 'daskshare[demo]'). Run it twice: the
second run finds its results and does nothing again.
"""

import sys

import pyarrow.compute as pc
from distributed import Client

import daskshare
from daskshare.demo import demo_clip
from daskshare.results.parquet import read_detections


def main() -> None:
    videos = sys.argv[1:] or [str(demo_clip())]
    # On your own cluster: Client("tcp://...") instead of these two lines; the rest stays.
    with daskshare.local_cluster(threads_per_worker=4) as cluster, Client(cluster) as client:
        yolo = daskshare.yolov3("yolov3-tiny", classes=["car", "bus", "truck", "person"])
        summary = daskshare.detect(
            videos, yolo, "demo-output/traffic", client=client, progress=sys.stderr.isatty()
        )
    print(summary)

    table = read_detections(summary.output)
    cars = table.filter(pc.equal(table["class_name"].cast("string"), "car"))
    per_frame = cars.group_by(["video", "frame"]).aggregate([("confidence", "count")])
    busiest = per_frame.sort_by([("confidence_count", "descending"), ("frame", "ascending")])
    for row in busiest.slice(0, 3).to_pylist():
        print(f"{row['confidence_count']} cars in frame {row['frame']} of {row['video']}")


if __name__ == "__main__":
    main()
