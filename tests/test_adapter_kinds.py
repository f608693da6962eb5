"""Runs that tune something other than low-rank pairs: from the config to an exported folder, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.test_experiment import CLIENTS, events, per_token, tiny

from fedmira.assembly import assemble
from fedmira.config.method import METHOD_SECTIONS, method_with_defaults
from fedmira.config.method_section import ALL_KINDS
from fedmira.config.refusals import refusal
from fedmira.config.run import RunConfig
from fedmira.errors import ConfigError
from fedmira.experiment import run
from fedmira.export.clients import answer, export_clients, load_trained
from fedmira.forecast.estimate import dry_run
from fedmira.studies.compare import compare

KINDS: dict[str, dict[str, Any]] = {
    "prompt": {"kind": "prompt", "num_virtual_tokens": 4},
    "p_tuning": {"kind": "p_tuning", "num_virtual_tokens": 4, "encoder_hidden_size": 8},
    "full": {"kind": "full"},
}


def config_of(kind: str, method: Any = "fedit", **training: Any) -> RunConfig:
    return tiny(
        method,
        model={"adapter": KINDS[kind], "dtype": "float32", "device": "cpu"},
        training={"local_steps": 4, "batch_size": 2, "learning_rate": 0.01, **training},
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_trains_is_judged_exported_and_answers(kind: str, tmp_path: Path) -> None:
    config = config_of(kind)
    path = run(config, directory=tmp_path)
    before = assemble(config)
    losses = [per_token(event) for event in events(path, "evaluation")]
    assert set(losses[-1]) == set(CLIENTS)
    assert sum(losses[-1].values()) < sum(losses[0].values()), "the second round must be better than the first"
    [first, *_] = events(path, "round")
    assert first["upload_bytes"] == 4 * len(CLIENTS) * before.layout.num_parameters
    assert first["failures"] == []
    values_KP = load_trained(path).adapters.values_KP
    assert torch.equal(values_KP, values_KP[:1].expand_as(values_KP)), "one global adapter for everybody"
    assert not torch.equal(values_KP, before.initial_adapters().values_KP)
    out = export_clients(path, CLIENTS[0], tmp_path / "out")[CLIENTS[0]]
    names = {file.name for file in out.iterdir()}
    assert {"README.md", "model.safetensors" if kind == "full" else "adapter_model.safetensors"} <= names
    assert ("tokenizer.json" in names) == (kind == "full")
    assert isinstance(answer(path, CLIENTS[0], "encode: a b"), str)


@pytest.mark.parametrize("kind", KINDS)
def test_the_exported_folder_answers_as_the_run_does(kind: str, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fedmira import embedded_base_path
    from fedmira.data.tokenization import prompt_tokens
    from fedmira.types import Example

    path = run(config_of(kind, "local_only"), directory=tmp_path)
    out = export_clients(path, CLIENTS[1], tmp_path / "out")[CLIENTS[1]]
    home = out if kind == "full" else embedded_base_path()
    model = AutoModelForCausalLM.from_pretrained(home).eval()
    tokenizer = AutoTokenizer.from_pretrained(home)
    if kind != "full":
        model = PeftModel.from_pretrained(model, str(out)).eval()
    prompt = prompt_tokens(Example(instruction="once upon a time", output=""), tokenizer, "plain", 64)
    tokens = torch.from_numpy(prompt).long()[None]
    new: list[int] = []
    while len(new) < 3:
        with torch.no_grad():
            new.append(int(model(input_ids=tokens, use_cache=False).logits[0, -1].argmax()))
        if new[-1] == tokenizer.eos_token_id:
            break
        tokens = torch.cat([tokens, torch.tensor([[new[-1]]])], dim=1)
    assert tokenizer.decode(new, skip_special_tokens=True) == answer(path, CLIENTS[1], "once upon a time")


def test_a_dry_run_says_what_the_adapters_of_all_clients_take(tmp_path: Path) -> None:
    estimate = dry_run(config_of("full"))
    parts = assemble(config_of("full"))
    assert estimate.cohort_size == 1
    assert estimate.adapter_parameters == parts.base.num_parameters
    assert estimate.adapters_bytes == 4 * len(CLIENTS) * parts.base.num_parameters
    assert f"{estimate.adapters_bytes / 2**20:,.2f} MiB for all clients" in "\n".join(estimate.lines())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(METHOD_SECTIONS))
def test_a_method_trains_with_the_kinds_it_names_and_refuses_the_others(kind: Any, name: str, tmp_path: Path) -> None:
    section = method_with_defaults(name)
    graph = getattr(section, "graph", None)
    if graph is not None:
        section = section.model_copy(update={"graph": type(graph)(kind="labels")})
    reason = refusal(section, kind)
    assert (reason == "") == (kind in section.kinds)
    method = section.model_dump(exclude_unset=False)
    if reason:
        assert f"it can use {', '.join(section.kinds)}" in reason
        with pytest.raises(ValueError, match="Methods that can use kind"):
            config_of(kind, method)
    else:
        path = run(config_of(kind, method), directory=tmp_path)
        assert [event["failures"] for event in events(path, "round")] == [[], []]


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ({"kind": "prompt", "rank": 4}, "rank has no effect with kind = prompt; remove it, or use kind: lora"),
        ({"kind": "full", "dropout": 0.1}, "dropout has no effect with kind = full"),
        ({"num_virtual_tokens": 5}, "num_virtual_tokens has no effect with kind = lora; .* kind: prompt or p_tuning"),
        ({"kind": "prompt", "encoder_hidden_size": 64}, "encoder_hidden_size has no effect"),
        ({"kind": "prefix"}, "prefix"),
    ],
)
def test_a_setting_without_effect_is_refused(adapter: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        tiny("fedit", model={"adapter": adapter})


def test_a_graph_of_low_rank_products_is_refused_for_other_kinds() -> None:
    with pytest.raises(ValueError, match=r"gram compares low-rank products.* use .*labels") as refused:
        config_of("prompt", {"name": "mira"})
    assert "Methods that can use kind" not in str(refused.value), "the method can, with another graph"
    config_of("prompt", {"name": "mira", "graph": {"kind": "labels"}})


def test_whole_models_are_trained_alone() -> None:
    with pytest.raises(ValueError, match=r"training\.cohort_size = 4, .* use auto or 1"):
        config_of("full", cohort_size=4)
    assert config_of("full", cohort_size=1).training.cohort_size == 1


def test_more_virtual_tokens_than_the_base_reads_are_refused() -> None:
    config = tiny("fedit", model={"adapter": {"kind": "prompt", "num_virtual_tokens": 100_000}, "device": "cpu"})
    with pytest.raises(ConfigError, match="num_virtual_tokens = 100000 leaves no room"):
        assemble(config)


def test_a_comparison_with_a_method_that_cannot_use_the_kind_does_not_start(tmp_path: Path) -> None:
    config = config_of("prompt")
    with pytest.raises(ConfigError, match=r"compare\.methods names mira: method\.graph.kind = gram"):
        compare(config, directory=tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_every_kind_has_methods() -> None:
    for kind in ALL_KINDS:
        assert refusal(method_with_defaults("fedit"), kind) == ""
