"""Live progress on a terminal, one plain line per round elsewhere.

All implement the `Display` that `experiment` and `studies` call. Knows nothing about rounds beyond their numbers.
"""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO, cast

from fedmira.cli.process import discard
from fedmira.cli.session import printable
from fedmira.formats import counted

if TYPE_CHECKING:
    from rich.progress import TaskID

MAXIMUM_REFRESHES_PER_SECOND = 8


class PlainDisplay:
    """One line per round, flushed, for logs and pipes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._total_rounds = 0

    def _line(self, text: str) -> None:
        print(printable(text), file=self._stream, flush=True)

    def start(self, title: str, total_rounds: int) -> None:
        self._total_rounds = total_rounds
        self._line(f"{title}: {counted(total_rounds, 'round')}")

    def step(self, round_: int, done: int, total: int) -> None: ...

    def round(self, round_: int, line: str) -> None:
        width = len(str(self._total_rounds))
        self._line(f"  round {round_:>{width}}/{self._total_rounds}  {line}")

    def message(self, line: str) -> None:
        self._line(line)

    def finish(self, line: str) -> None:
        self._line(line)

    def close(self) -> None: ...


class LiveDisplay:
    """A bar for the run at work; finished runs stay above it, one line each."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._console = Console(file=stream, highlight=False)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[state]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            console=self._console,
            transient=True,
            refresh_per_second=MAXIMUM_REFRESHES_PER_SECOND,
        )
        self._task: TaskID | None = None
        self._title = ""
        self._last_line = ""
        self._total_rounds = 0
        self._last_refresh = 0.0

    def start(self, title: str, total_rounds: int) -> None:
        self._progress.start()
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._title, self._last_line, self._total_rounds = title, "", total_rounds
        self._task = self._progress.add_task(printable(title), total=total_rounds, state="starting")

    def step(self, round_: int, done: int, total: int) -> None:
        now = time.monotonic()
        if self._task is None or (now - self._last_refresh < 1 / MAXIMUM_REFRESHES_PER_SECOND and done):
            return
        self._last_refresh = now
        share = done / total if total else 0.0
        self._progress.update(
            self._task,
            completed=round_ - 1 + min(1.0, share),
            state=f"round {round_}/{self._total_rounds}, step {done}/{total}",
        )

    def round(self, round_: int, line: str) -> None:
        self._last_line = line
        if self._task is not None:
            state = f"round {round_}/{self._total_rounds}, {printable(line)}"
            self._progress.update(self._task, completed=round_, state=state)

    def message(self, line: str) -> None:
        self._console.print(printable(line), markup=False)

    def finish(self, line: str) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None
        # the numbers of the last round say more than where the run lies, which the closing lines repeat
        self.message(f"{self._title}: {self._last_line}" if self._last_line else line)
        self._last_line = ""

    def close(self) -> None:
        self._progress.stop()


class SteadyStream:
    """A stream whose reader may leave; what is written from then on goes nowhere, and `lost` says why.

    Not left to the displays: a bar is also drawn by a thread of its own.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost = ""

    def write(self, text: str) -> int:
        with self._steadily():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._steadily():
            self._stream.flush()

    @contextmanager
    def _steadily(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.lost = self.lost or error.strerror or str(error)
            discard(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class SteadyDisplay:
    """Shows what another display shows until its reader leaves: a pager that is closed, a terminal that is gone.

    Then `told` hears why, once, and nothing else happens: a run of hours does not end because nobody looks on.
    """

    def __init__(self, told: Callable[[str], None], *, to_stderr: bool) -> None:
        # None where a program was started without it, as some services are: then a few lines are kept for nobody
        self._stream = SteadyStream((sys.stderr if to_stderr else sys.stdout) or io.StringIO())
        self._shown = open_display(cast(TextIO, self._stream))
        self._told: Callable[[str], None] | None = told

    def _show(self, show: Callable[..., None], *arguments: object) -> None:
        show(*arguments)
        if self._stream.lost and (told := self._told):
            self._told = None
            told(f"progress can no longer be shown ({self._stream.lost}); the work goes on without")

    def start(self, title: str, total_rounds: int) -> None:
        self._show(self._shown.start, title, total_rounds)

    def step(self, round_: int, done: int, total: int) -> None:
        self._show(self._shown.step, round_, done, total)

    def round(self, round_: int, line: str) -> None:
        self._show(self._shown.round, round_, line)

    def message(self, line: str) -> None:
        self._show(self._shown.message, line)

    def finish(self, line: str) -> None:
        self._show(self._shown.finish, line)

    def close(self) -> None:
        self._shown.close()


def open_display(stream: TextIO) -> PlainDisplay | LiveDisplay:
    """Return the display that fits where the output goes: live on a terminal, plain lines elsewhere.

    A terminal that cannot move its cursor (TERM=dumb) gets plain lines; NO_COLOR is respected.
    """
    if stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb"):
        return LiveDisplay(stream)
    return PlainDisplay(stream)
