"""yolov3-tiny on the CPU: daskshare's engine beside plain torch, torch.compile and OpenCV.

Every way gets the same letterboxed frames of the traffic clip, four at a time, and gives
detections. The ways take turns, round by round, in one process. torch.compile is used as its manual
recommends for inference on a CPU, with weights frozen into the graph; OpenCV runs the network up to
the heads, exported to ONNX. What a way found is compared with plain torch in fp32, so that a lower
precision counts only when the detections hold.

bfloat16 is measured where the CPU computes in it. Needs a C++ compiler (torch.compile) and the
package ``onnx`` (OpenCV); a way without what it needs is left out, with a word.
"""

from __future__ import annotations

import io
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from benchmarks.report import Report, argument_parser

#: From a batch of frames to one Detections a frame.
Way = Callable[[np.ndarray], list[Any]]

MODEL = "yolov3-tiny"
BATCH = 4
#: A reference detection of at least this confidence must be found again.
SURE = 0.30


def clip_frames(count: int) -> np.ndarray:
    """Evenly spaced frames of the clip, letterboxed: (count, 416, 416, 3) uint8."""
    import av

    from daskshare.demo import demo_clip
    from daskshare.kernels.preprocess import letterbox_host

    with av.open(str(demo_clip())) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    out = np.empty((count, 416, 416, 3), np.uint8)
    for index, destination in zip(np.linspace(0, len(frames) - 1, count), out, strict=True):
        letterbox_host(frames[int(index)], destination)
    return out


def make_program(precision: str, *, packed: bool) -> Any:
    """daskshare's program; its plain network unless ``packed``."""
    from unittest import mock

    from daskshare.device import current_device
    from daskshare.models.network import YoloNetwork
    from daskshare.models.yolov3 import yolov3_spec

    spec = yolov3_spec(MODEL, precision=precision, max_batch_size=BATCH)
    if packed:
        return spec.load(current_device())
    with mock.patch.object(YoloNetwork, "pack_convolutions"):
        return spec.load(current_device())


def finished(program: Any, frames: np.ndarray, outputs: dict[str, Any]) -> list[Any]:
    context = program.prepare(frames).context
    return program.finish({k: v.numpy() for k, v in outputs.items()}, context)  # type: ignore[no-any-return]


def torch_way(precision: str) -> Way:
    import torch

    program = make_program(precision, packed=False)

    def run(frames: np.ndarray) -> list[Any]:
        return finished(program, frames, program.forward(torch.from_numpy(frames)))

    return run


def compiled_way(precision: str) -> Way:
    import torch
    import torch._inductor.config as inductor

    program = make_program(precision, packed=False)
    inductor.freezing = True
    network = torch.compile(program._network, dynamic=False, fullgraph=True)

    def run(frames: np.ndarray) -> list[Any]:
        # Freezing is not done in inference mode.
        with torch.no_grad():
            outputs = program._suppress(*network(torch.from_numpy(frames)))
        return finished(program, frames, outputs)

    return run


def opencv_way(precision: str) -> Way:
    if precision != "fp32":
        raise ValueError("OpenCV computes in fp32 on a CPU")
    import cv2
    import torch

    program = make_program(precision, packed=False)
    network = program._network

    class Trunk(torch.nn.Module):
        """The network up to the heads."""

        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, images: torch.Tensor) -> Any:
            heads: list[torch.Tensor] = []
            network.decode = heads.extend
            try:
                network.predict(images.permute(0, 2, 3, 1))
            finally:
                del network.decode
            return tuple(heads)

    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Trunk().eval(),
            (torch.zeros(BATCH, 3, 416, 416),),
            file,
            dynamo=False,
            opset_version=13,
        )
    runner = cv2.dnn.readNetFromONNX(np.frombuffer(file.getvalue(), np.uint8))
    names = runner.getUnconnectedOutLayersNames()

    def run(frames: np.ndarray) -> list[Any]:
        runner.setInput(cv2.dnn.blobFromImages(frames))
        heads = [
            torch.from_numpy(head).contiguous(memory_format=torch.channels_last)
            for head in runner.forward(names)
        ]
        with torch.inference_mode():
            outputs = program._suppress(*network.candidates(network.decode(heads)))
        return finished(program, frames, outputs)

    return run


class EngineWay:
    """Tasks' threads that share one engine."""

    def __init__(self, precision: str, threads: int) -> None:
        from daskshare.config import EngineOptions
        from daskshare.device import current_device
        from daskshare.engine import InferenceEngine

        self.engine = InferenceEngine(
            make_program(precision, packed=True),
            current_device(),
            options=EngineOptions.from_config(),
            name=MODEL,
        )
        self.threads = threads

    def __call__(self, frames: np.ndarray) -> list[Any]:
        return self.engine.infer(frames)  # type: ignore[no-any-return]

    def rate(self, batches: list[np.ndarray], seconds: float) -> float:
        """Frames a second of all threads."""
        stop = time.perf_counter() + seconds
        start = time.perf_counter()

        def task(first: int) -> int:
            done = 0
            while time.perf_counter() < stop:
                done += len(self(batches[(first + done) % len(batches)]))
            return done

        with ThreadPoolExecutor(self.threads) as pool:
            done = sum(pool.map(task, range(self.threads)))
        return done / (time.perf_counter() - start)


def loop_rate(run: Way, batches: list[np.ndarray], seconds: float) -> float:
    """Frames a second of a loop in one thread."""
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        done += len(run(batches[done // BATCH % len(batches)]))
    return done / (time.perf_counter() - start)


def agreement(expected: list[Any], got: list[Any]) -> float:
    """Share of the sure detections that the other has: same class, IoU >= 0.90, within 0.05."""
    sure = matched = 0
    for one, other in zip(expected, got, strict=True):
        for box, confidence, class_id in zip(one.xyxy, one.confidence, one.class_id, strict=True):
            if confidence < SURE:
                continue
            sure += 1
            corner = np.maximum(box[:2], other.xyxy[:, :2])
            size = np.clip(np.minimum(box[2:], other.xyxy[:, 2:]) - corner, 0, None)
            both = size.prod(axis=1)
            area = (box[2:] - box[:2]).prod()
            areas = (other.xyxy[:, 2:] - other.xyxy[:, :2]).prod(axis=1)
            near = (both / (area + areas - both) >= 0.90) & (other.class_id == class_id)
            matched += bool((near & (abs(other.confidence - confidence) <= 0.05)).any())
    return matched / sure


def main() -> int:
    """Measure and report."""
    import torch

    from daskshare.models.packed import can_pack

    parser = argument_parser(__doc__)
    parser.add_argument("--threads", type=int, default=4, help="tasks that share the engine")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each turn")
    parser.add_argument("--rounds", type=int, default=15, help="turns, of which the median counts")
    arguments = parser.parse_args()
    report = Report(
        "cpu",
        settings={
            "model": MODEL,
            "batch": BATCH,
            "cores": torch.get_num_threads(),
            **{name: getattr(arguments, name) for name in ("threads", "seconds", "rounds")},
        },
    )
    frames = clip_frames(16 * BATCH)
    batches = [frames[i : i + BATCH] for i in range(0, len(frames), BATCH)]
    makers: dict[str, Callable[[str], Any]] = {
        "plain torch": torch_way,
        "torch.compile": compiled_way,
        "OpenCV": opencv_way,
        "daskshare": lambda precision: EngineWay(precision, arguments.threads),
    }
    ways: dict[tuple[str, str], Any] = {}
    found: dict[tuple[str, str], list[Any]] = {}
    for precision in ("fp32", "bf16"):
        if precision == "bf16" and not can_pack(torch.bfloat16):
            print("bf16 is left out: this CPU does not compute in it", file=sys.stderr)
            continue
        for name, make in makers.items():
            if (name, precision) == ("OpenCV", "bf16"):
                continue
            try:
                way = make(precision)
                found[name, precision] = [found for batch in batches for found in way(batch)]
            except Exception as error:
                # torch.compile and the exporter have many kinds; a machine may lack their needs.
                print(f"{name} in {precision} is left out: {error!r:.300}", file=sys.stderr)
                continue
            ways[name, precision] = way
    rates: dict[tuple[str, str], list[float]] = {key: [] for key in ways}
    for _ in range(arguments.rounds):
        for key, way in ways.items():
            measure = way.rate if isinstance(way, EngineWay) else None
            rates[key].append(
                measure(batches, arguments.seconds)
                if measure is not None
                else loop_rate(way, batches, arguments.seconds)
            )
    for way in ways.values():
        if isinstance(way, EngineWay):
            way.engine.close()
    medians = {key: statistics.median(values) for key, values in rates.items()}
    agreements = {key: agreement(found["plain torch", "fp32"], got) for key, got in found.items()}
    for (name, precision), rate in medians.items():
        report.add_row(
            way=name,
            precision=precision,
            frames_per_second=rate,
            lowest=min(rates[name, precision]),
            highest=max(rates[name, precision]),
            detections_found_again=agreements[name, precision],
        )
    for precision in ("fp32", "bf16"):
        if ("daskshare", precision) not in rates:
            continue
        others = {key: values for key, values in rates.items() if key[0] != "daskshare"}
        for what, rivals in (
            (precision, [v for key, v in others.items() if key[1] == precision]),
            ("fp32", [v for key, v in others.items() if key[1] == "fp32"]),
        ):
            # Round by round, as a machine's speed changes over time.
            ours = zip(rates["daskshare", precision], zip(*rivals, strict=True), strict=True)
            name = f"daskshare in {precision} over the best other in {what}"
            if rivals and name not in [bar.name for bar in report.bars]:
                ratio = statistics.median(rate / max(theirs) for rate, theirs in ours)
                report.add_bar(name, ratio, "x", bound=1.0, comparison=">=")
    for precision in ("fp32", "bf16"):
        if ("daskshare", precision) in agreements:
            report.add_bar(
                f"sure detections found again in {precision}",
                agreements["daskshare", precision],
                "share",
                bound=1.0 if precision == "fp32" else 0.98,
                comparison=">=",
            )
    return report.finish(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
