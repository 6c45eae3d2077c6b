"""Random deaths, joins, pauses and cancellations: every result comes once, nothing is left behind.

Three seeds by default; all twenty: ``DASKSHARE_CHAOS_SEEDS=20 pytest
tests/cluster/test_allocator_chaos.py``.
"""

from __future__ import annotations

import os
import random
import signal

import dask
import pytest
from distributed import Client

from tests.cluster.conftest import TIMEOUT, is_up, start
from tests.cluster.stand_ins import (
    books,
    double_slowly,
    fake,
    no_hook_fails,
    set_status,
    start_stand_ins,
    until,
)

NUM_SEEDS = int(os.environ.get("DASKSHARE_CHAOS_SEEDS", "3"))
NUM_WORKERS = 3
#: A fourth GPU's worker joins and leaves.
GPUS = {name: f"GPU-{name}" for name in range(NUM_WORKERS)}
NUM_TASKS = 60
NUM_BLOWS = 5

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def cluster(importable_by_subprocesses):
    with (
        dask.config.set(
            {
                "distributed.scheduler.validate": True,
                # A local cluster gives up a worker that dies twice in this time.
                "distributed.deploy.lost-worker-timeout": "1h",
            }
        ),
        start(n_workers=NUM_WORKERS, threads_per_worker=2) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        start_stand_ins(client, GPUS)
        yield cluster


def add_one(value):
    return value + 1


class Chaos:
    """What happens to a cluster, one blow after the other."""

    def __init__(self, seed, cluster, client, cancellable):
        self.random = random.Random(seed)
        self.cluster = cluster
        self.client = client
        self.cancellable = cancellable
        self.cancelled = []
        self.paused = set()

    def addresses(self):
        return sorted(self.cluster.scheduler.workers)

    def kill(self):
        up = {n.worker_address: n.pid for n in self.cluster.workers.values() if is_up(n)}
        pids = [pid for _, pid in sorted(up.items()) if pid is not None]
        if pids:
            os.kill(self.random.choice(pids), signal.SIGKILL)

    def pause(self):
        running = [a for a in self.addresses() if a not in self.paused]
        if len(running) > 1:
            self.paused.add(self.random.choice(running))
            self.apply("paused")

    def unpause(self):
        self.apply("running")
        self.paused.clear()

    def apply(self, status):
        for address in sorted(self.paused):
            try:
                set_status(self.client, address, status)
            except OSError:  # it has just been killed
                self.paused.discard(address)

    def join(self):
        self.cluster.scale(NUM_WORKERS + 1)

    def leave(self):
        self.cluster.scale(NUM_WORKERS)

    def cancel(self):
        chosen = self.random.sample(self.cancellable, 5)
        self.cancelled += chosen
        self.cancellable = [f for f in self.cancellable if f not in chosen]
        self.client.cancel(chosen)

    def strike(self):
        blows = [self.kill, self.kill, self.pause, self.unpause, self.join, self.leave, self.cancel]
        self.random.choice(blows)()


@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_every_result_comes_once(cluster, seed):
    with Client(cluster, set_as_default=False) as client, client.as_current(), no_hook_fails():
        cluster.scale(NUM_WORKERS)
        client.wait_for_workers(1, timeout=TIMEOUT)
        one, two = fake("one", factor=2), fake("two", factor=3)
        numbers = client.map(add_one, range(NUM_TASKS), pure=False)
        first = client.map(double_slowly, [one] * NUM_TASKS, numbers, pure=False)
        second = client.map(double_slowly, [two] * NUM_TASKS, first, pure=False)
        results = client.map(add_one, second, pure=False)
        loose = client.map(double_slowly, [one] * NUM_TASKS, range(NUM_TASKS), pure=False)
        chaos = Chaos(seed, cluster, client, loose)
        for blow in range(NUM_BLOWS):
            # The next blow falls when some more of the work is done.
            enough = (blow + 1) * NUM_TASKS // (NUM_BLOWS + 2)
            until(lambda enough=enough: sum(f.done() for f in first) >= enough, client)
            chaos.strike()
        chaos.unpause()
        assert client.gather(results) == [(i + 1) * 6 + 1 for i in range(NUM_TASKS)]
        kept = [(i, f) for i, f in enumerate(loose) if f not in chaos.cancelled]
        assert len(kept) == NUM_TASKS - len(chaos.cancelled)
        assert client.gather([f for _, f in kept]) == [2.0 * i for i, _ in kept]
        assert {f.status for f in chaos.cancelled} <= {"cancelled"}
    with Client(cluster, set_as_default=False) as client:
        until(lambda: books(client)["held"] == 0, client)
        left = books(client)
        assert (left["in_pool"], left["deaths"]) == (0, 0)
        assert all(m["waiting"] == m["in_flight"] == 0 for m in left["models"].values())
        assert set(left["workers"]) <= set(cluster.scheduler.workers)
        assert client.get_events("transitions") == ()
