"""daskshare's options, read from Dask's configuration system into frozen dataclasses."""

from __future__ import annotations

import importlib.resources
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import dask.config
import yaml
from dask.utils import parse_bytes, parse_timedelta

from daskshare._malloc import MAX_RETAINED_BYTES
from daskshare.errors import ConfigurationError

__all__ = [
    "AllocatorOptions",
    "EngineOptions",
    "FlightOptions",
    "HostOptions",
    "ModelsOptions",
    "ShareOptions",
    "VideoOptions",
    "WorkerOptions",
]


def _load_defaults() -> None:
    text = importlib.resources.files("daskshare").joinpath("daskshare.yaml").read_text("utf-8")
    dask.config.update_defaults(yaml.safe_load(text))


_load_defaults()


def _get(name: str) -> Any:
    return dask.config.get(f"daskshare.{name}")


def _fail(name: str, got: Any, expected: str) -> ConfigurationError:
    return ConfigurationError(
        f"Dask configuration daskshare.{name} is {got!r}; expected {expected}. Set it with "
        f"dask.config.set({{'daskshare.{name}': ...}}) or in a YAML file in ~/.config/dask.",
        option=f"daskshare.{name}",
    )


def _seconds(name: str) -> float:
    got = _get(name)
    try:
        seconds = float(parse_timedelta(got, default="s"))
    except (TypeError, ValueError, KeyError, IndexError, AttributeError):
        raise _fail(name, got, "a duration such as '5ms' or 2.0 (seconds)") from None
    if not seconds >= 0:
        raise _fail(name, got, "a duration of zero or more")
    return seconds


def _integer(name: str, *, minimum: int = 1) -> int:
    got = _get(name)
    if isinstance(got, bool) or not isinstance(got, int) or got < minimum:
        raise _fail(name, got, f"an integer >= {minimum}")
    return got


def _num_bytes(got: Any) -> int:
    try:  # A float is a mistaken fraction.
        return 0 if isinstance(got, (bool, float)) else int(parse_bytes(got))
    except (TypeError, ValueError, AttributeError):
        return 0


def _text(name: str) -> str | None:
    got = _get(name)
    if got is not None and (not isinstance(got, str) or not got):
        raise _fail(name, got, "a text, or null")
    return got


def _choice(name: str, choices: tuple[Any, ...]) -> Any:
    got = _get(name)
    for choice in choices:
        if got is choice or (isinstance(choice, str) and got == choice):
            return choice
    raise _fail(name, got, "one of " + ", ".join(repr(c) for c in choices))


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How an engine batches and runs one model.

    Parameters
    ----------
    max_batch_size : int or None
        Largest batch, frames; ``None`` takes the model's own.
    max_wait_seconds : float
        Longest time a frame waits for its batch to fill while the device is busy.
    slots : int
        Batches in flight at once.
    queue_batches : int
        Full batches that may wait before callers block.
    compile : {"auto", True, False}
        Whether to compile the forward pass; ``"auto"`` does so on CUDA devices.
    cuda_graphs : bool
        Whether to capture one CUDA graph for each batch size.
    """

    max_batch_size: int | None = None
    max_wait_seconds: float = 0.01
    slots: int = 3
    queue_batches: int = 4
    compile: str | bool = "auto"
    cuda_graphs: bool = True

    @classmethod
    def from_config(cls) -> Self:
        """Read the options from ``daskshare.engine`` in Dask's configuration.

        Raises
        ------
        ConfigurationError
            When a value has the wrong type or is out of range.
        """
        maximum = _get("engine.max-batch-size")
        return cls(
            max_batch_size=None if maximum is None else _integer("engine.max-batch-size"),
            max_wait_seconds=_seconds("engine.max-wait"),
            slots=_integer("engine.slots"),
            queue_batches=_integer("engine.queue-batches"),
            compile=_choice("engine.compile", ("auto", True, False)),
            cuda_graphs=_choice("engine.cuda-graphs", (True, False)),
        )


@dataclass(frozen=True, slots=True)
class ShareOptions:
    """How much of a device the models may take, and how they are loaded.

    Parameters
    ----------
    memory_limit : int or float
        Bytes (``int``), or a fraction of the device's memory (``float`` in (0, 1]).
    load_threads : int
        Models loading at once on one device.
    lease_timeout_seconds : float
        How long a load waits for a lease to end when models in use fill the budget.
    close_timeout_seconds : float
        Bound of a shutdown.
    """

    memory_limit: int | float = 0.8
    load_threads: int = 2
    close_timeout_seconds: float = 10.0
    lease_timeout_seconds: float = 60.0

    @classmethod
    def from_config(cls) -> Self:
        """Read the options from ``daskshare.share`` in Dask's configuration.

        Raises
        ------
        ConfigurationError
            When a value has the wrong type or is out of range.
        """
        got = _get("share.memory-limit")
        limit: int | float
        if isinstance(got, float) and 0 < got <= 1:
            limit = got
        else:
            limit = _num_bytes(got)
            if limit <= 1:
                raise _fail(
                    "share.memory-limit",
                    got,
                    "a fraction in (0, 1] or a number of bytes such as '20 GiB'",
                )
        return cls(
            memory_limit=limit,
            load_threads=_integer("share.load-threads"),
            close_timeout_seconds=_seconds("share.close-timeout"),
            lease_timeout_seconds=_seconds("share.lease-timeout"),
        )

    def budget_bytes(self, total_bytes: int) -> int:
        """Bytes that models may take on a device of ``total_bytes``."""
        if isinstance(self.memory_limit, float):
            return int(total_bytes * self.memory_limit)
        return self.memory_limit


@dataclass(frozen=True, slots=True)
class VideoOptions:
    """How video is cut and decoded.

    Parameters
    ----------
    chunk_seconds : float
        Aim for a chunk's length.
    frames_per_request : int
        Decoded frames handed to the engine at a time.
    requests_in_flight : int
        Requests that one task keeps waiting, so that decoding overlaps with inference.
    decoder : {"auto", "nvdec", "pyav"}
        ``"auto"`` takes NVDEC where the chip and the stream allow it, else PyAV.
    decoder_sessions : int or None
        Chunks that NVDEC decodes at once on a GPU; None: as many as its engines need.
    """

    chunk_seconds: float = 10.0
    frames_per_request: int = 32
    requests_in_flight: int = 1
    decoder: str = "auto"
    decoder_sessions: int | None = None

    @classmethod
    def from_config(cls) -> Self:
        """Read the options from ``daskshare.video`` in Dask's configuration.

        Raises
        ------
        ConfigurationError
            When a value has the wrong type or is out of range.
        """
        sessions = _get("video.decoder-sessions")
        return cls(
            chunk_seconds=_seconds("video.chunk-duration"),
            frames_per_request=_integer("video.frames-per-request"),
            requests_in_flight=_integer("video.requests-in-flight"),
            decoder=_choice("video.decoder", ("auto", "nvdec", "pyav")),
            decoder_sessions=None if sessions is None else _integer("video.decoder-sessions"),
        )


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """How a Dask worker runs its models.

    Parameters
    ----------
    torch_threads : int or None
        Threads that torch computes with on a worker without a GPU; ``None``: as many as the
        worker has task threads, and no more than the cores that the process may use.
    retain_memory_bytes : int or None
        What malloc keeps of freed memory on a worker without a GPU; ``None``: as Dask set it.
    profile_interval_seconds : float or None
        How often Dask's profiler looks at the tasks of a GPU's worker, at most; ``None``: as Dask
        is configured.
    freeze_imports : bool
        Whether Python's searches for garbage leave out what a GPU's worker process has imported
        when it starts.
    """

    torch_threads: int | None = None
    retain_memory_bytes: int | None = 64 * 2**20
    profile_interval_seconds: float | None = 0.1
    freeze_imports: bool = True

    @classmethod
    def from_config(cls) -> Self:
        """Read the options from ``daskshare.worker`` in Dask's configuration.

        Raises
        ------
        ConfigurationError
            When a value has the wrong type or is out of range.
        """
        threads = _get("worker.torch-threads")
        got = _get("worker.retain-memory")
        retained = None if got is None else _num_bytes(got)
        if retained is not None and not 1 < retained <= MAX_RETAINED_BYTES:
            raise _fail("worker.retain-memory", got, "bytes below 2 GiB such as '64 MiB', or null")
        interval = _get("worker.profile-interval")
        return cls(
            torch_threads=None if threads is None else _integer("worker.torch-threads"),
            retain_memory_bytes=retained,
            profile_interval_seconds=None
            if interval is None
            else _seconds("worker.profile-interval"),
            freeze_imports=_choice("worker.freeze-imports", (True, False)),
        )


@dataclass(frozen=True, slots=True)
class HostOptions:
    """How processes that are no Dask workers use a device's models.

    Parameters
    ----------
    serve : bool
        Whether a Dask worker lets other processes of its machine and user use its models.
    directory : str or None
        Folder of the sockets; ``None``: ``/tmp/daskshare-<user id>``.
    idle_timeout_seconds : float
        How long a host that was started on demand outlives its last connection.
    start_timeout_seconds : float
        How long to wait for one to start.
    allow_code : bool
        Whether processes of the same user may hand over models as pickled code.
    window : int
        Requests that one connection may have in flight.
    extensions : tuple of str
        Modules that add operations to a host.
    """

    serve: bool = True
    directory: str | None = None
    idle_timeout_seconds: float = 20.0
    start_timeout_seconds: float = 30.0
    allow_code: bool = True
    window: int = 8
    extensions: tuple[str, ...] = ("daskshare.results.hosted",)

    @classmethod
    def from_config(cls) -> Self:
        """Read the options from ``daskshare.host`` in Dask's configuration.

        Raises
        ------
        ConfigurationError
            When a value has the wrong type or is out of range.
        """
        extensions = _get("host.extensions")
        if not isinstance(extensions, (list, tuple)) or not all(
            isinstance(name, str) for name in extensions
        ):
            raise _fail("host.extensions", extensions, "a list of names of modules")
        return cls(
            serve=_choice("host.serve", (True, False)),
            directory=_text("host.directory"),
            idle_timeout_seconds=_seconds("host.idle-timeout"),
            start_timeout_seconds=_seconds("host.start-timeout"),
            allow_code=_choice("host.allow-code", (True, False)),
            window=_integer("host.window"),
            extensions=tuple(extensions),
        )


@dataclass(frozen=True, slots=True)
class FlightOptions:
    """How processes on other machines use the models of Dask workers.

    Parameters
    ----------
    port : int or None
        Of a worker's endpoint; ``None``: there is none; 0: any free one.
    host : str or None
        Address that it listens at; ``None``: the worker's own.
    token : str or None
        What clients must show.
    tls_certificate, tls_key : str or None
        PEM files of the endpoint.
    tls_ca : str or None
        PEM file by which clients know the endpoints.
    allow_code : bool
        Whether clients may hand over models as pickled code.
    timeout_seconds : float
        For finding and reaching an endpoint.
    """

    port: int | None = None
    host: str | None = None
    token: str | None = field(default=None, repr=False)
    tls_certificate: str | None = None
    tls_key: str | None = None
    tls_ca: str | None = None
    allow_code: bool = False
    timeout_seconds: float = 5.0

    @classmethod
    def from_config(cls) -> Self:
        """Read the options from ``daskshare.flight`` in Dask's configuration.

        Raises
        ------
        ConfigurationError
            When a value has the wrong type or is out of range, or only one of certificate and key
            is given.
        """
        port = None if _get("flight.port") is None else _integer("flight.port", minimum=0)
        if port is not None and port > 65535:
            raise _fail("flight.port", port, "a port up to 65535")
        options = cls(
            port=port,
            host=_text("flight.host"),
            token=_text("flight.token"),
            tls_certificate=_text("flight.tls-certificate"),
            tls_key=_text("flight.tls-key"),
            tls_ca=_text("flight.tls-ca"),
            allow_code=_choice("flight.allow-code", (True, False)),
            timeout_seconds=_seconds("flight.timeout"),
        )
        if (options.tls_certificate is None) != (options.tls_key is None):
            raise _fail("flight.tls-key", options.tls_key, "certificate and key, or neither")
        return options


@dataclass(frozen=True, slots=True)
class AllocatorOptions:
    """How the scheduler places models and sends tasks to them.

    Parameters
    ----------
    enabled : bool
        Whether it does; otherwise Dask decides where tasks run, and each loads what it needs.
    placement : {"auto", "spread", "pack"}
        How many copies of a model there are: as many as its tasks need, one on each device, or as
        few as possible.
    cpu_execution : {"auto", True, False}
        Whether workers without a GPU run models; ``"auto"``: as long as no worker has one.
    start_timeout_seconds : float
        How long a worker may take to report its device before it counts as failed.
    load_timeout_seconds : float
        How long loading a model may take.
    """

    enabled: bool = True
    placement: Literal["auto", "spread", "pack"] = "auto"
    cpu_execution: str | bool = "auto"
    start_timeout_seconds: float = 120.0
    load_timeout_seconds: float = 900.0

    @classmethod
    def from_config(cls) -> Self:
        """Read the options from ``daskshare.allocator`` in Dask's configuration.

        Raises
        ------
        ConfigurationError
            When a value has the wrong type or is out of range.
        """
        return cls(
            enabled=_choice("allocator.enabled", (True, False)),
            placement=_choice("allocator.placement", ("auto", "spread", "pack")),
            cpu_execution=_choice("allocator.cpu-execution", ("auto", True, False)),
            start_timeout_seconds=_seconds("allocator.start-timeout"),
            load_timeout_seconds=_seconds("allocator.load-timeout"),
        )


@dataclass(frozen=True, slots=True)
class ModelsOptions:
    """How models are made fast.

    Parameters
    ----------
    fused_kernels : {"auto", True, False}
        What compiling means on a GPU: ``"auto"`` takes fused kernels where they can run and
        ``torch.compile`` elsewhere; ``True`` takes nothing else; ``False`` takes ``torch.compile``.
    """

    fused_kernels: str | bool = "auto"

    @classmethod
    def from_config(cls) -> Self:
        """Read the options from ``daskshare.models`` in Dask's configuration.

        Raises
        ------
        ConfigurationError
            When a value has the wrong type or is out of range.
        """
        return cls(fused_kernels=_choice("models.fused-kernels", ("auto", True, False)))
