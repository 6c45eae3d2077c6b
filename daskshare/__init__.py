"""One copy of a model on each GPU, shared by every concurrent task of a Dask cluster.

Names load on first use: importing daskshare imports neither Dask's scheduler nor torch, which a
scheduler process must never do.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from daskshare import errors
    from daskshare.client import SharedModel, install, load, share, stats, unload, why, yolov3
    from daskshare.cluster import local_cluster
    from daskshare.results.detect import detect
    from daskshare.video.bag import read_video

    __version__: str

__all__ = [
    "SharedModel",
    "__version__",
    "detect",
    "errors",
    "install",
    "load",
    "local_cluster",
    "read_video",
    "share",
    "stats",
    "unload",
    "why",
    "yolov3",
]

_HOMES = {
    "SharedModel": "daskshare.client",
    "detect": "daskshare.results.detect",
    "install": "daskshare.client",
    "load": "daskshare.client",
    "local_cluster": "daskshare.cluster",
    "read_video": "daskshare.video.bag",
    "share": "daskshare.client",
    "stats": "daskshare.client",
    "unload": "daskshare.client",
    "why": "daskshare.client",
    "yolov3": "daskshare.client",
}


class _Package(types.ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # The import system binds each submodule to the package, so loading daskshare/share.py
        # would hide the function daskshare.share. The public names win.
        if name in _HOMES and isinstance(value, types.ModuleType):
            return
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    elif name == "errors":
        value = importlib.import_module("daskshare.errors")
    elif name == "__version__":
        value = _version()
    else:
        raise AttributeError(f"module 'daskshare' has no attribute {name!r}")
    globals()[name] = value
    return value


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("daskshare")
    except PackageNotFoundError:
        # A source tree on the path that was never installed has no metadata.
        return "0+unknown"


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
