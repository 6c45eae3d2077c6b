"""The pipelines of :mod:`benchmarks.ray_data`: models in actors, decoding, and the plan.

A module of its own, as Ray's workers import it. The network is daskshare's, compiled by
``torch.compile`` and captured in a CUDA graph; what follows it runs on the GPU too.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import workload
from daskshare.device import current_device, list_devices


def make_spec(settings: dict[str, Any]) -> Any:
    """The model that ``measure_daskshare`` takes; without a GPU, the tiny one and its weights."""
    from daskshare.models.yolov3 import yolov3_spec

    if not settings["gpu"]:
        return yolov3_spec(settings["model"])
    weights = workload.random_weights(settings["model"])
    return yolov3_spec(settings["model"], weights=weights, precision="fp16")


# --- the model in an actor ------------------------------------------------------------------------


class Slot:
    """Page-locked memory of a batch on its way to the GPU and of its results on their way back."""

    def __init__(self, static: Any, outputs: dict[str, Any]) -> None:
        import torch

        def pinned(tensor: Any) -> Any:
            return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)

        self.frames = pinned(static)
        self.outputs = {name: pinned(tensor) for name, tensor in outputs.items()}
        self.done = torch.cuda.Event()
        self.num_frames = 0


class GpuModel:
    """The compiled network and its suppression as one CUDA graph; two batches in flight."""

    def __init__(self, spec: Any, batch_size: int) -> None:
        import dask
        import torch

        device = current_device()
        self.torch, self.batch_size = torch, batch_size
        self.program = spec.load(device)
        # The kernels that replace torch.compile's are daskshare's own; a user of Ray has none.
        # (That of the first layer stays, in Ray's favour.)
        with dask.config.set({"daskshare.models.fused-kernels": False}):
            forward = self.program.compile(batch_size)
        shape = (batch_size, *self.program.letterbox_size, 3)
        # As what it was compiled for, or it would be compiled once more.
        with torch.inference_mode():
            self.static = torch.zeros(shape, dtype=torch.uint8, device=device.torch_device())
        self.stream = torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(3):
                forward(self.static)
        self.stream.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.outputs = forward(self.static)
        self.slots = deque(Slot(self.static, self.outputs) for _ in range(2))

    def __call__(self, batches: Iterable[Any], box: Any) -> list[Any]:
        """Detections of each frame of batches in host or GPU memory, at most ``batch_size`` each.

        While the GPU works on a batch, the next is filled and the one before is collected.
        """
        results: list[Any] = []
        flying: deque[Slot] = deque()
        for batch in batches:
            if len(flying) == len(self.slots):
                results += self.collect(flying.popleft(), box)
            slot = self.slots[0]
            self.slots.rotate(-1)
            self.launch(slot, batch)
            flying.append(slot)
        while flying:
            results += self.collect(flying.popleft(), box)
        return results

    def launch(self, slot: Slot, batch: Any) -> None:
        count = slot.num_frames = len(batch)
        if isinstance(batch, np.ndarray):
            np.copyto(slot.frames.numpy()[:count], batch)
            batch = slot.frames[:count]
        else:
            self.stream.wait_stream(self.torch.cuda.current_stream())
            batch.record_stream(self.stream)
        with self.torch.inference_mode(), self.torch.cuda.stream(self.stream):
            self.static[:count].copy_(batch, non_blocking=True)
            self.graph.replay()
            for name, output in self.outputs.items():
                slot.outputs[name].copy_(output, non_blocking=True)
            slot.done.record()

    def collect(self, slot: Slot, box: Any) -> list[Any]:
        slot.done.synchronize()
        count = slot.num_frames
        outputs = {name: output.numpy()[:count] for name, output in slot.outputs.items()}
        return list(self.program.finish(outputs, [box] * count))


class CpuModel:
    """The same without a GPU, one batch after the other."""

    def __init__(self, spec: Any) -> None:
        self.program = spec.load(current_device())
        self.batch_size = self.program.max_batch_size

    def __call__(self, batches: Iterable[Any], box: Any) -> list[Any]:
        import torch

        results: list[Any] = []
        for batch in batches:
            outputs = workload.to_host(self.program.forward(torch.from_numpy(batch.copy())))
            results += self.program.finish(outputs, [box] * len(batch))
        return results


class Actor:
    """What both kinds of actors do: load, say when they are ready, and make rows."""

    def __init__(self, spec: Any, batch_size: int, log: str) -> None:
        gpu = bool(list_devices())
        self.model: Any = GpuModel(spec, batch_size) if gpu else CpuModel(spec)
        self.size = self.model.program.letterbox_size
        self.log = Path(log) / f"{os.getpid()}.log"
        self.say(ready=time.time())

    def say(self, **words: float) -> None:
        with self.log.open("a") as out:
            out.write(json.dumps(words) + "\n")

    def rows(self, video: str, first: int, seconds: np.ndarray, results: list[Any]) -> Any:
        """Parquet-ready rows of detections in consecutive frames of a video."""
        import pyarrow as pa

        from daskshare.results.schema import detections_batch

        self.say(frames=len(results))
        return pa.Table.from_batches([detections_batch(video, first, seconds, results)])


# --- CPU decode -----------------------------------------------------------------------------------


def decode(batch: dict[str, Any], *, size: tuple[int, int], batch_frames: int) -> Iterator[Any]:
    """Decode files on one core each: letterboxed frames, a row each, ``batch_frames`` at a time.

    One thread a task, as there are more files than cores: threads of one decoder wait for each
    other. Conversion and scaling are those of daskshare's own road over the CPU, so that a frame
    is the same; scaling by swscale is slower (measured).
    """
    import av
    import cv2

    from daskshare.kernels.preprocess import letterbox_host
    from daskshare.video.decode import RgbConverter

    cv2.setNumThreads(1)
    for path in map(str, batch["item"]):
        with av.open(path) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            source = stream.codec_context.height, stream.codec_context.width
            to_rgb = RgbConverter(stream, rotation=0)
            images, seconds, first = np.empty((batch_frames, *size, 3), np.uint8), [], 0
            for frame in container.decode(stream):
                letterbox_host(to_rgb(frame), images[len(seconds)])
                seconds.append(float(frame.time))
                if len(seconds) == batch_frames:
                    yield image_rows(path, source, first, images, seconds)
                    first += batch_frames
                    images, seconds = np.empty_like(images), []
            if seconds:
                yield image_rows(path, source, first, images, seconds)


def image_rows(
    path: str, source: tuple[int, int], first: int, images: np.ndarray, seconds: list[float]
) -> dict[str, np.ndarray]:
    count = len(seconds)
    return {
        "video": np.repeat(path, count),
        "frame": np.arange(first, first + count),
        "seconds": np.array(seconds),
        "height": np.repeat(source[0], count),
        "width": np.repeat(source[1], count),
        "image": images[:count],
    }


class DetectActor(Actor):
    """Takes blocks as they come (some 320 frames of one video) and batches of 64 out of them.

    Whole blocks, so that within one call copies, the GPU and the collecting overlap.
    """

    def __call__(self, block: dict[str, Any]) -> Any:
        from daskshare.kernels.preprocess import Letterbox

        images, step = block["image"], self.model.batch_size
        box = Letterbox(int(block["height"][0]), int(block["width"][0]), *self.size)
        batches = (images[start : start + step] for start in range(0, len(images), step))
        results = self.model(batches, box)
        return self.rows(str(block["video"][0]), int(block["frame"][0]), block["seconds"], results)


# --- NVDEC in actors ------------------------------------------------------------------------------


class DecodeAndDetectActor(Actor):
    """Decodes, letterboxes and detects on the GPU, a file a call, with a model of its own."""

    decoder: Any = None

    def __call__(self, batch: dict[str, Any]) -> Any:
        import PyNvVideoCodec as nvc

        from daskshare.kernels.preprocess import Letterbox

        (path,) = map(str, batch["item"])
        if self.decoder is None:
            rgb = nvc.OutputColorType.RGB
            self.decoder = nvc.SimpleDecoder(
                path, gpu_id=0, use_device_memory=True, output_color_type=rgb
            )
        else:
            # Faster than a new session.
            self.decoder.reconfigure_decoder(path)
        about = self.decoder.get_stream_metadata()
        results = self.model(self.frames(), Letterbox(about.height, about.width, *self.size))
        return self.rows(path, 0, np.arange(len(results)) / about.average_fps, results)

    def frames(self) -> Iterator[Any]:
        """Letterboxed batches in GPU memory; 16 frames are decoded at a time."""
        import torch

        from daskshare.kernels.preprocess import letterbox_cuda

        left, step = len(self.decoder), self.model.batch_size
        # Everything here is on the default stream, the decoder's too; the model has its own.
        while left:
            out = torch.empty((min(left, step), *self.size, 3), dtype=torch.uint8, device="cuda")
            filled = 0
            while filled < len(out):
                surfaces = self.decoder.get_batch_frames(min(16, len(out) - filled))
                if not surfaces:
                    raise RuntimeError(f"the decoder ended {left} frames early")
                sources = torch.stack([torch.from_dlpack(surface) for surface in surfaces])
                letterbox_cuda(sources, out[filled : filled + len(sources)])
                filled += len(sources)
                # The decoder uses its surfaces again.
                torch.cuda.current_stream().synchronize()
            left -= len(out)
            yield out


# --- the plan -------------------------------------------------------------------------------------


def run_pipeline(way: str, settings: dict[str, Any], paths: list[str], output: Path) -> None:
    """What a user of Ray Data writes."""
    import ray

    spec = make_spec(settings)
    actors = settings["actors"]
    log = output.with_suffix(".logs")
    log.mkdir()
    arguments = {"batch_size": settings["batch_size"], "log": str(log), "spec": spec}
    if settings["gpu"]:
        resources = {"num_cpus": 0, "num_gpus": 1 / actors}
    else:
        # Not as many cores as decoding takes, or Ray would decode in the actor too.
        resources = {"num_cpus": 0.5, "num_gpus": 0}
    files = ray.data.from_items(paths, override_num_blocks=len(paths))
    if way == "CPU decode":
        # Blocks of 128 MiB at least, Ray's default, hold five such batches.
        options = {"size": spec.input_size, "batch_frames": settings["batch_size"]}
        frames = files.map_batches(decode, batch_size=1, num_cpus=1, fn_kwargs=options)
        found = frames.map_batches(
            DetectActor,
            # Ray wants it said where a GPU is asked for; a block as it comes is quicker.
            batch_size=settings["batch_size"] if settings["gpu"] else None,
            batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(size=actors),
            fn_constructor_kwargs=arguments,
            **resources,
        )
    else:
        found = files.map_batches(
            DecodeAndDetectActor,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=2),
            fn_constructor_kwargs=arguments,
            **resources,
        )
    found.write_parquet(str(output))
