"""Turning SIGINT, SIGTERM and SIGHUP into a question that the round loop asks between steps.

Knows nothing about what is saved when it is told to stop.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType


class StopFlag:
    """True, when called, once a signal has asked the process to stop."""

    def __init__(self) -> None:
        self.signal_number = 0
        """The first signal that arrived; 0 so far."""

    def __call__(self) -> bool:
        return self.signal_number != 0

    @property
    def signal_name(self) -> str:
        """What that signal is called, such as SIGTERM; `a signal` where something else has asked to stop."""
        return signal.Signals(self.signal_number).name if self.signal_number else "a signal"


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """Within the block, the first SIGINT, SIGTERM or SIGHUP raises a flag; a SIGINT after that interrupts at once.

    SIGHUP comes when a terminal or an SSH session closes; where it is ignored, as under `nohup`, it stays so.
    Python delivers signals to the main thread only, so in any other thread the flag stays down.
    """
    flag = StopFlag()

    def handle(number: int, frame: FrameType | None) -> None:
        if flag.signal_number == 0:
            flag.signal_number = number
        elif number == signal.SIGINT:
            raise KeyboardInterrupt

    with handled(handle, [signal.SIGINT, signal.SIGTERM, *not_ignored(signal.SIGHUP)]):
        yield flag


@contextmanager
def handled(handle: Callable[[int, FrameType | None], None], numbers: Iterable[int]) -> Iterator[None]:
    """Call `handle` for the signals `numbers` within the block, and put back after it what handled them before.

    Python delivers signals to the main thread only, so in any other thread nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            # None: installed by something other than Python, which cannot be put back
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def not_ignored(*numbers: int) -> list[int]:
    """Those of the signals that this process does not ignore; under `nohup` it ignores SIGHUP."""
    return [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
