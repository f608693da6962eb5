"""`fedmira predict` with many questions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fedmira.export import clients
from fedmira.types import Example


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("in.txt").write_text("one\ntwo\n")
    return tmp_path


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What is asked of any run; every answer is what was asked, on two lines."""
    found: list[dict[str, Any]] = []

    def answers(run: Path, client: str, questions: Sequence[Example], **options: Any) -> list[str]:
        options.pop("warn")("a remark")
        found.append({"run": str(run), "client": client, **options})
        return [f"{question.instruction}\nagain" for question in questions]

    monkeypatch.setattr(clients, "answers", answers)
    monkeypatch.setattr(clients, "fields_of", lambda run: {"instruction": "Frage"})
    return found


def test_one_line_for_each_question(fedmira, calls: list[dict[str, Any]]) -> None:
    outcome = fedmira("predict", "run", "--client", "a", "--file", "in.txt", "--max-new-tokens", 3)
    assert (outcome.code, outcome.out, outcome.err) == (0, "one\\nagain\ntwo\\nagain\n", "warning: a remark\n")
    assert calls == [{"run": "run", "client": "a", "max_new_tokens": 3}]


def test_one_object_for_each_question(fedmira, calls: list[dict[str, Any]]) -> None:
    Path("in.jsonl").write_text('{"instruction": "one", "input": "for"}\n{"instruction": "two"}\n')
    outcome = fedmira("predict", "run", "--client", "a", "--file", "in.jsonl", "--json")
    assert [json.loads(line) for line in outcome.out.splitlines()] == [
        {"client": "a", "instruction": "one", "input": "for", "answer": "one\nagain"},
        {"client": "a", "instruction": "two", "input": "", "answer": "two\nagain"},
    ]


def test_columns_go_by_the_names_of_the_run(fedmira, calls: list[dict[str, Any]]) -> None:
    Path("in.csv").write_text("Frage;Antwort\nWer?;\n")
    assert fedmira("predict", "run", "--client", "a", "--file", "in.csv").out == "Wer?\\nagain\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give either TEXT or --file FILE"),
        (("text", "--file", "in.txt"), "give either TEXT or --file FILE"),
        (("--file", "in.txt", "--input", "more"), "--input has no effect with --file"),
    ],
)
def test_what_does_not_go_together_is_refused(
    fedmira, calls: list[dict[str, Any]], arguments: tuple[str, ...], said: str
) -> None:
    outcome = fedmira("predict", "run", "--client", "a", *arguments)
    assert outcome.code == 2
    assert said in outcome.err
    assert calls == []


def test_a_file_that_is_not_there_is_a_fault_of_the_data(fedmira, calls: list[dict[str, Any]]) -> None:
    assert fedmira("predict", "run", "--client", "a", "--file", "other.txt").code == 3
