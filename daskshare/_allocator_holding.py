"""Tasks that the allocator holds back: what the user asked of each, and how one is let go."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distributed import Status

from daskshare._allocator_recognise import known_frames
from daskshare._placement_tasks import Task

if TYPE_CHECKING:
    from dask.typing import Key
    from distributed import Scheduler
    from distributed.scheduler import TaskState

__all__ = ["HELD_AT", "HeldTask", "dependency_bytes"]

#: No worker has this address, so Dask itself parks a task that is restricted to it ("no-worker").
HELD_AT = "daskshare://held"

# One set for all tasks: Dask replaces restrictions and never changes them in place, and a set for
# each would make the garbage collector's rounds longer.
_HELD = {HELD_AT}

#: Deaths of workers in company after which a task runs alone.
_DEATHS_IN_COMPANY = 2


class HeldTask(Task):
    """A task that carries a model, from its arrival until Dask forgets it.

    It is also what the pool keeps of it while it waits or runs.

    Parameters
    ----------
    ts : distributed.scheduler.TaskState
        Not yet held: its restrictions are the user's.
    model_key : str
        The model that it needs.

    Attributes
    ----------
    frames : float or None
        Of the video that it was given.
    restricted : bool
        Whether the user said where it may run.
    worker : str or None
        Address to which it was sent, while it is processing there.
    alone : bool
        Whether it must run with no other such task on its worker, because workers died under it.
    """

    __slots__ = (
        "_hosts",
        "_loose",
        "_workers",
        "alone",
        "deaths",
        "model_key",
        "restricted",
        "suspicious",
        "worker",
    )

    def __init__(self, ts: TaskState, model_key: str) -> None:
        super().__init__(ts.key)
        self.key: Key
        self.model_key = model_key
        self.worker: str | None = None
        self.alone = False
        self.deaths = 0
        self.frames = known_frames(ts.run_spec)
        self.suspicious = ts.suspicious
        self._workers: set[str] | None = ts.worker_restrictions or None
        self._hosts: set[str] | None = ts.host_restrictions or None
        self._loose: bool = ts.loose_restrictions
        self.restricted = self._workers is not None or self._hosts is not None

    @property
    def may_change(self) -> bool:
        """Whether it depends on who is in the cluster where the user lets it run."""
        return self._hosts is not None or (self._loose and self.restricted)

    def hold(self, ts: TaskState) -> None:
        """Make Dask park the task as soon as its dependencies are there."""
        ts.worker_restrictions = _HELD
        ts.host_restrictions = None
        ts.loose_restrictions = False

    def send(self, ts: TaskState, worker: str, there: set[str]) -> None:
        """Let Dask run the task on ``worker`` and nowhere else; ``there`` holds it alone."""
        # Restricted to one worker it is not stolen either.
        ts.worker_restrictions = there
        self.worker = worker
        self.suspicious = ts.suspicious

    def restore(self, ts: TaskState) -> None:
        """Put the user's own restrictions back."""
        ts.worker_restrictions = self._workers
        ts.host_restrictions = self._hosts
        ts.loose_restrictions = self._loose
        self.worker = None

    def allowed(self, scheduler: Scheduler) -> set[str] | None:
        """Return the addresses that the user allows, as Dask resolves them now; None for all."""
        if not self.restricted:
            return None
        addresses = set(self._workers or ())
        for host in self._hosts or ():
            known: dict[str, Any] = scheduler.host_info.get(scheduler.coerce_hostname(host)) or {}
            addresses |= known.get("addresses", set())
        if self._loose and not any(
            address in scheduler.workers and scheduler.workers[address].status == Status.running
            for address in addresses
        ):
            return None
        return addresses

    def worker_died(self, ts: TaskState, *, in_company: bool) -> None:
        """Take in that the worker died while the task was there.

        Dask fails a task when too many workers died under it, and counts each death against all
        tasks that the worker had. One bad input would then fail whoever is sent along with it.
        So only a death that a task suffered alone counts, and after two in company it runs alone.
        """
        if ts.suspicious <= self.suspicious:
            return  # it was told to leave
        if in_company:
            ts.suspicious = self.suspicious
            self.deaths += 1
        self.alone = self.alone or not in_company or self.deaths >= _DEATHS_IN_COMPANY

    def cleared(self) -> None:
        """Lift the suspicion."""
        self.alone = False
        self.deaths = 0


def dependency_bytes(ts: TaskState) -> dict[str, int] | None:
    """Bytes of the task's dependencies that each worker holds; None when there are none."""
    if not ts.dependencies:
        return None
    found: dict[str, int] = {}
    for dependency in ts.dependencies:
        nbytes = dependency.get_nbytes()
        for ws in dependency.who_has or ():
            found[ws.address] = found.get(ws.address, 0) + nbytes
    return found
