from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from daskshare.video.sessions import SessionPool

TIMEOUT = 20.0


class StandIn:
    def __init__(self, key):
        self.key = key
        self.drained = 0
        self.closed = threading.Event()

    def drain(self):
        assert not self.closed.is_set()
        self.drained += 1

    def close(self):
        assert not self.closed.is_set()
        self.closed.set()


@pytest.fixture
def make():
    pools = []

    def make(**options):
        pools.append(SessionPool(StandIn, **{"idle_seconds": 1000.0, **options}))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close_idle()


def test_a_session_is_used_again_for_its_key_alone(make):
    pool = make()
    with pool.use("h264") as first:
        pass
    with pool.use("hevc") as other:
        assert other is not first
    with pool.use("h264") as again:
        assert again is first
        assert first.drained == 1
        with pool.use("h264") as second:
            assert second is not first
    assert pool.opened == 3
    assert not first.closed.is_set()


def test_a_session_that_failed_is_closed(make):
    pool = make()
    with pytest.raises(RuntimeError, match="broke"), pool.use("h264") as session:
        raise RuntimeError("the session broke")
    assert session.closed.is_set()
    assert session.drained == 0
    with pool.use("h264") as fresh:
        assert fresh is not session


def test_a_chunk_that_was_left_early_takes_its_session_along(make):
    pool = make()

    def chunk():
        with pool.use("h264") as session:
            yield session

    frames = chunk()
    session = next(frames)
    frames.close()
    assert session.closed.is_set()


def test_a_session_that_cannot_be_drained_is_closed(make):
    pool = make()

    def fail():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"), pool.use("h264") as session:
        session.drain = fail
    assert session.closed.is_set()


def test_the_oldest_goes_when_too_many_are_idle(make):
    pool = make(max_idle=2)
    held = [pool.use(key) for key in "abc"]
    sessions = [each.__enter__() for each in held]
    for each in held:
        each.__exit__(None, None, None)
    assert [session.closed.is_set() for session in sessions] == [True, False, False]


def test_idle_sessions_are_closed_after_a_while(make):
    pool = make(idle_seconds=0.0)
    with pool.use("h264") as session:
        pass
    assert session.closed.wait(TIMEOUT)


def test_close_idle_leaves_those_in_use(make):
    pool = make()
    with pool.use("a") as busy:
        with pool.use("b") as idle:
            pass
        pool.close_idle()
        assert idle.closed.is_set()
        assert not busy.closed.is_set()


def test_many_threads_never_share_one(make):
    pool = make()
    users, lock = {}, threading.Lock()

    def work(_):
        with pool.use("h264") as session:
            with lock:
                assert session not in users
                users[session] = True
            with lock:
                del users[session]

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(work, range(400)))
    assert 1 <= pool.opened <= 16
