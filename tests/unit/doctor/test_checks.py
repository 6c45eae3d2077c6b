"""What the doctor says about made-up machines."""

from __future__ import annotations

import dataclasses

import pytest

from daskshare.doctor.checks import diagnose, exit_status, worst
from daskshare.doctor.findings import Check, Gpu, Machine, Requirement, Status

H200 = Gpu("NVIDIA H200", 141 * 2**30, {"h264": "", "hevc": ""})
CPU = Machine(
    python="3.11.7",
    system="linux",
    architecture="x86_64",
    cores=8,
    memory_bytes=32 * 2**30,
    packages={
        "daskshare": "0.1.0",
        "dask": "2026.7.1",
        "bokeh": "3.9.2",
        "torch": "2.13.0+cpu",
        "av": "18.1.0",
        "opencv-python-headless": "5.0.0.93",
    },
    requirements=(
        Requirement("daskshare", "dask", "==2026.7.1"),
        Requirement("daskshare", "bokeh", "<3.10,>=3.1"),
    ),
    imports={"av": "", "cv2": "", "torch": ""},
    cache_folder="/cache",
)
GPU = dataclasses.replace(
    CPU,
    packages={
        **CPU.packages,
        "torch": "2.13.0",
        "cupy-cuda13x": "14.0.1",
        "dask-cuda": "26.10.0",
        "pynvvideocodec": "2.2.0",
    },
    imports={**CPU.imports, "cupy": "", "dask_cuda": "", "triton": ""},
    driver="580.95.05",
    driver_gpus=(Gpu("NVIDIA H200", 141 * 2**30),),
    torch_cuda="13.0",
    gpus=(H200,),
    compiler="/usr/bin/gcc",
)


def change(machine: Machine, *, packages=None, imports=None, **changes) -> Machine:
    """A copy; packages and imports given as ``None`` are taken out."""

    def merged(before, after):
        both = {**before, **(after or {})}
        return {name: value for name, value in both.items() if value is not None}

    return dataclasses.replace(
        machine,
        packages=merged(machine.packages, packages),
        imports=merged(machine.imports, imports),
        **changes,
    )


def of(checks: list[Check], name: str) -> Check:
    found = [check for check in checks if check.name == name]
    assert len(found) == 1, [check.name for check in checks]
    return found[0]


def test_a_whole_cpu_machine():
    checks = diagnose(CPU)
    assert {c.name: c.status for c in checks} == {
        "python": Status.OK,
        "daskshare": Status.OK,
        "versions": Status.OK,
        "PyAV": Status.OK,
        "OpenCV": Status.OK,
        "H.264 writer": Status.OK,
        "GPU": Status.ABSENT,
        "Spark": Status.ABSENT,
        "Jupyter": Status.ABSENT,
        "configuration": Status.OK,
        "weights": Status.OK,
    }
    assert exit_status(checks, strict=True) == 0


def test_a_whole_gpu_machine():
    checks = diagnose(GPU, needs=["gpu", "nvdec"])
    assert worst([c for c in checks if c.name not in ("Spark", "Jupyter")]) is Status.OK
    assert of(checks, "GPU").found == (
        "NVIDIA H200 (141 GiB), driver 580.95.05, torch for CUDA 13.0"
    )
    assert of(checks, "NVDEC").found == "decodes h264, hevc"
    assert of(checks, "CuPy").found == "cupy-cuda13x 14.0.1"
    assert of(checks, "compiler").found == "/usr/bin/gcc, Triton"
    eight = of(diagnose(dataclasses.replace(GPU, gpus=(H200,) * 8)), "GPU")
    assert eight.found.startswith("8 x NVIDIA H200 (141 GiB)")


ERROR, WARNING, ABSENT, OK = Status.ERROR, Status.WARNING, Status.ABSENT, Status.OK
CASES = {
    "old python": (change(CPU, python="3.10.12"), "python", ERROR, "3.10", "3.11"),
    "new python": (change(CPU, python="3.14.0"), "python", ERROR, "3.14", "3.13"),
    "not installed": (
        change(CPU, packages={"daskshare": None}),
        *("daskshare", WARNING, "never installed", "pip install -e"),
    ),
    "bokeh clash": (
        change(CPU, packages={"bokeh": "3.10.1"}),
        *("bokeh", ERROR, "3.10.1; daskshare needs <3.10,>=3.1", "pip install 'bokeh<3.10,>=3.1'"),
    ),
    "dask missing": (
        change(CPU, packages={"dask": None}),
        *("dask", ERROR, "not installed; daskshare needs it", "pip install 'dask==2026.7.1'"),
    ),
    "dask-cuda's own clash": (
        change(GPU, requirements=(Requirement("dask-cuda", "dask", "==2026.8.0"),)),
        *("dask", ERROR, "2026.7.1; dask-cuda needs ==2026.8.0", "scheduler, workers"),
    ),
    "PyAV broken": (
        change(CPU, imports={"av": "ImportError: libavcodec.so.62"}),
        *("PyAV", ERROR, "libavcodec.so.62", "pip install --force-reinstall av"),
    ),
    "OpenCV needs libGL": (
        change(CPU, imports={"cv2": "ImportError: libGL.so.1"}),
        *("OpenCV", ERROR, "libGL.so.1", "opencv-python-headless"),
    ),
    "two OpenCVs": (
        change(CPU, packages={"opencv-python": "5.0"}),
        *("opencv builds", WARNING, "overwrite each other", "pip uninstall opencv-python "),
    ),
    "two CuPys": (
        change(GPU, packages={"cupy-cuda12x": "14.0"}),
        *("cupy builds", ERROR, "cupy-cuda12x and cupy-cuda13x", "pip uninstall cupy-cuda12x"),
    ),
    "no x264": (change(CPU, h264_encoder=False), "H.264 writer", WARNING, "libx264", "binary=av"),
    "driver does not answer": (
        change(CPU, driver_problem="NVIDIA-SMI has failed"),
        *("GPU", WARNING, "NVIDIA-SMI has failed", "driver"),
    ),
    "torch for CPUs on a GPU machine": (
        change(GPU, torch_cuda="", gpus=(), packages={"torch": "2.13.0+cpu"}),
        *("GPU", ERROR, "torch 2.13.0+cpu is a build for CPUs", "constraints/gpu.txt"),
    ),
    "no torch on a GPU machine": (
        change(GPU, torch_cuda="", gpus=(), imports={"torch": "OSError: libcudart"}),
        *("GPU", ERROR, "no torch", "torch"),
    ),
    "old driver": (
        change(GPU, driver="570.12", gpus=()),
        *("GPU", ERROR, "driver 570.12; torch's CUDA 13.0 needs 580", "CUDA 12 by hand"),
    ),
    "old driver that is new enough for CUDA 12": (
        change(GPU, driver="570.12", torch_cuda="12.8"),
        *("GPU", OK, "torch for CUDA 12.8", ""),
    ),
    "hidden": (
        change(GPU, gpus=(), visible_devices="-1"),
        *("GPU", WARNING, "CUDA_VISIBLE_DEVICES='-1'", "unset CUDA_VISIBLE_DEVICES"),
    ),
    "CUDA does not start": (
        change(GPU, gpus=(), cuda_problem="CUDA error 802"),
        *("GPU", ERROR, "CUDA error 802, driver 580", "reboot"),
    ),
    "no CuPy": (
        change(GPU, packages={"cupy-cuda13x": None}, imports={"cupy": None}),
        *("CuPy", ERROR, "not installed", "pip install 'cupy-cuda13x[ctk]'"),
    ),
    "CuPy broken": (
        change(GPU, imports={"cupy": "ImportError: libnvrtc"}),
        *("CuPy", ERROR, "libnvrtc", "cupy-cuda13x[ctk]"),
    ),
    "CuPy of another CUDA": (
        change(GPU, packages={"cupy-cuda13x": None, "cupy-cuda12x": "14.0"}),
        *("CuPy", ERROR, "cupy-cuda12x beside torch for CUDA 13.0", "uninstall cupy-cuda12x"),
    ),
    "CuPy without headers": (
        change(GPU, cupy_problem="cuda_fp16.h not found"),
        *("CuPy", ERROR, "cuda_fp16.h not found", "[ctk]"),
    ),
    "CuPy of conda": (
        change(GPU, packages={"cupy-cuda13x": None, "cupy": "14.0"}),
        *("CuPy", OK, "cupy 14.0", ""),
    ),
    "no dask-cuda": (
        change(GPU, packages={"dask-cuda": None}, imports={"dask_cuda": None}),
        *("dask-cuda", WARNING, "not installed", "dask-cuda[cu13]"),
    ),
    "dask-cuda without bindings": (
        change(GPU, imports={"dask_cuda": "ImportError: cannot import name 'bindings'"}),
        *("dask-cuda", ERROR, "bindings", "dask-cuda[cu13]"),
    ),
    "no compiler": (change(GPU, compiler=""), "compiler", WARNING, "no C compiler", "gcc"),
    "no Triton": (
        change(GPU, imports={"triton": None}),
        *("compiler", WARNING, "no Triton", "pip install triton"),
    ),
    "no capability video": (
        change(GPU, gpus=(Gpu("H200", 1, {"h264": "libnvcuvid.so.1 is missing"}),)),
        *("NVDEC", WARNING, "libnvcuvid.so.1 is missing", "compute,utility,video"),
    ),
    "no PyNvVideoCodec": (
        change(
            GPU,
            gpus=(Gpu("H200", 1, {"h264": "PyNvVideoCodec cannot be imported"}),),
            packages={"pynvvideocodec": None},
        ),
        *("NVDEC", WARNING, "decoded on the CPU", "pip install pynvvideocodec"),
    ),
    "one GPU of two decodes HEVC": (
        change(GPU, gpus=(H200, Gpu("old", 1, {"h264": "", "hevc": "not on this chip"}))),
        *("NVDEC", OK, "decodes h264", ""),
    ),
    "Spark without Java": (
        change(CPU, packages={"pyspark": "4.3.0"}),
        *("Spark", ABSENT, "no Java", "Install Java 17 or 21"),
    ),
    "Spark with an old Java": (
        change(CPU, packages={"pyspark": "4.0.4"}, java="11.0.21"),
        *("Spark", WARNING, "Java 11.0.21; it is made for Java 17 or 21", "JAVA_HOME"),
    ),
    "old Spark with Java 8": (
        change(CPU, packages={"pyspark": "3.5.9"}, java="1.8.0_392"),
        *("Spark", OK, "Java 1.8.0_392", ""),
    ),
    "Spark": (
        change(CPU, packages={"pyspark": "4.3.0"}, java="17.0.15"),
        *("Spark", OK, "pyspark 4.3.0, Java 17.0.15", ""),
    ),
    "Jupyter": (
        change(
            CPU,
            packages={"jupyterlab": "4.6", "ipywidgets": "8.1", "dask-labextension": "7.0"},
        ),
        *("Jupyter", OK, "dask-labextension 7.0", ""),
    ),
    "misspelt option": (
        change(CPU, config_problems=("daskshare.engine.max-wiat is unknown",)),
        *("configuration", ERROR, "max-wiat", "docs/howto.md"),
    ),
    "no room for weights": (
        change(CPU, cache_problem="Permission denied"),
        *("weights", WARNING, "/cache cannot be written: Permission denied", "cache-directory"),
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_each_finding_has_its_status_and_its_fix(case):
    machine, name, status, found, fix = case
    check = of(diagnose(machine), name)
    assert check.status is status
    assert found in check.found
    assert fix in check.fix
    assert bool(check.fix) is (bool(fix))


@pytest.mark.parametrize(
    ("need", "name"),
    [("gpu", "GPU"), ("nvdec", "NVDEC"), ("spark", "Spark"), ("jupyter", "Jupyter")],
)
def test_what_is_required_and_absent_is_an_error_with_a_fix(need, name):
    checks = diagnose(CPU, needs=[need])
    check = of(checks, name)
    assert check.status is Status.ERROR
    assert check.fix
    assert exit_status(checks) == 1


@pytest.mark.parametrize(
    ("status", "strict", "expected"),
    [
        (Status.OK, True, 0),
        (Status.ABSENT, True, 0),
        (Status.WARNING, False, 0),
        (Status.WARNING, True, 1),
        (Status.ERROR, False, 1),
    ],
)
def test_exit_status_tells(status, strict, expected):
    checks = [Check("a", Status.OK, ""), Check("b", status, "")]
    assert exit_status(checks, strict=strict) == expected
    assert worst(checks) is (status if status is not Status.OK else Status.OK)


def test_a_package_that_only_others_want_may_be_missing():
    machine = change(CPU, requirements=(Requirement("dask-cuda", "zict", ">=2"),))
    assert of(diagnose(machine), "versions").status is Status.OK
