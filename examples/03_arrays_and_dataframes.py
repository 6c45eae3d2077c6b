"""The same model on a dask.array of frames and on a dask.dataframe of pictures.

    python examples/03_arrays_and_dataframes.py [VIDEO]

Both are made of the demo's clip (pip install 'daskshare[demo]') here: an array of decoded frames,
and a table with a column of JPEG bytes, which is how pictures usually lie in Parquet files. Yours
may come from dask.array.from_zarr, dask.dataframe.read_parquet or anything else.
"""

import sys

import cv2
import dask
import dask.array as da
import numpy as np
import pandas as pd
import pyarrow as pa
from distributed import Client

import daskshare
from daskshare.demo import demo_clip


def decode(chunk):
    """Frames of a piece of video, uint8 (n, height, width, 3), RGB."""
    with chunk.open_frames() as stream:
        return np.concatenate([batch.frames for batch in stream])


def array_of_frames(video):
    blocks = [
        da.from_delayed(
            dask.delayed(decode)(chunk),
            shape=(chunk.num_frames, chunk.height, chunk.width, 3),
            dtype="uint8",
        )
        for chunk in daskshare.read_video(video, chunk_seconds=1).compute()
    ]
    return da.concatenate(blocks)


def count_objects(block, model):
    """Objects in each frame of a block: (n, height, width, 3) to (n,)."""
    return np.array([len(detections) for detections in model(block)])


def to_jpegs(chunks):
    """Rows of a table of pictures: every tenth frame."""
    for chunk in chunks:
        for i, frame in enumerate(decode(chunk)[::10]):
            _, jpeg = cv2.imencode(".jpg", frame[..., ::-1])
            yield {"frame": chunk.first_frame + 10 * i, "jpeg": jpeg.tobytes()}


def surest(pictures, model):
    """For each row, the class that the model is surest of in the picture, and how sure."""
    decoded = [
        cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR_RGB)
        for jpeg in pictures["jpeg"]
    ]
    # A list may hold pictures of different sizes.
    found = model(decoded) if decoded else []
    return pictures[["frame"]].assign(
        class_name=[d.names()[0] if len(d) else "nothing" for d in found],
        confidence=[d.confidence[0] if len(d) else 0.0 for d in found],
    )


def main() -> None:
    video = sys.argv[1] if len(sys.argv) > 1 else demo_clip()
    yolo = daskshare.yolov3("yolov3-tiny")
    with daskshare.local_cluster(threads_per_worker=4) as cluster, Client(cluster) as client:
        daskshare.install(client)

        # An array: a block of frames is a task, and the model batches blocks together. Frames are
        # large, so decode them where they are used; only the counts leave the worker.
        frames = array_of_frames(video)
        counts = frames.map_blocks(count_objects, yolo, dtype="int64", drop_axis=[1, 2, 3])
        mean, most = dask.compute(counts.mean(), counts.max())
        print(f"array: {frames.numblocks[0]} blocks, {frames.shape[0]} frames")
        print(f"objects in a frame: {mean:.2f} on average, {most} at most")

        # A DataFrame. Dask takes a column of objects for text, so bytes get a type of their own.
        pictures = (
            daskshare.read_video(video, chunk_seconds=1)
            .map_partitions(to_jpegs)
            .to_dataframe(meta={"frame": "int64", "jpeg": pd.ArrowDtype(pa.binary())})
        )
        # `meta` tells Dask the columns, so that it need not try the function on empty data.
        meta = {"frame": "int64", "class_name": "str", "confidence": "float64"}
        best = pictures.map_partitions(surest, yolo, meta=meta)
        seen = best[best["confidence"] > 0.5].groupby("class_name")["frame"].count().compute()
        print(f"dataframe: {pictures.npartitions} partitions of pictures; surest of")
        for name, count in seen.sort_values(ascending=False).items():
            print(f"  {name} in {count} pictures")

        for report in daskshare.stats(client).values():
            print(f"{report['frames']} frames with {report['loads']} copy of the model")


if __name__ == "__main__":
    main()
