"""From the tables of departments, called as they are called, to an adapter in a folder for each, without any code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

CONFIG = """
model: {adapter: {rank: 2, targets: [q_proj]}}
training: {local_steps: 1, batch_size: 1}
federation: {rounds: 1}
evaluation: {generation: {enabled: false}}
data:
  source: jsonl
  path: data
  fields: {instruction: Frage, input: Akte, output: Antwort}
  split_field: Teil
  partition: {by: field}
"""
NAMES = ["Chirurgie \u2013 West", "Innere", "Radiologie S\u00fcd"]


def test_departments_tables_are_trained_on_and_exported(fedmira, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(CONFIG, encoding="utf-8")
    Path("data").mkdir()
    for name in NAMES:
        rows = "".join(f"Was gilt in {name} {n}?;;ja;\n" for n in range(10))
        text = f"Frage;Akte;Antwort;Teil\n{rows}Wer?;Akte 7;niemand;test\n"
        Path(f"data/{name}.csv").write_text(text, encoding="utf-8-sig")
    assert fedmira("validate", "c.yaml").code == 0
    outcome = fedmira("data", "c.yaml", "--json")
    assert outcome.code == 0, outcome.err + outcome.out
    shown = json.loads(outcome.out)
    assert [row["client"] for row in shown["clients"]] == NAMES
    run = json.loads(fedmira("run", "c.yaml", "--json").out)["run"]
    outcome = fedmira("export", run, "--all", "--out", "out")
    assert outcome.code == 0, outcome.err
    assert sorted(place.name for place in Path("out").iterdir()) == NAMES
    assert all((Path("out") / name / "adapter_model.safetensors").is_file() for name in NAMES)
    assert fedmira("predict", run, "--client", NAMES[2], "Wer?").code == 0
    outcome = fedmira("predict", run, "--client", NAMES[2], "--file", f"data/{NAMES[1]}.csv", "--max-new-tokens", "1")
    assert (outcome.code, outcome.out.count("\n")) == (0, 11), outcome.err
    assert fedmira("report", run).code == 0


@pytest.mark.parametrize("command", ["data", "run"])
def test_a_table_with_a_header_of_its_own_says_which_key_helps(fedmira, tmp_path: Path, monkeypatch, command) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(CONFIG.replace("  fields:", "  # fields:"), encoding="utf-8")
    Path("data").mkdir()
    Path("data/Innere.csv").write_text("Frage;Akte;Antwort;Teil\nWo?;;hier;\n", encoding="utf-8")
    outcome = fedmira(command, "c.yaml")
    assert outcome.code == 3
    assert "the columns of 'Innere.csv' are Frage, Akte, Antwort, Teil" in outcome.err
    assert "data.fields: {instruction: NAME, output: NAME}" in outcome.err
