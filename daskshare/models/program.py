"""YOLO-v3 loaded on one device: from what callers hand in to detections, as an engine drives it."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from daskshare.config import ModelsOptions
from daskshare.errors import InvalidInputError
from daskshare.kernels.capture import undisturbed
from daskshare.kernels.postprocess import greedy_nms, greedy_nms_cuda
from daskshare.kernels.preprocess import (
    Letterbox,
    letterbox_cuda,
    letterbox_host,
    letterbox_kernel,
)
from daskshare.kernels.streams import STREAMS
from daskshare.models.fetch import cache_directory
from daskshare.models.lanes import RowLanes
from daskshare.models.network import Candidates, YoloNetwork, compile_network
from daskshare.models.nms import greedy_nms_host
from daskshare.models.spec import Detections, Prepared

__all__ = ["MAX_DETECTIONS", "CompiledForward", "YoloV3Program"]

logger = logging.getLogger(__name__)

#: Most objects of a frame, those of highest confidence.
MAX_DETECTIONS = 300

#: Intermediate results that threads of a CPU may hold together; a worker keeps as much memory.
_LANES_BYTES = 2**26

#: Frames that layers with large outputs compute at once on a GPU while no compiled pass does.
_CUDA_SPLIT_ROWS = 4

_EXPECTED = (
    "expected a uint8 RGB array of shape (frames, height, width, 3) with at least one frame, in "
    "host or GPU memory (NumPy, torch, CuPy), or a list of uint8 frames (height, width, 3)"
)


class CompiledForward:
    """The fast forward pass for one batch size.

    Parameters
    ----------
    candidates : callable
        From uint8 frames to candidates.
    suppress : callable
        From candidates to the program's outputs.
    description : str
        For people: what runs.
    """

    def __init__(
        self,
        candidates: Callable[[torch.Tensor], Candidates],
        suppress: Callable[..., dict[str, torch.Tensor]],
        description: str,
    ) -> None:
        self._candidates, self._suppress = candidates, suppress
        self.description = description

    @torch.inference_mode()
    def __call__(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """Detect in a batch, as ``forward`` does."""
        return self._suppress(*self._candidates(batch))


class YoloV3Program:
    """A :class:`~daskshare.models.spec.Program` that detects objects.

    Parameters
    ----------
    network : YoloNetwork
        Built on the CPU; moved to ``device`` here.
    device : torch.device
        With an index when it is a CUDA device.
    class_names : tuple of str
        All classes of the network.
    iou_threshold : float
        Of the suppression of overlapping boxes of a class.
    max_batch_size : int or None
        ``None``: 64 on CUDA devices, 4 on the CPU (measured: more gains nothing there).

    Notes
    -----
    ``forward`` returns a dict: ``boxes`` (n, k, 4) float32 xyxy in input pixels, ``confidence``
    (n, k) float32, ``class_id`` (n, k) integer and ``count`` (n,) integer. On a GPU these are the
    detections, suppressed there without a host round trip; on the CPU the candidates, which
    ``finish`` suppresses in the caller's thread so that the engine's goes on with the next batch.

    ``torch.backends.cudnn.benchmark`` is left as it is: it is a switch of the whole process, and
    the kernels chosen without it are the fast ones for channels-last half precision.
    """

    def __init__(
        self,
        network: YoloNetwork,
        *,
        device: torch.device,
        class_names: tuple[str, ...],
        iou_threshold: float,
        max_batch_size: int | None = None,
    ) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        self._network = network.requires_grad_(False).eval().to(device)
        self._class_names = class_names
        self._iou_threshold = iou_threshold
        plan = network.plan
        self.item_shape: tuple[int, ...] | None = (plan.height, plan.width, 3)
        self.letterbox_size: tuple[int, int] = (plan.height, plan.width)
        self.max_batch_size = max_batch_size or (64 if self._cuda else 4)
        self.batch_sizes: tuple[int, ...] = _doubling(self.max_batch_size) if self._cuda else ()
        self.model_bytes = network.num_bytes
        self.graph_capturable = self._cuda
        if self._cuda:
            self._network.fuse_first_convolution()
            self._network.split_large_layers(_CUDA_SPLIT_ROWS)
            letterbox_kernel.compile(device)
            greedy_nms_cuda.compile(device)
            # The engine works on a stream of its own, which does not wait for these copies.
            torch.cuda.current_stream(device).synchronize()
        else:
            self._network.pack_convolutions(self.max_batch_size)
            self._lanes = RowLanes(_most_lanes(network))

    def prepare(self, inputs: Any) -> Prepared:
        """Letterbox frames to the network's input.

        Parameters
        ----------
        inputs : array or sequence of arrays
            uint8 RGB: (n, h, w, 3) in host or GPU memory, or a list of (h, w, 3) of any sizes.
            Arrays of exactly the input's size are passed on without a copy.

        Returns
        -------
        Prepared
            ``items`` uint8 (n, height, width, 3): a NumPy array for frames in host memory, a torch
            tensor on the program's device for frames in GPU memory. ``context``: one Letterbox a
            frame.

        Raises
        ------
        InvalidInputError
            For a wrong shape, dtype or type, or no frame at all.

        Notes
        -----
        Runs in the callers' threads, many at once. Frames in GPU memory are read, and ``items``
        are made, in the order of the thread's current torch stream, from which the thread must
        submit too. Memory that is not torch's own has been read when this returns.
        """
        values = inputs if isinstance(inputs, list | tuple) else [inputs]
        if isinstance(inputs, list | tuple):
            if not inputs:
                raise InvalidInputError(f"got an empty list; {_EXPECTED}.", shape=(0,), dtype=None)
            groups = [_checked(_as_array(frame, self._device), dims=3)[None] for frame in inputs]
        else:
            groups = [_checked(_as_array(inputs, self._device), dims=4)]
        if not self._cuda or all(isinstance(group, np.ndarray) for group in groups):
            items: Any = self._prepare_host([_to_host(group) for group in groups])
        else:
            items = self._prepare_device(groups)
            # Others recycle memory without regard to torch's streams as soon as it is dropped.
            if not all(isinstance(value, torch.Tensor | np.ndarray) for value in values):
                torch.cuda.current_stream(self._device).synchronize()
        context = []
        for group in groups:
            context += [Letterbox(group.shape[1], group.shape[2], *self.letterbox_size)] * len(
                group
            )
        return Prepared(items, context)

    def prepare_letterboxed(self, frames: torch.Tensor, source_size: tuple[int, int]) -> Prepared:
        """Take frames that a decoder letterboxed to ``letterbox_size``.

        Parameters
        ----------
        frames : torch.Tensor, shape (n, height, width, 3), uint8
            On the program's device, in the order of the thread's current torch stream.
        source_size : tuple of int
            Height and width of the video's frames, pixels.

        Returns
        -------
        Prepared
            As :meth:`prepare` gives.
        """
        return Prepared(frames, [Letterbox(*source_size, *self.letterbox_size)] * len(frames))

    def _prepare_host(self, groups: list[np.ndarray]) -> np.ndarray:
        if len(groups) == 1 and groups[0].shape[1:3] == self.letterbox_size:
            return np.ascontiguousarray(groups[0])
        out = np.empty((sum(map(len, groups)), *self.letterbox_size, 3), dtype=np.uint8)
        frames = (frame for group in groups for frame in group)
        for frame, destination in zip(frames, out, strict=True):
            letterbox_host(frame, destination)
        return out

    def _prepare_device(self, groups: list[Any]) -> torch.Tensor:
        tensors = [
            # A copy first, as torch refuses arrays with negative strides.
            torch.from_numpy(group.copy()).to(self._device)
            if isinstance(group, np.ndarray)
            else group.to(self._device).contiguous()
            for group in groups
        ]
        if len(tensors) == 1 and tensors[0].shape[1:3] == self.letterbox_size:
            out = tensors[0]
        else:
            shape = (sum(map(len, tensors)), *self.letterbox_size, 3)
            out = torch.empty(shape, dtype=torch.uint8, device=self._device)
            start = 0
            for tensor in tensors:
                letterbox_cuda(tensor, out[start : start + len(tensor)])
                start += len(tensor)
        return out

    @torch.inference_mode()
    def forward(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """Detect in a batch (n, height, width, 3) of uint8 on the device.

        Notes
        -----
        Runs in the engine's thread; on a GPU it can be captured in a CUDA graph.
        """
        if self._cuda:
            return self._forward(batch)
        return self._lanes.run(self._forward, batch)

    @torch.inference_mode()
    def _forward(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        return self._suppress(*self._network(batch))

    def _suppress(
        self, boxes: torch.Tensor, confidence: torch.Tensor, class_id: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        if self._cuda:
            boxes, confidence, class_id, count = greedy_nms(
                boxes,
                confidence,
                class_id,
                iou_threshold=self._iou_threshold,
                max_kept=MAX_DETECTIONS,
            )
        else:
            count = (confidence > 0).sum(dim=1)
        return {"boxes": boxes, "confidence": confidence, "class_id": class_id, "count": count}

    def compile(self, batch_size: int) -> CompiledForward | None:
        """Make the network fast for ``batch_size`` and run it once; ``None`` on the CPU.

        Fused kernels where the GPU and the installed packages have them, otherwise
        ``torch.compile``; the result's ``description`` says which, and why. The suppression stays
        a kernel of its own behind it.

        Notes
        -----
        Runs in a background thread, on a stream of its own, while ``forward`` goes on serving.
        """
        if not self._cuda:
            return None
        with torch.cuda.device(self._device):
            stream = STREAMS.take(torch.cuda.current_device(), "compile")
        try:
            with torch.inference_mode(), torch.cuda.stream(stream):
                candidates, description = self._fast_candidates(batch_size)
                forward = CompiledForward(candidates, self._suppress, description)
                shape = (batch_size, *self.letterbox_size, 3)
                frames = torch.zeros(shape, dtype=torch.uint8, device=self._device)
                undisturbed(partial(forward, frames))
        finally:
            stream.synchronize()
            STREAMS.give_back(stream, "compile")
        return forward

    def _fast_candidates(self, batch_size: int) -> tuple[Callable[[torch.Tensor], Candidates], str]:
        wanted = ModelsOptions.from_config().fused_kernels
        if wanted is False:
            reason = "switched off by daskshare.models.fused-kernels"
            return compile_network(self._network), f"torch.compile; no fused kernels: {reason}"
        # Imported here: its kernels need packages that machines without a GPU lack.
        from daskshare.models.fused_build import FusedUnavailableError, build_fused

        folder = cache_directory() / "tuning"
        try:
            candidates, operations, _ = undisturbed(
                partial(build_fused, self._network, batch_size, folder=folder)
            )
        except FusedUnavailableError as error:
            if wanted is True:
                raise
            reason = str(error)
            logger.info("Compiling with torch, as the fused kernels are unavailable: %s", error)
        except Exception as error:
            # cuDNN's package has kinds of its own, and whatever they say, there is another way.
            if wanted is True:
                raise
            reason = f"{type(error).__name__}: {error}"
            logger.warning("Compiling with torch, as the fused kernels failed", exc_info=error)
        else:
            return candidates, operations.description
        return compile_network(self._network), f"torch.compile; no fused kernels: {reason}"

    def finish(self, outputs: Any, context: Sequence[Letterbox]) -> list[Detections]:
        """Detections of each frame in pixels of its source.

        Notes
        -----
        Runs in the callers' threads, many at once.
        """
        if not context:
            return []
        if not self._cuda:
            outputs = self._suppressed(outputs)
        # All frames' rows at once, by what keeps the interpreter's lock: a mask of thousands of
        # rows, most of them empty, would give it away.
        counts = outputs["count"].tolist()

        def rows_of(name: str) -> np.ndarray:
            return np.concatenate(
                [rows[:count] for rows, count in zip(outputs[name], counts, strict=True)]
            )

        boxes = rows_of("boxes")
        confidence = rows_of("confidence").astype(np.float32, copy=False)
        class_id = rows_of("class_id").astype(np.int16)
        stops = itertools.accumulate(counts)
        same = all(box is context[0] for box in context)
        if same:
            boxes = context[0].to_source(boxes)
        results = []
        start = 0
        for box, stop in zip(context, stops, strict=True):
            rows = slice(start, stop)
            xyxy = boxes[rows] if same else box.to_source(boxes[rows])
            results.append(Detections(xyxy, confidence[rows], class_id[rows], self._class_names))
            start = stop
        return results

    def _suppressed(self, outputs: Any) -> dict[str, np.ndarray]:
        """What the GPU's kernel does, for the candidates of a few frames in host memory."""
        kept_rows = []
        for frame, count in enumerate(outputs["count"]):
            kept_rows.append(
                greedy_nms_host(
                    outputs["boxes"][frame][:count],
                    outputs["confidence"][frame][:count],
                    outputs["class_id"][frame][:count],
                    iou_threshold=self._iou_threshold,
                    max_kept=MAX_DETECTIONS,
                )
            )
        most = max(map(len, kept_rows))
        rows = np.zeros((len(kept_rows), most), np.int64)
        for row, kept in zip(rows, kept_rows, strict=True):
            row[: len(kept)] = kept
        suppressed = {
            name: np.take_along_axis(outputs[name], rows, axis=1)
            for name in ("confidence", "class_id")
        }
        suppressed["boxes"] = np.take_along_axis(outputs["boxes"], rows[..., None], axis=1)
        suppressed["count"] = np.array([len(kept) for kept in kept_rows])
        return suppressed


def _most_lanes(network: YoloNetwork) -> int:
    """Frames that may be computed at once, with the input and the output of a layer each."""
    layers = network.plan.layers
    values = max(layer.channels * layer.height * layer.width for layer in layers)
    return max(1, _LANES_BYTES // (2 * values * network.dtype.itemsize))


def _doubling(maximum: int) -> tuple[int, ...]:
    sizes = [1]
    while sizes[-1] * 2 < maximum:
        sizes.append(sizes[-1] * 2)
    return tuple(sizes) if maximum == 1 else (*sizes, maximum)


def _as_array(value: Any, device: torch.device) -> Any:
    """NumPy array of host memory, or torch tensor of GPU memory, without a copy."""
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, torch.Tensor):
        tensor = value
    elif hasattr(value, "__dlpack__"):
        # DLPack makes torch's current stream wait for the producer's.
        tensor = torch.utils.dlpack.from_dlpack(value)
    elif hasattr(value, "__cuda_array_interface__"):
        tensor = torch.as_tensor(value, device=device)
    else:
        got = type(value).__name__
        raise InvalidInputError(f"got a {got}; {_EXPECTED}.", shape=None, dtype=got)
    return tensor.detach() if tensor.is_cuda else tensor.detach().numpy()


def _checked(array: Any, *, dims: int) -> Any:
    shape, dtype = tuple(array.shape), str(array.dtype).removeprefix("torch.")
    if len(shape) != dims or shape[-1] != 3 or dtype != "uint8" or 0 in shape:
        hint = ""
        if dims == 4 and len(shape) == 3:
            hint = " For one frame pass frame[None]."
        elif dtype != "uint8":
            hint = " Convert with .astype('uint8') after scaling to 0..255."
        raise InvalidInputError(
            f"got an array of shape {shape} and dtype {dtype}; {_EXPECTED}.{hint}",
            shape=shape,
            dtype=dtype,
        )
    return array


def _to_host(group: Any) -> np.ndarray:
    return group if isinstance(group, np.ndarray) else group.cpu().numpy()
