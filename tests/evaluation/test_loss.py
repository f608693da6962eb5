"""Losses are sums over each client's supervised tokens under its own adapter, however they are batched."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from tests.reference.engine_twin import mean_loss, peft_model
from tests.reference.tiny_models import random_arena, random_examples, tiny_base, tiny_layout

from fedmira.evaluation.loss import evaluate_loss, parts_to_judge
from fedmira.side_by_side import side_by_side

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


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
def test_two_threads_judge_two_parts_at_a_time(batch_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base("llama")
    arena = random_arena(tiny_layout(base, "llama"), len(COUNTS))
    torch.set_num_threads(1)
    expected = evaluate_loss(base, arena, EXAMPLES, batch_tokens)
    torch.set_num_threads(2)
    calls: list[tuple[int, int]] = []

    def watched(parts: Sequence[Callable[[], object]], at_once: int) -> list[object]:
        calls.append((len(parts), at_once))
        return side_by_side(parts, at_once)

    monkeypatch.setattr("fedmira.evaluation.loss.side_by_side", watched)
    first, second = (evaluate_loss(base, arena, EXAMPLES, batch_tokens) for _ in range(2))
    assert first == second
    assert [tokens for _, tokens in first] == [tokens for _, tokens in expected]
    assert [loss for loss, _ in first] == pytest.approx([loss for loss, _ in expected], abs=1e-9)
    # 77 tokens; examples longer than half of a batch are judged one after the other
    assert calls == [{1: (9, 1), 40: (5, 2), 10_000: (2, 2)}[batch_tokens]] * 2


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("batch_tokens", range(1, 100))
def test_no_more_tokens_are_judged_together_than_allowed(batch_tokens: int) -> None:
    base = tiny_base("llama")
    parts, at_once = parts_to_judge(base, tiny_layout(base, "llama"), EXAMPLES, batch_tokens)
    for part in parts:
        lengths = [example.num_inputs for examples in part.values() for example in examples]
        assert sum(lengths) <= batch_tokens // at_once or (len(lengths) == 1 and at_once == 1)
    assert at_once == (2 if batch_tokens >= 24 else 1), "the longest example has 12 tokens"
    for client, examples in enumerate(EXAMPLES):
        assert [example for part in parts for example in part.get(client, [])] == list(examples)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("count", [2, 4, 6, 16])
def test_equal_examples_fall_into_equal_parts(count: int) -> None:
    base = tiny_base("llama")
    parts, _ = parts_to_judge(base, tiny_layout(base, "llama"), [EXAMPLES[0][:1]] * count, 10_000)
    assert [sum(map(len, part.values())) for part in parts] == [count // 2] * 2


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
