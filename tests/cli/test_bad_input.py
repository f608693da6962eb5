"""Bad input: each kind gets its exit code and one clear message, and nothing is left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

BASE = """
name: bad
model: {adapter: {rank: 2, targets: [q_proj]}}
training: {local_steps: 1, batch_size: 1}
federation: {rounds: 1}
evaluation: {generation: {enabled: false}}
"""
PLANTED = "data: {source: planted, families: 2, clients_per_family: 2, examples: 16}\n"
JSONL = "data: {source: jsonl, path: clients, partition: {by: field}}\n"


def lines(count: int, answer: str = "yes", **more: str) -> str:
    return "".join(json.dumps({"instruction": f"say {n}", "output": answer, **more}) + "\n" for n in range(count))


# name: (files to make, config, overrides, exit code, words of the message)
CASES: dict[str, tuple[dict[str, str], str, list[str], int, list[str]]] = {
    "a missing data file": ({}, JSONL, ["data.path=nowhere.jsonl"], 3, ["nowhere.jsonl"]),
    "a file that is not text": ({"a.jsonl": "\x00\udcff"}, JSONL, [], 3, ["a.jsonl"]),
    "a file without examples": ({"a.jsonl": "\n"}, JSONL, [], 3, ["a.jsonl"]),
    "a client with too few examples": ({"a.jsonl": lines(10), "b.jsonl": lines(1)}, JSONL, [], 3, ["'b'"]),
    "all answers too long": (
        {"a.jsonl": lines(10), "b.jsonl": lines(10, "word " * 200)},
        JSONL,
        ["data.max_length=40"],
        3,
        ["b", "max_length"],
    ),
    "an unknown model folder": ({}, PLANTED, ["model.path=./no-such-model"], 4, ["./no-such-model", "embedded"]),
    "no layer matched": ({}, PLANTED, ["model.adapter.targets=[q_porj]"], 2, ["q_porj", "q_proj", "down_proj"]),
    "a prediction that is to be resumed": ({}, PLANTED, ["--dry-run", "--resume"], 2, ["--dry-run", "leave out"]),
    "rank 0": ({}, PLANTED, ["model.adapter.rank=0"], 2, ["model.adapter.rank", "0"]),
    "more clients per round than clients": ({}, PLANTED, ["federation.clients_per_round=9"], 2, ["9", "4"]),
    "strength beyond the stable bound": (
        {},
        PLANTED,
        ["method.name=mira_published", "method.graph.kind=uniform", "method.strength=10", "method.server_lr=1"],
        2,
        ["10", "0.5"],
    ),
    "a graph of the wrong size": ({"../g.csv": "0,1\n1,0"}, PLANTED, ["@graph"], 3, ["(2, 2)", "4 x 4"]),
    "a graph with NaN": (
        {"../g.csv": "0,nan,1,1\nnan,0,1,1\n1,1,0,1\n1,1,1,0"},
        PLANTED,
        ["@graph"],
        3,
        ["nan"],
    ),
    "a graph with negative weights": (
        {"../g.csv": "0,-1,1,1\n-1,0,1,1\n1,1,0,1\n1,1,1,0"},
        PLANTED,
        ["@graph"],
        3,
        ["-1"],
    ),
    "a client name with path tricks": (
        {"a.jsonl": lines(10, client="../escaped") + lines(10, client="anna")},
        JSONL,
        [],
        3,
        ["../escaped", "Allowed"],
    ),
}
GRAPH = ["method.name=mira", "method.graph.kind=given", "method.graph.path=g.csv"]


@pytest.mark.parametrize("case", CASES)
def test_bad_input(fedmira, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    files, config, overrides, code, words = CASES[case]
    place = tmp_path / "place"
    (place / "clients").mkdir(parents=True)
    monkeypatch.chdir(place)
    for name, content in files.items():
        (place / "clients" / name).write_text(content, encoding="utf-8", errors="surrogateescape")
    (place / "c.yaml").write_text(BASE + config, encoding="utf-8")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    outcome = fedmira("run", "c.yaml", *(GRAPH if overrides == ["@graph"] else overrides))
    assert outcome.code == code, outcome.err
    assert outcome.err.startswith("Error: ")
    assert "Traceback" not in outcome.err
    for word in words:
        assert word in outcome.err, outcome.err
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before


@pytest.mark.parametrize(
    ("breakage", "code", "words"),
    [
        ("the data file is gone", 3, "clients"),
        ("the data file is damaged", 3, "a.jsonl"),
        ("the data file lost an example", 5, "the data changed since the run was started"),
        ("the graph is gone", 3, "g.csv"),
        ("the graph has NaN", 3, "nan"),
        ("the graph is another", 5, "the graph changed since the run was started"),
    ],
)
def test_bad_input_takes_nothing_from_a_run_that_is_there(
    fedmira, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, breakage: str, code: int, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    data, graph = Path("clients/a.jsonl"), Path("g.csv")
    data.parent.mkdir()
    data.write_text(lines(8), encoding="utf-8")
    Path("clients/b.jsonl").write_text(lines(8, "no"), encoding="utf-8")
    graph.write_text("0,1\n1,0\n")
    Path("c.yaml").write_text(BASE + JSONL, encoding="utf-8")
    assert fedmira("run", "c.yaml", *GRAPH).code == 0
    before = {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}
    match breakage:
        case "the data file is gone":
            data.unlink()
            Path("clients/b.jsonl").unlink()
        case "the data file is damaged":
            data.write_bytes(b"\xff\xfe\x00")
        case "the data file lost an example":
            data.write_text(lines(7), encoding="utf-8")
        case "the graph is gone":
            graph.unlink()
        case "the graph has NaN":
            graph.write_text("0,nan\nnan,0\n")
        case "the graph is another":
            graph.write_text("0,2\n2,0\n")
    outcome = fedmira("run", "c.yaml", "--resume", *GRAPH)
    assert outcome.code == code, outcome.err
    assert words in outcome.err
    assert "Traceback" not in outcome.err
    assert {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()} == before


def test_records_that_cannot_be_used_are_told_when_a_run_starts(fedmira, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("clients").mkdir()
    for name in "ab":
        Path(f"clients/{name}.jsonl").write_text(lines(10) + '{"text": "t"}\n', encoding="utf-8")
    Path("c.yaml").write_text(BASE + JSONL, encoding="utf-8")
    outcome = fedmira("run", "c.yaml")
    assert outcome.code == 0, outcome.err
    warning = "warning: unusable: 2 of 22 records, in 2 of 2 files (a.jsonl record 11: no known shape"
    assert sum(line.startswith(warning) for line in outcome.out.splitlines()) == 1
    [log] = Path("runs").glob("*/run.log")
    assert warning in log.read_text()
