"""What goes into and comes out of :class:`daskshare.placement.GpuPool`: options and decisions."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple, TypeAlias

from daskshare.errors import ConfigurationError

__all__ = ["Decision", "Dispatch", "Fail", "Load", "PlacementOptions", "Unload"]

MODES = ("auto", "spread", "pack")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementOptions:
    """How models are put on devices and tasks handed out.

    Parameters
    ----------
    mode : {"auto", "spread", "pack"}
        ``"auto"``: replicas follow the backlog. ``"spread"``: a model with work goes wherever it
        fits beside what is there. ``"pack"``: devices are filled one after the other, and
        further replicas come late, so that other devices stay free.
    surplus_fraction : float
        Tasks that a worker holds beyond its slots, as a fraction of them (at least one), so that
        it never waits for the next one.
    placement_interval_seconds : float
        Least time between two looks at which model belongs where; dispatching never waits for it.
    min_residency_seconds : float
        How long a model stays at least before it makes room for another one.
    load_amortisation : float
        The same in times of what loading the newcomer takes: with 4, at most a fifth of a
        device's time goes into switching between models that do not fit together.
    idle_unload_seconds : float
        After this time unused, all replicas but one are unloaded.
    load_backoff_seconds, max_load_backoff_seconds : float
        Wait before a device tries a model again that failed to load there; doubles each time.
    load_tries_per_device : int
        The model's waiting tasks fail when it failed so often on every device that may hold it.
    max_load_attempts : int
        They also fail after so many failures in a row over all devices.
    retry_failed_seconds : float
        How long later tasks of that model fail at once instead of trying again.
    transfer_bytes_per_second : float
        Speed of moving a task's dependencies between workers.

    Raises
    ------
    ConfigurationError
        When a value is out of range.
    """

    mode: Literal["auto", "spread", "pack"] = "auto"
    surplus_fraction: float = 0.125
    placement_interval_seconds: float = 0.5
    min_residency_seconds: float = 10.0
    load_amortisation: float = 4.0
    idle_unload_seconds: float = 300.0
    load_backoff_seconds: float = 5.0
    max_load_backoff_seconds: float = 300.0
    load_tries_per_device: int = 1
    max_load_attempts: int = 8
    retry_failed_seconds: float = 30.0
    transfer_bytes_per_second: float = 500e6

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigurationError(
                f"Got placement mode {self.mode!r}; expected one of {', '.join(MODES)}."
            )
        for field in fields(self):
            value = getattr(self, field.name)
            least = int(field.name in ("max_load_attempts", "load_tries_per_device"))
            if field.name != "mode" and not (least <= value < math.inf):
                raise ConfigurationError(
                    f"Got {field.name}={value!r}; expected a number of at least {least}."
                )
        if not self.transfer_bytes_per_second or not self.load_backoff_seconds:
            raise ConfigurationError(
                f"Got transfer_bytes_per_second={self.transfer_bytes_per_second!r}, "
                f"load_backoff_seconds={self.load_backoff_seconds!r}; expected more than 0."
            )


class Dispatch(NamedTuple):
    """Run a task on a worker now.

    Parameters
    ----------
    task : hashable
        Its key.
    worker : str
        The worker's address.
    model_key : str
        The model to run it with; not the one it came with when that was superseded.
    cause : str
        What led to it.
    busy_seconds : float
        What is in flight on the worker with it, in seconds of its device.
    frames_per_second : float
        Expected of the device with this model.
    num_in_flight : int
        Tasks in flight on the worker with it.
    """

    task: Hashable
    worker: str
    model_key: str
    cause: str
    busy_seconds: float
    frames_per_second: float
    num_in_flight: int

    @property
    def reason(self) -> str:
        """Why there, for people; put into words only when asked for."""
        return (
            f"{self.cause}; about {self.busy_seconds:.1f} s with all {self.num_in_flight} in "
            f"flight, at {self.frames_per_second:.0f} frames/s"
        )


@dataclass(frozen=True, slots=True)
class Load:
    """Load a model on a worker; answer with ``load_finished`` or ``load_failed``.

    Parameters
    ----------
    worker : str
        The worker's address.
    model_key : str
        The model.
    reason : str
        Why there, for people.
    """

    worker: str
    model_key: str
    reason: str


@dataclass(frozen=True, slots=True)
class Unload:
    """Unload a model, which no task uses there; answer with ``unload_finished`` or ``_failed``.

    Parameters
    ----------
    worker : str
        The worker's address.
    model_key : str
        The model.
    reason : str
        Why, for people.
    """

    worker: str
    model_key: str
    reason: str


@dataclass(frozen=True, slots=True)
class Fail:
    """End a task with an error; the pool has forgotten it already.

    Parameters
    ----------
    task : hashable
        Its key.
    kind : {"load", "too_large"}
        The model loaded nowhere, or no device has a budget for it.
    reason : str
        What happened, for people.
    model_key : str
        The model.
    """

    task: Hashable
    kind: Literal["load", "too_large"]
    reason: str
    model_key: str


Decision: TypeAlias = Dispatch | Load | Unload | Fail
