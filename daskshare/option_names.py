"""Names under ``daskshare`` in Dask's configuration: a misspelt one must not go unnoticed."""

from __future__ import annotations

import difflib
import functools
import importlib.resources
from collections.abc import Iterator, Mapping
from typing import Any

import dask.config
import yaml

from daskshare.errors import ConfigurationError

__all__ = ["check_option_names", "unknown_options"]


def _plain(name: str) -> str:
    # Dask takes both spellings for one.
    return name.replace("_", "-")


def _names(options: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in options.items():
        name = f"{prefix}{_plain(str(key))}"
        yield name
        if isinstance(value, Mapping):
            yield from _names(value, f"{name}.")


def unknown_options(
    options: Mapping[str, Any], defaults: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """Find the names in a configuration that have no default.

    Parameters
    ----------
    options : mapping
        What is configured, nested.
    defaults : mapping
        All that can be configured. Below an empty mapping every name is allowed.

    Returns
    -------
    list of (str, str)
        Each unknown name with dots, such as ``"engine.max-wiat"``, and the nearest known one or
        ``""``.
    """
    known = list(_names(defaults))
    return [(name, _nearest(name, known)) for name in _unknown(options, defaults, "")]


def _nearest(name: str, known: list[str]) -> str:
    """A name that looks alike in the same section, or the same name in another one."""
    section, _, leaf = name.rpartition(".")
    siblings = {other.rpartition(".")[2]: other for other in known if _section(other) == section}
    alike = difflib.get_close_matches(leaf, siblings, 1)
    if alike:
        return siblings[alike[0]]
    return next((other for other in known if other.rpartition(".")[2] == leaf), "")


def _section(name: str) -> str:
    return name.rpartition(".")[0]


def _unknown(options: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str) -> Iterator[str]:
    by_name = {_plain(key): value for key, value in defaults.items()}
    for key, value in options.items():
        name = _plain(str(key))
        if name not in by_name:
            yield f"{prefix}{name}"
        elif isinstance(value, Mapping) and isinstance(by_name[name], Mapping) and by_name[name]:
            yield from _unknown(value, by_name[name], f"{prefix}{name}.")


@functools.cache
def _defaults() -> dict[str, Any]:
    text = importlib.resources.files("daskshare").joinpath("daskshare.yaml").read_text("utf-8")
    defaults: dict[str, Any] = yaml.safe_load(text)["daskshare"]
    return defaults


def check_option_names() -> None:
    """Look through ``daskshare`` in Dask's configuration as it is now.

    Raises
    ------
    ConfigurationError
        When a name has no meaning; says which one is near.
    """
    unknown = unknown_options(dask.config.get("daskshare", {}), _defaults())
    if not unknown:
        return
    name, near = unknown[0]
    hint = f" Did you mean daskshare.{near}?" if near else ""
    more = f" ({len(unknown) - 1} more like it.)" if len(unknown) > 1 else ""
    raise ConfigurationError(
        f"Dask configuration has daskshare.{name}, which daskshare does not know; expected one of "
        f"the names in daskshare.yaml.{hint}{more} Correct it in the YAML file, the environment "
        "variable or dask.config.set.",
        option=f"daskshare.{name}",
    )
