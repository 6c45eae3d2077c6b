"""Where videos lie: local paths, folders, globs and fsspec URLs."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from daskshare.errors import ConfigurationError, UnreadableVideoError

if TYPE_CHECKING:
    from av.container import InputContainer

__all__ = [
    "VIDEO_SUFFIXES",
    "Paths",
    "expand_paths",
    "fingerprint",
    "is_process_local",
    "is_url",
    "open_av",
]

#: Names that count as videos when a folder is given.
# fmt: off
VIDEO_SUFFIXES = frozenset({
    ".3gp", ".asf", ".avi", ".dav", ".flv", ".h264", ".h265", ".hevc", ".m2ts", ".m4v", ".mjpeg",
    ".mjpg", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf", ".ogv", ".ts", ".webm",
    ".wmv",
})
# fmt: on

Paths = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]


def expand_paths(paths: Paths, *, storage_options: Mapping[str, Any] | None = None) -> list[str]:
    """List the videos that ``paths`` names.

    Parameters
    ----------
    paths : str, os.PathLike, or an iterable of them
        A file; a folder (searched recursively for :data:`VIDEO_SUFFIXES`); a glob (``**`` goes
        down); or any of these as an fsspec URL.
    storage_options : mapping, optional
        For fsspec.

    Returns
    -------
    list of str
        In the given order, globs and folders sorted, duplicates dropped. A plain file is listed
        whether it exists or not: only a worker can tell.

    Raises
    ------
    UnreadableVideoError
        A glob or folder holds no video.
    ConfigurationError
        No path was given.
    """
    given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if not given:
        raise ConfigurationError(
            "No video was given: got an empty list; expected a path, a folder, a glob, an fsspec "
            "URL, or a list of them."
        )
    videos: dict[str, None] = {}
    for path in given:
        name = os.fspath(path)
        if not isinstance(name, str):
            raise ConfigurationError(f"A video's path is {path!r}; expected a str or a Path.")
        found = _expand_url(name, storage_options) if is_url(name) else _expand_local(name)
        videos.update(dict.fromkeys(found))
    return list(videos)


def is_url(name: str) -> bool:
    """Whether fsspec opens a video, and no path of this machine is meant."""
    return "://" in name or "::" in name


def _local_path(name: str) -> str:
    return unquote(urlsplit(name).path) if name.startswith("file://") else name


def _is_video(name: str) -> bool:
    return Path(name).suffix.lower() in VIDEO_SUFFIXES


def _nothing(name: str, kind: str) -> UnreadableVideoError:
    looked = f"the {kind} {name!r}"
    if kind == "folder":
        looked += (
            f" and the folders below it for names ending in {', '.join(sorted(VIDEO_SUFFIXES))}"
        )
    return UnreadableVideoError(
        f"No video found: looked in {looked}. Check the path, or give the files themselves.",
        video=name,
    )


def _expand_local(name: str) -> list[str]:
    # A file whose name holds brackets is that file, not a pattern.
    if os.path.isdir(name):
        found = sorted(
            os.path.join(folder, file)
            for folder, _, files in os.walk(name)
            for file in files
            if _is_video(file)
        )
        kind = "folder"
    elif glob.has_magic(name) and not os.path.exists(name):
        found = sorted(p for p in glob.glob(name, recursive=True) if not os.path.isdir(p))
        kind = "glob"
    else:
        return [name]
    if not found:
        raise _nothing(name, kind)
    return found


def _expand_url(name: str, storage_options: Mapping[str, Any] | None) -> list[str]:
    if name.startswith("file://"):
        return _expand_local(_local_path(name))
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(name, **(storage_options or {}))
    if glob.has_magic(path) and not filesystem.exists(path):
        found = sorted(p for p in filesystem.glob(path) if not filesystem.isdir(p))
        kind = "glob"
    elif not name.startswith(("http://", "https://")) and filesystem.isdir(path):
        found = sorted(p for p in filesystem.find(path) if _is_video(p))
        kind = "folder"
    else:
        return [name]
    if not found:
        raise _nothing(name, kind)
    return [filesystem.unstrip_protocol(p) for p in found]


def is_process_local(video: str) -> bool:
    """Whether only this process can read ``video``."""
    return video.startswith("memory://")


def fingerprint(video: str, *, storage_options: Mapping[str, Any] | None = None) -> str:
    """Identify the version of a file's content without reading it.

    Parameters
    ----------
    video : str
        Path or URL.
    storage_options : mapping, optional

    Returns
    -------
    str
        Changes with the file's size or modification time (for URLs: with what the store reports).

    Raises
    ------
    OSError
        The file is missing or cannot be reached.
    """
    if not is_url(video):
        status = os.stat(video)
        return f"{status.st_size}-{status.st_mtime_ns}"
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(video, **(storage_options or {}))
    return str(filesystem.ukey(path))


@contextmanager
def open_av(
    video: str, *, storage_options: Mapping[str, Any] | None = None
) -> Iterator[InputContainer]:
    """Open a video with PyAV, through fsspec for URLs.

    Parameters
    ----------
    video : str
        Path or URL.
    storage_options : mapping, optional

    Raises
    ------
    OSError, av.error.FFmpegError
        The file is missing, or no demuxer knows it.
    """
    import av

    if not is_url(video):
        # With the protocol spelled out a colon or a percent sign in a name has no meaning.
        with av.open(f"file:{video}", metadata_errors="replace") as container:
            yield container
        return
    import fsspec

    with (
        fsspec.open(video, "rb", **(storage_options or {})) as file,
        av.open(file, metadata_errors="replace") as container,
    ):
        yield container
