"""yolov3-tiny on the CPU: daskshare's engine beside plain torch, torch.compile and OpenCV.

Every way gets the same letterboxed frames of the traffic clip, four at a time, and gives
detections. The ways take turns, round by round, in one process. torch.compile is used as its manual
recommends for inference on a CPU, with weights frozen into the graph; OpenCV runs the network up to
the heads, exported to ONNX. What a way found is compared with plain torch in fp32, so that a lower
precision counts only when the detections hold.

bfloat16 is measured where the CPU computes in it. Needs a C++ compiler (torch.compile) and the
package ``onnx`` (OpenCV); what a machine lacks is left out, and the report says why.
"""

from __future__ import annotations

import io
import statistics
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np

from benchmarks import workload
from benchmarks.report import Report, argument_parser

#: From a batch of frames to one Detections a frame.
Way = Callable[[np.ndarray], list[Any]]

#: A way and a precision.
Key = tuple[str, str]

MODEL = "yolov3-tiny"
OURS = "daskshare"
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


def finished(program: Any, frames: np.ndarray, outputs: Any) -> list[Any]:
    context = program.prepare(frames).context
    return program.finish(workload.to_host(outputs), context)  # type: ignore[no-any-return]


def torch_way(precision: str) -> Way:
    import torch

    program = make_program(precision, packed=False)
    return lambda frames: finished(program, frames, program.forward(torch.from_numpy(frames)))


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


def make_engine(precision: str) -> Any:
    from daskshare.config import EngineOptions
    from daskshare.device import current_device
    from daskshare.engine import InferenceEngine

    return InferenceEngine(
        make_program(precision, packed=True),
        current_device(),
        options=EngineOptions.from_config(),
        name=MODEL,
    )


def measure(run: Way, batches: list[np.ndarray], seconds: float) -> float:
    """Frames a second of as many threads as batches, each with its own."""
    barrier = threading.Barrier(len(batches))
    with ThreadPoolExecutor(len(batches)) as pool:
        jobs = [pool.submit(workload.run_for, run, own, seconds, barrier) for own in batches]
        return workload.rate([job.result() for job in jobs])


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


def make_ways(precision: str, engine: Any, left_out: dict[str, str]) -> dict[Key, Way]:
    """All ways that this machine has in a precision."""
    ways: dict[Key, Way] = {
        ("plain torch", precision): torch_way(precision),
        (OURS, precision): engine.infer,
    }
    makers = {"torch.compile": compiled_way}
    if precision == "fp32":
        makers["OpenCV"] = opencv_way
    for name, make in makers.items():
        try:
            ways[name, precision] = way = make(precision)
            way(np.zeros((BATCH, 416, 416, 3), np.uint8))
        except Exception as error:
            # The compiler and the exporter have many kinds; a machine may lack what they need.
            ways.pop((name, precision), None)
            left_out[f"{name}, {precision}"] = f"{error!r:.300}"
    return ways


def set_bars(report: Report, rates: dict[Key, list[float]], agreements: dict[Key, float]) -> None:
    for ours, theirs in (("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32")):
        rivals = [v for (name, p), v in rates.items() if name != OURS and p == theirs]
        if (OURS, ours) in rates:
            best = max(rivals, key=statistics.median)
            # Turn by turn, as a machine's speed changes over time.
            turns = zip(rates[OURS, ours], best, strict=True)
            report.add_bar(
                f"{OURS} in {ours} over the best other in {theirs}",
                statistics.median(rate / other for rate, other in turns),
                "x",
                bound=1.0,
            )
    for precision, bound in (("fp32", 1.0), ("bf16", 0.98)):
        if (OURS, precision) in agreements:
            name = f"sure detections found again in {precision}"
            report.add_bar(name, agreements[OURS, precision], "share", bound=bound)


def main() -> int:
    """Measure and report."""
    import torch

    from daskshare.models.packed import can_pack

    parser = argument_parser(__doc__)
    parser.add_argument("--threads", type=int, default=4, help="tasks that share the engine")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each turn")
    parser.add_argument("--rounds", type=int, default=15, help="turns, of which the median counts")
    arguments = parser.parse_args()
    left_out: dict[str, str] = {}
    settings = {
        "model": MODEL,
        "batch": BATCH,
        "cores": torch.get_num_threads(),
        "left_out": left_out,
        **{name: getattr(arguments, name) for name in ("threads", "seconds", "rounds")},
    }
    report = Report("cpu", settings=settings)
    frames = clip_frames(16 * BATCH)
    batches = [frames[i : i + BATCH] for i in range(0, len(frames), BATCH)]
    precisions = ["fp32"]
    if can_pack(torch.bfloat16):
        precisions.append("bf16")
    else:
        left_out["bf16"] = "this CPU does not compute in it"
    with ExitStack() as stack:
        ways: dict[Key, Way] = {}
        for precision in precisions:
            engine = make_engine(precision)
            stack.callback(engine.close)
            ways |= make_ways(precision, engine, left_out)
        found = {key: [one for own in batches for one in way(own)] for key, way in ways.items()}
        rates: dict[Key, list[float]] = {key: [] for key in ways}
        for turn in range(arguments.rounds):
            # What ran before may leave threads that still look for work.
            order = list(ways)[turn % len(ways) :] + list(ways)[: turn % len(ways)]
            for key in order:
                threads = arguments.threads if key[0] == OURS else 1
                own = [batches[(turn + i) % len(batches)] for i in range(threads)]
                rates[key].append(measure(ways[key], own, arguments.seconds))
    agreements = {key: agreement(found["plain torch", "fp32"], got) for key, got in found.items()}
    for (name, precision), values in rates.items():
        report.add_row(
            way=name,
            precision=precision,
            frames_per_second=statistics.median(values),
            lowest=min(values),
            highest=max(values),
            detections_found_again=agreements[name, precision],
        )
    set_bars(report, rates, agreements)
    return report.finish(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
