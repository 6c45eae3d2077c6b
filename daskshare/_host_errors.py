"""Exceptions on the wire: their kind, text and traceback, without pickle."""

from __future__ import annotations

import builtins
import json
import traceback
from typing import Any

from daskshare import errors
from daskshare.errors import DaskshareError, RemoteCodeError

__all__ = ["as_exception", "describe_error"]


def describe_error(error: BaseException) -> dict[str, Any]:
    """Describe an exception as plain JSON."""
    described: dict[str, Any] = {
        "type": type(error).__name__,
        "module": type(error).__module__,
        "message": str(error),
        "traceback": "".join(traceback.format_exception(error)),
    }
    if isinstance(error, DaskshareError):
        # What JSON cannot hold comes as text: better a field as text than none.
        described["fields"] = json.loads(json.dumps(error.fields, default=str))
    return described


def as_exception(described: dict[str, Any], where: str) -> Exception:
    """Make an exception that says what happened in the other process.

    Parameters
    ----------
    described : dict
        From :func:`describe_error`.
    where : str
        The other process, for people.

    Returns
    -------
    Exception
        daskshare's and Python's own exceptions keep their type; any other becomes a
        RemoteCodeError. The other process's traceback is a note of the exception.
    """
    name, message = described["type"], described["message"]
    error = _known(described)
    if error is None:
        error = RemoteCodeError(
            f"{name}: {message}", type=name, traceback=described["traceback"], address=where
        )
    error.add_note(f"In {where}:\n{described['traceback']}")
    return error


def _known(described: dict[str, Any]) -> Exception | None:
    name, message = described["type"], described["message"]
    if described["module"] == errors.__name__:
        cls = getattr(errors, name, None)
        if isinstance(cls, type) and issubclass(cls, DaskshareError):
            return cls(message, **described.get("fields", {}))
    if described["module"] != "builtins":
        return None
    cls = getattr(builtins, name, None)
    if not (isinstance(cls, type) and issubclass(cls, Exception)):
        return None
    try:
        error = cls(message)
    except TypeError:
        # UnicodeDecodeError and its like are made of more than a text.
        return None
    # KeyError shows the representation of what it is given.
    return error if str(error) == message else None
