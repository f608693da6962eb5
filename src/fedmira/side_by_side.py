"""Calls that run at the same time in threads of one process, on a CPU; each has its part of PyTorch's threads.

PyTorch lets go of the interpreter while an operation computes. Where operations are small, threads that share each of
them wait for one another longer than they compute; threads with work of their own do not.

Threads are kept from call to call, with what PyTorch remembers in each. Knows nothing about what is called.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextvars import copy_context
from threading import Barrier
from typing import TypeVar

import torch

Result = TypeVar("Result")
_POOLS: dict[tuple[int, int], ThreadPoolExecutor] = {}
"""By how many calls run at once and how many threads each has."""


def side_by_side(calls: Sequence[Callable[[], Result]], at_once: int) -> list[Result]:
    """Return what the calls return, in their order; one after the other where PyTorch has one thread.

    A thread takes the next call when it is done with one: thousands of small calls need no message each. The first call
    sees the caller's context variables (what counts time is one), the others see none.

    Args:
        calls: must not write to the same memory, nor depend on each other.
        at_once: how many run at a time; each has that part of `torch.get_num_threads()`, at least one.

    Raises:
        Exception: what a call that failed raised, after all that had begun have ended; no other begins.
    """
    threads = torch.get_num_threads()
    if min(threads, at_once, len(calls)) <= 1:
        return [call() for call in calls]
    context = copy_context()
    left: deque[int | None] = deque([*range(len(calls)), *[None] * at_once])
    results: dict[int, Result] = {}

    def go_on() -> None:
        while (place := left.popleft()) is not None:
            results[place] = context.run(calls[0]) if place == 0 else calls[place]()

    pool = _pool(at_once, max(1, threads // at_once))
    futures = [pool.submit(go_on) for _ in range(at_once)]
    try:
        wait(futures, return_when=FIRST_EXCEPTION)
    finally:
        left.extendleft([None] * at_once)
        wait(futures)
    for future in futures:
        future.result()
    return [results[place] for place in range(len(calls))]


def portions(costs: Sequence[float], count: int) -> list[list[int]]:
    """Return the places of the costs in at most `count` portions of about the same sum, the dearest portion first.

    The dearest goes first, each to the portion that has least so far (Graham, SIAM Journal on Applied Mathematics,
    1969).

    >>> portions([3.0, 9.0, 4.0, 2.0], 2)
    [[1], [0, 2, 3]]
    """
    places: list[list[int]] = [[] for _ in range(count)]
    sums = [0.0] * count
    for place in sorted(range(len(costs)), key=lambda place: (-costs[place], place)):
        least = sums.index(min(sums))
        places[least].append(place)
        sums[least] += costs[place]
    order = sorted(range(count), key=lambda portion: -sums[portion])
    return [sorted(places[portion]) for portion in order if places[portion]]


def _pool(at_once: int, threads: int) -> ThreadPoolExecutor:
    pool = _POOLS.get((at_once, threads))
    if pool is None:
        before, all_there = torch.get_num_threads(), Barrier(at_once)
        pool = ThreadPoolExecutor(at_once, "side-by-side", _begin, (threads,))
        wait([pool.submit(all_there.wait) for _ in range(at_once)])
        # what one thread sets holds for those that begin later
        torch.set_num_threads(before)
        _POOLS[at_once, threads] = pool
    return pool


def _begin(threads: int) -> None:
    torch.set_num_threads(threads)
    # the first question in a thread brings it to what was set last, by whichever thread; later ones do not
    torch.get_num_threads()


if hasattr(os, "register_at_fork"):
    # threads stay behind in the parent
    os.register_at_fork(after_in_child=_POOLS.clear)
