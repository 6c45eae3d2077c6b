"""Which model a task needs, read from what the task carries. On the scheduler: no torch here.

``dask.annotate`` is lost when a bag is optimised and always in a DataFrame, so a task is recognised
by the :class:`~daskshare.client.SharedModel` in its run_spec, whatever collection built it.
"""

from __future__ import annotations

import functools
import math
import sys
import types
from collections.abc import Callable, Iterable
from enum import Enum, auto
from numbers import Real
from typing import Any

from dask._task_spec import Alias, DataNode, Task, TaskRef

__all__ = ["ModelFinder", "annotated_model", "known_frames"]

#: Deeper nesting than any program has; a structure that contains itself ends here.
_MAX_DEPTH = 40

#: Their functions never carry a user's model, and there are many of them in graphs.
_LIBRARIES = frozenset({"dask", "distributed", "numpy", "operator", "pandas", "tlz", "toolz"})


class _Kind(Enum):
    LEAF = auto()
    MODEL = auto()
    TASK = auto()
    DATA = auto()
    SEQUENCE = auto()
    MAPPING = auto()
    PARTIAL = auto()
    FUNCTION = auto()
    METHOD = auto()
    CALLABLE = auto()


_KINDS: dict[type, _Kind] = {
    **dict.fromkeys((int, float, bool, str, bytes, complex, type(None), slice), _Kind.LEAF),
    **dict.fromkeys((TaskRef, Alias, types.BuiltinFunctionType, type), _Kind.LEAF),
    **dict.fromkeys((list, tuple, set, frozenset), _Kind.SEQUENCE),
    dict: _Kind.MAPPING,
    Task: _Kind.TASK,
    DataNode: _Kind.DATA,
    functools.partial: _Kind.PARTIAL,
    types.FunctionType: _Kind.FUNCTION,
    types.MethodType: _Kind.METHOD,
}


_FRAMELESS = frozenset({int, float, str, bytes, bool, type(None), list, tuple, dict, TaskRef})


class ModelFinder:
    """Finds the shared model that a task's run_spec holds, if any.

    Looks into a task's function, arguments and keyword arguments; into fused and nested tasks,
    lists, tuples, sets, dicts, partials, bound methods and callable objects; and into functions:
    defaults, closures, and the globals that they name.

    Notes
    -----
    Runs on the scheduler's event loop, with one finder for one graph: tasks of a graph share their
    functions, so each of these is looked into once. The graph must be alive as long as the
    finder, which knows objects by ``id``.
    """

    def __init__(self) -> None:
        self._kinds = dict(_KINDS)
        self._seen: dict[int, Any] = {}
        #: Models found as the first argument of the function below, which itself carries none.
        self._models: set[int] = set()
        self._func: Any = None

    def find(self, run_spec: Any) -> Any | None:
        """Return the first SharedModel in ``run_spec``, or None."""
        if type(run_spec) is Task and run_spec.args:
            # As in client.map and client.submit: one function, a model as its first argument.
            first = run_spec.args[0]
            if id(first) in self._models and run_spec.func is self._func:
                return first
            found = self._find(run_spec, 0)
            if found is first and found is not None and not run_spec.kwargs:
                self._models.add(id(first))
                self._func = run_spec.func
            return found
        return self._find(run_spec, 0)

    def _find(self, value: Any, depth: int) -> Any | None:
        kind = self._kinds.get(type(value)) or self._learn(type(value))
        if kind is _Kind.LEAF or depth > _MAX_DEPTH:
            return None
        if kind is _Kind.MODEL:
            return value
        if kind is _Kind.TASK:
            depth += 1
            return (
                self._find(value.func, depth)
                or (self._first(value.kwargs.values(), depth) if value.kwargs else None)
                or self._first(value.args, depth)
            )
        if kind is _Kind.DATA:
            return self._find(value.value, depth + 1)
        identity = id(value)
        if identity in self._seen:
            return self._seen[identity]
        # What contains or names itself ends here.
        self._seen[identity] = None
        if kind is _Kind.SEQUENCE:
            parts = value
        elif kind is _Kind.MAPPING:
            parts = value.values()
        else:
            parts = _parts(value, kind)
        found = self._seen[identity] = self._first(parts, depth + 1)
        return found

    def _first(self, values: Iterable[Any], depth: int) -> Any | None:
        kinds = self._kinds
        for value in values:
            if kinds.get(type(value)) is _Kind.LEAF:
                continue
            found = self._find(value, depth)
            if found is not None:
                return found
        return None

    def _learn(self, cls: type) -> _Kind:
        kind = _kind_of(cls)
        # Not for ever: classes of notebooks come and go.
        self._kinds[cls] = kind
        return kind


def _kind_of(cls: type) -> _Kind:
    if getattr(cls, "__daskshare_model__", False):
        return _Kind.MODEL
    for base in (Task, DataNode, functools.partial, dict, list, tuple, set, frozenset):
        if issubclass(cls, base):
            return _KINDS[base]
    if any("__call__" in vars(base) for base in cls.__mro__) and not issubclass(cls, type):
        return _Kind.CALLABLE
    return _Kind.LEAF


def _parts(value: Any, kind: _Kind) -> Iterable[Any]:
    """What a callable carries along."""
    if kind is _Kind.PARTIAL:
        return (value.func, *value.args, *value.keywords.values())
    if kind is _Kind.METHOD:
        return (value.__func__, *getattr(value.__self__, "__dict__", {}).values(), value.__self__)
    if kind is _Kind.FUNCTION:
        return _function_parts(value)
    return list(getattr(value, "__dict__", {}).values())


def _function_parts(function: types.FunctionType) -> list[Any]:
    if str(function.__module__).partition(".")[0] in _LIBRARIES:
        return []
    parts: list[Any] = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    for cell in function.__closure__ or ():
        try:
            parts.append(cell.cell_contents)
        except ValueError:  # not bound yet
            continue
    names = function.__globals__
    named = [names[name] for name in _names(function.__code__) if name in names]
    module = sys.modules.get(function.__module__)
    if module is not None and vars(module) is names:
        # Of an importable module one would walk all that it refers to.
        named = [v for v in named if getattr(type(v), "__daskshare_model__", False)]
    wrapped: Callable[..., Any] | None = getattr(function, "__wrapped__", None)
    return [*parts, *named, wrapped]


def _names(code: types.CodeType) -> Iterable[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def annotated_model(value: Any) -> tuple[str | None, Any | None]:
    """Read the value of ``dask.annotate(model=...)``: (key, handle), each None when unknown.

    Parameters
    ----------
    value : object
        A SharedModel, or the key of one as a string.
    """
    if isinstance(value, str):
        return str(value), getattr(value, "handle", None)
    if getattr(type(value), "__daskshare_model__", False):
        return value.key, value
    return None, None


# Asking a class for an attribute that it lacks is slow. Bounded: classes of notebooks come and go.
@functools.lru_cache(maxsize=256)
def _counts_frames(cls: type) -> bool:
    return hasattr(cls, "num_frames")


def known_frames(run_spec: Any) -> float | None:
    """Frames of the video that a task was given; None when it has none, or they are not known.

    Counts arguments of classes with ``num_frames``, as a
    :class:`~daskshare.video.chunk.VideoChunk` has; what is no number above 0 is not known.
    """
    if type(run_spec) is not Task:
        return None
    found = 0.0
    for argument in run_spec.args:
        cls = type(argument)
        if cls not in _FRAMELESS and _counts_frames(cls):  # type: ignore[arg-type]
            frames = argument.num_frames
            if isinstance(frames, Real) and 0 < float(frames) < math.inf:
                found += float(frames)
    return found or None
