"""How much more memory a call takes than was held before it.

On CUDA the bytes that torch allocated; elsewhere the resident set of this process, after the allocator has handed back
what it had kept. Knows nothing about what is called.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from fedmira.evaluation.costs import PeakMemory

T = TypeVar("T")


def with_peak(call: Callable[[], T], device: str) -> tuple[T, int]:
    """Call, and return what it returned and the bytes of its peak above the state before it."""
    before = held_bytes(device)
    with PeakMemory(device) as peak:
        result = call()
    return result, max(0, peak.peak_bytes - before)


def held_bytes(device: str) -> int:
    """Bytes in use now."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        return int(torch.cuda.memory_allocated(device))
    _give_back()
    with PeakMemory() as peak:
        pass
    return peak.peak_bytes


def _give_back() -> None:
    """Ask glibc to return free memory to the system; other C libraries lack the call."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
