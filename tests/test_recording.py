"""What stands beside metrics.jsonl: which examples each client had, and what its adapter answered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedmira.assembly import assemble
from fedmira.config.run import RunConfig
from fedmira.exchange import in_process
from fedmira.experiment import run
from fedmira.runs.store import RunStore


def tiny(**evaluation: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "data": {"source": "planted", "families": 2, "clients_per_family": 1, "examples": 12},
            "model": {"adapter": {"rank": 2, "targets": ["q_proj"]}, "dtype": "float32", "device": "cpu"},
            "training": {"local_steps": 1, "batch_size": 2},
            "federation": {"rounds": 1},
            "method": {"name": "fedit"},
            "evaluation": {"generation": {"max_new_tokens": 4}, **evaluation},
        }
    )


def test_the_split_of_every_client_can_be_read(tmp_path: Path) -> None:
    config = tiny()
    path = run(config, directory=tmp_path)
    told = json.loads((path / "splits.json").read_text())
    clients = assemble(config).tokenized
    assert told.keys() == {client.name for client in clients}
    for client in clients:
        for split, ids in told[client.name].items():
            assert ids == [example.id for example in getattr(client.examples, split)]
            assert ids == [example.id for example in getattr(client, split)], "none is left out"
        every = [id_ for ids in told[client.name].values() for id_ in ids]
        assert len(set(every)) == len(every) == 12


def test_answers_are_kept_with_the_scores_that_are_recorded(tmp_path: Path) -> None:
    path = run(tiny(), directory=tmp_path)
    answers = [json.loads(line) for line in (path / "answers.jsonl").read_text().splitlines()]
    tests = {name: of["test"] for name, of in json.loads((path / "splits.json").read_text()).items()}
    [final] = [event for event in RunStore.open(path).events() if event["event"] == "final"]
    for name, record in final["clients"].items():
        own = [answer for answer in answers if answer["client"] == name]
        assert [answer["example"] for answer in own] == tests[name][: record["generated"]]
        assert sum(answer["rouge_l"] for answer in own) == pytest.approx(record["rouge_l_sum"])
    assert len(answers) == sum(record["generated"] for record in final["clients"].values()) > 0


def test_without_answers_none_are_kept(tmp_path: Path) -> None:
    path = run(tiny(generation={"enabled": False}), directory=tmp_path)
    assert not (path / "answers.jsonl").exists()


def test_of_a_round_only_what_came_of_it_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, sound = in_process.train, []

    def one_fails(*arguments: Any, **named: Any) -> Any:
        values_SP, (first, second) = original(*arguments, **named)
        assert 0 < first.num_supervised_tokens < first.num_tokens
        sound.append(second)
        return values_SP[1:], (first._replace(failure="training diverged"), second)

    monkeypatch.setattr(in_process, "train", one_fails)
    path = run(tiny(generation={"enabled": False}), directory=tmp_path)
    [event], [report] = [event for event in RunStore.open(path).events() if event["event"] == "round"], sound
    assert event["train_loss_sum"] == report.loss_sum
    assert (event["train_tokens"], event["tokens"]) == (report.num_supervised_tokens, report.num_tokens)
