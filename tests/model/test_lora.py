"""Each client's rows meet only its own pair, in PEFT's order of operations, and the base stays as it is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.reference.engine_twin import peft_model
from tests.reference.tiny_models import random_arena, random_examples, tiny_base, tiny_layout

from fedmira.config.run import AdapterConfig
from fedmira.data.packing import pack
from fedmira.model.adapted import AdaptedModel
from fedmira.model.arena import lora_layout
from fedmira.model.lora import Dropout, attached
from fedmira.randomness import torch_generator


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "gemma2"])
def test_one_sequence_gets_the_bits_of_peft(family: str, dtype: torch.dtype) -> None:
    base = replace(tiny_base(family, dtype), body=None)
    layout = tiny_layout(base, family, rank=5)
    arena = random_arena(layout, 3, dtype)
    for client in range(3):
        batch = pack([random_examples(int(k == client), seed=client, longest=25) for k in range(3)])
        with torch.no_grad():
            stock = peft_model(base, layout, arena.values_KP[client])(input_ids=batch.tokens_N[None]).logits[0]
            plain = base.logits(base.hidden(batch))
            with attached(base, arena, batch.rows_per_client):
                adapted = base.logits(base.hidden(batch))
        assert torch.equal(adapted, stock)
        assert (plain - stock).abs().max() > 1e-3


def test_the_training_forward_has_the_same_bits() -> None:
    base = tiny_base("llama", torch.float32)
    layout = tiny_layout(base, "llama")
    arena = random_arena(layout, 2, torch.float32)
    batch = pack([random_examples(2, seed=0), random_examples(3, seed=1)])
    with attached(base, arena, batch.rows_per_client):
        judged = base.hidden(batch)
    with attached(base, arena, batch.rows_per_client, gradient_CP=torch.zeros_like(arena.values_KP)):
        trained = base.hidden(batch)
    assert trained.requires_grad
    assert not judged.requires_grad
    assert torch.equal(judged, trained)


def test_a_bfloat16_base_keeps_float32_adapters_as_peft_does() -> None:
    base = replace(tiny_base("llama", torch.bfloat16), body=None)
    layout = tiny_layout(base, "llama")
    arena = random_arena(layout, 1, torch.float32)
    batch = pack([random_examples(1, seed=2)])
    model = peft_model(base, layout, arena.values_KP[0])
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    with torch.no_grad():
        for spec in layout.specs:
            weight = "lora_A" if spec.group == "lora_a" else "lora_B"
            parameter = model.base_model.model.get_submodule(f"{spec.layer}.{weight}.default").weight
            parameter.copy_(arena.view(spec)[0])
        stock = model(input_ids=batch.tokens_N[None]).logits[0]
    gradient_CP = torch.zeros_like(arena.values_KP)
    with attached(base, arena, batch.rows_per_client, gradient_CP=gradient_CP):
        logits = base.logits(base.hidden(batch))
    assert torch.equal(logits, stock)
    logits.float().square().sum().backward()
    assert gradient_CP.dtype == torch.float32
    assert gradient_CP.abs().max() > 0


def test_the_base_is_left_as_it_was_even_after_an_error() -> None:
    base = tiny_base("gpt2")
    layout = tiny_layout(base, "gpt2")
    modules = [name for name, _ in base.model.named_modules()]
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    batch = pack([random_examples(2, seed=0)])
    with torch.no_grad():
        plain = base.hidden(batch)
    out_of_vocabulary = batch._replace(tokens_N=batch.tokens_N + 1000)
    with attached(base, random_arena(layout, 1), batch.rows_per_client):
        assert [name for name, _ in base.model.named_modules()] == modules
        with pytest.raises(IndexError):
            base.hidden(out_of_vocabulary)
    after = base.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    with torch.no_grad():
        assert torch.equal(base.hidden(batch), plain)


@pytest.mark.parametrize("factor", [1, 2])
def test_rows_that_belong_to_nobody_are_an_error(factor: int) -> None:
    """Also where they are a multiple of those that are known: a layer may be called with copies of each row."""
    base = tiny_base("llama")
    layout = tiny_layout(base, "llama")
    examples = random_examples(1, seed=0)
    batch, known = pack([examples * factor], share_prefixes=False), len(pack([examples]).tokens_N) - (factor == 1)
    with pytest.raises(RuntimeError, match=f"the batch has {known}$"), attached(base, random_arena(layout, 1), [known]):
        base.hidden(batch)


def test_dropout_scales_what_it_keeps_and_gradients_see_the_same_mask() -> None:
    base = tiny_base("gpt2")
    layout = tiny_layout(base, "gpt2")
    arena = random_arena(layout, 2)
    batch = pack([random_examples(2, seed=0), random_examples(1, seed=1)])
    dropout = Dropout(0.4, lambda client, layer: torch_generator(0, "mask", client, layer))

    def objective(values_CP: torch.Tensor, gradient_CP: torch.Tensor | None) -> torch.Tensor:
        with attached(base, arena.replace(values_CP), batch.rows_per_client, gradient_CP=gradient_CP, dropout=dropout):
            return base.hidden(batch).square().sum()

    gradient_CP = torch.zeros_like(arena.values_KP)
    objective(arena.values_KP, gradient_CP).backward()
    draw = torch.Generator().manual_seed(1)
    direction_CP = torch.randn(arena.values_KP.shape, generator=draw, dtype=torch.float64)
    with torch.no_grad():
        step = 1e-6
        ahead = objective(arena.values_KP + step * direction_CP, None)
        behind = objective(arena.values_KP - step * direction_CP, None)
        with attached(base, arena, batch.rows_per_client):
            without = base.hidden(batch).square().sum()
    measured = float((ahead - behind) / (2 * step))
    assert measured == pytest.approx(float((gradient_CP * direction_CP).sum()), rel=1e-6)
    assert abs(float(objective(arena.values_KP, None) - without)) > 1e-6


def test_two_pairs_of_a_layer_have_masks_of_their_own() -> None:
    base = tiny_base("llama")
    layout = lora_layout(base, AdapterConfig(rank=2, targets=("q_proj",)), 2)
    asked: list[str] = []

    def generator(row: int, name: str) -> torch.Generator:
        asked.append(name)
        return torch.Generator().manual_seed(0)

    arena = random_arena(layout, 1)
    AdaptedModel(base, arena).hidden(pack([random_examples(2, seed=1)]), Dropout(0.5, generator))
    assert len(set(asked)) == len(asked) == 4, "two layers of two pairs"
