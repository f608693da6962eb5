"""Calls that run at the same time: their order, their threads, their failures."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar
from functools import partial

import pytest
import torch

from fedmira.side_by_side import portions, side_by_side

WATCH: ContextVar[str] = ContextVar("watch", default="nobody")


@pytest.fixture(autouse=True)
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_calls_run_at_the_same_time_with_their_part_of_the_threads_and_answer_in_order() -> None:
    both_there = threading.Barrier(2, timeout=30)

    def call(number: int) -> tuple[int, int]:
        both_there.wait()
        return number, torch.get_num_threads()

    assert side_by_side([partial(call, 0), partial(call, 1)], 2) == [(0, 2), (1, 2)]
    assert torch.get_num_threads() == 4
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [4], "who begins later has the threads that the caller set"


def test_threads_are_kept() -> None:
    both_there = threading.Barrier(2, timeout=30)

    def call() -> int:
        # without it one thread may answer both
        both_there.wait()
        return threading.get_ident()

    first, second = (set(side_by_side([call] * 2, 2)) for _ in range(2))
    assert first == second
    assert len(first) == 2
    assert threading.get_ident() not in first


@pytest.mark.parametrize(("threads", "at_once", "calls"), [(1, 2, 2), (4, 1, 2), (4, 2, 1)])
def test_alone_a_call_stays_in_its_thread(threads: int, at_once: int, calls: int) -> None:
    torch.set_num_threads(threads)
    assert side_by_side([threading.get_ident] * calls, at_once) == [threading.get_ident()] * calls


def test_what_counts_time_is_seen_by_the_first_call_only() -> None:
    WATCH.set("somebody")
    assert side_by_side([WATCH.get] * 3, 2) == ["somebody", "nobody", "nobody"]


def test_a_failure_comes_back_after_the_others_have_ended() -> None:
    ended, failed = [], threading.Event()

    def fail() -> None:
        failed.set()
        raise RuntimeError("broken")

    def other() -> None:
        assert failed.wait(30)
        ended.append(True)

    with pytest.raises(RuntimeError, match="broken"):
        side_by_side([fail, other], 2)
    assert ended == [True]
    assert torch.get_num_threads() == 4


def test_after_a_failure_no_other_call_begins() -> None:
    begun: list[bool] = []

    def fail() -> None:
        raise RuntimeError("broken")

    def slow() -> None:
        begun.append(True)
        time.sleep(0.001)

    with pytest.raises(RuntimeError, match="broken"):
        side_by_side([slow, fail, *[slow] * 1000], 2)
    assert len(begun) < 1000


def test_thousands_of_calls_are_taken_by_the_threads_that_are_there() -> None:
    def call(number: int) -> tuple[int, int]:
        return number, threading.get_ident()

    calls = [partial(call, number) for number in range(5000)]
    answers = side_by_side(calls, 2)
    assert [number for number, _ in answers] == list(range(5000))
    assert len({thread for _, thread in answers}) <= 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_process_begins_threads_of_its_own() -> None:
    side_by_side([threading.get_ident] * 2, 2)
    child = os.fork()
    if child == 0:
        # threads of the parent would never answer
        threading.Timer(30, os._exit, (1,)).start()
        os._exit(0 if side_by_side([int] * 2, 2) == [0, 0] else 2)
    assert os.waitpid(child, 0)[1] == 0


def test_portions_are_as_equal_as_the_dearest_first_makes_them() -> None:
    assert portions([5.0, 1.0, 4.0, 2.0], 2) == [[0, 1], [2, 3]]
    assert portions([1.0, 4.0, 2.0], 3) == [[1], [2], [0]]
    assert portions([1.0], 4) == [[0]]
    assert portions([], 2) == []
    assert portions([2.0, 2.0, 2.0, 2.0], 2) == [[0, 2], [1, 3]], "ties go by place"
