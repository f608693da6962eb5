"""Progress: live on a terminal, a flushed line per round elsewhere, nothing with --quiet."""

from __future__ import annotations

import errno
import io
import os
import sys

import pytest

from fedmira.cli.display import LiveDisplay, PlainDisplay, SteadyDisplay, open_display
from fedmira.cli.session import Session
from fedmira.config.run import RunConfig


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class CountingStream(io.StringIO):
    flushes = 0

    def flush(self) -> None:
        self.flushes += 1
        super().flush()


def tell(display: PlainDisplay | LiveDisplay | SteadyDisplay) -> None:
    display.start("mira seed 0", 2)
    for round_ in (1, 2):
        for done in range(5):
            display.step(round_, done, 4)
        display.round(round_, f"train loss {3 - round_}.0")
    display.message("client \x1b[31mred was left out")
    display.finish("runs/done")
    display.close()


def test_plain_lines_one_per_round_each_flushed() -> None:
    stream = CountingStream()
    tell(PlainDisplay(stream))
    assert stream.getvalue().splitlines() == [
        "mira seed 0: 2 rounds",
        "  round 1/2  train loss 2.0",
        "  round 2/2  train loss 1.0",
        "client \\x1b[31mred was left out",
        "runs/done",
    ]
    assert stream.flushes >= 5


def test_a_terminal_gets_a_bar_and_keeps_one_line_per_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    display = LiveDisplay(stream)
    tell(display)
    shown = stream.getvalue()
    assert "mira seed 0" in shown
    assert "mira seed 0: train loss 1.0\n" in shown.replace("\r", "")
    assert "\x1b[31m" not in shown
    assert shown.rstrip("\n").endswith("\x1b[2K") or "\x1b[?25h" in shown  # the bar is wiped and the cursor is back


@pytest.mark.parametrize(
    ("term", "terminal", "kind"),
    [("xterm", True, LiveDisplay), ("dumb", True, PlainDisplay), ("xterm", False, PlainDisplay)],
)
def test_the_display_fits_the_output(monkeypatch: pytest.MonkeyPatch, term: str, terminal: bool, kind: type) -> None:
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(sys, "stdout", Terminal() if terminal else io.StringIO())
    assert type(open_display(sys.stdout)) is kind


def test_json_keeps_standard_output_free(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with Session(json=True).loading(RunConfig()) as display:
        assert display is not None
        display.message("at work")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "Loading the base model (embedded) and the data (planted) ...",
        "at work",
    ]


def test_quiet_shows_nothing() -> None:
    with Session(quiet=True).loading(RunConfig()) as display:
        assert display is None


def test_without_standard_output_there_is_nothing_to_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    told: list[str] = []
    tell(SteadyDisplay(told.append, to_stderr=False))
    assert not told


class GoneAfter(Terminal):
    """A reader that leaves after some writes."""

    def __init__(self, writes: int) -> None:
        super().__init__()
        self.writes = writes

    def write(self, text: str) -> int:
        self.writes -= 1
        if self.writes < 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().write(text)


@pytest.mark.parametrize("term", ["xterm", "dumb"])
@pytest.mark.parametrize("writes", [0, 1, 4])
def test_a_reader_that_leaves_is_told_once_and_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, term: str, writes: int
) -> None:
    told: list[str] = []
    stream = GoneAfter(writes)
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(sys, "stdout", stream)
    tell(SteadyDisplay(told.append, to_stderr=False))
    assert told == ["progress can no longer be shown (Input/output error); the work goes on without"]
    assert stream.writes < 0
