"""From findings to a report. Pure: the same findings give the same report on any machine."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from daskshare.doctor.findings import Check, Gpu, Machine, Status

__all__ = ["NEEDS", "diagnose", "exit_status", "worst"]

#: What a caller may insist on: an absence is then an error.
NEEDS = ("gpu", "nvdec", "spark", "jupyter")

#: First driver series that runs a CUDA major version.
_MINIMUM_DRIVER = {13: 580, 12: 525, 11: 450}

#: Java releases that run a pyspark of less than this version.
_SPARK_JAVAS = (("4", (8, 11, 17)), ("4.1", (17, 21)), ("5", (17, 21, 25)))

_ORDER = (Status.OK, Status.ABSENT, Status.WARNING, Status.ERROR)


def diagnose(machine: Machine, *, needs: Collection[str] = ()) -> list[Check]:
    """Judge what was found on a machine.

    Parameters
    ----------
    machine : Machine
        From :func:`daskshare.doctor.probe.probe_machine`.
    needs : collection of str
        Of :data:`NEEDS`: what must be there; anything else may be absent.

    Returns
    -------
    list of Check
        In a fixed order, from the interpreter up.
    """
    return [
        *_versions(machine),
        *_imports(machine),
        *_doubles(machine),
        *_video_writer(machine),
        *_gpu(machine, required="gpu" in needs or "nvdec" in needs),
        *_nvdec(machine, required="nvdec" in needs),
        _spark(machine, required="spark" in needs),
        _jupyter(machine, required="jupyter" in needs),
        *_settings(machine),
    ]


def worst(checks: Collection[Check]) -> Status:
    """The least favourable status among checks."""
    return max((check.status for check in checks), key=_ORDER.index, default=Status.OK)


def exit_status(checks: Collection[Check], *, strict: bool = False) -> int:
    """1 when something will fail (or, if strict, could be better), else 0."""
    return int(worst(checks) in ((Status.WARNING, Status.ERROR) if strict else (Status.ERROR,)))


def _versions(machine: Machine) -> Iterator[Check]:
    where = f"{machine.python} on {machine.system} {machine.architecture}"
    supported = Version("3.11") <= Version(machine.python) < Version("3.14")
    yield Check(
        "python",
        Status.OK if supported else Status.ERROR,
        f"{where}, {machine.cores} cores, {machine.memory_bytes / 2**30:.0f} GiB",
        "" if supported else "Use Python 3.11, 3.12 or 3.13.",
    )
    own = machine.packages.get("daskshare", "")
    yield Check(
        "daskshare",
        Status.OK if own else Status.WARNING,
        own or "a source tree that was never installed",
        "" if own else "pip install -e . in it, so that versions can be compared.",
    )
    clashes = list(_clashes(machine))
    yield from clashes
    if not clashes:
        shown = ("dask", "distributed", "dask-cuda", "bokeh", "torch", "pyarrow", "pandas", "numpy")
        found = [f"{n} {machine.packages[n]}" for n in shown if n in machine.packages]
        yield Check("versions", Status.OK, ", ".join(found))


def _clashes(machine: Machine) -> Iterator[Check]:
    for wanted in machine.requirements:
        installed = machine.packages.get(wanted.name)
        if installed is None:
            if wanted.owner == "daskshare":
                yield Check(
                    wanted.name,
                    Status.ERROR,
                    f"not installed; daskshare needs it ({wanted.versions or 'any version'})",
                    f"pip install '{wanted.name}{wanted.versions}'",
                )
        elif not SpecifierSet(wanted.versions).contains(installed, prereleases=True):
            yield Check(
                wanted.name,
                Status.ERROR,
                f"{installed}; {wanted.owner} needs {wanted.versions}",
                f"pip install '{wanted.name}{wanted.versions}'; the same on scheduler, workers "
                "and client.",
            )


def _imports(machine: Machine) -> Iterator[Check]:
    fixes = {
        "av": "pip install --force-reinstall av",
        "cv2": "pip uninstall opencv-python opencv-contrib-python; "
        "pip install --force-reinstall opencv-python-headless",
        "torch": "Install torch anew, for a CPU or for this machine's CUDA (README, Install).",
        "dask_cuda": "pip install 'dask-cuda[cu13]==26.10.*'; without its extra it lacks CUDA's "
        "bindings.",
    }
    packages = {
        "av": "PyAV",
        "cv2": "OpenCV",
        "torch": "torch",
        "dask_cuda": "dask-cuda",
    }
    for module, label in packages.items():
        problem = machine.imports.get(module)
        if problem:
            # dask-cuda without a GPU cannot be used, and need not.
            idle = module == "dask_cuda" and not machine.has_gpu
            yield Check(
                label,
                Status.ABSENT if idle else Status.ERROR,
                f"cannot be imported: {problem}",
                "" if idle else fixes[module],
            )
        elif problem is not None and module in ("av", "cv2"):
            name = {"av": "av", "cv2": "opencv-python-headless"}[module]
            yield Check(label, Status.OK, machine.packages.get(name, "imported"))


def _doubles(machine: Machine) -> Iterator[Check]:
    for prefix, keep, status in (
        ("opencv-", "opencv-python-headless", Status.WARNING),
        ("cupy", "cupy-cuda13x", Status.ERROR),
    ):
        found = sorted(n for n in machine.packages if n.startswith(prefix))
        if len(found) > 1:
            yield Check(
                f"{prefix.rstrip('-')} builds",
                status,
                f"{' and '.join(found)} overwrite each other's files",
                f"pip uninstall {' '.join(found)}; pip install {keep}",
            )


def _video_writer(machine: Machine) -> Iterator[Check]:
    if machine.imports.get("av") != "":
        return
    if machine.h264_encoder:
        yield Check("H.264 writer", Status.OK, "libx264 in PyAV")
    else:
        yield Check(
            "H.264 writer",
            Status.WARNING,
            "PyAV was built without libx264: --annotate cannot write videos",
            "pip install --force-reinstall --only-binary=av av",
        )


def _memory(gpu: Gpu) -> str:
    return f"{gpu.name} ({gpu.total_bytes / 2**30:.0f} GiB)"


def _gpu(machine: Machine, *, required: bool) -> Iterator[Check]:
    if not machine.has_gpu:
        problem = machine.driver_problem
        said = f"; nvidia-smi says: {problem}" if problem else ""
        yield Check(
            "GPU",
            Status.ERROR if required else Status.WARNING if problem else Status.ABSENT,
            f"none: models run on the CPU{said}",
            "Install or reload NVIDIA's driver; in a container, start it with the GPUs."
            if problem or required
            else "",
        )
        return
    yield _cuda(machine)
    yield from _gpu_packages(machine)
    yield _compiler(machine)


def _cuda(machine: Machine) -> Check:
    """Whether torch can use the GPUs that are there, or the first reason why not."""
    driver = f", driver {machine.driver}" if machine.driver else ""
    if not machine.torch_cuda:
        there = ", ".join(map(_memory, machine.driver_gpus))
        if machine.imports.get("torch"):
            return Check("GPU", Status.ERROR, f"{there}, but no torch to use it", "See torch.")
        return Check(
            "GPU",
            Status.ERROR,
            f"{there}, but torch {machine.packages.get('torch', '')} is a build for CPUs",
            "pip install -c constraints/gpu.txt '.[gpu]' in a fresh environment.",
        )
    major = int(machine.torch_cuda.partition(".")[0])
    wanted = _MINIMUM_DRIVER.get(major)
    if machine.driver and wanted and int(machine.driver.partition(".")[0]) < wanted:
        return Check(
            "GPU",
            Status.ERROR,
            f"driver {machine.driver}; torch's CUDA {machine.torch_cuda} needs {wanted} or newer",
            f"Update the driver to {wanted} or newer, or install the packages for CUDA "
            f"{major - 1} by hand (README, Install).",
        )
    if not machine.gpus:
        if machine.visible_devices is not None:
            return Check(
                "GPU",
                Status.WARNING,
                f"{len(machine.driver_gpus)} hidden from this process by "
                f"CUDA_VISIBLE_DEVICES={machine.visible_devices!r}",
                "unset CUDA_VISIBLE_DEVICES, or name GPUs that exist.",
            )
        return Check(
            "GPU",
            Status.ERROR,
            f"torch cannot start CUDA: {machine.cuda_problem or 'it names no reason'}{driver}",
            "See nvidia-smi; after a driver update, reboot; in a container, mount the GPUs.",
        )
    count = f"{len(machine.gpus)} x " if len(machine.gpus) > 1 else ""
    names = sorted({_memory(gpu) for gpu in machine.gpus})
    return Check(
        "GPU", Status.OK, f"{count}{', '.join(names)}{driver}, torch for CUDA {machine.torch_cuda}"
    )


def _gpu_packages(machine: Machine) -> Iterator[Check]:
    cupy = next((n for n in sorted(machine.packages) if n.startswith("cupy")), None)
    major = machine.torch_cuda.partition(".")[0] or "13"
    cupy_fix = f"pip install 'cupy-cuda{major}x[ctk]'"
    if cupy is None or machine.imports.get("cupy"):
        reason = machine.imports.get("cupy")
        yield Check(
            "CuPy",
            Status.ERROR,
            f"cannot be imported: {reason}" if reason else "not installed; GPU models need it",
            cupy_fix,
        )
    elif cupy.startswith("cupy-cuda") and machine.torch_cuda and cupy != f"cupy-cuda{major}x":
        yield Check(
            "CuPy",
            Status.ERROR,
            f"{cupy} beside torch for CUDA {machine.torch_cuda}",
            f"pip uninstall {cupy}; {cupy_fix}",
        )
    elif machine.cupy_problem:
        yield Check(
            "CuPy",
            Status.ERROR,
            f"cannot compile or run a kernel: {machine.cupy_problem}",
            f"{cupy_fix}; without its extra it lacks CUDA's headers.",
        )
    else:
        yield Check("CuPy", Status.OK, f"{cupy} {machine.packages[cupy]}")
    if "dask-cuda" not in machine.packages:
        yield Check(
            "dask-cuda",
            Status.WARNING,
            "not installed: local_cluster() and daskshare detect cannot use the GPU",
            "pip install 'dask-cuda[cu13]==26.10.*'",
        )
    elif not machine.imports.get("dask_cuda"):
        yield Check("dask-cuda", Status.OK, machine.packages["dask-cuda"])


def _compiler(machine: Machine) -> Check:
    if machine.compiler and machine.imports.get("triton") == "":
        return Check("compiler", Status.OK, f"{machine.compiler}, Triton")
    missing = "Triton" if machine.compiler else "a C compiler"
    return Check(
        "compiler",
        Status.WARNING,
        f"no {missing.removeprefix('a ')}: models run uncompiled, at two thirds of the speed",
        "pip install triton" if machine.compiler else "apt-get install gcc (or set CC)",
    )


def _nvdec(machine: Machine, *, required: bool) -> Iterator[Check]:
    if not machine.gpus:
        if required:
            yield Check("NVDEC", Status.ERROR, "no GPU to decode with", "See GPU.")
        return
    # What only some of the GPUs decode is left out: a task may run on any.
    decoded = sorted(set.intersection(*(_decoded(gpu) for gpu in machine.gpus)))
    if decoded:
        yield Check("NVDEC", Status.OK, f"decodes {', '.join(decoded)}")
        return
    reasons = [why for gpu in machine.gpus for why in gpu.decodes.values() if why]
    reason = reasons[0] if reasons else "no codec was tried"
    installed = "pynvvideocodec" in machine.packages
    yield Check(
        "NVDEC",
        Status.ERROR if required else Status.WARNING,
        f"does not decode ({reason}): video is decoded on the CPU",
        "In a container, set NVIDIA_DRIVER_CAPABILITIES=compute,utility,video."
        if installed
        else "pip install pynvvideocodec",
    )


def _decoded(gpu: Gpu) -> set[str]:
    return {codec for codec, why in gpu.decodes.items() if not why}


def _spark(machine: Machine, *, required: bool) -> Check:
    pyspark = machine.packages.get("pyspark")
    absent = Status.ERROR if required else Status.ABSENT
    if pyspark is None:
        found = "pyspark is not installed" + (f"; Java {machine.java} is" if machine.java else "")
        return Check("Spark", absent, found, "pip install 'daskshare[spark]'" if required else "")
    wanted = next(
        (javas for below, javas in _SPARK_JAVAS if Version(pyspark) < Version(below)),
        _SPARK_JAVAS[-1][1],
    )
    java = " or ".join(map(str, wanted))
    if not machine.java:
        return Check(
            "Spark",
            absent,
            f"pyspark {pyspark}, but no Java ({machine.java_problem or 'not found'})",
            f"Install Java {java} (apt-get install openjdk-17-jre-headless) or set JAVA_HOME.",
        )
    parts = machine.java.split(".")
    major = int(parts[1] if parts[0] == "1" else parts[0])
    if major not in wanted:
        return Check(
            "Spark",
            Status.ERROR if required else Status.WARNING,
            f"pyspark {pyspark} with Java {machine.java}; it is made for Java {java}",
            f"Set JAVA_HOME to Java {java}.",
        )
    return Check("Spark", Status.OK, f"pyspark {pyspark}, Java {machine.java}")


def _jupyter(machine: Machine, *, required: bool) -> Check:
    names = ("jupyterlab", "ipywidgets", "dask-labextension")
    missing = [name for name in names if name not in machine.packages]
    if not missing:
        found = ", ".join(f"{name} {machine.packages[name]}" for name in names)
        return Check("Jupyter", Status.OK, found)
    return Check(
        "Jupyter",
        Status.ERROR if required else Status.ABSENT,
        f"without {', '.join(missing)}",
        "pip install 'daskshare[jupyter]'" if required else "",
    )


def _settings(machine: Machine) -> Iterator[Check]:
    for problem in machine.config_problems:
        yield Check("configuration", Status.ERROR, problem, "See the options in docs/howto.md.")
    if not machine.config_problems:
        yield Check("configuration", Status.OK, "daskshare's options are valid")
    if machine.cache_problem:
        yield Check(
            "weights",
            Status.WARNING,
            f"{machine.cache_folder} cannot be written: {machine.cache_problem}",
            "Set daskshare.models.cache-directory to a folder that can.",
        )
    else:
        yield Check("weights", Status.OK, f"downloads go to {machine.cache_folder}")
