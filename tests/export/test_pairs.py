"""Two pairs of a layer are exported as one of twice the rank, which PEFT loads and which gives the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.reference.tiny_models import tiny_base

from fedmira import embedded_base_path
from fedmira.config.run import AdapterConfig, RunConfig
from fedmira.experiment import run
from fedmira.export.clients import export_clients, load_trained
from fedmira.export.pairs import joined_pairs, num_pairs
from fedmira.export.peft import Settings, adapter_files, new_folder, write_files
from fedmira.model.arena import initial_arena, lora_layout
from fedmira.model.base import BaseModel
from fedmira.model.lora import attached
from fedmira.types import Arena


def trained_arena(base: BaseModel, adapter: AdapterConfig, num_pairs_: int) -> Arena:
    """Two clients' adapters in which no factor is zero."""
    arena = initial_arena(lora_layout(base, adapter, num_pairs_), 2, seed=0, dtype=base.dtype)
    noise = torch.randn(arena.values_KP.shape, generator=torch.Generator().manual_seed(1)) * 0.1
    return arena.replace(arena.values_KP + noise.to(base.dtype))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_peft_gives_fedmiras_logits_for_two_pairs(family: str, tmp_path: Path) -> None:
    from peft import PeftModel

    base: Any = tiny_base(family, torch.float64)
    adapter = AdapterConfig(rank=3, alpha=5, targets="all-linear")
    arena = trained_arena(base, adapter, 2)
    one = arena.replace(arena.values_KP[1:])
    tokens_T = torch.arange(4, 15)
    with torch.no_grad(), attached(base, one, [len(tokens_T)]):
        expected = base.model(input_ids=tokens_T[None], use_cache=False).logits[0]
    with torch.no_grad():
        bare = base.model(input_ids=tokens_T[None], use_cache=False).logits[0]
    half = one.values_KP.clone()
    for group in ("second_a", "second_b"):
        for part in one.layout.slices(group):
            half[:, part] = 0.0
    with torch.no_grad(), attached(base, one.replace(half), [len(tokens_T)]):
        first_pair = base.model(input_ids=tokens_T[None], use_cache=False).logits[0]
    assert not torch.allclose(expected, bare, atol=1e-3)
    assert not torch.allclose(expected, first_pair, atol=1e-3)
    settings = Settings(adapter.rank, adapter.alpha, 0.0, base_path="some/base", fan_in_fan_out=family == "gpt2")
    with new_folder(tmp_path / "adapter") as folder:
        write_files(folder, adapter_files(arena.layout, arena.values_KP[1], settings))
    loaded = PeftModel.from_pretrained(base.model, str(tmp_path / "adapter")).eval()
    assert (loaded.peft_config["default"].r, loaded.peft_config["default"].lora_alpha) == (6, 10)
    with torch.no_grad():
        found = loaded(input_ids=tokens_T[None], use_cache=False).logits[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_the_clients_of_a_run_with_two_pairs_are_exported(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = RunConfig.model_validate(
        {
            "data": {"source": "planted", "families": 2, "clients_per_family": 2, "examples": 12},
            "model": {"adapter": {"rank": 2, "targets": ["q_proj", "v_proj"]}, "device": "cpu"},
            "training": {"local_steps": 3, "learning_rate": 0.01},
            "federation": {"rounds": 2},
            "method": {"name": "fedalt"},
            "evaluation": {"generation": {"enabled": False}},
        }
    )
    folder = run(config, directory=tmp_path)
    trained = load_trained(folder)
    assert num_pairs(trained.adapters.layout) == 2
    name = trained.names[1]
    export_clients(folder, name, tmp_path / "adapter")
    tokens_T = torch.arange(5, 25)
    one = trained.adapters.replace(trained.adapters.values_KP[1:2])
    assert all(one.values_KP[:, part].any() for part in one.layout.slices("second_b"))
    with torch.no_grad(), attached(trained.base, one, [len(tokens_T)]):
        expected = trained.base.model(input_ids=tokens_T[None], use_cache=False).logits[0]
    model = AutoModelForCausalLM.from_pretrained(embedded_base_path())
    loaded = PeftModel.from_pretrained(model, str(tmp_path / "adapter")).eval()
    assert loaded.peft_config["default"].r == 4
    with torch.no_grad():
        found = loaded(input_ids=tokens_T[None], use_cache=False).logits[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_the_joined_pair_is_the_sum_of_the_products() -> None:
    base = tiny_base("llama", torch.float64)
    arena = trained_arena(base, AdapterConfig(rank=2, alpha=3), 2)
    layout, row_P = joined_pairs(arena.layout, arena.values_KP[0])
    assert (num_pairs(arena.layout), num_pairs(layout)) == (2, 1)
    assert (layout.scaling, layout.num_parameters) == (arena.layout.scaling, arena.layout.num_parameters)
    tensors = {spec.name: arena.view(spec)[0] for spec in arena.layout.specs}
    joined = Arena(layout, row_P[None])
    found = {spec.name: joined.view(spec)[0] for spec in layout.specs}
    for layer in layout.layers:
        products = [
            tensors[f"{layer}.{b}"] @ tensors[f"{layer}.{a}"]
            for a, b in (("lora_a", "lora_b"), ("second_a", "second_b"))
        ]
        torch.testing.assert_close(found[f"{layer}.lora_b"] @ found[f"{layer}.lora_a"], products[0] + products[1])
