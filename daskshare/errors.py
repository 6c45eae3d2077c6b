"""Every exception that daskshare raises, on one page.

Dask moves exceptions between processes by pickling them, so each class keeps its constructor's
keyword arguments as attributes and rebuilds itself from them. A message always says what was got,
what was expected and what to do.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "ChecksumError",
    "ConfigurationError",
    "DarknetConfigError",
    "DaskshareError",
    "DownloadError",
    "EngineClosedError",
    "EngineDiedError",
    "HostError",
    "InferenceError",
    "InvalidInputError",
    "ModelError",
    "ModelLoadError",
    "ModelTooLargeError",
    "NotOnWorkerError",
    "OutOfDeviceMemoryError",
    "OutputError",
    "PlacementError",
    "RemoteCodeError",
    "TruncatedVideoError",
    "UnreadableVideoError",
    "VideoError",
    "WeightsError",
]


def _rebuild(cls: type[DaskshareError], message: str, fields: dict[str, Any]) -> DaskshareError:
    return cls(message, **fields)


class DaskshareError(Exception):
    """Root of daskshare's exceptions.

    Parameters
    ----------
    message : str
        What was got, what was expected, what to do.
    **fields
        Machine-readable details, kept as attributes; they must be picklable.
    """

    def __init__(self, message: str, **fields: Any) -> None:
        super().__init__(message)
        self.fields = fields
        for name, value in fields.items():
            setattr(self, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception's own __reduce__ would call cls(message) and lose the keyword arguments.
        state = {k: v for k, v in self.__dict__.items() if k not in self.fields and k != "fields"}
        return _rebuild, (type(self), str(self), self.fields), state or None


class ConfigurationError(DaskshareError, ValueError):
    """An option, a configuration value or a name is wrong."""


class InvalidInputError(DaskshareError, ValueError):
    """What was handed to a model has a wrong shape, dtype or device."""


class NotOnWorkerError(DaskshareError, RuntimeError):
    """A shared model was called where no daskshare worker runs."""


class ModelError(DaskshareError):
    """A model could not be described, fetched, read or loaded."""


class DarknetConfigError(ModelError, ConfigurationError):
    """A Darknet cfg file is wrong; fields ``path``, ``line`` (1-based) and ``section``."""


class WeightsError(ModelError, ValueError):
    """A weights file does not fit its network; ``path``, ``got_bytes``, ``expected_bytes``."""


class DownloadError(ModelError, OSError):
    """Weights could not be downloaded; fields ``name``, ``path`` (where to put the file)."""


class ChecksumError(DownloadError):
    """A file is not the one expected; fields ``path``, ``got_sha256``, ``expected_sha256``."""


class ModelLoadError(ModelError, RuntimeError):
    """Loading failed; fields ``model``, ``device``, and the cause's text in ``reason``."""


class ModelTooLargeError(ModelError):
    """A model exceeds the device's byte budget; fields ``needed_bytes``, ``budget_bytes``."""


class PlacementError(DaskshareError, AssertionError):
    """The allocator's books contradict themselves; ``problems`` is a list of sentences."""


class InferenceError(DaskshareError, RuntimeError):
    """The model failed on a frame; fields ``model``, ``frame`` (index in the caller's request)."""


class OutOfDeviceMemoryError(InferenceError):
    """Device memory ran out even for the smallest batch."""


class EngineDiedError(InferenceError):
    """The engine's thread died; the next call rebuilds the engine. Field ``reason``."""


class EngineClosedError(InferenceError):
    """The engine was closed while the call waited, or before it."""


class HostError(DaskshareError, RuntimeError):
    """The process that owns a device's models cannot be reached or started; field ``address``."""


class RemoteCodeError(DaskshareError, RuntimeError):
    """Code of the caller's failed in another process; ``type`` and ``traceback`` are its own."""


class VideoError(DaskshareError):
    """A video could not be read as expected; field ``video``."""


class UnreadableVideoError(VideoError):
    """A file is missing, is no video or has no video stream."""


class TruncatedVideoError(VideoError):
    """A video ends early or is damaged; fields ``got_frames``, ``expected_frames``."""


class OutputError(DaskshareError, OSError):
    """Results could not be written, or an output folder holds something else."""
