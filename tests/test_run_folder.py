"""docs/run-folder.md names what a run writes, and the readers of Python give what the command line prints."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.report.conftest import write_run, write_study

import fedmira
from fedmira.cli.main import main
from fedmira.config.run import RunConfig
from fedmira.errors import UsageError
from fedmira.experiment import run
from fedmira.runs.store import RunStore

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "run-folder.md").read_text("utf-8")
BESIDE = {"event", "round"}


def named(cell: str) -> set[str]:
    return set(re.findall(r"`([\w./]+)`", cell))


def rows() -> dict[str, tuple[str, ...]]:
    """First cell to all cells of the page's tables, by what is named in it."""
    cells = [
        tuple(cell.strip() for cell in line.strip("|\n").split(" | ")) for line in PAGE.splitlines() if "|" in line
    ]
    return {name: row for row in cells for name in named(row[0])}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = RunConfig.model_validate(
        {
            "data": {"source": "planted", "families": 2, "clients_per_family": 2, "examples": 8},
            "model": {"adapter": {"rank": 2, "targets": ["q_proj"]}, "dtype": "float32", "device": "cpu"},
            "training": {"local_steps": 1, "batch_size": 2},
            "federation": {"rounds": 2},
            "method": {"name": "mira", "choice": {"enabled": False}},
            "exchange": {"compression": "bf16", "privacy": {"enabled": True}},
            "evaluation": {"generation": {"max_new_tokens": 2}},
        }
    )
    return run(config, directory=tmp_path_factory.mktemp("folder"))


def test_the_page_names_every_file(finished: Path) -> None:
    made = {path.name for path in finished.iterdir() if not path.name.startswith(".")}
    known = {name.partition("/")[0] for name in rows()}
    assert made - {"config.yaml"} <= known
    assert {"metrics.jsonl", "manifest.json", "graph.json", "checkpoints"} <= made


def test_the_page_names_every_event_and_key(finished: Path) -> None:
    timing = named(PAGE.split("`timing` holds")[1].split("\n\n")[0])
    seen: dict[str, set[str]] = {}
    for event in RunStore.open(finished).events():
        keys = seen.setdefault(event["event"], set())
        keys |= set(event) - BESIDE
        assert set(event["timing"]) <= timing
        if "clients" in event:
            keys |= {key for values in event["clients"].values() for key in values}
        keys |= set(event.get("privacy", {}))
    assert set(seen) == {"round", "evaluation", "final"}
    for kind, keys in seen.items():
        told = named(rows()[kind][2]) - {"client", "reason", "exchange.privacy", "validation", "test"}
        assert told == keys, kind


def printed(capsys: pytest.CaptureFixture[str], path: Path) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["report", str(path), "--json"]) == 0
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    del facts["report"]
    return facts


@pytest.mark.parametrize(("write", "read"), [(write_run, fedmira.read_run), (write_study, fedmira.read_study)])
def test_the_readers_give_what_the_report_prints(
    write: Callable[..., Path], read: Callable[[str], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "made", rounds=2)
    assert json.loads(json.dumps(read(str(path)))) == printed(capsys, path)
    assert fedmira.write_report(str(path)) == path / "report" / "index.html"
    other = {fedmira.read_run: fedmira.read_study, fedmira.read_study: fedmira.read_run}[read]
    with pytest.raises(UsageError, match=r"made is no (run|comparison): it has no "):
        other(path)
