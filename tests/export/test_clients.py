"""What a run's exported folders say about themselves: a base that can be found, the rank they have; and what is read of
a question."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fedmira import embedded_base_path
from fedmira.config.run import RunConfig
from fedmira.evaluation import generation
from fedmira.experiment import run
from fedmira.export import clients
from fedmira.export.clients import Trained, answer, export_clients
from fedmira.model.arena import initial_arena, lora_layout
from fedmira.model.base import load_base


def exported(tmp_path: Path, path: str, method: dict[str, Any], **adapter: Any) -> tuple[dict[str, Any], str]:
    config = RunConfig.model_validate(
        {
            "data": {"source": "planted", "families": 2, "clients_per_family": 1, "examples": 12},
            "model": {
                "path": path,
                "adapter": {"rank": 2, "targets": ["q_proj", "v_proj"], **adapter},
                "dtype": "float32",
                "device": "cpu",
            },
            "training": {"local_steps": 1, "batch_size": 2, "learning_rate": 0.01},
            "federation": {"rounds": 1},
            "method": method,
            "evaluation": {"test": False},
        }
    )
    made = run(config, directory=tmp_path / "runs")
    name = "family-0-client-0"
    folder = export_clients(made, name, tmp_path / "out")[name]
    return json.loads((folder / "adapter_config.json").read_text()), (folder / "README.md").read_text()


def test_a_local_base_is_named_so_that_it_is_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(embedded_base_path(), tmp_path / "home" / "base", copy_function=shutil.copyfile)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    config, card = exported(tmp_path, "~/base", {"name": "local_only"})
    assert config["base_model_name_or_path"] == str((tmp_path / "home" / "base").resolve())
    assert f"BASE is `{config['base_model_name_or_path']}`" in card
    assert "- rank: 2" in card


@pytest.mark.parametrize(
    ("method", "adapter", "rank"),
    [({"name": "feddpa"}, {}, 4), ({"name": "fedit"}, {"rank_pattern": {"q_proj": 5}}, 5)],
)
def test_the_card_states_the_rank_that_the_files_have(
    tmp_path: Path, method: dict[str, Any], adapter: dict[str, Any], rank: int
) -> None:
    config, card = exported(tmp_path, "embedded", method, **adapter)
    assert config["r"] == rank
    assert f"- rank: {rank}" in card


@pytest.mark.parametrize("cut", ["input", "beginning"])
def test_a_question_that_makes_room_for_its_answer_loses_what_prompts_lose_in_training(
    cut: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(RunConfig().base_model)
    room, length = 24, base.max_length
    config = RunConfig.model_validate(
        {
            "data": {"source": "planted", "max_length": length, "cut": cut},
            "evaluation": {"generation": {"max_new_tokens": length - room}},
        }
    )
    arena = initial_arena(lora_layout(base, config.model.adapter), 1, 0)
    monkeypatch.setattr(clients, "load_trained", lambda path: Trained(config, ("a",), arena, base, 10**6))
    asked: list[Any] = []

    def generate(base: Any, arena: Any, prompts: Any, *rest: Any, **ends: Any) -> list[list[str]]:
        asked.append(prompts[0][0])
        return [["blue"]]

    monkeypatch.setattr(generation, "generate", generate)
    told: list[str] = []
    assert answer(Path("run"), "a", "Which colour?", "red and then " * 20 + "blue", warn=told.append) == "blue"
    [prompt], [line] = asked, told
    assert len(prompt) == room
    text = base.tokenizer.decode(prompt)
    assert text.endswith("and then blue\n")
    assert ("Which colour?" in text) == (cut == "input")
    assert f"room for {room} beside {length - room:,} new ones" in line


def test_an_answer_ends_with_what_ends_a_turn_of_the_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_base(RunConfig().base_model)
    turns = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<pad>{% endif %}{% endfor %}"
    monkeypatch.setattr(base.tokenizer, "chat_template", turns)
    config = RunConfig.model_validate({"data": {"source": "planted", "template": "chat"}})
    arena = initial_arena(lora_layout(base, config.model.adapter), 1, 0)
    monkeypatch.setattr(clients, "load_trained", lambda path: Trained(config, ("a",), arena, base, 10**6))
    ends: list[Any] = []

    def generate(*_: Any, **named: Any) -> list[list[str]]:
        ends.append(set(named.get("ends", ())))
        return [["blue"]]

    monkeypatch.setattr(generation, "generate", generate)
    assert answer(Path("run"), "a", "Which colour?") == "blue"
    assert ends == [{base.tokenizer.pad_token_id}]
