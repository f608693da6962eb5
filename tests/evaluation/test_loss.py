"""Losses are sums over each client's supervised tokens under its own adapter, however they are batched."""

from __future__ import annotations

import pytest
import torch
from tests.reference.engine_twin import mean_loss, peft_model
from tests.reference.tiny_models import random_arena, random_examples, tiny_base, tiny_layout

from fedmira.evaluation.loss import evaluate_loss

COUNTS = (3, 0, 5, 1)
EXAMPLES = [random_examples(count, seed=count) for count in COUNTS]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_each_client_is_judged_with_its_own_adapter(family: str) -> None:
    base = tiny_base(family)
    layout = tiny_layout(base, family)
    arena = random_arena(layout, len(COUNTS))
    losses = evaluate_loss(base, arena, EXAMPLES, batch_tokens=40)
    for client, examples in enumerate(EXAMPLES):
        supervised = sum(len(example.tokens) - example.prompt_length for example in examples)
        assert losses[client][1] == supervised
        if examples:
            with torch.no_grad():
                mean = mean_loss(peft_model(base, layout, arena.values_KP[client]), list(examples))
            assert losses[client][0] == pytest.approx(float(mean) * supervised, abs=1e-9)
    assert losses[1] == (0.0, 0)


@pytest.mark.parametrize("batch_tokens", [1, 13, 10_000])
def test_the_size_of_batches_changes_nothing(batch_tokens: int) -> None:
    base = tiny_base("llama")
    arena = random_arena(tiny_layout(base, "llama"), len(COUNTS))
    expected = evaluate_loss(base, arena, EXAMPLES, batch_tokens=40)
    losses = evaluate_loss(base, arena, EXAMPLES, batch_tokens)
    assert [tokens for _, tokens in losses] == [tokens for _, tokens in expected]
    assert [loss for loss, _ in losses] == pytest.approx([loss for loss, _ in expected], abs=1e-9)


def test_a_permuted_arena_judges_differently() -> None:
    base = tiny_base("llama")
    arena = random_arena(tiny_layout(base, "llama"), len(COUNTS))
    losses = evaluate_loss(base, arena, EXAMPLES, 1000)
    swapped = evaluate_loss(base, arena.replace(arena.values_KP.flip(0)), EXAMPLES, 1000)
    assert abs(losses[0][0] - swapped[0][0]) > 1e-3


def test_one_bad_adapter_spoils_only_its_own_client() -> None:
    base = tiny_base("llama")
    arena = random_arena(tiny_layout(base, "llama"), len(COUNTS))
    expected = evaluate_loss(base, arena, EXAMPLES, 1000)
    values_KP = arena.values_KP.clone()
    values_KP[2] = float("nan")
    losses = evaluate_loss(base, arena.replace(values_KP), EXAMPLES, 1000)
    assert losses[2][0] != losses[2][0]
    assert [losses[k] for k in (0, 1, 3)] == [expected[k] for k in (0, 1, 3)]


def test_one_adapter_per_client_is_required() -> None:
    base = tiny_base("llama")
    arena = random_arena(tiny_layout(base, "llama"), 3)
    with pytest.raises(ValueError, match="3 adapters cannot judge 4 clients"):
        evaluate_loss(base, arena, EXAMPLES, 1000)
