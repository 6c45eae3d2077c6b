"""Tables for notebooks: escaped, and without colours of their own."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from daskshare.html_repr import format_bytes, properties, table


def cells(text: str) -> list[list[str]]:
    """Texts by row; parsing fails on anything that was not escaped or closed."""
    root = ET.fromstring(text)
    return [[cell.text or "" for cell in row] for row in root.iter("tr")]


def test_a_table():
    text = table("cars", ("name", "count", "share"), [["a", 1234567, 0.5], ["b", 2, 0.25]])
    assert cells(text) == [
        ["name", "count", "share"],
        ["a", "1,234,567", "0.50"],
        ["b", "2", "0.25"],
    ]
    aligned = ["right" in cell.get("style") for cell in ET.fromstring(text).iter("th")]
    assert aligned == [False, True, True]


def test_all_texts_are_escaped():
    evil = "<script>alert('x')</script>&\""
    for text in (
        table(evil, (evil,), [[evil]], note=evil),
        properties(evil, [(evil, evil), ("list", [evil])], note=evil),
    ):
        assert "<script" not in text
        assert cells(text)[-1][-1] == evil


def test_long_tables_are_cut_and_say_so():
    text = table("", ("n",), [[i] for i in range(100)], max_rows=3, note="All are cars.")
    assert len(cells(text)) == 4
    assert "and 97 more. All are cars." in text


def test_an_empty_table_has_its_headings():
    assert cells(table("", ("a", "b"), [])) == [["a", "b"]]


def test_properties_leave_out_what_is_not_there():
    text = properties("t", [("a", None), ("b", ""), ("c", 0), ("d", False), ("e", (1, 2))])
    assert cells(text) == [["c", "0"], ["d", "no"], ["e", "1, 2"]]


@pytest.mark.parametrize("text", [table("t", ("a",), [["b"]]), properties("t", [("a", "b")])])
def test_colours_are_the_pages_own(text):
    # A colour of its own would vanish on one of the two backgrounds.
    assert "#" not in text
    for element in ET.fromstring(text).iter():
        style = element.get("style", "")
        declared = dict(p.split(":", 1) for p in style.split("; ") if p)
        assert declared.get("color", " inherit").strip() == "inherit"
        assert declared.get("background", " transparent").strip() == "transparent"


@pytest.mark.parametrize(
    ("num_bytes", "expected"),
    [(0, "0 B"), (999, "999 B"), (35_400_000, "35.4 MB"), (2 * 10**9, "2.0 GB"), (10**15, "1,000")],
)
def test_bytes_have_units(num_bytes, expected):
    assert format_bytes(num_bytes).startswith(expected)
