"""Look at this machine. Nothing here judges; :mod:`daskshare.doctor.checks` does."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement as ParsedRequirement
from packaging.utils import canonicalize_name

from daskshare.doctor.findings import Gpu, Machine, Requirement

__all__ = ["installed_packages", "probe_machine"]

#: Whose demands are compared with what is installed.
_OWNERS = ("daskshare", "dask", "distributed", "dask-cuda", "rapids-dask-dependency")

#: Modules that must load, with the packages that bring them.
_MODULES = {
    "av": "av",
    "cv2": "opencv-python-headless",
    "torch": "torch",
    "triton": "triton",
    "dask_cuda": "dask-cuda",
    "cupy": "cupy",
}

_COMMAND_SECONDS = 30.0
_CODECS = ("h264", "hevc", "vp9", "av1")
_KERNEL = 'extern "C" __global__ void daskshare_doctor(int* out) { out[0] = 42; }'


def probe_machine() -> Machine:
    """Find out what this machine has.

    Returns
    -------
    Machine

    Notes
    -----
    Runs in the calling process, takes some seconds: imports torch, starts CUDA where there is a
    GPU, compiles one kernel there, and runs ``nvidia-smi`` and ``java -version``.
    """
    import psutil
    from dask.system import CPU_COUNT

    from daskshare.models.fetch import cache_directory

    packages = installed_packages()
    imports = {
        module: _import_problem(module)
        for module, package in _MODULES.items()
        if any(name == package or name.startswith(f"{package}-") for name in packages)
    }
    driver, driver_problem, driver_gpus = _driver()
    torch_cuda, gpus, cuda_problem = _cuda(imports)
    java, java_problem = _java()
    cache = cache_directory()
    return Machine(
        python=platform.python_version(),
        system=sys.platform,
        architecture=platform.machine(),
        cores=CPU_COUNT,
        memory_bytes=int(psutil.virtual_memory().total),
        packages=packages,
        requirements=tuple(_requirements()),
        imports=imports,
        driver=driver,
        driver_problem=driver_problem,
        driver_gpus=driver_gpus,
        visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
        torch_cuda=torch_cuda,
        gpus=gpus,
        cuda_problem=cuda_problem,
        cupy_problem=_cupy_problem() if gpus and imports.get("cupy") == "" else "",
        compiler=_compiler(),
        java=java,
        java_problem=java_problem,
        h264_encoder=_writes_h264() if imports.get("av") == "" else False,
        config_problems=tuple(_config_problems()),
        cache_folder=str(cache),
        cache_problem=_write_problem(cache),
    )


def installed_packages() -> dict[str, str]:
    """Versions of all installed packages, by name in lower case with hyphens; imports none."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        # Of two on the path the first is the one that is imported.
        if name:
            found.setdefault(str(canonicalize_name(name)), distribution.version)
    return dict(sorted(found.items()))


def _requirements() -> Iterator[Requirement]:
    for owner in _OWNERS:
        try:
            lines = importlib.metadata.requires(owner) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for line in lines:
            wanted = ParsedRequirement(line)
            if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
                yield Requirement(owner, str(canonicalize_name(wanted.name)), str(wanted.specifier))


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _import_problem(module: str) -> str:
    try:
        importlib.import_module(module)
    # A broken build fails with whatever its libraries make of it; all of it is the finding.
    except Exception as error:
        return f"{type(error).__name__}: {_one_line(error)}"
    return ""


def _run(*command: str) -> tuple[int, str]:
    """Exit status and all output of a command; 127 when it cannot be started."""
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=_COMMAND_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return 124, f"no answer within {_COMMAND_SECONDS:g} s"
    except OSError as error:
        return 127, str(error)
    return done.returncode, done.stdout.strip()


def _driver() -> tuple[str, str, tuple[Gpu, ...]]:
    """Driver, what is wrong with it, and the GPUs that it knows."""
    if shutil.which("nvidia-smi") is None:
        return "", "", ()
    query = "--query-gpu=driver_version,memory.total,name"
    status, output = _run("nvidia-smi", query, "--format=csv,noheader,nounits")
    if status != 0:
        return "", (output.splitlines() or [f"status {status}"])[0], ()
    gpus = []
    driver = ""
    for line in output.splitlines():
        fields = [field.strip() for field in line.split(",", 2)]
        if len(fields) == 3:
            driver = fields[0]
            # Where memory is one with the host's, it says [N/A].
            mebibytes = int(fields[1]) if fields[1].isdigit() else 0
            gpus.append(Gpu(fields[2], mebibytes * 2**20))
    return driver, "" if gpus else output.partition("\n")[0], tuple(gpus)


def _cuda(imports: dict[str, str]) -> tuple[str, tuple[Gpu, ...], str]:
    """CUDA of torch's build, the GPUs that it can use, and why it cannot."""
    if imports.get("torch") != "":
        return "", (), ""
    import torch

    from daskshare.device import list_devices

    build = str(torch.version.cuda or "")
    if not build or not torch.cuda.is_available():
        return build, (), ""
    try:
        devices = list_devices()
        torch.zeros(1, device="cuda").add_(1).cpu()
    except RuntimeError as error:
        return build, (), _one_line(error)
    return (
        build,
        tuple(Gpu(d.name, d.total_bytes, _decodes(d, imports)) for d in devices),
        "",
    )


def _decodes(device: object, imports: dict[str, str]) -> dict[str, str]:
    from daskshare.device import Device
    from daskshare.video.chunk import VideoChunk
    from daskshare.video.nvdec import refusal

    assert isinstance(device, Device)
    return {
        codec: refusal(
            VideoChunk(
                video="", index=0, codec=codec, pixel_format="yuv420p", width=1920, height=1080
            ),
            device,
        )
        for codec in _CODECS
    }


def _cupy_problem() -> str:
    try:
        import cupy

        out = cupy.zeros(1, dtype=cupy.int32)
        cupy.RawKernel(_KERNEL, "daskshare_doctor")((1,), (1,), (out,))
        got = int(out[0])
    # CuPy's compiler and driver errors have no root of their own.
    except Exception as error:
        return f"{type(error).__name__}: {_one_line(error)}"
    return "" if got == 42 else f"a kernel wrote {got} where 42 was expected"


def _compiler() -> str:
    named = os.environ.get("CC")
    for name in (named, "gcc", "clang", "cc"):
        path = shutil.which(name) if name else None
        if path:
            return path
    return ""


def _java() -> tuple[str, str]:
    """Version of the Java that Spark would start, and what is wrong with it."""
    home = os.environ.get("JAVA_HOME")
    command = str(Path(home) / "bin" / "java") if home else shutil.which("java")
    if command is None:
        return "", ""
    status, output = _run(command, "-version")
    version = re.search(r'version "([0-9][^"]*)"', output)
    if status == 0 and version:
        return version.group(1), ""
    return "", (output.splitlines() or [f"status {status}"])[0]


def _writes_h264() -> bool:
    import av

    return "libx264" in av.codecs_available


def _config_problems() -> Iterator[str]:
    from daskshare import config
    from daskshare.errors import ConfigurationError
    from daskshare.option_names import check_option_names

    owners = [getattr(config, n).from_config for n in config.__all__ if n.endswith("Options")]
    for check in (check_option_names, *owners):
        try:
            check()
        except ConfigurationError as error:
            yield str(error)


def _write_problem(folder: Path) -> str:
    # A folder that is not there yet is made where its nearest existing parent allows it.
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            return ""
    except OSError as error:
        return str(error)
