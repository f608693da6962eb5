"""How alike adapters predict, and what prompts are about: equal to one model at a time, however they are batched."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.reference.engine_twin import peft_model
from tests.reference.tiny_models import layout_of_kind, random_arena, random_examples, tiny_base, tiny_layout

from fedmira.evaluation.predictions import agreement, prompt_products

TEXTS = random_examples(4, seed=5)


@pytest.mark.parametrize("batch_tokens", [1, 20, 10_000])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_agreement_is_the_bhattacharyya_coefficient_of_each_pair(family: str, batch_tokens: int) -> None:
    base = tiny_base(family)
    layout = tiny_layout(base, family)
    arena = random_arena(layout, 3)
    roots = []
    for row_P in arena.values_KP:
        model, rows = peft_model(base, layout, row_P), []
        for text in TEXTS:
            with torch.no_grad():
                logits_TV = model(torch.from_numpy(text.tokens.astype(np.int64))[None]).logits[0]
            rows.append(torch.softmax(logits_TV[text.prompt_length - 1 : -1], dim=1).sqrt())
        roots.append(torch.cat(rows))
    expected = torch.stack([torch.stack([(one * other).sum(dim=1).mean() for other in roots]) for one in roots])
    found = agreement(base, arena, TEXTS, batch_tokens)
    assert torch.allclose(found, expected, rtol=0, atol=1e-9)
    assert torch.allclose(torch.diagonal(found), torch.ones(3, dtype=torch.float64))
    assert float(found[0, 1]) < 0.9999


@pytest.mark.parametrize("kind", ["prompt", "full"])
def test_every_kind_of_adapter_can_be_compared(kind: str) -> None:
    base = tiny_base("llama")
    layout = layout_of_kind(base, kind)
    values_SP = 0.1 * torch.randn((3, layout.num_parameters), generator=torch.Generator().manual_seed(1)).double()
    values_SP[2] = values_SP[0]
    found = agreement(base, random_arena(layout, 3).replace(values_SP), TEXTS, 100)
    assert float(found[0, 2]) == pytest.approx(1)
    assert float(found[0, 1]) < 0.9999
    assert torch.allclose(found, found.T)


def test_without_texts_there_is_nothing_to_compare() -> None:
    base = tiny_base("llama")
    with pytest.raises(ValueError, match="none were given"):
        agreement(base, random_arena(tiny_layout(base, "llama"), 2), (), 100)


@pytest.mark.parametrize("batch_tokens", [1, 30, 10_000])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_prompt_products_are_of_mean_hidden_states_of_prompts(family: str, batch_tokens: int) -> None:
    base = tiny_base(family)
    examples = [random_examples(count, seed=count) for count in (3, 0, 4)]
    means = []
    for of_client in examples:
        states = [torch.zeros(base.model.config.hidden_size, dtype=torch.float64)]
        for example in of_client:
            tokens = torch.from_numpy(example.tokens.astype(np.int64))[None]
            with torch.no_grad():
                hidden_Td = base.model.base_model(tokens).last_hidden_state[0]
            states.append(hidden_Td[: example.prompt_length].mean(dim=0) / len(of_client))
        means.append(torch.stack(states).sum(dim=0))
    expected = torch.stack(means) @ torch.stack(means).T
    assert np.allclose(prompt_products(base, examples, batch_tokens), expected.numpy(), rtol=0, atol=1e-9)
