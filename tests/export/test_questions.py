"""Questions are read as people write them, and answered together as one by one."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedmira.config.run import RunConfig
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
        ("in.jsonl", '{"question": "a"}\n', "first record 1: no known shape"),
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
