"""What `daskshare doctor` knows about a machine, and what it says. Plain data, no probing."""

from __future__ import annotations

import enum
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Check", "Gpu", "Machine", "Requirement", "Status"]


class Status(enum.StrEnum):
    """How a check came out, best first."""

    OK = "ok"
    #: Not there, and nothing that was asked for needs it.
    ABSENT = "absent"
    #: Works, but slower or with less than it could.
    WARNING = "warning"
    #: Something will fail.
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report.

    Parameters
    ----------
    name : str
        What was looked at.
    status : Status
        How it came out.
    found : str
        What is there.
    fix : str
        What to do about it; ``""`` where nothing is to be done.
    """

    name: str
    status: Status
    found: str
    fix: str = ""

    def as_dict(self) -> dict[str, str]:
        """JSON-able."""
        return {**asdict(self), "status": str(self.status)}


@dataclass(frozen=True, slots=True)
class Requirement:
    """What an installed package asks of another one.

    Parameters
    ----------
    owner : str
        Package that asks.
    name : str
        Package that it asks for, in lower case with hyphens.
    versions : str
        PEP 440 specifiers, such as ``"<3.10,>=3.1"``; ``""`` accepts any.
    """

    owner: str
    name: str
    versions: str


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU as the driver, or CUDA in this process, names it.

    Parameters
    ----------
    name : str
        For people.
    total_bytes : int
        All of its memory.
    decodes : dict of str to str
        By codec (FFmpeg's names): why NVDEC does not decode ordinary 1080p video of it, or ``""``
        when it does. Empty where that was not asked.
    """

    name: str
    total_bytes: int
    decodes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What was found out about a machine; made by :func:`daskshare.doctor.probe.probe_machine`.

    Parameters
    ----------
    python : str
        Version of the interpreter.
    system, architecture : str
        As ``sys.platform`` and ``platform.machine()`` say.
    cores : int
        CPU cores that this process may use.
    memory_bytes : int
        Main memory.
    packages : dict of str to str
        Versions of the installed packages, by name in lower case with hyphens.
    requirements : tuple of Requirement
        What daskshare, Dask's packages and dask-cuda ask for on this machine.
    imports : dict of str to str
        By module: why importing it failed, or ``""``. Only modules of installed packages.
    driver : str
        Version of NVIDIA's driver, or ``""``.
    driver_problem : str
        What nvidia-smi said when it failed, or ``""``.
    driver_gpus : tuple of Gpu
        GPUs that the driver names.
    visible_devices : str or None
        Environment variable ``CUDA_VISIBLE_DEVICES``.
    torch_cuda : str
        CUDA version of torch's build, ``""`` for a CPU build.
    gpus : tuple of Gpu
        GPUs that torch can use in this process.
    cuda_problem : str
        Why torch could not start CUDA, or ``""``.
    cupy_problem : str
        Why CuPy could not compile and run a kernel, or ``""``; only tried with a GPU.
    compiler : str
        Path of a C compiler, or ``""``.
    java : str
        Version of Java, or ``""``.
    java_problem : str
        Why ``java`` did not run, or ``""``.
    h264_encoder : bool
        Whether PyAV can write H.264.
    config_problems : tuple of str
        What is wrong with ``daskshare`` in Dask's configuration.
    cache_folder : str
        Where downloaded weights lie.
    cache_problem : str
        Why it cannot be written, or ``""``.
    """

    python: str
    system: str
    architecture: str
    cores: int
    memory_bytes: int
    packages: dict[str, str] = field(default_factory=dict)
    requirements: tuple[Requirement, ...] = ()
    imports: dict[str, str] = field(default_factory=dict)
    driver: str = ""
    driver_problem: str = ""
    driver_gpus: tuple[Gpu, ...] = ()
    visible_devices: str | None = None
    torch_cuda: str = ""
    gpus: tuple[Gpu, ...] = ()
    cuda_problem: str = ""
    cupy_problem: str = ""
    compiler: str = ""
    java: str = ""
    java_problem: str = ""
    h264_encoder: bool = True
    config_problems: tuple[str, ...] = ()
    cache_folder: str = ""
    cache_problem: str = ""

    @property
    def has_gpu(self) -> bool:
        """Whether there is a GPU, usable or not."""
        return bool(self.driver_gpus or self.gpus)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)
