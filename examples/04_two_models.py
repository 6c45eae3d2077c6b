"""Two models in one job: a detector, then a classifier on what it found.

    python examples/04_two_models.py [VIDEO ...]

Each task decodes a piece of video, asks the first model where the cars are, cuts them out and asks
the second model for their colours. Frames and cut-outs stay on the worker, on its GPU if it has
one; a few rows come back. Without arguments it takes the demo's clip (pip install
'daskshare[demo]').
"""

import sys

import torch
from distributed import Client
from torch import nn

import daskshare
from daskshare.demo import demo_clip
from daskshare.device import current_device

CROP = 32
PALETTE = {
    "black": (25, 25, 25),
    "grey": (120, 120, 120),
    "white": (225, 225, 225),
    "red": (170, 40, 40),
    "green": (60, 120, 60),
    "blue": (40, 70, 160),
    "yellow": (210, 180, 60),
}
NAMES = list(PALETTE)


class ColourClassifier(nn.Module):
    """Which of the palette's colours most of a picture is nearest to; in place of one you trained.

    Takes uint8 (n, 32, 32, 3), RGB; gives probabilities (n, colours).
    """

    def __init__(self):
        super().__init__()
        self.register_buffer("palette", torch.tensor(list(PALETTE.values())) / 255.0)

    def forward(self, batch):
        # The middle of the crop: the rest is street.
        middle = batch[:, 8:24, 8:24].flatten(1, 2).float() / 255
        distance = torch.cdist(middle, self.palette.expand(len(batch), -1, -1))
        return (-12 * distance).softmax(dim=-1).mean(dim=1)


def load_classifier(device):
    return ColourClassifier()


def cut_out(frame, boxes):
    """Crops of one size, uint8 (n, 32, 32, 3), from a frame (height, width, 3) on any device."""
    height, width, _ = frame.shape
    crops = []
    for x_min, y_min, x_max, y_max in boxes.round().astype(int).tolist():
        left, top = max(0, min(x_min, width - 1)), max(0, min(y_min, height - 1))
        crop = frame[top : max(top + 1, y_max), left : max(left + 1, x_max)]
        planes = crop.permute(2, 0, 1)[None].float()
        crops.append(nn.functional.interpolate(planes, size=(CROP, CROP), mode="area")[0])
    return torch.stack(crops).permute(0, 2, 3, 1).round().to(torch.uint8)


def cars_and_colours(chunks, detector, classifier):
    """One partition's task: pieces of video to rows."""
    rows = []
    for chunk in chunks:
        with chunk.open_frames(device=current_device()) as stream:
            for batch in stream:
                frames = torch.as_tensor(batch.frames)
                found = detector(frames)
                crops = [cut_out(f, d.xyxy) for f, d in zip(frames, found, strict=True) if len(d)]
                if not crops:
                    continue
                probabilities = iter(classifier(torch.cat(crops)))
                for offset, detections in enumerate(found):
                    for confidence in detections.confidence.tolist():
                        colour = next(probabilities)
                        rows.append(
                            {
                                "video": chunk.video,
                                "frame": batch.first_frame + offset,
                                "confidence": confidence,
                                "colour": NAMES[colour.argmax()],
                            }
                        )
    return rows


def main() -> None:
    videos = sys.argv[1:] or [demo_clip()]
    detector = daskshare.yolov3("yolov3-tiny", classes=["car"])
    classifier = daskshare.share(load_classifier, name="colours", max_batch_size=64)
    with daskshare.local_cluster(threads_per_worker=4) as cluster, Client(cluster) as client:
        daskshare.install(client)
        chunks = daskshare.read_video(videos, chunk_seconds=2)
        rows = chunks.map_partitions(cars_and_colours, detector, classifier)
        table = rows.to_dataframe(
            meta={"video": "str", "frame": "int64", "confidence": "float64", "colour": "str"}
        )
        colours = table.groupby("colour")["confidence"].agg(["count", "mean"]).compute()
        for colour, count, mean in colours.sort_values("count", ascending=False).itertuples():
            print(f"{colour:<7} in {count:.0f} detections of cars, confidence {mean:.2f}")
        for report in daskshare.stats(client).values():
            for model in report["models"].values():
                print(
                    f"{model['name']}: {model['loads']} load, {model['frames']} items in "
                    f"{model['batches']} batches"
                )


if __name__ == "__main__":
    main()
