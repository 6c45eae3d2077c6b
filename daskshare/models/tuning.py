"""What was measured to be fastest, kept on disk for the next process.

One file holds the choices for one network on one kind of GPU with certain versions. Processes that
start together measure once: the others wait for the first one's file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

__all__ = ["TuningFile"]

logger = logging.getLogger(__name__)

_VERSION = 1


class TuningFile:
    """Measured choices by name, in one JSON file.

    Parameters
    ----------
    folder : Path
        Made when it does not exist.
    **subject : str or int
        What the choices are valid for: the network, the GPU, versions.

    Notes
    -----
    Any number of processes may use one file. A file that cannot be read counts as empty.
    """

    def __init__(self, folder: Path, **subject: str | int) -> None:
        self._subject = {"version": _VERSION, **subject}
        digest = hashlib.sha256(json.dumps(self._subject, sort_keys=True).encode()).hexdigest()
        self.path = folder / f"tuning-{digest[:24]}.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the file for oneself: read, measure and write within."""
        lock = FileLock(f"{self.path}.lock")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except OSError as error:
            logger.warning("%s cannot be kept (%s); every start measures anew", self.path, error)
            yield
            return
        try:
            yield
        finally:
            lock.release()

    def read(self) -> dict[str, Any]:
        """The choices so far."""
        try:
            content = json.loads(self.path.read_text("utf-8"))
            if content["subject"] == self._subject:
                return dict(content["choices"])
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s cannot be read (%s); measuring anew", self.path, error)
            return {}
        logger.warning("%s is about something else; measuring anew", self.path)
        return {}

    def write(self, choices: dict[str, Any]) -> None:
        """Replace the choices; readers see the old file or the new one, never a part.

        A folder that cannot be written is logged: the choices serve this process all the same.
        """
        partial = self.path.with_suffix(f".{os.getpid()}.part")
        content = {"subject": self._subject, "choices": choices}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(content, indent=1, sort_keys=True), "utf-8")
            partial.replace(self.path)
        except OSError as error:
            logger.warning("%s cannot be written: %s", self.path, error)
