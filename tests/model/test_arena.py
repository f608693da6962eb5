"""Layouts hold what PEFT would adapt; initial arenas are what PEFT would draw."""

from __future__ import annotations

import pytest
import torch
from tests.reference.tiny_models import tiny_base
from transformers import AutoModelForCausalLM, LlamaConfig

from fedmira.config.run import AdapterConfig
from fedmira.errors import ConfigError
from fedmira.model.arena import adaptable_layers, initial_arena, lora_layout
from fedmira.model.base import BaseModel


def test_all_linear_takes_everything_but_the_head() -> None:
    base = tiny_base("llama")
    layout = lora_layout(base, AdapterConfig(rank=4, alpha=8.0))
    layers = [spec.layer for spec in layout.specs if spec.group == "lora_a"]
    assert len(layers) == 14
    assert not any("lm_head" in layer for layer in layers)
    assert layout.scaling == 2.0
    assert layout.groups == ("lora_a", "lora_b")
    end = 0
    for spec in layout.specs:
        assert spec.offset == end
        end += spec.size
    assert layout.num_parameters == end == sum(4 * (i + o) for i, o in adaptable_layers(base).values())


def test_conv1d_shapes_are_the_right_way_round() -> None:
    layout = lora_layout(tiny_base("gpt2"), AdapterConfig(rank=2, targets=("c_attn", "mlp.c_proj")))
    shapes = {spec.name: spec.shape for spec in layout.specs}
    assert shapes["transformer.h.0.attn.c_attn.lora_a"] == (2, 32)
    assert shapes["transformer.h.0.attn.c_attn.lora_b"] == (96, 2)
    assert shapes["transformer.h.1.mlp.c_proj.lora_a"] == (2, 128)
    assert "transformer.h.0.attn.c_proj.lora_a" not in shapes


def test_the_adapter_of_the_paper_has_six_mebibytes() -> None:
    # Data-Juicer 1.3B, rank 16 on q_proj in float32: the paper counts 12 MB for upload and download together
    config = LlamaConfig(hidden_size=2048, num_hidden_layers=24, num_attention_heads=16, intermediate_size=5504)
    with torch.device("meta"):
        base = BaseModel(AutoModelForCausalLM.from_config(config), tokenizer=None, name="data-juicer")
    layout = lora_layout(base, AdapterConfig(rank=16, alpha=32, targets=("q_proj",)))
    assert layout.num_parameters * 4 == 6 * 2**20


@pytest.mark.parametrize("targets", [("q_prj",), ("q_proj", "q_prj"), ("_proj",), ("lm_head",), ("embed_tokens",)])
def test_a_target_without_a_layer_lists_those_that_exist(targets: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        lora_layout(tiny_base("llama"), AdapterConfig(targets=targets))
    message = str(caught.value)
    assert targets[-1] in message
    assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in message
    assert ("did you mean 'q_proj'" in message) == ("q_prj" in targets)


def test_the_initial_arena_is_one_draw_for_all_clients() -> None:
    layout = lora_layout(tiny_base("llama"), AdapterConfig(rank=8))
    few, many = initial_arena(layout, 2, seed=3), initial_arena(layout, 5, seed=3)
    assert torch.equal(few.values_KP, many.values_KP[:2])
    assert torch.equal(many.values_KP, many.values_KP[:1].expand(5, -1))
    assert not torch.equal(few.values_KP, initial_arena(layout, 2, seed=4).values_KP)
    for spec in layout.specs:
        values = few.view(spec)
        if spec.group == "lora_b":
            assert not values.any()
        else:
            bound = spec.shape[1] ** -0.5
            assert 0.9 * bound < values.abs().max() <= bound
            assert abs(values.mean()) < 0.1 * bound
    many.values_KP[0] += 1
    assert torch.equal(many.values_KP[1], few.values_KP[1]), "rows must not share memory"


def test_float64_and_float32_start_from_the_same_numbers() -> None:
    layout = lora_layout(tiny_base("gpt2"), AdapterConfig())
    assert torch.equal(
        initial_arena(layout, 1, 0, torch.float64).values_KP, initial_arena(layout, 1, 0).values_KP.double()
    )
