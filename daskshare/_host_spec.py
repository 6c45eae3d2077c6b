"""A model's description on the wire: plain JSON, pickled code only where it must be."""

from __future__ import annotations

import dataclasses
from typing import Any

import cloudpickle

from daskshare._host_predict import PredictSpec
from daskshare.errors import ConfigurationError, HostError
from daskshare.models.spec import ModelSpec
from daskshare.models.torch_model import TorchModelSpec
from daskshare.models.yolov3 import YoloV3Spec, yolov3_spec

__all__ = ["build", "carries_code", "describe"]

#: What is plain data but for one field of pickled code, and that field.
_WITH_LOADER: dict[str, Any] = {"torch": TorchModelSpec, "predict": PredictSpec}


def describe(spec: ModelSpec | str) -> tuple[dict[str, Any], bytes]:
    """Describe a model.

    Parameters
    ----------
    spec : ModelSpec or str
        A text is the name of a packaged model, "yolov3-tiny" for example.

    Returns
    -------
    (dict, bytes)
        Plain JSON, and pickled code (empty for models that need none).

    Raises
    ------
    ConfigurationError
        When the model is no model or cannot be pickled.
    """
    if isinstance(spec, str):
        return {"kind": "name", "name": spec}, b""
    if isinstance(spec, YoloV3Spec):
        return {"kind": "yolov3", "fields": _fields(spec)}, b""
    for kind, cls in _WITH_LOADER.items():
        if isinstance(spec, cls):
            fields = _fields(spec)
            return {"kind": kind, "fields": fields}, fields.pop("loader")
    if not isinstance(spec, ModelSpec):
        raise ConfigurationError(
            f"Got a model of type {type(spec).__name__}; expected one of daskshare.yolov3() or "
            "daskshare.share(), or a model's name.",
            option="model",
        )
    try:
        return {"kind": "pickled"}, cloudpickle.dumps(spec)
    except Exception as error:
        raise ConfigurationError(
            f"The model {spec.name!r} cannot be pickled ({type(error).__name__}: {error}); "
            "expected a description that can travel.",
            option="model",
        ) from error


def carries_code(description: dict[str, Any]) -> bool:
    """Whether building the model runs code that came with it."""
    return description.get("kind") not in ("name", "yolov3")


def build(description: dict[str, Any], code: bytes) -> ModelSpec:
    """Undo :func:`describe`.

    Raises
    ------
    HostError
        When the description makes no sense here.
    DaskshareError
        When a named model does not exist.

    Notes
    -----
    Unpickles only descriptions that are pickled as a whole; loaders stay bytes until they load.
    """
    kind = description.get("kind")
    try:
        if kind == "name":
            return yolov3_spec(description["name"])
        if kind == "yolov3":
            return YoloV3Spec(**_with_tuples(description["fields"]))
        if kind in _WITH_LOADER:
            spec: ModelSpec = _WITH_LOADER[kind](**_with_tuples(description["fields"]), loader=code)
            return spec
    except (KeyError, TypeError) as error:
        raise _nonsense(kind, f"{type(error).__name__}: {error}") from error
    if kind != "pickled":
        raise _nonsense(kind, "unknown kind")
    found = cloudpickle.loads(code)
    if not isinstance(found, ModelSpec):
        raise _nonsense(kind, f"it holds a {type(found).__name__}")
    return found


def _nonsense(kind: object, reason: str) -> HostError:
    return HostError(
        f"A model's description of kind {kind!r} makes no sense here ({reason}). Both processes "
        "must run the same version of daskshare."
    )


def _fields(spec: Any) -> dict[str, Any]:
    return {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}


def _with_tuples(fields: dict[str, Any]) -> dict[str, Any]:
    # JSON knows only lists; specs are hashable.
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
    }
