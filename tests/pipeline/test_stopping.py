from __future__ import annotations

import os
import signal

import pytest

from potstill.errors import Interrupted
from potstill.pipeline.stopping import Stopping, stoppable

SIGNALS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


@SIGNALS
def test_a_request_ends_the_work_at_once(number):
    done = []

    def work():
        with stoppable():
            os.kill(os.getpid(), number)
            done.append("what comes after")

    with pytest.raises(Interrupted, match="the same command continues"):
        work()
    assert done == []


@SIGNALS
def test_a_held_request_is_noted_and_the_second_one_ends_the_work(number):
    done = []

    def work():
        with stoppable() as stopping, stopping.held():
            done.append(stopping.asked())
            os.kill(os.getpid(), number)
            done.append(stopping.asked())
            os.kill(os.getpid(), number)
            done.append("what comes after")

    with pytest.raises(Interrupted):
        work()
    assert done == [False, True]


def test_requests_are_held_in_the_block_only():
    done = []

    def work():
        with stoppable() as stopping:
            with stopping.held():
                done.append("held")
            os.kill(os.getpid(), signal.SIGINT)
            done.append("what comes after")

    with pytest.raises(Interrupted):
        work()
    assert done == ["held"]


def test_signals_do_afterwards_what_they_did_before():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with stoppable():
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] != before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_nobody_asks_where_nobody_listens():
    with Stopping().held():
        assert not Stopping().asked()
