"""Facts about the project's own files that would otherwise drift apart."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from tools import make_venv

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
PYTHONS = ("3.11", "3.12", "3.13")

# What conda-forge calls a package that PyPI calls otherwise.
CONDA_NAMES = {
    "torch": "pytorch",
    "opencv-python-headless": "py-opencv",
    "matplotlib": "matplotlib-base",
    "cupy-cuda13x": "cupy",
    "prometheus-client": "prometheus_client",
}
# What is imported by another name than it is installed by.
DISTRIBUTIONS = {
    "cupy": "cupy-cuda13x",
    "pynvml": "nvidia-ml-py",
    "cv2": "opencv-python-headless",
    "PyNvVideoCodec": "pynvvideocodec",
    "yaml": "pyyaml",
}
# Of conda only: the interpreter, its tools, and what PyPI's packages bring or assume.
CONDA_ONLY = {"python", "pip", "pytorch-gpu", "cuda-version", "openjdk"}


def requirements(lines: list[str]) -> dict[str, Requirement]:
    return {canonicalize_name(r.name): r for r in map(Requirement, lines)}


def pyproject(*extras: str) -> dict[str, Requirement]:
    lines = list(PROJECT["dependencies"]) if "base" in extras else []
    return requirements(lines + [line for e in extras if e != "base" for line in EXTRAS[e]])


def environment() -> tuple[dict[str, SpecifierSet], list[str]]:
    """Conda's packages with their versions as PEP 440 writes them, and the lines for pip."""
    found, pip_lines = {}, []
    text = (ROOT / "environment.yml").read_text("utf-8")
    for line in yaml.safe_load(text)["dependencies"]:
        if isinstance(line, dict):
            pip_lines = line["pip"]
            continue
        name, versions = re.fullmatch(r"([a-z0-9_-]+)(.*)", line).groups()
        # conda's single "=" means what pip's "==" with a star means.
        found[name] = SpecifierSet(re.sub(r"^=(?!=)", "==", versions))
    return found, pip_lines


def constraints(name: str) -> dict[str, Version]:
    pins = {}
    for line in (ROOT / "constraints" / name).read_text("utf-8").splitlines():
        if not line or line.startswith(("#", "-c ")):
            continue
        package, _, version = line.partition("==")
        assert version, f"{name}: {line!r} pins no exact version"
        pins[canonicalize_name(package)] = Version(version)
    return pins


CONDA_EXTRAS = ("base", "gpu", "spark", "jupyter", "demo", "test")


def test_environment_and_pyproject_ask_for_the_same():
    conda, pip_lines = environment()
    by_pip = requirements([line for line in pip_lines if not line.startswith("--")])
    wanted = pyproject(*CONDA_EXTRAS)
    # The GPU extra asks for a newer torch than the base does: conda has a package for that.
    wanted["torch"] = pyproject("base")["torch"]
    for name, requirement in wanted.items():
        other = by_pip[name].specifier if name in by_pip else conda[CONDA_NAMES.get(name, name)]
        assert other == requirement.specifier, name
    assert conda["pytorch-gpu"] == pyproject("gpu")["torch"].specifier
    named = {CONDA_NAMES.get(name, name) for name in wanted} | CONDA_ONLY
    assert conda.keys() <= named, "environment.yml names what pyproject.toml does not"
    assert by_pip.keys() <= wanted.keys()


def test_environment_and_pyproject_ask_for_the_same_python():
    assert environment()[0]["python"] == SpecifierSet(PROJECT["requires-python"])
    for python in PYTHONS:
        assert f"{python}.0" in SpecifierSet(PROJECT["requires-python"])
    assert "3.10.9" not in SpecifierSet(PROJECT["requires-python"])
    assert "3.14.0" not in SpecifierSet(PROJECT["requires-python"])


def test_cuda_of_cupy_dask_cuda_and_conda_agree():
    gpu = pyproject("gpu")
    assert "cupy-cuda13x" in gpu
    assert gpu["dask-cuda"].extras == {"cu13"}
    assert environment()[0]["cuda-version"] == SpecifierSet("==13.*")


ON_LINUX = {"torch", "dask-cuda", "cupy-cuda13x", "nvidia-ml-py", "nvidia-cudnn-frontend", "triton"}


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize(
    ("system", "machine", "expected"),
    [
        ("linux", "x86_64", ON_LINUX | {"pynvvideocodec"}),
        ("linux", "aarch64", ON_LINUX),
        ("darwin", "arm64", set()),
        ("win32", "AMD64", set()),
    ],
)
def test_gpu_extra_asks_only_for_what_has_wheels(python, system, machine, expected):
    there = default_environment() | {
        "sys_platform": system,
        "platform_machine": machine,
        "python_version": python,
    }
    asked = {
        name
        for name, requirement in pyproject("gpu").items()
        if requirement.marker is None or requirement.marker.evaluate(there)
    }
    assert asked == expected


def _imports(folder: str) -> set[str]:
    found = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module)
    return {name.partition(".")[0] for name in found} - set(sys.stdlib_module_names)


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("daskshare", ("base", "gpu", "spark")),
        ("plugins", ("base",)),
        ("examples", ("base", "spark", "demo")),
        ("benchmarks", ("base", "gpu", "spark", "demo", "test")),
        ("tools", ()),
    ],
)
def test_every_import_is_a_declared_dependency(folder, extras):
    imported = {
        canonicalize_name(DISTRIBUTIONS.get(name, name))
        for name in _imports(folder) - {"daskshare", "benchmarks", "tools"}
    }
    # A peer that is measured beside ours; whoever measures it installs it.
    peers = {"ray"} if folder == "benchmarks" else set()
    assert imported <= pyproject(*extras).keys() | peers


def test_constraints_pin_every_requirement_to_a_version_it_accepts():
    cpu, gpu = constraints("cpu.txt"), constraints("gpu.txt")
    assert not cpu.keys() & gpu.keys()
    for name, requirement in pyproject("base", "spark", "demo", "docs", "test", "dev").items():
        if name != "daskshare":
            assert cpu[name] in requirement.specifier, name
    for name, requirement in pyproject("gpu").items():
        assert (cpu | gpu)[name] in requirement.specifier, name


def test_this_environment_is_the_constrained_one():
    # A venv that someone made by hand may differ; the Makefile's must not.
    if not (Path(sys.prefix) / ".installed").exists():
        pytest.skip("not an environment of the Makefile")
    for name, version in constraints("cpu.txt").items():
        try:
            installed = Version(importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            continue
        assert installed.public == version.public, name


def test_versions_agree():
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    headings = re.findall(r"^## (\S+)", changelog, re.MULTILINE)
    assert PROJECT["version"] in headings[:2]
    assert importlib.metadata.version("daskshare") == PROJECT["version"]


def test_licence_is_the_one_that_pyproject_names():
    text = (ROOT / "LICENSE").read_text("utf-8")
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def _markdown() -> list[Path]:
    return [*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md")]


@pytest.mark.parametrize("page", _markdown(), ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    text = page.read_text("utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if "://" not in target and not target.startswith("mailto:"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", _markdown(), ids=lambda page: page.name)
def test_python_in_the_pages_compiles(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL):
        compile(block, page.name, "exec")


@pytest.mark.parametrize("page", _markdown(), ids=lambda page: page.name)
def test_make_targets_and_options_in_the_pages_exist(page):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for target in re.findall(r"`make ([a-z]+)", page.read_text("utf-8")):
        assert target in targets, f"{page.name} names make {target}"


def test_ci_runs_tests_demo_docs_and_lint():
    text = (ROOT / ".ci" / "run").read_text("utf-8")
    assert "set -euo pipefail" in text
    steps = re.findall(r"^step (\w+) (.*)$", text, re.MULTILINE)
    assert [name for name, _ in steps] == ["packages", "install", "test", "demo", "docs", "lint"]
    assert dict(steps)["test"] == "make test"
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")], check=True)


def test_make_venv_pins_the_torch_of_the_constraints():
    assert Version(make_venv.pinned_torch()) == constraints("cpu.txt")["torch"]
    first, second = make_venv.cpu_torch_commands("2.13.0", "https://example.invalid/cpu")
    assert "torch==2.13.0+cpu" in first
    assert "--index-url" not in first
    assert second[: len(first)] == first
    assert "https://example.invalid/cpu" in second


@pytest.mark.parametrize(
    ("choice", "system", "driver", "expected"),
    [
        ("auto", "linux", None, False),
        ("auto", "linux", 580, True),
        ("auto", "linux", 575, False),
        ("auto", "darwin", None, False),
        ("yes", "linux", None, True),
        ("no", "linux", 590, False),
    ],
)
def test_make_venv_chooses_the_gpu_extra(choice, system, driver, expected):
    assert make_venv.wants_gpu(choice, system, driver) is expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("echo 580.95.05; echo 580.95.05", 580),
        ("echo 'could not communicate with the driver'; exit 9", None),
        ("echo 'No devices were found'", None),
    ],
)
def test_make_venv_asks_the_driver(tmp_path, monkeypatch, body, expected):
    script = tmp_path / "nvidia-smi"
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert make_venv.driver_version() == expected
    script.unlink()
    assert make_venv.driver_version() is None


def test_an_old_python_is_told_which_one_to_use(tmp_path):
    source = (ROOT / "tools" / "make_venv.py").read_text("utf-8")
    old = tmp_path / "old.py"
    old.write_text(f"import sys\nsys.version_info = (3, 10, 13, 'final', 0)\n{source}")
    done = subprocess.run([sys.executable, old], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "is Python 3.10" in done.stderr
    assert "make PYTHON=" in done.stderr
    # Older interpreters must get as far as that message: no syntax that they cannot parse.
    ast.parse(source, feature_version=(3, 6))
    assert "from __future__ import annotations" not in source
