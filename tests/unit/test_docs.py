"""What the pages promise and nothing else would hold."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import daskshare
from daskshare.cli import main

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *DOCS.glob("*.rst")])


def api_names() -> list[str]:
    text = (DOCS / "api.rst").read_text("utf-8")
    return re.findall(r"^   ([A-Za-z_][\w.]*)$", text, re.MULTILINE)


def test_the_api_page_has_every_public_name():
    missing = set(daskshare.__all__) - {"__version__", "errors"} - set(api_names())
    assert not missing, f"add to docs/api.rst: {sorted(missing)}"


@pytest.mark.parametrize("name", api_names())
def test_the_api_page_names_what_is_there(name):
    module, _, leaf = f"daskshare.{name}".rpartition(".")
    assert getattr(importlib.import_module(module), leaf).__doc__


def options(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in section.items():
        if isinstance(value, dict):
            yield from options(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


DEFAULTS = dict(
    options(yaml.safe_load((ROOT / "daskshare/daskshare.yaml").read_text("utf-8"))["daskshare"])
)


@pytest.mark.parametrize("name", DEFAULTS)
def test_every_option_is_described_with_its_default(name):
    pages = "\n".join(page.read_text("utf-8") for page in PAGES)
    row = re.search(rf"^\| `{re.escape(name)}` \| ([^|]*) \|", pages, re.MULTILINE)
    assert row, f"no row of a table in docs/ describes {name}"
    default = DEFAULTS[name]
    # What has no default of its own is told in words.
    if default is not None:
        assert row.group(1).lower().strip("` ") == str(default).lower().strip("` ")


def test_every_page_is_in_a_table_of_contents():
    index = (DOCS / "index.md").read_text("utf-8")
    entries = re.findall(r"^([a-z*_-]+)$", index, re.MULTILINE)
    for page in PAGES:
        if page.stem != "index":
            assert any(page.match(f"{entry}{page.suffix}") for entry in entries), page.name


def test_every_image_of_the_pages_is_there():
    for page in PAGES:
        for image in re.findall(r"images/[\w.-]+", page.read_text("utf-8")):
            assert (DOCS / image).exists(), f"{page.name} shows {image}"


def test_examples_that_the_pages_name_are_there():
    for page in PAGES:
        for script in re.findall(r"\b\d\d_\w+\.py", page.read_text("utf-8")):
            assert (ROOT / "examples" / script).exists(), f"{page.name} names {script}"


def test_commands_that_the_pages_name_are_there():
    for page in PAGES:
        for command in re.findall(r"(?:`|\$ )daskshare ([a-z]+)\b", page.read_text("utf-8")):
            assert command in main.commands, f"{page.name} names daskshare {command}"
