"""Weights of Darknet networks: its own binary files, and safetensors. NumPy only.

A safetensors file of daskshare holds, for each convolutional layer with index ``i`` in the cfg
(``[net]`` not counted), ``layers.<i>.weight`` of shape (filters, input channels of a group, size,
size) and ``layers.<i>.bias`` of shape (filters,), with batch norm folded into both.

Batch norm is folded before rounding to fp16, not kept beside the kernels: the fold runs once, in
fp64 from the original fp32 values, each number is rounded a single time, and an fp16 engine
computes with exactly the stored kernels. Biases stay fp32; they are 0.1 % of the bytes.

Run as a program this module converts: ``python -m daskshare.models.weights yolov3.weights
yolov3.cfg yolov3.safetensors [--precision fp16|fp32]``.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import struct
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from daskshare.errors import ChecksumError, WeightsError
from daskshare.models.darknet import parse_cfg
from daskshare.models.plan import Convolutional, NetworkPlan

__all__ = [
    "LayerWeights",
    "check_sha256",
    "file_sha256",
    "main",
    "read_darknet",
    "read_safetensors",
    "read_weights",
    "require_weights",
    "write_safetensors",
]

# Added to the variance: what Darknet's GPU code and every framework's batch norm use.
_EPSILON = 1e-5
_FOLD_THREADS = 4
_PRECISIONS: dict[str, np.dtype[np.floating]] = {
    "fp16": np.dtype(np.float16),
    "fp32": np.dtype(np.float32),
}


@dataclass(frozen=True, slots=True, eq=False)
class LayerWeights:
    """A convolution's numbers with batch norm folded in.

    Parameters
    ----------
    weight : numpy.ndarray, shape (filters, in_channels // groups, size, size)
        float32, or float16 as stored.
    bias : numpy.ndarray, shape (filters,)
        float32, or float16 as stored.
    """

    weight: np.ndarray
    bias: np.ndarray


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's content as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(
    path: str | os.PathLike[str], expected_sha256: str, *, advice: str, got: str | None = None
) -> None:
    """Raise ChecksumError unless the file has the expected content.

    Parameters
    ----------
    path : str or path
        File to read.
    expected_sha256 : str
        64 hexadecimal digits.
    advice : str
        What to do when it differs, a sentence.
    got : str, optional
        What it has, where that is known already.
    """
    got = got or file_sha256(path)
    if got != expected_sha256:
        raise ChecksumError(
            f"{path} has SHA-256 {got}; expected {expected_sha256}. {advice}",
            path=str(path),
            got_sha256=got,
            expected_sha256=expected_sha256,
        )


def _size_error(path: Path, got_bytes: int, expected_bytes: int) -> WeightsError:
    relation = "too short" if got_bytes < expected_bytes else "too long"
    return WeightsError(
        f"{path} is {relation} for this network: it has {got_bytes:,} bytes, expected "
        f"{expected_bytes:,}. Use the weights that belong to the cfg, or download them again.",
        path=str(path),
        got_bytes=got_bytes,
        expected_bytes=expected_bytes,
    )


def _fold(layer: Convolutional, floats: np.ndarray) -> LayerWeights:
    n = layer.channels
    if not layer.batch_normalize:
        return LayerWeights(floats[n:].reshape(layer.weight_shape), floats[:n])
    beta, gamma, mean, variance = floats[: 4 * n].astype(np.float64).reshape(4, n)
    scale = gamma / np.sqrt(variance + _EPSILON)
    kernel = floats[4 * n :].reshape(layer.weight_shape)
    # In fp64, piece by piece, and rounded to where the original was.
    np.multiply(kernel, scale[:, None, None, None], out=kernel, casting="same_kind")
    return LayerWeights(kernel, (beta - mean * scale).astype(np.float32))


def read_darknet(path: str | os.PathLike[str], plan: NetworkPlan) -> dict[int, LayerWeights]:
    """Read a Darknet ``.weights`` file and fold batch norm.

    The header is three int32 (major, minor, revision) and the number of training images seen, an
    int32 before version 0.2 and an int64 from then on. Early versions could mark dense layers as
    transposed by a large version number; convolutions never are, so the mark is ignored.

    Parameters
    ----------
    path : str or path
        The file.
    plan : NetworkPlan
        Network that the weights belong to.

    Returns
    -------
    dict of int to LayerWeights
        By layer index, float32.

    Raises
    ------
    WeightsError
        When the file is too short or too long for the network, with ``path``, ``got_bytes`` and
        ``expected_bytes``.

    Notes
    -----
    Runs in a worker's loader thread.
    """
    path = Path(path)
    got_bytes = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(12)
        if len(start) < 12:
            raise _size_error(path, got_bytes, 20 + 4 * plan.num_parameters)
        major, minor, _ = struct.unpack("<3i", start)
        # Darknet's own test, with its guard against the transposed mark (1000 and above).
        long_count = major * 10 + minor >= 2 and major < 1000 and minor < 1000
        header_bytes = 20 if long_count else 16
        expected_bytes = header_bytes + 4 * plan.num_parameters
        if got_bytes != expected_bytes:
            raise _size_error(path, got_bytes, expected_bytes)
        file.seek(header_bytes)
        # NumPy leaves the interpreter to others while it multiplies.
        with ThreadPoolExecutor(_FOLD_THREADS, thread_name_prefix="daskshare-fold") as pool:
            folding = {
                layer.index: pool.submit(
                    _fold, layer, np.fromfile(file, dtype="<f4", count=layer.num_parameters)
                )
                for layer in plan.convolutions
            }
    return {index: future.result() for index, future in folding.items()}


def _names(layer: Convolutional) -> tuple[tuple[str, tuple[int, ...]], tuple[str, tuple[int, ...]]]:
    prefix = f"layers.{layer.index}"
    return (f"{prefix}.weight", layer.weight_shape), (f"{prefix}.bias", (layer.channels,))


def read_safetensors(path: str | os.PathLike[str], plan: NetworkPlan) -> dict[int, LayerWeights]:
    """Read a safetensors file in daskshare's naming (see the module's text).

    Parameters
    ----------
    path : str or path
        The file; its tensors are F16 or F32.
    plan : NetworkPlan
        Network that the weights belong to.

    Returns
    -------
    dict of int to LayerWeights
        By layer index, in the precision stored.

    Raises
    ------
    WeightsError
        When the file is damaged, or a tensor is missing, left over, or of another shape or type.

    Notes
    -----
    Runs in a worker's loader thread.
    """
    path = Path(path)
    expected = {name: shape for layer in plan.convolutions for name, shape in _names(layer)}

    def fail(problem: str) -> WeightsError:
        return WeightsError(
            f"{path} does not fit this network: {problem}. Make it with "
            "python -m daskshare.models.weights IN.weights CFG OUT.safetensors.",
            path=str(path),
            got_bytes=path.stat().st_size,
            expected_bytes=None,
        )

    try:
        with safe_open(path, framework="numpy") as file:
            names = set(file.keys())
            for name in sorted(names ^ expected.keys()):
                raise fail(f"tensor {name} is {'not needed' if name in names else 'missing'}")
            for name, shape in expected.items():
                tensor = file.get_slice(name)
                got, dtype = tuple(tensor.get_shape()), tensor.get_dtype()
                if got != shape:
                    raise fail(f"tensor {name} has shape {got}, expected {shape}")
                if dtype not in ("F16", "F32"):
                    raise fail(f"tensor {name} has type {dtype}, expected F16 or F32")
            return {
                layer.index: LayerWeights(*(file.get_tensor(name) for name, _ in _names(layer)))
                for layer in plan.convolutions
            }
    except SafetensorError as error:
        raise fail(f"it is no complete safetensors file ({error})") from error


def require_weights(path: str | os.PathLike[str]) -> None:
    """Raise WeightsError unless the file is there."""
    if not Path(path).is_file():
        raise WeightsError(
            f"There is no weights file {path} on this machine; expected a file at the same path on "
            "every worker. Copy it there or use a shared folder.",
            path=str(path),
            got_bytes=0,
            expected_bytes=None,
        )


def read_weights(path: str | os.PathLike[str], plan: NetworkPlan) -> dict[int, LayerWeights]:
    """Read a file by its suffix: ``.safetensors``, or else Darknet's format.

    Raises
    ------
    WeightsError
        When the file is missing or does not fit the network.

    Notes
    -----
    Runs in a worker's loader thread.
    """
    require_weights(path)
    if Path(path).suffix == ".safetensors":
        return read_safetensors(path, plan)
    return read_darknet(path, plan)


def write_safetensors(
    path: str | os.PathLike[str],
    plan: NetworkPlan,
    weights: dict[int, LayerWeights],
    *,
    precision: str = "fp16",
    metadata: dict[str, str] | None = None,
) -> None:
    """Write folded weights as safetensors (see the module's text for the names).

    Parameters
    ----------
    path : str or path
        File to write.
    plan : NetworkPlan
        Network that the weights belong to.
    weights : dict of int to LayerWeights
        By layer index.
    precision : {"fp16", "fp32"}
        Of the kernels; biases are always fp32.
    metadata : dict of str to str, optional
        Kept in the file's header.

    Raises
    ------
    WeightsError
        When a kernel holds a number that fp16 cannot.
    """
    dtype = _PRECISIONS[precision]
    tensors: dict[str, np.ndarray] = {}
    for layer in plan.convolutions:
        (weight_name, _), (bias_name, _) = _names(layer)
        kernel, bias = weights[layer.index].weight, weights[layer.index].bias
        largest = float(np.abs(kernel).max())
        if not largest <= float(np.finfo(dtype).max):
            raise WeightsError(
                f"{weight_name} has a magnitude of {largest:g}; {precision} ends at "
                f"{np.finfo(dtype).max:g}. Write it with precision fp32.",
                path=str(path),
                got_bytes=None,
                expected_bytes=None,
            )
        tensors[weight_name] = np.ascontiguousarray(kernel, dtype=dtype)
        tensors[bias_name] = np.ascontiguousarray(bias, dtype=np.float32)
    # The library keeps metadata in a hash map, whose order changes the file's digest; one entry
    # alone makes equal input give equal files.
    text = "; ".join(f"{key}={value}" for key, value in sorted((metadata or {}).items()))
    save_file(tensors, path, metadata={"daskshare": text})


def main(argv: Sequence[str] | None = None) -> int:
    """Convert Darknet weights to safetensors and print the result's size and SHA-256."""
    parser = argparse.ArgumentParser(
        prog="python -m daskshare.models.weights",
        description="Convert Darknet weights to safetensors with batch norm folded.",
    )
    parser.add_argument("weights", type=Path, help="Darknet .weights file")
    parser.add_argument("cfg", type=Path, help="the network's Darknet .cfg file")
    parser.add_argument("output", type=Path, help="safetensors file to write")
    parser.add_argument("--precision", choices=sorted(_PRECISIONS), default="fp16")
    options = parser.parse_args(argv)
    plan = parse_cfg(options.cfg.read_text("utf-8"), path=str(options.cfg))
    write_safetensors(
        options.output,
        plan,
        read_darknet(options.weights, plan),
        precision=options.precision,
        metadata={
            "batch_norm": "folded",
            "source": options.weights.name,
            "source_sha256": file_sha256(options.weights),
        },
    )
    size = options.output.stat().st_size
    print(f"{options.output}: {size:,} bytes, SHA-256 {file_sha256(options.output)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
