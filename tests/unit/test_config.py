"""Options from Dask's configuration, their defaults and their schema."""

from __future__ import annotations

import importlib.resources
import math
import pickle
from typing import Any

import dask.config
import jsonschema
import pytest
import yaml

from daskshare import config
from daskshare.config import ShareOptions
from daskshare.errors import ConfigurationError


def _read(name: str) -> Any:
    return yaml.safe_load(importlib.resources.files("daskshare").joinpath(name).read_text("utf-8"))


DEFAULTS = _read("daskshare.yaml")
SCHEMA = _read("daskshare-schema.yaml")

# "engine" -> EngineOptions, and so on.
OWNERS = {name.removesuffix("Options").lower(): getattr(config, name) for name in config.__all__}

BAD = [
    ("allocator.enabled", "yes"),
    ("allocator.enabled", None),
    ("allocator.placement", "everywhere"),
    ("allocator.cpu-execution", "never"),
    ("allocator.start-timeout", -1),
    ("allocator.load-timeout", None),
    ("engine.max-batch-size", 0),
    ("engine.max-batch-size", 2.5),
    ("engine.max-batch-size", True),
    ("engine.max-batch-size", "64"),
    ("engine.max-wait", -1),
    ("engine.max-wait", "-1s"),
    ("engine.max-wait", None),
    ("engine.max-wait", True),
    ("engine.slots", 0),
    ("engine.slots", None),
    ("engine.queue-batches", -1),
    ("engine.compile", "yes"),
    ("engine.compile", 2),
    ("engine.compile", None),
    ("engine.cuda-graphs", "auto"),
    ("engine.cuda-graphs", 2),
    ("share.memory-limit", 0),
    ("share.memory-limit", -0.5),
    ("share.memory-limit", 1.5),
    ("share.memory-limit", None),
    ("share.memory-limit", True),
    ("share.memory-limit", ""),
    ("share.memory-limit", "-20 GiB"),
    ("share.load-threads", 0),
    ("worker.retain-memory", 0),
    ("worker.retain-memory", -1),
    ("worker.retain-memory", True),
    ("worker.retain-memory", ""),
    ("worker.retain-memory", 2**31),
    ("worker.profile-interval", -1),
    ("worker.freeze-imports", "auto"),
    ("share.close-timeout", [1]),
    ("host.serve", "yes"),
    ("host.directory", 7),
    ("host.idle-timeout", "-1s"),
    ("host.start-timeout", None),
    ("host.allow-code", 2),
    ("host.window", 0),
    ("host.extensions", "daskshare.results.hosted"),
    ("flight.port", 70000),
    ("flight.port", -1),
    ("flight.token", 7),
    ("flight.allow-code", "no"),
    ("flight.timeout", "-1s"),
    ("video.chunk-duration", -10),
    ("video.frames-per-request", 0),
    ("video.requests-in-flight", 1.5),
    ("video.decoder", "ffmpeg"),
    ("video.decoder-sessions", 0),
    ("models.fused-kernels", "torch"),
    ("models.fused-kernels", None),
]

GOOD = [
    ("allocator.enabled", False, "enabled", False),
    ("allocator.placement", "pack", "placement", "pack"),
    ("allocator.cpu-execution", True, "cpu_execution", True),
    ("allocator.start-timeout", "30s", "start_timeout_seconds", 30.0),
    ("allocator.load-timeout", "1 hour", "load_timeout_seconds", 3600.0),
    ("engine.max-batch-size", None, "max_batch_size", None),
    ("engine.max-batch-size", 64, "max_batch_size", 64),
    ("engine.max-wait", "2 ms", "max_wait_seconds", 0.002),
    ("engine.max-wait", 0, "max_wait_seconds", 0.0),
    ("engine.max-wait", 0.5, "max_wait_seconds", 0.5),
    ("engine.compile", "auto", "compile", "auto"),
    ("engine.compile", False, "compile", False),
    ("engine.cuda-graphs", False, "cuda_graphs", False),
    ("share.memory-limit", 0.25, "memory_limit", 0.25),
    ("share.memory-limit", 1.0, "memory_limit", 1.0),
    ("share.memory-limit", "20 GiB", "memory_limit", 20 * 2**30),
    ("share.memory-limit", "1.5e3 kB", "memory_limit", 1_500_000),
    ("share.memory-limit", 10**9, "memory_limit", 10**9),
    ("share.close-timeout", "1 minute", "close_timeout_seconds", 60.0),
    ("worker.retain-memory", "1 MiB", "retain_memory_bytes", 2**20),
    ("worker.retain-memory", 4096, "retain_memory_bytes", 4096),
    ("worker.retain-memory", None, "retain_memory_bytes", None),
    ("worker.profile-interval", "1s", "profile_interval_seconds", 1.0),
    ("worker.profile-interval", None, "profile_interval_seconds", None),
    ("worker.freeze-imports", False, "freeze_imports", False),
    ("video.chunk-duration", "1.5h", "chunk_seconds", 5400.0),
    ("video.decoder", "pyav", "decoder", "pyav"),
    ("video.decoder-sessions", 6, "decoder_sessions", 6),
    ("models.fused-kernels", "auto", "fused_kernels", "auto"),
    ("models.fused-kernels", False, "fused_kernels", False),
]


def _leaves(tree: dict[str, Any], prefix: str = "") -> set[str]:
    found = set()
    for name, value in tree.items():
        path = f"{prefix}.{name}" if prefix else name
        found |= _leaves(value, path) if isinstance(value, dict) else {path}
    return found


def _schema_leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, dict[str, Any]]:
    found = {}
    for name, value in tree["properties"].items():
        path = f"{prefix}.{name}" if prefix else name
        found |= _schema_leaves(value, path) if "properties" in value else {path: value}
    return found


def _document(option: str, value: Any) -> dict[str, Any]:
    section, name = option.split(".")
    return {"daskshare": {section: {name: value}}}


def _from_config(option: str, value: Any) -> Any:
    with dask.config.set({f"daskshare.{option}": value}):
        return OWNERS[option.split(".")[0]].from_config()


def test_schema_is_valid_and_the_defaults_fit_it():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(DEFAULTS, SCHEMA)


def test_schema_describes_exactly_the_options_that_there_are():
    described = _schema_leaves(SCHEMA)
    assert described.keys() == _leaves(DEFAULTS)
    assert all(leaf.get("description") for leaf in described.values())


def test_defaults_are_in_dasks_configuration_after_the_import():
    for option in _leaves(DEFAULTS):
        assert dask.config.get(option, default=missing) is not missing


missing = object()


@pytest.mark.parametrize("options", OWNERS.values())
def test_dataclass_defaults_equal_the_yaml(options):
    assert options.from_config() == options()


@pytest.mark.parametrize("options", OWNERS.values())
def test_options_travel_to_workers(options):
    assert pickle.loads(pickle.dumps(options())) == options()  # noqa: S301


@pytest.mark.parametrize(("option", "value"), BAD)
def test_wrong_values_are_refused_by_code_and_schema_alike(option, value):
    with pytest.raises(ConfigurationError, match="expected") as caught:
        _from_config(option, value)
    assert caught.value.option == f"daskshare.{option}"
    assert repr(value) in str(caught.value)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(_document(option, value), SCHEMA)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("engine.max-wait", ""),
        ("engine.max-wait", "5 parsecs"),
        ("engine.max-wait", math.nan),
        ("engine.max-wait", math.inf),
        ("share.memory-limit", math.inf),
        ("share.memory-limit", math.nan),
        ("share.memory-limit", 2.5),
        ("share.memory-limit", "20 buckets"),
    ],
)
def test_wrong_values_that_a_schema_cannot_tell_are_refused_by_the_code(option, value):
    with pytest.raises(ConfigurationError, match=option):
        _from_config(option, value)


@pytest.mark.parametrize(("option", "value", "attribute", "expected"), GOOD)
def test_right_values_are_taken_by_code_and_schema_alike(option, value, attribute, expected):
    jsonschema.validate(_document(option, value), SCHEMA)
    got = getattr(_from_config(option, value), attribute)
    assert got == expected
    assert type(got) is type(expected)


def test_an_unknown_option_is_named_by_the_schema():
    with pytest.raises(jsonschema.ValidationError, match="max-batchsize"):
        jsonschema.validate(_document("engine.max-batchsize", 4), SCHEMA)


def test_budget_is_a_fraction_of_the_device_or_bytes():
    assert ShareOptions(memory_limit=0.5).budget_bytes(1000) == 500
    assert ShareOptions(memory_limit=700).budget_bytes(1000) == 700
