"""The exception tree: every class survives the trip between processes."""

from __future__ import annotations

import inspect
import pickle

import cloudpickle
import pytest
from distributed.protocol.pickle import dumps, loads

from daskshare import errors
from daskshare.errors import DaskshareError

CLASSES = [getattr(errors, name) for name in errors.__all__]

FIELDS = {"path": "a/b.cfg", "line": 7, "got_bytes": 10, "expected_bytes": 12, "reason": None}

WAYS = {
    "pickle": lambda error: pickle.loads(pickle.dumps(error)),  # noqa: S301
    "cloudpickle": lambda error: pickle.loads(cloudpickle.dumps(error)),  # noqa: S301
    "distributed": lambda error: loads(dumps(error)),
}


def test_all_lists_every_exception_of_the_module():
    defined = {
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and value.__module__ == errors.__name__
    }
    assert defined == set(errors.__all__)
    assert sorted(errors.__all__) == errors.__all__


@pytest.mark.parametrize("cls", CLASSES)
def test_every_exception_is_a_daskshare_error_and_documented(cls):
    assert issubclass(cls, DaskshareError)
    assert cls.__doc__
    assert inspect.getdoc(cls) != inspect.getdoc(cls.__base__)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cls", CLASSES)
def test_message_and_fields_survive_pickling(cls, way):
    got = WAYS[way](cls("got 10, expected 12; do this", **FIELDS))
    assert type(got) is cls
    assert str(got) == "got 10, expected 12; do this"
    assert got.args == ("got 10, expected 12; do this",)
    assert got.fields == FIELDS
    for name, value in FIELDS.items():
        assert getattr(got, name) == value


def test_notes_and_later_attributes_survive_pickling():
    error = errors.WeightsError("too short", path="a")
    error.add_note("while loading yolov3")
    error.attempt = 2
    got = WAYS["pickle"](error)
    assert got.__notes__ == ["while loading yolov3"]
    assert got.attempt == 2
    assert got.fields == {"path": "a"}


def test_pickling_twice_changes_nothing():
    error = errors.InferenceError("bad frame", model="yolov3", frame=3)
    once = WAYS["pickle"](error)
    assert pickle.dumps(WAYS["pickle"](once)) == pickle.dumps(once)


@pytest.mark.parametrize(
    ("cls", "builtin"),
    [
        (errors.ConfigurationError, ValueError),
        (errors.InvalidInputError, ValueError),
        (errors.NotOnWorkerError, RuntimeError),
        (errors.DownloadError, OSError),
        (errors.OutputError, OSError),
    ],
)
def test_callers_may_catch_the_builtin_kin(cls, builtin):
    with pytest.raises(builtin, match="expected"):
        raise cls("got 1, expected 2")
