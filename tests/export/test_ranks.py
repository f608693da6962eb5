"""Adapters of smaller rank and over a shifted base are exported as what they are: PEFT gives the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.reference.tiny_models import random_arena, tiny_base

from fedmira.config.run import AdapterConfig
from fedmira.export.pairs import fitted
from fedmira.export.peft import Settings, adapter_files, new_folder, write_files
from fedmira.federation.ranks import trimmed
from fedmira.model.arena import lora_layout
from fedmira.model.base import BaseModel
from fedmira.model.lora import attached
from fedmira.model.shift import shifted
from fedmira.types import Arena

TOKENS_T = torch.arange(4, 15)


def logits(base: BaseModel, arena: Arena) -> torch.Tensor:
    with torch.no_grad(), shifted(base, arena.layout, arena.shift_W), attached(base, arena, [len(TOKENS_T)]):
        found: torch.Tensor = base.model(input_ids=TOKENS_T[None], use_cache=False).logits[0]
    return found


def loaded(base: Any, arena: Arena, adapter: AdapterConfig, folder: Path) -> tuple[torch.Tensor, dict[str, Any]]:
    """The logits of the exported folder in PEFT, and its config."""
    from peft import PeftModel

    transposed = base.name.endswith("gpt2")
    settings = Settings(adapter.rank, adapter.alpha, 0.0, base_path="some/base", fan_in_fan_out=transposed)
    with new_folder(folder) as inside:
        write_files(inside, adapter_files(arena.layout, arena.values_KP[0], settings, shift_W=arena.shift_W))
    model = PeftModel.from_pretrained(base.model, str(folder)).eval()
    with torch.no_grad():
        found = model(input_ids=TOKENS_T[None], use_cache=False).logits[0]
    model.unload()
    return found, json.loads((folder / "adapter_config.json").read_text())


def test_ranks_by_layer_stand_in_the_patterns(tmp_path: Path) -> None:
    base = tiny_base("llama")
    adapter = AdapterConfig(rank=2, alpha=6, rank_pattern={"v_proj": 5, "layers.1.self_attn.q_proj": 1})
    arena = random_arena(lora_layout(base, adapter), 1)
    found, config = loaded(base, arena, adapter, tmp_path / "a")
    torch.testing.assert_close(found, logits(base, arena), rtol=0, atol=1e-10)
    assert (config["r"], config["lora_alpha"]) == (5, 15)
    assert config["rank_pattern"]["model.layers.1.self_attn.q_proj"] == 1
    assert config["alpha_pattern"]["model.layers.1.self_attn.q_proj"] == 3
    assert config["rank_pattern"]["model.layers.0.mlp.up_proj"] == 2
    assert "model.layers.0.self_attn.v_proj" not in config["rank_pattern"]


def test_a_client_of_smaller_rank_gets_an_adapter_of_that_rank(tmp_path: Path) -> None:
    base = tiny_base("llama")
    adapter = AdapterConfig(rank=3, alpha=6, client_ranks=(2, 4))
    arena = random_arena(lora_layout(base, adapter), 1)
    arena = arena.replace(trimmed(arena.layout, arena.values_KP, (2,)))
    found, config = loaded(base, arena, adapter, tmp_path / "a")
    torch.testing.assert_close(found, logits(base, arena), rtol=0, atol=1e-10)
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (2, 4, {})


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("shift_rank", [3, 50])
def test_a_shift_becomes_part_of_the_pairs(family: str, shift_rank: int, tmp_path: Path) -> None:
    base = tiny_base(family)
    adapter = AdapterConfig(rank=2, alpha=6)
    arena = random_arena(lora_layout(base, adapter), 1)
    draw = torch.Generator().manual_seed(0)
    parts, sizes = [], {}
    for spec_a, spec_b in ((a, b) for a in arena.layout.specs for b in arena.layout.specs if a.layer == b.layer):
        if (spec_a.group, spec_b.group) == ("lora_a", "lora_b"):
            sizes[spec_a.layer] = (spec_b.shape[0], spec_a.shape[1])
    for layer in arena.layout.layers:
        num_out, num_in = sizes[layer]
        b, a = (torch.randn(shape, generator=draw).double() for shape in ((num_out, shift_rank), (shift_rank, num_in)))
        parts.append((0.02 * b @ a).flatten())
    arena = Arena(arena.layout, arena.values_KP, torch.cat(parts))
    expected = logits(base, arena)
    assert not torch.allclose(expected, logits(base, Arena(arena.layout, arena.values_KP)), atol=1e-2)
    found, config = loaded(base, arena, adapter, tmp_path / "a")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    fitting, _ = fitted(arena.layout, arena.values_KP[0], arena.shift_W)
    ranks = {spec_a.layer: spec_a.shape[0] for spec_a, _ in fitting.pairs}
    assert ranks == {layer: min(2 + shift_rank, *size) for layer, size in sizes.items()}
    assert config["r"] == max(ranks.values())


def test_what_needs_its_whole_rank_keeps_its_bytes() -> None:
    base = tiny_base("llama")
    arena = random_arena(lora_layout(base, AdapterConfig(rank=3)), 1)
    layout, row_P = fitted(arena.layout, arena.values_KP[0])
    assert layout == arena.layout
    assert torch.equal(row_P, arena.values_KP[0])


def test_an_adapter_of_zeros_is_still_one() -> None:
    base = tiny_base("llama")
    of = lora_layout(base, AdapterConfig(rank=3))
    layout, row_P = fitted(of, torch.zeros(of.num_parameters))
    assert {spec_a.shape[0] for spec_a, _ in layout.pairs} == {1}
    assert not row_P.any()
