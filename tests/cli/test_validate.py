"""`fedmira validate`: every mistake at once, and what a config names must be there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> str:
        (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
        return "c.yaml"

    return write


def test_a_valid_config_names_its_run_directory(fedmira, write, tmp_path: Path) -> None:
    outcome = fedmira("validate", write("name: trial\nseed: 3\n"))
    assert outcome.code == 0
    assert outcome.out.startswith("c.yaml is valid\nRun directory: runs/trial-mira-seed3-")
    facts = json.loads(fedmira("validate", "c.yaml", "method.name=fedit", "--json").out)
    assert facts["valid"] is True
    assert facts["run_directory"].startswith("runs/trial-fedit-seed3-")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.yaml"]


def test_every_mistake_is_reported_at_once(fedmira, write) -> None:
    outcome = fedmira("validate", write("seed: -1\ntrainning: {}\nmodel: {adapter: {rank: 0}}\n"), "method.strenght=1")
    assert outcome.code == 2
    for wrong in ("seed", "trainning", "model.adapter.rank", "method.strenght"):
        assert wrong in outcome.err
    assert "'training'" in outcome.err
    assert "strength" in outcome.err
    assert outcome.out == ""


def test_a_missing_config_offers_the_recipes(fedmira, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = fedmira("validate", "quickstart")
    assert outcome.code == 2
    assert "quickstart" in outcome.err


@pytest.mark.parametrize(
    ("text", "code", "names"),
    [
        ("data: {source: jsonl, path: nowhere}", 3, ["data.path", "nowhere"]),
        ("data: {source: jsonl, path: 'none/*.jsonl'}", 3, ["none/*.jsonl"]),
        ("data: {source: natural_instructions, path: nowhere}", 3, ["data.path", "folder of task files"]),
        ("data: {source: dolly, path: data/dolly.jsonl.gz}", 3, ["data/dolly.jsonl.gz"]),
        ("method: {graph: {kind: given, path: graph.json}}", 3, ["method.graph.path", "graph.json"]),
        ("model: {path: ./no-model}", 4, ["model.path", "./no-model", "config.json"]),
        (r"model: {path: C:\models\small}", 4, ["model.path", r"C:\models\small", "config.json"]),
    ],
)
def test_files_that_are_not_there_are_named(fedmira, write, text: str, code: int, names: list[str]) -> None:
    outcome = fedmira("validate", write(text))
    assert outcome.code == code
    for name in names:
        assert name in outcome.err


def test_missing_files_are_reported_together(fedmira, write) -> None:
    outcome = fedmira("validate", write("data: {source: jsonl, path: nowhere}\nmodel: {path: ./no-model}\n"))
    assert outcome.code == 3
    assert "data.path" in outcome.err
    assert "model.path" in outcome.err


@pytest.mark.parametrize(
    "text",
    [
        "data: {source: dolly, path: databricks/databricks-dolly-15k}",
        "data: {source: huggingface, path: owner/set}",
        "model: {path: openai-community/gpt2-large}",
    ],
)
def test_hub_ids_are_left_alone(fedmira, write, text: str) -> None:
    assert fedmira("validate", write(text)).code == 0


def test_files_that_are_there_are_fine(fedmira, write, tmp_path: Path) -> None:
    (tmp_path / "clients").mkdir()
    (tmp_path / "clients" / "a.jsonl").write_text("{}\n")
    for path in ("clients", "clients/a.jsonl", "clients/*.jsonl"):
        assert fedmira("validate", write(f"data: {{source: jsonl, path: '{path}'}}")).code == 0


@pytest.mark.parametrize("method", ["{name: oracle_clusters}", "{graph: {kind: labels}}"])
def test_what_only_the_data_can_tell_is_said(fedmira, write, tmp_path: Path, method: str) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n")
    tasks = "method.graph.kind = labels needs tasks that clients share; `fedmira data c.yaml` shows those of the data"
    outcome = fedmira("validate", write(f"data: {{source: jsonl, path: a.jsonl}}\nmethod: {method}\n"))
    assert outcome.code == 0
    assert tasks in outcome.out
    assert tasks not in fedmira("validate", "c.yaml", "data.source=planted", "data.path=null").out
    assert tasks not in fedmira("validate", "c.yaml", "method.name=fedit").out


def test_a_leading_tilde_is_the_home_folder_as_in_a_run(fedmira, write, tmp_path: Path, monkeypatch) -> None:
    home = tmp_path / "home"
    (home / "model").mkdir(parents=True)
    (home / "model" / "config.json").write_text("{}")
    (home / "a.jsonl").write_text("{}\n")
    (home / "g.json").write_text("{}")
    monkeypatch.setenv("HOME", str(home))
    given = "method: {graph: {kind: given, path: ~/g.json}}\n"
    config = "data: {source: jsonl, path: ~/*.jsonl}\nmodel: {path: ~/model}\noutput: {directory: ~/runs}\n"
    outcome = fedmira("validate", write(config + given))
    assert outcome.code == 0, outcome.err
    assert f"Run directory: {home}/runs/" in outcome.out
    assert fedmira("validate", write("method: {graph: {kind: probe, probe_path: ~/a.jsonl}}")).code == 0
    assert fedmira("validate", write("method: {graph: {kind: probe, probe_path: ~/b.jsonl}}")).code == 3
