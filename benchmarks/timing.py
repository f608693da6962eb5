"""Interleaved timing: every round runs each contestant once, so that a slow moment of the machine hits all alike.

Knows nothing about what is timed.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch


class Lap(NamedTuple):
    """How long one call took, as whoever called it measured: what works in another process measures itself."""

    wall: float
    processor: float


@dataclass(slots=True)
class Times:
    """Wall-clock and processor seconds of the timed repetitions of one contestant."""

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    """Of the process that did the work."""
    missing: str = ""
    """Why it did not get to the end; empty if it did."""

    @property
    def median(self) -> float:
        return statistics.median(self.wall)

    @property
    def processor_median(self) -> float:
        return statistics.median(self.processor)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Lower and upper quartile of the wall-clock seconds."""
        lower, _, upper = statistics.quantiles(self.wall, n=4, method="inclusive")
        return lower, upper


def interleave(
    contestants: Mapping[str, Callable[[], object]],
    *,
    warm_up: int,
    repeats: int,
    device: str = "cpu",
    prepare: Callable[[], object] = gc.collect,
    failure: type[Exception] | tuple[type[Exception], ...] = (),
) -> dict[str, Times]:
    """Time all contestants, each once per repetition, starting with another one each time.

    Args:
        contestants: name -> what to time; the time is what it returns if that is a `Lap`.
        warm_up: repetitions that are not counted.
        repeats: repetitions that are.
        prepare: called before each, not timed.
        device: waited for before and after each call where it is a GPU.
        failure: what a contestant may raise: it is left out from then on, and its times say why.
    """
    times = {name: Times() for name in contestants}
    names = list(contestants)
    for repetition in range(warm_up + repeats):
        turn = repetition % max(1, len(names))
        for name in names[turn:] + names[:turn]:
            if times[name].missing:
                continue
            prepare()
            wait_for(device)
            processor, wall = time.process_time(), time.perf_counter()
            try:
                result = contestants[name]()
            except failure as error:
                times[name].missing = str(error)
                continue
            wait_for(device)
            lap = Lap(time.perf_counter() - wall, time.process_time() - processor)
            lap = result if isinstance(result, Lap) else lap
            if repetition >= warm_up:
                times[name].wall.append(lap.wall)
                times[name].processor.append(lap.processor)
    return times


def wait_for(device: str) -> None:
    """Wait until a GPU has done all that it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
