"""What a host can be asked to do beyond running a model on arrays; higher floors add to it."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from daskshare.errors import HostError, InvalidInputError

if TYPE_CHECKING:
    from daskshare.share import Lease

__all__ = ["Call", "find_operation", "operation"]


@dataclass(frozen=True, slots=True)
class Call:
    """One request to an operation.

    Parameters
    ----------
    arguments : dict
        Plain JSON.
    value : object
        Arrays and the like; in memory that the client reuses after the answer.
    model : Lease or None
        The model that the request names.
    task : str
        Whose request it is, for the engine's taking turns.
    cancelled : threading.Event
        Set when nobody waits for the answer any more.
    """

    arguments: dict[str, Any]
    value: Any
    model: Lease | None
    task: str
    cancelled: threading.Event

    @property
    def lease(self) -> Lease:
        """The model.

        Raises
        ------
        InvalidInputError
            When the request names none.
        """
        if self.model is None:
            raise InvalidInputError("The request names no model; expected one that was opened.")
        return self.model


Operation = Callable[[Call], Any]

_operations: dict[str, Operation] = {}


def operation(name: str) -> Callable[[Operation], Operation]:
    """Register a function as an operation of hosts.

    Parameters
    ----------
    name : str
        What clients ask for.

    Notes
    -----
    The function runs in a thread of the host, many at once; what it returns is encoded by
    :func:`daskshare._host_values.encode`. A host finds it when its module is listed in
    ``daskshare.host.extensions``.
    """

    def register(function: Operation) -> Operation:
        _operations[name] = function
        return function

    return register


def find_operation(name: str, extensions: Iterable[str]) -> Operation:
    """Return an operation; imports the extensions when it is not known yet.

    Raises
    ------
    HostError
        When there is none.
    """
    if name not in _operations:
        for module in extensions:
            importlib.import_module(module)
    try:
        return _operations[name]
    except KeyError:
        raise HostError(
            f"The host knows no operation {name!r}; it knows {sorted(_operations)}. Run the same "
            "daskshare in both processes, or list the module that brings it in "
            "daskshare.host.extensions.",
            operation=name,
        ) from None
