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


def in_thread(pool, key):
    """Use a session in a thread until told to stop; what to wait for and how to stop."""
    inside, stop = threading.Event(), threading.Event()

    def run():
        with pool.use(key):
            inside.set()
            assert stop.wait(TIMEOUT)

    thread = threading.Thread(target=run)
    thread.start()
    return inside, stop, thread


def test_no_more_than_the_limit_are_in_use(make):
    pool = make(limit=lambda key: (key[0], 1), patience_seconds=1000.0)
    with pool.use("a1"), pool.use("b1"):
        inside, stop, thread = in_thread(pool, "a2")
        stop.set()
        # It can only come in after the other's end, which is below.
        assert not inside.is_set()
    assert inside.wait(TIMEOUT)
    thread.join(TIMEOUT)
    assert pool.opened == 3


def test_a_failure_makes_room_too(make):
    pool = make(limit=lambda key: ("all", 1), patience_seconds=1000.0)
    with pytest.raises(RuntimeError), pool.use("a"):
        raise RuntimeError
    with pool.use("a"):
        pass


def test_who_reads_several_videos_side_by_side_gets_more_than_the_limit(make):
    pool = make(limit=lambda key: ("all", 1), patience_seconds=0.05)
    with pool.use("a") as first, pool.use("a") as second:
        assert first is not second
    # Beyond the limit was an exception.
    with pool.use("a"):
        inside, stop, thread = in_thread(pool, "a")
        assert inside.wait(TIMEOUT)
        stop.set()
        thread.join(TIMEOUT)
