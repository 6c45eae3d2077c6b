"""Installing on a scheduler that is played; tests/cluster has real ones."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from daskshare.errors import ConfigurationError
from daskshare.scheduler_plugin import DaskshareSchedulerPlugin, install_on_scheduler
from daskshare.worker_plugin import PLUGIN_NAME

OK = {"status": "OK"}
BROKEN = {"status": "error", "exception_text": "ImportError('no torch here')"}


class Scheduler:
    def __init__(self, answers):
        self.answers = answers
        self.workers = {
            a: SimpleNamespace(address=a, metrics={}, long_running=set(), nthreads=2)
            for a in answers
        }
        self.tasks = {}
        self.no_workers_timeout = None
        self.plugins = {}
        self.worker_plugins = {}
        self.handlers = {}
        self.broadcasts = []
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    def add_plugin(self, plugin, name):
        assert name not in self.plugins
        self.plugins[name] = plugin

    async def broadcast(self, *, msg, on_error):
        assert on_error == "return"
        # Workers that join from now on must get the plugin on their own.
        assert PLUGIN_NAME in self.worker_plugins
        self.broadcasts.append(msg)
        await self.may_answer.wait()
        return dict(self.answers)


def test_installing_twice_is_installing_once():
    async def run():
        scheduler = Scheduler({"tcp://a": OK, "tcp://b": OK})
        await install_on_scheduler(scheduler)
        await install_on_scheduler(scheduler)
        return scheduler

    scheduler = asyncio.run(run())
    assert list(scheduler.plugins) == [PLUGIN_NAME]
    [message] = scheduler.broadcasts
    assert (message["op"], message["name"]) == ("plugin-add", PLUGIN_NAME)
    assert message["plugin"] == scheduler.worker_plugins[PLUGIN_NAME]


def test_two_at_once_both_wait_for_the_workers():
    async def run():
        scheduler = Scheduler({"tcp://a": OK})
        scheduler.may_answer.clear()
        both = [asyncio.create_task(install_on_scheduler(scheduler)) for _ in range(2)]
        done, _ = await asyncio.wait(both, timeout=0.05)
        assert not done
        scheduler.may_answer.set()
        await asyncio.wait_for(asyncio.gather(*both), 10)
        return scheduler

    assert len(asyncio.run(run()).broadcasts) == 1


@pytest.mark.parametrize(
    ("answer", "reason"), [(BROKEN, "no torch here"), (OSError("gone"), "OSError: gone")]
)
def test_a_worker_that_cannot_is_named_and_the_next_call_tries_again(answer, reason):
    async def run():
        scheduler = Scheduler({"tcp://a": OK, "tcp://b": answer})
        with pytest.raises(ConfigurationError, match=reason) as caught:
            await install_on_scheduler(scheduler)
        assert caught.value.worker == "tcp://b"
        scheduler.answers["tcp://b"] = OK
        await install_on_scheduler(scheduler)
        return scheduler

    assert len(asyncio.run(run()).broadcasts) == 2


def test_a_worker_that_left_meanwhile_is_no_failure():
    async def run():
        scheduler = Scheduler({"tcp://a": OK, "tcp://b": OSError("connection lost")})
        del scheduler.workers["tcp://b"]
        await install_on_scheduler(scheduler)

    asyncio.run(run())


def test_state_is_the_last_heartbeat_and_the_last_event():
    async def run():
        scheduler = Scheduler({"tcp://a": OK, "tcp://b": OK})
        await install_on_scheduler(scheduler)
        plugin: DaskshareSchedulerPlugin = scheduler.plugins[PLUGIN_NAME]
        scheduler.workers["tcp://a"].metrics[PLUGIN_NAME] = {"state": "ready", "loads": 2}
        started = {"action": "started", "worker": "tcp://b"}
        plugin.log_event(PLUGIN_NAME, started)
        plugin.log_event("another topic", {"worker": "tcp://a"})
        plugin.log_event(PLUGIN_NAME, "something else")
        state = await scheduler.handlers["daskshare_state"]()
        assert state == {
            "tcp://a": {"state": "ready", "loads": 2, "event": {}},
            "tcp://b": {"event": started},
        }
        plugin.remove_worker(scheduler, "tcp://b", stimulus_id="test")
        del scheduler.workers["tcp://b"]
        assert list(await plugin.get_state()) == ["tcp://a"]
        assert plugin._last_events == {}

    asyncio.run(run())
