"""Questions are read as people write them, and answered together as one by one."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedmira.config.run import RunConfig
from fedmira.data.sources.records import Fields, example_from_record
from fedmira.errors import DataError
from fedmira.experiment import run
from fedmira.export.clients import answer, answers
from fedmira.export.questions import read_questions

CLIENT = "family-0-client-0"


def written(tmp_path: Path, text: str, name: str = "in.txt") -> str:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return str(tmp_path / name)


def asked(place: str) -> list[tuple[str, str]]:
    return [(question.instruction, question.input) for question in read_questions(place)]


def test_a_line_is_an_instruction_and_a_record_may_have_an_input(tmp_path: Path) -> None:
    assert asked(written(tmp_path, "What is 1?\n\n{or this}\n")) == [("What is 1?", ""), ("{or this}", "")]
    lines = '{"instruction": "a", "input": "b"}\n{"instruction": "c", "context": "d", "response": "e"}\n'
    expected = [("a", "b"), ("c", "d")]
    assert asked(written(tmp_path, lines)) == expected
    assert asked(written(tmp_path, lines, "in.jsonl")) == expected
    whole = json.dumps([{"instruction": "a", "input": "b"}, {"prompt": "c"}, "d"])
    assert asked(written(tmp_path, whole, "in.json")) == [("a", "b"), ("c", ""), ("d", "")]


def test_of_a_conversation_the_last_turn_of_the_user_is_asked(tmp_path: Path) -> None:
    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    [question] = read_questions(written(tmp_path, json.dumps({"messages": turns}), "in.jsonl"))
    assert (question.instruction, question.turns) == ("c", (("user", "a"), ("assistant", "b")))
    # as in training data, with its answer
    [question] = read_questions(written(tmp_path, json.dumps({"messages": turns[:2]}), "in.jsonl"))
    assert (question.instruction, question.turns) == ("a", ())


USER = {"role": "user", "content": "Q"}


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "Q", "output": ""},
        {"instruction": "Q", "output": {"text": 3}, "category": 0.5, "client": ["a"]},
        {"instruction": "Q", "response": [], "output": None},
        {"question": "Q"},
        {"question": "Q", "answer": ""},
        {"question": "Q", "prompt": None, "completion": 3},
        {"prompt": "Q"},
        {"prompt": "Q", "completion": ""},
        {"prompt": "Q", "response": ""},
        {"prompt": [USER]},
        {"prompt": [USER], "completion": None},
        {"prompt": [USER], "completion": [{"role": "assistant", "content": ""}]},
        {"messages": [USER, {"role": "assistant", "content": ""}]},
        {"messages": [USER, {"role": "assistant", "content": None}, {"role": "assistant"}]},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": 3}]},
        {"messages": [], "conversations": None, "instruction": "Q"},
    ],
    ids=str,
)
def test_whatever_stands_as_the_answer_is_not_looked_at(record: dict[str, Any], tmp_path: Path) -> None:
    assert asked(written(tmp_path, json.dumps(record), "in.jsonl")) == [("Q", "")]
    # nor by a run whose own data has other names
    [question] = read_questions(written(tmp_path, json.dumps(record)), {"instruction": "Frage", "output": "Antwort"})
    assert (question.instruction, question.turns) == ("Q", ())


@pytest.mark.parametrize(
    ("record", "parts"),
    [
        ({"messages": [{"role": "system", "content": "s"}, USER, {"role": "bot", "content": "a"}]}, {}),
        ({"messages": [USER, {"role": "bot", "content": "a"}] * 2, "system": "s"}, {}),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "a"}], "input": "i"}, {}),
        ({"prompt": "Q", "completion": "a", "input": "i", "history": [["b", "c"]], "system": "s"}, {}),
        ({"prompt": [USER], "completion": [{"role": "bot", "content": "a"}], "input": "i"}, {}),
        ({"prompt": "Q", "response": "a", "context": "i", "history": [["b", "c"]]}, {}),
        ({"instruction": "Q", "question": "no", "output": "a", "input": None, "context": "i", "system": "s"}, {}),
        ({"instruction": "Q", "output": "a", "prompt": "P", "completion": "c"}, {}),
        ({"question": "Q", "answer": "a", "prompt": "no", "history": [["b", "c"]]}, {}),
        (
            {"Frage": "Q", "Antwort": "a", "instruction": "no", "input": "i"},
            {"instruction": "Frage", "output": "Antwort"},
        ),
        ({"prompt": "Q", "completion": "a", "Akte": "i", "history": "no"}, {"input": "Akte"}),
        ({"system": "Q", "Antwort": "a", "messages": [USER]}, {"instruction": "system", "output": "Antwort"}),
        ({"instruction": "Q", "messages": [{"role": "user", "content": "no"}], "reply": "a"}, {"output": "reply"}),
    ],
    ids=str,
)
def test_what_was_trained_on_is_asked_as_it_was(record: dict[str, Any], parts: dict[str, str], tmp_path: Path) -> None:
    of_training = example_from_record(record, Fields(parts=parts), "in.jsonl:1")
    [question] = read_questions(written(tmp_path, json.dumps(record), "in.jsonl"), parts)
    assert question == replace(of_training, output="")


def test_tables_have_columns_of_the_runs_own(tmp_path: Path) -> None:
    text = "Frage;Akte;messages;history\nWer?;7;x;y\nWo?;;;\n"
    place = written(tmp_path, text, "in.csv")
    questions = read_questions(place, {"instruction": "Frage", "input": "Akte", "output": "Antwort"})
    assert [(one.instruction, one.input, one.turns) for one in questions] == [("Wer?", "7", ()), ("Wo?", "", ())]
    with pytest.raises(
        DataError, match=r"none of the fields Frage, instruction, question, prompt, .* its fields are Satz"
    ):
        read_questions(written(tmp_path, "Satz\nWer?\n", "in.csv"), {"instruction": "Frage"})
    assert asked(written(tmp_path, "question,history\nWho?,y\n", "in.csv")) == [("Who?", "")]


def test_standard_input_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO("Gr\u00fc\u00dfe?\n".encode())))
    assert asked("-") == [("Gr\u00fc\u00dfe?", "")]
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"\xff")))
    with pytest.raises(DataError, match="standard input is not UTF-8"):
        read_questions("-")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("in.txt", " \n", "in.txt holds no question"),
        ("in.jsonl", '{"instruction": "a"}\nwhat?\n', r"1 records that are no questions, first record 2: not JSON"),
        ("in.txt", '{"instruction": "a"}\nwhat?\n', r"first record 2: not JSON"),
        ("in.txt", '{"instruction": ""}\n', "first record 1: the field instruction is empty"),
        ("in.jsonl", '{"answer": "a"}\n', "none of the fields instruction, question, .*; its fields are answer"),
        ("in.jsonl", '{"question": 3}\n', "first record 1: the field question is int, not text"),
        ("in.jsonl", '{"prompt": ""}\n', "first record 1: the field prompt is empty"),
        ("in.jsonl", '{"prompt": [{"role": "judge", "content": "a"}]}\n', "unknown role 'judge' in prompt; allowed"),
        ("in.jsonl", '{"messages": [{"role": "bot", "content": "a"}]}\n', "messages has no turn of a user that waits"),
        (
            "in.jsonl",
            '{"conversations": [{"from": "user", "value": " "}]}\n',
            "last question in conversations is empty",
        ),
        ("in.jsonl", "3\n", "first record 1: a record must be an object"),
        ("in.jsonl", '"\\ud800"\n', "half a character"),
    ],
)
def test_what_is_no_question_is_named(name: str, text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        read_questions(written(tmp_path, text, name))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = RunConfig.model_validate(
        {
            "data": {"source": "planted", "families": 1, "clients_per_family": 2, "examples": 8},
            "model": {"adapter": {"rank": 2, "targets": ["q_proj"]}, "dtype": "float32", "device": "cpu"},
            "training": {"local_steps": 2, "batch_size": 2, "learning_rate": 0.01},
            "federation": {"rounds": 1},
            "method": {"name": "local_only"},
            "evaluation": {"test": False, "generation": {"max_new_tokens": 4}},
        }
    )
    return run(config, directory=tmp_path_factory.mktemp("questions"))


def test_many_are_answered_as_each_alone(finished: Path, tmp_path: Path) -> None:
    place = written(tmp_path, "encode: kemo\nWhat?\nencode: a longer one of these\n")
    told: list[str] = []
    together = answers(finished, CLIENT, read_questions(place), warn=told.append)
    assert together == [answer(finished, CLIENT, text) for text, _ in asked(place)]
    assert told == []
    assert answers(finished, CLIENT, []) == []


def test_paths_may_be_texts_and_answers_longer_than_in_the_run(finished: Path) -> None:
    short, long = (answer(str(finished), CLIENT, "encode: kemo", max_new_tokens=most) for most in (1, 12))
    assert long.startswith(short)
    assert len(long) > len(short)


def test_what_is_left_out_of_questions_is_said_once(finished: Path, tmp_path: Path) -> None:
    long = "word " * 400
    questions = read_questions(written(tmp_path, f"What?\n{long}\n{long}\n"))
    told: list[str] = []
    answers(finished, CLIENT, questions, warn=told.append)
    [line] = told
    assert line.startswith("2 of 3 questions are too long to be read whole; in.txt:2: ")
