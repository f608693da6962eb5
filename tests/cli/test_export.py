"""`fedmira export` that is asked to end."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedmira.export import clients
from fedmira.export.peft import new_folder


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def exporting(monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[], None]) -> None:
    """`export` writes a folder, whatever run is named, and something happens meanwhile."""

    def export_clients(run: Path, client: str, out: Path, **_: Any) -> dict[str, Path]:
        with new_folder(out) as folder:
            (folder / "half").write_text("written")
            try:
                meanwhile()
            except Exception:
                pytest.fail("taken for an error of what was going on")
        return {client: out}

    monkeypatch.setattr(clients, "export_clients", export_clients)


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_leaves_nothing_behind(fedmira, monkeypatch: pytest.MonkeyPatch, name: str, there: bool) -> None:
    number = signal.Signals[name]
    exporting(monkeypatch, lambda: os.kill(os.getpid(), number))
    if there:
        Path("out").mkdir()
    seen: list[int] = []
    before = signal.signal(number, lambda number, _: seen.append(number))
    try:
        outcome = fedmira("export", "run", "--client", "a", "--out", "out", "--json")
        os.kill(os.getpid(), number)
    finally:
        signal.signal(number, before)
    assert outcome.code == 128 + number
    assert json.loads(outcome.out) == {"error": f"interrupted by {name}", "exit_code": 128 + number}
    assert [path for path in Path(".").rglob("*") if path != Path("out")] == []
    assert Path("out").exists() == there
    # behind the command signals are the caller's again
    assert seen == [number]


def test_under_nohup_the_end_of_the_terminal_is_ignored(fedmira, monkeypatch: pytest.MonkeyPatch) -> None:
    exporting(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert fedmira("export", "run", "--client", "a", "--out", "out").code == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert Path("out/half").is_file()


def test_a_thread_that_gets_no_signals_exports_too(fedmira, monkeypatch: pytest.MonkeyPatch) -> None:
    exporting(monkeypatch, lambda: None)
    codes: list[int] = []
    thread = threading.Thread(
        target=lambda: codes.append(fedmira("export", "run", "--client", "a", "--out", "out").code)
    )
    thread.start()
    thread.join()
    assert codes == [0]
