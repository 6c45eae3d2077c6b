"""The allocator on the scheduler: holds tasks that need a model and sends each where it fits.

Which GPU holds which model and which task runs where is decided by
:class:`daskshare.placement.GpuPool`, which knows nothing of Dask. Here is what Dask's hooks tell
it, and how its decisions are carried out. Never imports torch.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from distributed.metrics import monotonic
from distributed.protocol.pickle import dumps

from daskshare._allocator_holding import HeldTask
from daskshare._allocator_journal import Journal
from daskshare._allocator_models import KnownModel, ModelLoader
from daskshare._allocator_notes import Notes
from daskshare._allocator_recognise import ModelFinder, annotated_model
from daskshare._allocator_workers import News, WorkerBook
from daskshare.placement import Decision, Dispatch, Fail, GpuPool, PlacementOptions
from daskshare.worker_plugin import PLUGIN_NAME

if TYPE_CHECKING:
    from dask.typing import Key
    from distributed import Scheduler
    from distributed.scheduler import Recs, TaskState, WorkerState

    from daskshare.config import AllocatorOptions

__all__ = ["Allocator"]

logger = logging.getLogger("daskshare.scheduler")

_TICK_SECONDS = 1.0
#: After a model loaded nowhere, until its next task tries again: a wrong path is soon put right.
_RETRY_SECONDS = 5.0


class Allocator:
    """Feeds the pool with Dask's events and carries out its decisions.

    Parameters
    ----------
    scheduler : distributed.Scheduler
        Running, in whose event loop this is made.
    options : AllocatorOptions
        How to place models.

    Notes
    -----
    Everything runs on the scheduler's event loop. A task that carries a model is restricted to an
    address that no worker has, so Dask parks it as "no-worker" once its dependencies are there; to
    send it, its restriction becomes one worker's address. All else is left to Dask, also what
    happens when workers die: the task comes back, is parked again and sent elsewhere.

    No transition may start inside another, so hooks decide nothing: the pool does in a later step
    of the loop, once for all that happened in this one. Of what happens most, tasks that are ready
    and tasks that succeeded, hooks only take notes, because telling the pool of many at once costs
    a fraction of what each alone does between Dask's own work. :meth:`settle` comes before
    whatever must know.
    """

    def __init__(self, scheduler: Scheduler, options: AllocatorOptions) -> None:
        self.scheduler = self._scheduler = scheduler
        self._options = options
        self._loop = asyncio.get_running_loop()
        self.pool = GpuPool(
            PlacementOptions(mode=options.placement, retry_failed_seconds=_RETRY_SECONDS)
        )
        self.workers = WorkerBook(self.pool, start_timeout_seconds=options.start_timeout_seconds)
        self.loader = ModelLoader(
            scheduler, self.pool, self.kick, load_timeout_seconds=options.load_timeout_seconds
        )
        self._held: dict[Any, HeldTask] = {}
        self._find_held = self._held.get
        #: The restriction to each worker, shared by all tasks that are sent there.
        self._only: dict[str, set[str]] = {}
        #: Tasks for which other workers may count as others come and go.
        self._changing: set[Key] = set()
        self._notes = Notes(scheduler, self.pool, self.workers)
        self._deaths: dict[str, list[HeldTask]] = {}
        self.journal = Journal(scheduler)
        self._needs_gpu = self._models_need_gpu()
        self._kicked = self._closed = False
        self._wake: asyncio.TimerHandle | None = None
        self._wake_seconds = 0.0
        self._tick_handle = self._loop.call_later(_TICK_SECONDS, self._tick)

    # -- what Dask tells --

    def attach(self) -> None:
        """Take in workers and tasks that were there before."""
        scheduler = self._scheduler
        for ws in scheduler.workers.values():
            self.add_worker(ws)
        self.update_graph(list(scheduler.tasks))
        queued = [key for key in self._held if scheduler.tasks[key].state == "queued"]
        parked = [key for key in self._held if scheduler.tasks[key].state == "no-worker"]
        for key in parked:
            self._notes.ready.append(self._held[key])
        self.kick()
        if queued:
            # They come back through "waiting" and are parked.
            released: Recs = dict.fromkeys(queued, "released")
            self._loop.call_soon(scheduler.transitions, released, _stimulus("requeue"))

    def update_graph(self, tasks: Iterable[Key]) -> None:
        """Look for tasks that need a model among those of a new graph."""
        states, held = self._scheduler.tasks, self._held
        find = ModelFinder().find
        # Tasks of a graph share their model, and its key may be a digest.
        keys: dict[int, str] = {}
        registered = None
        for key in tasks:
            if key in held:
                continue
            ts = states[key]
            run_spec, annotations = ts.run_spec, ts.annotations
            handle = None if run_spec is None else find(run_spec)
            model_key = None
            if handle is not None:
                model_key = keys.get(id(handle))
                if model_key is None:
                    model_key = keys[id(handle)] = handle.key
            if annotations and "model" in annotations:
                named, named_handle = annotated_model(annotations["model"])
                if named is not None and named != model_key:
                    model_key, handle = named, named_handle
            if model_key is None or ts.actor:
                continue
            if handle is None or handle is not registered:
                self._register(model_key, handle)
                registered = handle
            task = held[key] = HeldTask(ts, model_key)
            if task.restricted and task.may_change:
                self._changing.add(key)
            # Also one that is released: once it waits, Dask has begun to look for its worker.
            if ts.state in ("released", "waiting", "queued", "no-worker"):
                task.hold(ts)

    def transition(self, key: Key, start: str, finish: str, *args: Any, **kwargs: Any) -> None:
        """Follow a held task through Dask's states."""
        # Called for each step of each task, so the common cases come first. A task that Dask found
        # no worker for is told of twice, the first time with no change.
        if finish == "processing" or finish == start:
            return
        held = self._find_held(key)
        if held is None:
            return
        if start == "processing":
            self._left(held, self._scheduler.tasks[key], finish)
        elif finish == "no-worker":
            self._notes.ready.append(held)
            if not self._kicked:
                self.kick()
        elif finish == "waiting":
            held.hold(self._scheduler.tasks[key])
        elif start == "no-worker":
            self.settle()
            self.pool.forget_task(key, now_seconds=time.monotonic())
        if finish == "forgotten":
            del self._held[key]
            self._changing.discard(key)

    def _left(self, held: HeldTask, ts: TaskState, finish: str) -> None:
        """A task is no longer on a worker: it is done, or Dask took it back."""
        worker = held.worker
        if finish == "memory":
            self._notes.done.append(held.key)
        else:
            self.pool.finish_task(held.key, ok=False, now_seconds=time.monotonic())
        if (held.deaths or held.alone) and finish in ("memory", "erred"):
            held.cleared()
        if worker is not None and worker not in self._scheduler.workers:
            self._deaths.setdefault(worker, []).append(held)
        held.restore(ts)
        if not self._kicked:
            self.kick()

    def settle(self) -> None:
        """Tell the pool what the hooks took notes of."""
        self._notes.tell(time.monotonic())

    def add_worker(self, ws: WorkerState) -> None:
        """Take in a worker that joined."""
        self._only[ws.address] = {ws.address}
        self.workers.add(ws)
        self.workers.heartbeat(ws, ws.metrics.get(PLUGIN_NAME))
        self._workers_changed()

    def remove_worker(self, address: str) -> None:
        """Take in that a worker left; Dask has taken its tasks back already."""
        self.settle()
        tasks = self._deaths.pop(address, [])
        for held in tasks:
            ts = self._scheduler.tasks.get(held.key)
            if ts is not None and self._held.get(held.key) is held and ts.state != "erred":
                was_alone = held.alone
                held.worker_died(ts, in_company=len(tasks) > 1)
                if held.alone and not was_alone:
                    self._renew(held)
        self.workers.remove(address)
        self._only.pop(address, None)
        self.journal.forget(address)
        self._workers_changed()
        self.loader.notify()

    def log_event(self, topic: str, message: Any) -> None:
        """Take in what a worker says at once, or Dask of a worker's status."""
        if not isinstance(message, dict):
            return
        if topic == PLUGIN_NAME:
            ws = self._scheduler.workers.get(message.get("worker", ""))
            if ws is not None and "report" in message:
                self._reported(self.workers.report(ws, message["report"]))
        elif message.get("action") == "worker-status-change":
            ws = self._scheduler.workers.get(topic)
            if ws is not None:
                self.workers.set_status(ws)
                self._workers_changed()

    def _reported(self, news: News) -> None:
        if news is News.WORKERS:
            self._workers_changed()
        if news is not News.NOTHING:
            self.loader.notify()

    def restart(self) -> None:
        """Forget all tasks, as Dask did."""
        self.settle()
        for key in self._held:
            self.pool.forget_task(key, now_seconds=time.monotonic())
        self._held.clear()
        self._notes.hopeless.clear()
        self._changing.clear()
        self._deaths.clear()

    def holds(self, key: Key) -> bool:
        """Whether a task is one of those that need a model."""
        return key in self._held

    def waiting_tasks(self) -> dict[str, int]:
        """How many tasks of each model, by key, wait for a place."""
        models = self.pool.snapshot()["models"]
        return {key: model["waiting"] for key, model in models.items() if model["waiting"]}

    def busy_workers(self) -> set[str]:
        """Addresses of workers that run tasks with models or load one."""
        return self.pool.busy_workers()

    def close(self) -> None:
        """Stop deciding."""
        self._closed = True
        self._tick_handle.cancel()
        if self._wake is not None:
            self._wake.cancel()
        self.loader.close()

    # -- models and workers --

    def register(self, handle: Any) -> KnownModel:
        """Take in a model that no task may have named yet."""
        return self._register(handle.key, handle)

    def _register(self, key: str, handle: Any | None) -> KnownModel:
        models = self.loader.models
        model = models.get(key)
        if model is None or (model.spec is None and handle is not None):
            model = models[key] = KnownModel(key, handle)
            self._tell_of(model)
        return model

    def _tell_of(self, model: KnownModel) -> None:
        self.pool.add_model(
            model.key,
            name=model.name,
            estimated_bytes=model.estimated_bytes,
            needs_gpu=self._needs_gpu,
            now_seconds=time.monotonic(),
        )

    def _models_need_gpu(self) -> bool:
        cpu = self._options.cpu_execution
        return self.workers.seen_gpu if cpu == "auto" else not cpu

    def _workers_changed(self) -> None:
        if self._needs_gpu != self._models_need_gpu():
            self._needs_gpu = not self._needs_gpu
            for model in self.loader.models.values():
                self._tell_of(model)
        self.settle()
        for key in self._changing:
            held = self._held[key]
            if held.worker is None and key in self.pool:
                self._renew(held)
        if self.workers.any_failed:
            self._notes.hopeless = [
                key
                for key, held in self._held.items()
                if key in self.pool and self.workers.failed(held.allowed(self._scheduler))
            ]
        self.kick()

    def _renew(self, held: HeldTask) -> None:
        """Tell the pool of a waiting task anew, because what it asks for has changed."""
        now_seconds = time.monotonic()
        if self.pool.forget_task(held.key, now_seconds=now_seconds):
            self._notes.tell_ready((held,), now_seconds)
            self.kick()

    # -- deciding --

    def kick(self) -> None:
        """Decide in the next step of the event loop."""
        if not self._kicked and not self._closed:
            self._kicked = True
            self._loop.call_soon(self.decide)

    def decide(self) -> None:
        """Let the pool decide and carry that out; never call it from a hook of Dask."""
        self._kicked = False
        if self._closed:
            return
        self.settle()
        if self._notes.hopeless:
            self._hand_over()
        decisions = self.pool.decide(time.monotonic())
        if decisions:
            self._carry_out(decisions)
        wake_seconds = self.pool.next_wake_seconds()
        if wake_seconds is not None:
            self._wake_at(wake_seconds)

    def _wake_at(self, seconds: float) -> None:
        """Decide at this time or before."""
        if self._wake is not None:
            # One that comes too early sets the next; cancelled ones would fill the loop's heap.
            if self._wake_seconds <= seconds:
                return
            self._wake.cancel()
        self._wake_seconds = seconds
        self._wake = self._loop.call_later(max(0.01, seconds - time.monotonic()), self._awake)

    def _awake(self) -> None:
        self._wake = None
        self.kick()

    def _carry_out(self, decisions: list[Decision]) -> None:
        scheduler, held, tasks = self._scheduler, self._held, self._scheduler.tasks
        only = self._only
        stimulus = _stimulus("decide")
        sent: dict[Key, TaskState] = {}
        failed: list[Fail] = []
        for decision in decisions:
            if isinstance(decision, Dispatch):
                task, worker = held[decision.task], decision.worker
                ts = sent[task.key] = tasks[task.key]
                task.send(ts, worker, only[worker])
            elif isinstance(decision, Fail):
                failed.append(decision)
            else:
                self.loader.carry_out(decision)
        if sent:
            # Dask takes recommendations from the end.
            scheduler.transitions(dict.fromkeys(reversed(sent), "processing"), stimulus)
            for key, ts in sent.items():
                if ts.state == "no-worker":
                    self._refused(held[key], ts)
        # Last, because Dask drops what only a failed task's successors wanted.
        for fail in failed:
            self._fail(fail, stimulus)
        self.journal.write(decisions)

    def _refused(self, held: HeldTask, ts: TaskState) -> None:
        """Dask did not want a task there: the worker was paused in between."""
        worker, held.worker = held.worker, None
        held.hold(ts)
        ws = self._scheduler.workers.get(worker or "")
        if ws is not None:
            self.workers.set_status(ws)
        self.pool.lose_task(held.key, now_seconds=time.monotonic())
        self.kick()

    def _fail(self, decision: Fail, stimulus: str) -> None:
        held = self._held.get(decision.task)
        ts = None if held is None else self._scheduler.tasks.get(held.key)
        if ts is None or ts.state != "no-worker":
            return
        recommendations = self._scheduler.transition(
            ts.key, "erred", stimulus, exception=dumps(self.loader.error(decision)), cause=ts.key
        )
        self._scheduler.transitions(recommendations, stimulus)

    def _hand_over(self) -> None:
        """Let Dask run tasks that no worker can serve: there, each says what is wrong."""
        hopeless, self._notes.hopeless = self._notes.hopeless, []
        recommendations: Recs = {}
        for key in hopeless:
            ts = self._scheduler.tasks.get(key)
            if ts is not None and ts.state == "no-worker" and key in self.pool:
                self.pool.forget_task(key, now_seconds=time.monotonic())
                self._held[key].restore(ts)
                recommendations[key] = "processing"
        if recommendations:
            self._scheduler.transitions(recommendations, _stimulus("hand-over"))

    def _tick(self) -> None:
        """Once a second: what heartbeats brought, and what no event tells of."""
        if self._closed:
            return
        self._tick_handle = self._loop.call_later(_TICK_SECONDS, self._tick)
        now_seconds = time.monotonic()
        self.settle()
        if self.workers.expire(now_seconds):
            self._workers_changed()
        for ws in self._scheduler.workers.values():
            self._reported(self.workers.heartbeat(ws, ws.metrics.get(PLUGIN_NAME)))
            for ts in ws.long_running:
                # It gave its thread back, and may wait for tasks that need the place.
                if self.pool.finish_task(ts.key, now_seconds=now_seconds):
                    self.kick()
        self._spare_from_timeout()

    def _spare_from_timeout(self) -> None:
        # Dask fails tasks that are parked for long, taking them for ones that no worker may run.
        scheduler = self._scheduler
        if scheduler.no_workers_timeout is None or not scheduler.running:
            return
        held = [ts for ts in scheduler.unrunnable if ts.key in self.pool]
        for ts in held:
            del scheduler.unrunnable[ts]
            scheduler.unrunnable[ts] = monotonic()


def _stimulus(what: str) -> str:
    return f"daskshare-{what}-{time.time()}"
