"""The package's public names, and that importing it stays light."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import daskshare

PLUGINS = Path(__file__).parents[2] / "plugins"

PUBLIC_NAMES = {
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
}

#: What Dask's scheduler imports when it unpickles plugins and graphs.
SCHEDULER_IMPORTS = [
    "import daskshare",
    "import daskshare.client",
    "import daskshare.cluster",
    "import daskshare.models.spec",
    "import daskshare.models.torch_model",
    "import daskshare.models.yolov3",
    "import daskshare.scheduler_plugin",
    "import daskshare.sizeof",
    "import daskshare.streaming",
    "import daskshare.testing",
    "import daskshare.video.bag",
    "import daskshare.video.chunk",
    "import daskshare.worker_plugin",
    f"import sys; sys.path.insert(0, {str(PLUGINS)!r}); import daskshare_scheduler",
    f"import sys; sys.path.insert(0, {str(PLUGINS)!r}); import daskshare_worker",
]


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_is_the_public_names():
    assert set(daskshare.__all__) == PUBLIC_NAMES
    assert daskshare.__all__ == sorted(daskshare.__all__)
    assert set(dir(daskshare)) >= PUBLIC_NAMES


@pytest.mark.parametrize("name", sorted(PUBLIC_NAMES))
def test_every_public_name_resolves(name):
    assert getattr(daskshare, name) is not None
    # From a module that was not there before the first use, too.
    namespace: dict[str, object] = {}
    exec(f"from daskshare import {name}", namespace)  # noqa: S102
    assert namespace[name] is getattr(daskshare, name)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'yolov4'"):
        daskshare.yolov4  # noqa: B018


@pytest.mark.parametrize("statement", SCHEDULER_IMPORTS)
def test_the_scheduler_imports_no_heavy_module(statement):
    code = (
        f"{statement}\nimport sys\nprint(sorted({{'torch','cv2','av','cupy'}} & set(sys.modules)))"
    )
    assert run_python(code).strip() == "[]"


def test_importing_the_package_alone_imports_no_dask():
    code = "import daskshare, sys; print('dask' in sys.modules, 'distributed' in sys.modules)"
    assert run_python(code).split() == ["False", "False"]


@pytest.mark.parametrize("first", ["import daskshare.share", "from daskshare import share"])
def test_the_module_share_does_not_hide_the_function(first):
    code = (
        f"{first}\n"
        "import daskshare\n"
        "from daskshare.share import ModelShare\n"
        "import daskshare.share\n"
        "from daskshare.client import share\n"
        "assert daskshare.share is share, daskshare.share\n"
        "assert ModelShare.__module__ == 'daskshare.share'\n"
    )
    run_python(code)


@pytest.mark.parametrize("script", ["daskshare_scheduler.py", "daskshare_worker.py"])
def test_preload_scripts_are_short_and_define_no_classes(script):
    text = (PLUGINS / script).read_text("utf-8")
    assert len(text.splitlines()) <= 40
    # Dask imports the file under its stem, so a class from it cannot be unpickled elsewhere.
    assert "\nclass " not in text
