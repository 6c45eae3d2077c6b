"""YOLO-v3 as a model spec: small, picklable, and free of torch until it is loaded."""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib.resources
import json
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daskshare.errors import ConfigurationError, ModelLoadError
from daskshare.models.darknet import parse_cfg
from daskshare.models.fetch import fetch, known_weights
from daskshare.models.plan import NetworkPlan
from daskshare.models.weights import (
    LayerWeights,
    check_sha256,
    file_sha256,
    read_weights,
    require_weights,
)

if TYPE_CHECKING:
    import torch

    from daskshare.device import Device
    from daskshare.models.program import YoloV3Program

__all__ = ["PRECISIONS", "YoloV3Spec", "yolov3_spec"]

logger = logging.getLogger(__name__)

#: Precisions of the network and the bytes that a weight takes.
PRECISIONS = {"fp32": 4, "fp16": 2, "bf16": 2}

# Enters every key: raise it when the same spec begins to compute something else.
_KEY_VERSION = 1


@dataclass(frozen=True, slots=True, eq=False)
class YoloV3Spec:
    """A YOLO-v3 with its options; make one with :func:`yolov3_spec`.

    Specs are equal when their keys are.

    Parameters
    ----------
    name : str
        For people.
    key : str
        Digest of all that decides what the loaded model computes.
    cfg : str
        The cfg's path as given, or the name of a packaged one.
    cfg_text : str or None
        Content of the caller's own cfg; ``None`` for a packaged one.
    weights : str or None
        Path of the caller's own weights; ``None`` for those of ``name``.
    weights_sha256 : str
        Digest that the weights must have where they are loaded.
    class_names : tuple of str
        All classes of the network.
    input_size : tuple of (int, int)
        Height and width of the network's input in pixels.
    precision : {"fp32", "fp16", "bf16"} or None
        ``None``: fp16 on CUDA devices, fp32 on the CPU.
    confidence_threshold, iou_threshold : float
        What is an object, and what is the same object.
    class_ids : tuple of int or None
        Classes to find; ``None`` for all.
    max_batch_size : int or None
        Frames; ``None`` leaves it to the program.
    """

    name: str
    key: str
    cfg: str
    cfg_text: str | None = field(repr=False)
    weights: str | None
    weights_sha256: str = field(repr=False)
    class_names: tuple[str, ...] = field(repr=False)
    input_size: tuple[int, int]
    precision: str | None
    confidence_threshold: float
    iou_threshold: float
    class_ids: tuple[int, ...] | None
    max_batch_size: int | None

    def __eq__(self, other: object) -> bool:
        return self.key == other.key if isinstance(other, YoloV3Spec) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.key)

    def __dask_tokenize__(self) -> tuple[str, str]:
        return "daskshare.YoloV3Spec", self.key

    def plan(self) -> NetworkPlan:
        """The network's layers."""
        text = _packaged_text(f"{self.cfg}.cfg") if self.cfg_text is None else self.cfg_text
        return parse_cfg(text, path=self.cfg, input_size=self.input_size)

    def estimated_bytes(self) -> int:
        """Bytes that the loaded weights will take; without a precision, those of fp32."""
        return self.plan().num_folded_parameters * PRECISIONS[self.precision or "fp32"]

    def load(self, device: Device) -> YoloV3Program:
        """Read the weights and build the network on ``device``.

        Raises
        ------
        WeightsError
            When the weights are missing or do not fit the network.
        ChecksumError
            When a file is not the one that the spec was made with.
        DownloadError
            When named weights cannot be had.
        ModelLoadError
            When the device refuses; the cause's text is in ``reason``.

        Notes
        -----
        Runs in a loader thread of a worker: it may download, and reads up to 250 MB.
        """
        plan = self.plan()
        if self.weights is not None:
            require_weights(self.weights)
        with ThreadPoolExecutor(1, thread_name_prefix="daskshare-load") as pool:
            # Reading leaves the interpreter to others, who have a second's work to do.
            making_ready = pool.submit(self._make_ready, plan, device)
            try:
                weights = self._read_weights(plan)
            except Exception:
                lost = making_ready.exception()
                if lost is not None:
                    logger.warning("%s was not made ready either", device.name, exc_info=lost)
                raise
        try:
            dtype = making_ready.result()

            from daskshare.models.network import YoloNetwork
            from daskshare.models.program import YoloV3Program

            network = YoloNetwork(
                plan,
                weights,
                dtype=dtype,
                confidence_threshold=self.confidence_threshold,
                class_ids=self.class_ids,
            )
            return YoloV3Program(
                network,
                device=device.torch_device(),
                class_names=self.class_names,
                iou_threshold=self.iou_threshold,
                max_batch_size=self.max_batch_size,
            )
        except RuntimeError as error:
            precision = self._precision(device)
            raise ModelLoadError(
                f"{self.name} in {precision} could not be loaded on {device.name}: {error}. "
                "See the cause; when memory ran out, choose a smaller model or precision.",
                model=self.name,
                device=device.name,
                reason=str(error),
            ) from error

    def _precision(self, device: Device) -> str:
        return self.precision or ("fp16" if device.kind == "cuda" else "fp32")

    def _make_ready(self, plan: NetworkPlan, device: Device) -> torch.dtype:
        """Import what computes, and fetch what a GPU's first batch would wait for."""
        import torch

        import daskshare.models.program  # noqa: F401

        dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
        dtype = dtypes[self._precision(device)]
        torch_device = device.torch_device()
        if torch_device.type == "cuda":
            from daskshare.models.warm_up import warm_up

            warm_up(plan, torch_device, dtype)
        return dtype

    def _read_weights(self, plan: NetworkPlan) -> dict[int, LayerWeights]:
        path = fetch(self.name) if self.weights is None else Path(self.weights)
        # First whether it is there and fits, as those errors say more than a wrong digest.
        weights = read_weights(path, plan)
        if self.weights is not None:
            status = path.stat()
            check_sha256(
                path,
                self.weights_sha256,
                # In the process that made the spec the file need not be read once more.
                got=_sha256_of_version(str(path), status.st_mtime_ns, status.st_size),
                advice="Make the file the same on every machine, or make the model anew.",
            )
        return weights


@functools.cache
def _packaged_text(file: str) -> str:
    return importlib.resources.files("daskshare").joinpath("data", file).read_text("utf-8")


@functools.lru_cache(maxsize=32)
def _sha256_of_version(path: str, mtime_ns: int, size: int) -> str:
    return file_sha256(path)


def _fail(option: str, got: object, expected: str) -> ConfigurationError:
    return ConfigurationError(f"{option}={got!r}; expected {expected}.", option=option)


def _existing(option: str, path: str | os.PathLike[str], advice: str = "") -> Path:
    resolved = Path(path).expanduser().absolute()
    if not resolved.is_file():
        raise _fail(option, os.fspath(path), f"a file that can be read here{advice}")
    return resolved


def _read_names(
    names: str | os.PathLike[str] | Sequence[str] | None, count: int
) -> tuple[str, ...]:
    what = f"{count} class names, one for each class of the network"
    if names is None:
        lines = _packaged_text("coco.names").splitlines()
        if len(lines) != count:
            raise _fail("names", None, f"a file or a list of {what} (only COCO's 80 are built in)")
        return tuple(lines)
    if isinstance(names, str | os.PathLike):
        lines = _existing("names", names).read_text("utf-8").splitlines()
        found = tuple(line.strip() for line in lines if line.strip())
        got: object = os.fspath(names)
    else:
        found, got = tuple(map(str, names)), names
    if len(found) != count:
        raise _fail("names", got, f"{what}; got {len(found)}")
    return found


def _class_ids(
    classes: str | Sequence[str | int] | None, names: tuple[str, ...]
) -> tuple[int, ...] | None:
    if classes is None:
        return None
    wanted = classes.split(",") if isinstance(classes, str) else classes
    if not len(wanted):
        raise _fail("classes", classes, "at least one class, or None for all")
    ids = set()
    for item in wanted:
        if isinstance(item, str):
            name = item.strip()
            if name not in names:
                near = difflib.get_close_matches(name.lower(), names, 1)
                hint = f". Did you mean {near[0]!r}?" if near else ""
                known = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
                raise _fail("classes", item, f"names of the model's classes ({known}){hint}")
            ids.add(names.index(name))
        elif isinstance(item, bool) or not 0 <= int(item) < len(names):
            raise _fail("classes", item, f"class numbers 0 to {len(names) - 1}")
        else:
            ids.add(int(item))
    return tuple(sorted(ids))


def _input_size(input_size: int | tuple[int, int] | None, default: NetworkPlan) -> tuple[int, int]:
    if input_size is None:
        return default.height, default.width
    size = tuple(input_size) if isinstance(input_size, tuple | list) else (input_size,) * 2
    stride = default.stride
    if len(size) != 2 or any(
        isinstance(side, bool) or not isinstance(side, int) or side < stride or side % stride
        for side in size
    ):
        raise _fail(
            "input_size",
            input_size,
            f"a multiple of {stride} pixels, the network's stride, or (height, width) of such",
        )
    return size[0], size[1]


def yolov3_spec(
    name: str = "yolov3",
    *,
    cfg: str | os.PathLike[str] | None = None,
    weights: str | os.PathLike[str] | None = None,
    names: str | os.PathLike[str] | Sequence[str] | None = None,
    input_size: int | tuple[int, int] | None = None,
    precision: str | None = None,
    confidence_threshold: float = 0.25,
    iou_threshold: float = 0.45,
    classes: str | Sequence[str | int] | None = None,
    max_batch_size: int | None = None,
) -> YoloV3Spec:
    """Describe a YOLO-v3. Nothing is loaded or downloaded here.

    Parameters
    ----------
    name : {"yolov3", "yolov3-spp", "yolov3-tiny"}
        A known network; with ``cfg`` of your own any label (by default the file's stem).
    cfg : path, optional
        A Darknet cfg of the family; then ``weights`` must be given too.
    weights : path, optional
        Darknet ``.weights`` or daskshare's ``.safetensors``, at the same path here and on the
        workers. By default the named network's COCO weights.
    names : path or sequence of str, optional
        Class names, one a line. By default COCO's 80.
    input_size : int or (height, width), optional
        Pixels; by default what the cfg says.
    precision : {"fp32", "fp16", "bf16"}, optional
        By default fp16 on CUDA devices and fp32 on the CPU.
    confidence_threshold : float
        Objects of more confidence count, in [0, 1).
    iou_threshold : float
        Of two boxes of a class that overlap by more, one counts, in (0, 1].
    classes : sequence of str or int, optional
        Names or numbers of the classes to find; others are dropped before suppression.
    max_batch_size : int, optional
        Frames in a batch at most.

    Returns
    -------
    YoloV3Spec

    Raises
    ------
    ConfigurationError
        For a wrong option; unknown names come with the nearest known one.
    DarknetConfigError
        When the cfg is wrong.

    Notes
    -----
    Runs where the graph is built; reads the weights file once to take its SHA-256.
    """
    cfg_text: str | None = None
    if cfg is None:
        known = known_weights(name)
        cfg_name, text = name, _packaged_text(f"{name}.cfg")
    else:
        path = _existing("cfg", cfg)
        cfg_name, text = str(path), path.read_text("utf-8")
        cfg_text = text
        if weights is None:
            raise _fail("weights", None, f"the weights that belong to {os.fspath(cfg)}")
        if name == "yolov3":
            name = path.stem
    plan = parse_cfg(text, path=cfg_name)
    size = _input_size(input_size, plan)
    if size != (plan.height, plan.width):
        parse_cfg(text, path=cfg_name, input_size=size)
    if precision is not None and precision not in PRECISIONS:
        raise _fail("precision", precision, "one of " + ", ".join(map(repr, PRECISIONS)))
    if not 0 <= confidence_threshold < 1:
        raise _fail("confidence_threshold", confidence_threshold, "a number in [0, 1)")
    if not 0 < iou_threshold <= 1:
        raise _fail("iou_threshold", iou_threshold, "a number in (0, 1]")
    if max_batch_size is not None and (
        isinstance(max_batch_size, bool)
        or not isinstance(max_batch_size, int)
        or max_batch_size < 1
    ):
        raise _fail("max_batch_size", max_batch_size, "an integer >= 1, or None")
    class_names = _read_names(names, plan.num_classes)
    class_ids = _class_ids(classes, class_names)
    weights_path: str | None = None
    if weights is None:
        sha256 = known.sha256
    else:
        file = _existing("weights", weights, " and at the same path on every worker")
        weights_path, status = str(file), file.stat()
        sha256 = _sha256_of_version(weights_path, status.st_mtime_ns, status.st_size)
    content: dict[str, Any] = {
        "version": _KEY_VERSION,
        "cfg": text,
        "weights_sha256": sha256,
        "class_names": class_names,
        "input_size": size,
        "precision": precision,
        "confidence_threshold": float(confidence_threshold),
        "iou_threshold": float(iou_threshold),
        "class_ids": class_ids,
        "max_batch_size": max_batch_size,
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return YoloV3Spec(
        name=name,
        key=f"yolov3-{digest[:32]}",
        cfg=cfg_name,
        cfg_text=cfg_text,
        weights=weights_path,
        weights_sha256=sha256,
        class_names=class_names,
        input_size=size,
        precision=precision,
        confidence_threshold=float(confidence_threshold),
        iou_threshold=float(iou_threshold),
        class_ids=class_ids,
        max_batch_size=max_batch_size,
    )
