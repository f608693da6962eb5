"""What a card says to whoever serves the adapter: the prompts that were trained on, and what noise was worth."""

from __future__ import annotations

import ast
import json
import math
import re
from pathlib import Path

import pytest

from fedmira.config.run import RunConfig
from fedmira.data.prompts import render
from fedmira.experiment import run
from fedmira.export.card import prompt_lines
from fedmira.export.clients import export_clients, load_trained
from fedmira.model.base import load_base
from fedmira.runs.store import RunStore
from fedmira.types import Example

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


@pytest.mark.parametrize("template", ["alpaca", "plain", "chat"])
def test_the_prompts_of_a_card_are_those_of_training(template: str) -> None:
    tokenizer = load_base(RunConfig().base_model).tokenizer
    tokenizer.chat_template = CHAT
    text = "\n".join(prompt_lines(template, tokenizer))
    shown = dict(re.findall(r"^(\w+) = (.*)$", text, re.M))
    for name, given in (("without_input", ""), ("with_input", "the {text}")):
        made = ast.literal_eval(shown[name]).replace("{instruction}", "Do\nit").replace("{input}", given)
        assert made == render(Example("Do\nit", "", given), template, tokenizer).prompt
    assert ("chat template" in text) == (template == "chat")


def test_a_template_that_refuses_a_lone_question_is_left_out() -> None:
    tokenizer = load_base(RunConfig().base_model).tokenizer
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    assert prompt_lines("chat", tokenizer) == []


@pytest.mark.parametrize("noise_seed", ["run", "system"])
def test_the_card_of_a_noised_run_states_epsilon(noise_seed: str, tmp_path: Path) -> None:
    config = RunConfig.model_validate(
        {
            "data": {"source": "planted", "families": 1, "clients_per_family": 3, "examples": 8},
            "model": {"adapter": {"rank": 2, "targets": ["q_proj"]}, "dtype": "float32", "device": "cpu"},
            "training": {"local_steps": 1, "batch_size": 2},
            "federation": {"rounds": 2, "clients_per_round": 1},
            "method": {"name": "fedit"},
            "exchange": {"privacy": {"enabled": True, "noise_multiplier": 2.0, "noise_seed": noise_seed}},
            "evaluation": {"test": False},
        }
    )
    made = run(config, directory=tmp_path / "runs")
    rounds = [event for event in RunStore.open(made).events() if event["event"] == "round"]
    last: dict[str, float] = {}
    for event in rounds:
        last |= event["privacy"]["epsilon"]
    folders = export_clients(str(made), None, str(tmp_path / "out"))
    for name, folder in folders.items():
        promise = f"epsilon {last.get(name, 0.0):.4g} at delta 1e-05"
        known = ", for those who do not know the seed, from which the noise follows (noise_seed: run)"
        limit = known if noise_seed == "run" else ""
        line = f"- differential privacy of what this client sent in the run: {promise}{limit}"
        card = (folder / "README.md").read_text()
        assert line in card.splitlines()
        assert "## Prompts" in card
    assert 0 < len(last) < len(folders)
    # as it is written where it is not finite
    metrics = made / "metrics.jsonl"
    rounds[-1]["privacy"]["epsilon"] = dict.fromkeys(last)
    metrics.write_text("".join(json.dumps(event) + "\n" for event in rounds))
    assert all(math.isinf(load_trained(made).epsilon[name]) for name in last)
