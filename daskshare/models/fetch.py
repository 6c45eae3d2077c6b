"""Named weights: packaged, in the cache folder, or downloaded from one of several mirrors."""

from __future__ import annotations

import difflib
import importlib.resources
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask.config
import platformdirs

import daskshare.config  # noqa: F401 (fills in the defaults that are read below)
from daskshare.errors import ChecksumError, ConfigurationError, DownloadError
from daskshare.models.weights import check_sha256, file_sha256

__all__ = ["KNOWN_WEIGHTS", "MIRRORS", "KnownWeights", "cache_directory", "fetch", "known_weights"]

#: Folders on the web that hold the files under their own names, tried in order.
MIRRORS = (
    "https://data.pjreddie.com/files/",
    "https://pjreddie.com/media/files/",
    "https://github.com/hank-ai/darknet/releases/download/v2.0/",
)

_ATTEMPTS = 3
_TIMEOUT_SECONDS = (10.0, 60.0)
# What a cut connection loses at most: a block is written only when it is full.
_BLOCK_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class KnownWeights:
    """A file of weights that is known by name.

    Parameters
    ----------
    file : str
        Its name.
    sha256 : str
        Of its content.
    packaged : bool
        Whether it is part of the installed package.
    """

    file: str
    sha256: str
    packaged: bool = False


#: By model name.
KNOWN_WEIGHTS = {
    "yolov3": KnownWeights(
        "yolov3.weights", "523e4e69e1d015393a1b0a441cef1d9c7659e3eb2d7e15f793f060a21b32f297"
    ),
    "yolov3-spp": KnownWeights(
        "yolov3-spp.weights", "87a1e8c85c763316f34e428f2295e1db9ed4abcec59dd9544f8052f50de327b4"
    ),
    "yolov3-tiny": KnownWeights(
        "yolov3-tiny.safetensors",
        "476aa079cac68ee85d316f83aa966873eda51c602f7689a1051122e985efbd68",
        packaged=True,
    ),
}


def known_weights(name: str) -> KnownWeights:
    """The file that belongs to a model's name.

    Raises
    ------
    ConfigurationError
        For an unknown name, with the nearest known one.
    """
    if name in KNOWN_WEIGHTS:
        return KNOWN_WEIGHTS[name]
    near = difflib.get_close_matches(name, KNOWN_WEIGHTS, 1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigurationError(
        f"There is no model named {name!r}; expected one of "
        f"{', '.join(map(repr, KNOWN_WEIGHTS))}, or cfg= and weights= of your own.{hint}",
        option="name",
    )


def cache_directory() -> Path:
    """Folder for downloaded weights: ``daskshare.models.cache-directory``, or the platform's."""
    configured = dask.config.get("daskshare.models.cache-directory")
    if configured is not None:
        return Path(configured).expanduser()
    return Path(platformdirs.user_cache_dir("daskshare")) / "models"


class _ResumingDownloader:
    """What pooch calls to download: continues a ``.part`` file where an earlier attempt ended."""

    def __init__(self, part: Path, *, progress: bool) -> None:
        self.part = part
        self.progress = progress
        self.resumed = False
        self.got_sha256 = ""

    def __call__(self, url: str, output_file: Any, pooch: Any, check_only: bool = False) -> bool:
        import requests

        self.resumed = self._part_bytes() > 0
        for attempt in range(1, _ATTEMPTS + 1):
            before = self._part_bytes()
            try:
                self._download(url)
                break
            except (
                requests.ConnectionError,
                requests.Timeout,
                requests.exceptions.ChunkedEncodingError,
            ):
                # Another try is worth it only where the last one got something.
                if attempt == _ATTEMPTS or self._part_bytes() == before:
                    raise
        self.got_sha256 = file_sha256(self.part)
        shutil.move(self.part, output_file)
        return True

    def _part_bytes(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _download(self, url: str) -> None:
        import requests
        from tqdm.auto import tqdm

        have = self._part_bytes()
        headers = {"Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT_SECONDS) as response:
            if response.status_code == requests.codes.requested_range_not_satisfiable:
                # Nothing is left to ask for; the checksum decides whether the part is the file.
                return
            response.raise_for_status()
            partial = response.status_code == requests.codes.partial_content
            start = have if partial else 0
            total = start + int(response.headers.get("Content-Length", 0))
            with (
                self.part.open("ab" if partial else "wb") as file,
                tqdm(
                    total=total or None,
                    initial=start,
                    unit="B",
                    unit_scale=True,
                    desc=self.part.stem,
                    disable=not self.progress,
                ) as bar,
            ):
                for block in response.iter_content(_BLOCK_BYTES):
                    file.write(block)
                    bar.update(len(block))


def fetch(
    name: str,
    *,
    directory: str | os.PathLike[str] | None = None,
    mirrors: tuple[str, ...] = MIRRORS,
    progress: bool = False,
) -> Path:
    """Return the weights file of a named model, downloading it when it is not there.

    Parameters
    ----------
    name : {"yolov3", "yolov3-spp", "yolov3-tiny"}
        ``yolov3-tiny`` is part of the package and is never downloaded.
    directory : path, optional
        Cache folder; by default :func:`cache_directory`.
    mirrors : tuple of str
        URL prefixes, tried in order.
    progress : bool
        Show a progress bar.

    Returns
    -------
    pathlib.Path
        A file whose SHA-256 was checked in this call.

    Raises
    ------
    ConfigurationError
        For an unknown name.
    DownloadError
        When no mirror gave the file; says where to put it by hand.
    ChecksumError
        When each mirror gave a file with another content.

    Notes
    -----
    Runs in a worker's loader thread, or in the command line's process. Processes of one machine
    wait for each other. An interrupted download is continued by the next call.
    """
    known = known_weights(name)
    if known.packaged:
        path = Path(str(importlib.resources.files("daskshare").joinpath("data", known.file)))
        check_sha256(path, known.sha256, advice="Install daskshare again.")
        return path
    folder = cache_directory() if directory is None else Path(directory)
    path = folder / known.file
    if path.is_file() and file_sha256(path) == known.sha256:
        return path
    advice = (
        f"Put the file at {path} yourself (SHA-256 {known.sha256}), set Dask's option "
        "daskshare.models.cache-directory to a folder that holds it, or pass weights=PATH."
    )
    try:
        return _locked_fetch(known, folder, mirrors, progress, advice)
    except OSError as error:
        if isinstance(error, DownloadError):
            raise
        raise DownloadError(
            f"{known.file} could not be stored in {folder}: {error}. {advice}",
            name=known.file,
            path=str(path),
        ) from error


def _locked_fetch(
    known: KnownWeights, folder: Path, mirrors: tuple[str, ...], progress: bool, advice: str
) -> Path:
    import pooch  # type: ignore[import-untyped]
    import requests
    from filelock import FileLock

    path = folder / known.file
    folder.mkdir(parents=True, exist_ok=True)
    problems: list[str] = []
    wrong: list[str] = []
    with FileLock(folder / f"{known.file}.lock"):
        downloader = _ResumingDownloader(folder / f"{known.file}.part", progress=progress)
        for mirror in mirrors:
            for _ in range(2):
                url = mirror + known.file
                try:
                    pooch.retrieve(
                        url, f"sha256:{known.sha256}", known.file, folder, downloader=downloader
                    )
                    return path
                except requests.RequestException as error:
                    problems.append(f"{url}: {error}")
                    break
                except ValueError as error:
                    # pooch's word for a wrong digest; what was wrong may be the old beginning.
                    problems.append(f"{url}: {error}")
                    wrong.append(url)
                    if not downloader.resumed:
                        break
    reasons = "; ".join(problems)
    if wrong and len(problems) == len(wrong):
        raise ChecksumError(
            f"{known.file} was downloaded, but its content is not the expected one ({reasons}). "
            f"{advice}",
            name=known.file,
            path=str(path),
            got_sha256=downloader.got_sha256,
            expected_sha256=known.sha256,
        )
    raise DownloadError(
        f"{known.file} could not be downloaded from any of {len(mirrors)} mirrors ({reasons}). "
        f"{advice}",
        name=known.file,
        path=str(path),
    )
