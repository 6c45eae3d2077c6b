"""A misspelt name in Dask's configuration is found, and the near one named."""

from __future__ import annotations

import dask.config
import pytest

from daskshare.errors import ConfigurationError
from daskshare.option_names import check_option_names, unknown_options

DEFAULTS = {"engine": {"max-wait": "5ms", "slots": 2}, "weights": {}, "level": None}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, []),
        ({"engine": {"max-wait": "1s"}, "level": 3}, []),
        ({"engine": {"max_wait": "1s"}}, []),
        ({"engine": {"max-wiat": "1s"}}, [("engine.max-wiat", "engine.max-wait")]),
        ({"egnine": {"max-wait": "1s"}}, [("egnine", "engine")]),
        ({"engine": {"colour": "red"}}, [("engine.colour", "")]),
        ({"max-wait": "1s"}, [("max-wait", "engine.max-wait")]),
        ({"weights": {"any": {"name": 1}}}, []),
        ({"level": {"deep": 1}}, []),
        ({"engine": None}, []),
        ({"a": 1, "lvel": 2}, [("a", ""), ("lvel", "level")]),
    ],
)
def test_unknown_names_and_the_near_ones(options, expected):
    assert unknown_options(options, DEFAULTS) == expected


def test_the_defaults_pass():
    check_option_names()


@pytest.mark.parametrize("name", ["engine.max-wiat", "engine.max_wiat"])
def test_a_misspelt_option_is_an_error_with_a_suggestion(name):
    with (
        dask.config.set({f"daskshare.{name}": "1s"}),
        pytest.raises(ConfigurationError, match=r"Did you mean daskshare\.engine\.max-wait") as got,
    ):
        check_option_names()
    assert got.value.option == "daskshare.engine.max-wiat"


def test_a_misspelt_environment_variable_is_seen():
    found = dask.config.collect_env({"DASK_DASKSHARE__VIDEO__DECODR": "pyav"})
    with (
        dask.config.set(found),
        pytest.raises(ConfigurationError, match=r"daskshare\.video\.decoder"),
    ):
        check_option_names()


def test_several_are_counted():
    with (
        dask.config.set({"daskshare.a": 1, "daskshare.b": 2}),
        pytest.raises(ConfigurationError, match=r"\(1 more like it\.\)"),
    ):
        check_option_names()
