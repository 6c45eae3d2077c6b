"""A module imports only from lower floors; pure modules stay pure. Read from the source."""

from __future__ import annotations

import ast
import fnmatch
import graphlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "daskshare"

#: From the ground up. Modules of one floor may import each other, but not in a circle.
FLOORS: list[list[str]] = [
    ["errors", "html_repr", "sizeof", "_malloc"],
    ["config", "option_names"],
    ["batching", "placement", "_placement_*", "chunking", "timesplit"],
    ["device", "_device_*", "_torch_threads"],
    ["models.spec"],
    ["kernels", "kernels.*"],
    ["models", "models.*"],
    ["engine", "_engine_*"],
    ["share", "_share_*"],
    ["host", "_host_*"],
    ["streaming"],
    ["flight", "_flight_*"],
    ["dashboard", "dashboard.*"],
    ["worker_plugin", "_worker_*"],
    ["allocator", "_allocator_*"],
    ["scheduler_plugin"],
    ["notebook"],
    ["client"],
    ["cluster"],
    ["video", "video.*"],
    ["results", "results.*"],
    ["spark", "spark.*"],
    ["testing"],
    ["doctor", "doctor.*"],
    ["cli", "_cli_*", "demo", "__main__"],
]

#: Programs, which use daskshare as anybody does.
PROGRAMS = {"cli", "demo", "__main__"}

PURE = ["batching", "placement", "_placement_*", "chunking", "timesplit"]
IMPURE_IMPORTS = {"dask", "distributed", "torch", "threading", "time", "asyncio", "concurrent"}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
MODULES_WITH_FLOOR = [name for name in MODULES if name]


def floor_of(module: str) -> int:
    # An exact name counts before a pattern: models.spec lies below the other models.
    for floor, patterns in enumerate(FLOORS):
        if module in patterns:
            return floor
    for floor, patterns in enumerate(FLOORS):
        if any(fnmatch.fnmatchcase(module, pattern) for pattern in patterns):
            return floor
    raise AssertionError(f"daskshare.{module} has no floor: add it to FLOORS and to the design")


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def statements(tree: ast.AST, *, only_at_import: bool) -> list[ast.Import | ast.ImportFrom]:
    found: list[ast.Import | ast.ImportFrom] = []
    for node in ast.iter_child_nodes(tree):
        if only_at_import and (
            isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            or is_type_checking(node)
        ):
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found.append(node)
        found += statements(node, only_at_import=only_at_import)
    return found


def imported(module: str, source: str, *, only_at_import: bool = False) -> set[str]:
    """Full names of the modules that a module imports."""
    names = set()
    for node in statements(ast.parse(source), only_at_import=only_at_import):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        else:
            assert node.level == 0, f"daskshare.{module}: relative import; write the full name"
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                is_module = inner.removeprefix("daskshare.") in MODULES
                names.add(inner if is_module else node.module)
    return names


def own(names: set[str]) -> set[str]:
    return {n.removeprefix("daskshare.") for n in names if n.startswith("daskshare.")}


def violations(module: str, source: str) -> list[str]:
    return sorted(
        f"daskshare.{module} imports daskshare.{target}, which lies above it"
        for target in own(imported(module, source))
        if floor_of(target) > floor_of(module)
    )


@pytest.mark.parametrize("module", MODULES_WITH_FLOOR)
def test_imports_go_down(module):
    # Imports within functions and for type checking count too: a floor is about what is known.
    assert violations(module, MODULES[module].read_text("utf-8")) == []


def test_no_module_names_the_package_itself():
    # `from daskshare import x` would reach for the top floor, whatever x is.
    for module in MODULES_WITH_FLOOR:
        names = imported(module, MODULES[module].read_text("utf-8"))
        assert module in PROGRAMS or "daskshare" not in names, module


def test_no_circle():
    graph = {
        name: set(own(imported(name, path.read_text("utf-8"), only_at_import=True)))
        for name, path in MODULES.items()
        if name
    }
    list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize(
    "module", [m for m in MODULES if any(fnmatch.fnmatchcase(m, pattern) for pattern in PURE)]
)
def test_pure_modules_know_no_clock_threads_dask_or_torch(module):
    roots = {name.partition(".")[0] for name in imported(module, MODULES[module].read_text())}
    assert roots & IMPURE_IMPORTS == set()


def test_the_batching_policy_is_among_the_pure_modules():
    assert "batching" in MODULES


def test_there_is_no_drawer_for_odds_and_ends():
    assert not {"utils", "helpers", "common"} & {m.rpartition(".")[2] for m in MODULES}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("engine", "from daskshare.client import install"),
        ("engine", "def f():\n    import daskshare.client"),
        ("errors", "if TYPE_CHECKING:\n    from daskshare.config import EngineOptions"),
        ("models.spec", "from daskshare.models import torch_model as t"),
        ("config", "from daskshare import client"),
    ],
)
def test_a_violation_is_seen(module, source):
    assert len(violations(module, source)) == 1


def test_a_new_module_needs_a_floor():
    with pytest.raises(AssertionError, match="has no floor"):
        floor_of("attic")
