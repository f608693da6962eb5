"""Where the time of a run goes: code marks its stages, and a stopwatch adds them up where somebody is watching.

Times are exclusive: a stage inside another one is counted once, as itself. Without a watcher a mark costs one look at
a context variable. Knows nothing about what happens in a stage; imports nothing of fedmira.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Literal, TypeAlias, get_args

Stage: TypeAlias = Literal["start", "data", "forward", "backward", "optimizer", "mixing", "evaluation", "disk", "other"]
STAGES: tuple[Stage, ...] = get_args(Stage)
"""In the order in which people read them; `other` is what no mark claims."""


class Stopwatch:
    """Adds up the seconds of every stage.

    Args:
        clock: seconds, from any origin.

    >>> ticks = iter([0.0, 1.0, 3.0, 3.5])
    >>> watch = Stopwatch(clock=lambda: next(ticks))
    >>> with watching(watch):  # from 0.0
    ...     with stage("forward"):  # from 1.0 to 3.0
    ...         pass
    >>> watch.seconds["forward"], watch.seconds["other"]
    (2.0, 1.5)
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[Stage, float] = dict.fromkeys(STAGES, 0.0)
        self.settle: Callable[[], None] = lambda: None
        """See `settle_with`."""
        self._clock = clock
        self._running: list[Stage] = []
        self._since = 0.0

    @contextmanager
    def stage(self, name: Stage) -> Iterator[None]:
        """Count the `with` block as `name` instead of as the stage around it."""
        self._turn()
        self._running.append(name)
        try:
            yield
        finally:
            self._turn()
            self._running.pop()

    def _turn(self) -> None:
        """Give the time since the last turn to the stage that was running."""
        self.settle()
        now = self._clock()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now


_WATCH: ContextVar[Stopwatch | None] = ContextVar("stopwatch", default=None)
_UNWATCHED = nullcontext()


@contextmanager
def watching(stopwatch: Stopwatch) -> Iterator[None]:
    """Inside the `with` block the marks of this thread count on `stopwatch`; what none claims is `other`."""
    token = _WATCH.set(stopwatch)
    try:
        with stopwatch.stage("other"):
            yield
    finally:
        _WATCH.reset(token)


def settle_with(settle: Callable[[], None]) -> None:
    """Let the stopwatch, where one is watching, call `settle` before it reads the clock.

    Work on a GPU goes on after the call that ordered it; without waiting it would be counted wherever the result is
    first needed.
    """
    stopwatch = _WATCH.get()
    if stopwatch is not None:
        stopwatch.settle = settle


def stage(name: Stage) -> AbstractContextManager[None]:
    """Mark a `with` block as the stage `name`."""
    stopwatch = _WATCH.get()
    return _UNWATCHED if stopwatch is None else stopwatch.stage(name)
