"""Follow vehicles through a video and count those that cross a line.

    python examples/05_count_vehicles.py [VIDEO ...]

daskshare finds the objects of each frame, chunk by chunk, on any number of workers. Which of them
are one and the same vehicle is decided afterwards from the table: all detections of a video, in
the order of their frames, so that it makes no difference where the chunks were cut. trackpy
links them, one task a video. Without arguments it takes the demo's clip, where cars stand more than
they drive (pip install 'daskshare[demo]' brings the clip and trackpy).
"""

import itertools
import sys
from pathlib import Path

import numpy as np
import trackpy
from distributed import Client

import daskshare
from daskshare.demo import demo_clip
from daskshare.results.parquet import read_detections

VEHICLES = ["car", "bus", "truck", "motorbike"]
#: From (x, y) to (x, y), in parts of the frame's width and height.
LINE = ((0.0, 0.6), (1.0, 0.6))
CORNERS = ["x_min", "y_min", "x_max", "y_max"]


def follow(rows, *, reach_pixels, memory_frames=12):
    """Number the vehicles in the detections of one video.

    Parameters
    ----------
    rows : pandas.DataFrame
        Columns ``frame`` and those of CORNERS, in any order.
    reach_pixels : float
        A box that has moved or grown by more from one frame to the next is another vehicle.
    memory_frames : int
        For so many frames a vehicle may go unseen and still be the same.

    Returns
    -------
    pandas.DataFrame
        The rows by frame, with a column ``track``.
    """
    rows = rows.sort_values(["frame", *CORNERS], ignore_index=True)
    if not len(rows):
        return rows.assign(track=np.empty(0, np.int64))
    trackpy.quiet()
    boxes = rows[CORNERS].to_numpy(float)
    numbers = rows["frame"].to_numpy()
    # Frames without a vehicle count too: they use up the memory.
    edges = np.searchsorted(numbers, np.arange(numbers[0], numbers[-1] + 2))
    by_frame = [boxes[begin:end] for begin, end in itertools.pairwise(edges)]
    # The distance of two boxes is that of all four corner coordinates: twice the way they moved.
    reach = 2 * reach_pixels
    linked = trackpy.link_iter(
        by_frame,
        reach,
        memory=memory_frames,
        # In dense traffic the reach is made smaller until the choice is clear.
        adaptive_stop=reach / 16,
        adaptive_step=0.9,
    )
    tracks = [np.asarray(track, np.int64) for _, track in linked]
    return rows.assign(track=np.concatenate(tracks))


def crossings(tracked, line, *, min_detections=5):
    """Count the tracks that cross a line.

    Parameters
    ----------
    tracked : pandas.DataFrame
        From :func:`follow`.
    line : ((x, y), (x, y))
        Pixels.
    min_detections : int
        A shorter track is noise.

    Returns
    -------
    (int, int)
        Tracks that end on the left and on the right of the line, as seen from its first point to
        its second, having crossed it. One that comes back does not count.
    """
    start, end = np.asarray(line, float)
    along = end - start
    left = right = 0
    for _, track in tracked.groupby("track"):
        if len(track) < min_detections:
            continue
        # Where the wheels are: the middle of the lower edge.
        x = (track["x_min"] + track["x_max"]).to_numpy() / 2
        points = np.stack([x, track["y_max"].to_numpy()], axis=1)
        offset = points - start
        # In pictures y grows downwards, hence the sign.
        side = np.sign(along[1] * offset[:, 0] - along[0] * offset[:, 1])
        position = offset @ along / (along @ along)
        on_line = side != 0
        side, position = side[on_line], position[on_line]
        changes = np.flatnonzero(np.diff(side))
        within = (position[changes] >= 0) & (position[changes] <= 1)
        net = np.sum(np.diff(side)[changes][within]) / 2
        left += net > 0
        right += net < 0
    return int(left), int(right)


def count_video(video, folder, size):
    """One video's task: its rows of the table to tracks and counts."""
    rows = read_detections(folder, video=video).select(["frame", *CORNERS]).to_pandas()
    width, height = size
    tracked = follow(rows, reach_pixels=0.05 * width)
    line = [(x * width, y * height) for x, y in LINE]
    long = tracked["track"].value_counts()
    return int((long >= 5).sum()), crossings(tracked, line)


def main() -> None:
    videos = sys.argv[1:] or [str(demo_clip())]
    output = Path("demo-output/vehicles")
    with daskshare.local_cluster(threads_per_worker=4) as cluster, Client(cluster) as client:
        yolo = daskshare.yolov3("yolov3-tiny", classes=VEHICLES)
        chunks = daskshare.read_video(videos, chunk_seconds=2).compute()
        summary = daskshare.detect(
            chunks, yolo, output, client=client, progress=sys.stderr.isatty()
        )
        print(summary)
        sizes = {chunk.video: (chunk.width, chunk.height) for chunk in chunks}
        counted = client.map(
            count_video, list(sizes), [str(output)] * len(sizes), list(sizes.values())
        )
        for video, (tracks, (left, right)) in zip(sizes, client.gather(counted), strict=True):
            print(
                f"{Path(video).name}: {tracks} vehicles followed; {left} crossed the line "
                f"upwards, {right} downwards"
            )


if __name__ == "__main__":
    main()
