"""How much memory a call takes.

Of this process what it adds to what was held before: on CUDA of the bytes that torch allocated, elsewhere of the
resident set, after the allocator has handed back what it had kept. Of other processes that work for the call all that
they have, what they share counted once, looked at every few milliseconds. Knows nothing about what is called.
"""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable
from typing import TypeVar

import psutil
import torch

from fedmira.evaluation.costs import PeakMemory

T = TypeVar("T")
_SECONDS_BETWEEN_LOOKS = 0.01


def with_peak(call: Callable[[], T], device: str) -> tuple[T, int]:
    """Call, and return what it returned and the bytes of its peak above the state before it."""
    before = held_bytes(device)
    memory = PeakMemory(device)
    result = call()
    return result, max(0, memory.lap() - before)


def with_peak_of(process: int, call: Callable[[], T]) -> tuple[T, int]:
    """Call, and return what it returned and the bytes of the peak of a process and all its children."""
    peak = family_bytes(process)
    ended = threading.Event()

    def look() -> None:
        nonlocal peak
        while not ended.wait(_SECONDS_BETWEEN_LOOKS):
            peak = max(peak, family_bytes(process))

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    try:
        result = call()
    finally:
        ended.set()
        looking.join()
    return result, max(peak, family_bytes(process))


def family_bytes(process: int) -> int:
    """Bytes of memory of a process and its children, theirs too; what several map counts in parts."""
    total = 0
    try:
        first = psutil.Process(process)
        members = [first, *first.children(recursive=True)]
    except psutil.Error:
        return 0
    for member in members:
        try:
            total += int(member.memory_full_info().pss)
        except psutil.Error:  # ended meanwhile
            continue
    return total


def held_bytes(device: str) -> int:
    """Bytes in use now."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        return int(torch.cuda.memory_allocated(device))
    _give_back()
    return PeakMemory().lap()


def _give_back() -> None:
    """Ask glibc to return free memory to the system; other C libraries lack the call."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
