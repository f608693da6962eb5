"""Batched generation answers as PEFT does one prompt at a time."""

from __future__ import annotations

from itertools import takewhile
from typing import Any

import numpy as np
import pytest
import torch
from tests.reference.engine_twin import peft_model
from tests.reference.tiny_models import random_arena, tiny_layout, tiny_model
from transformers import GenerationConfig

from fedmira.config import AdapterConfig, ModelConfig
from fedmira.evaluation.generation import generate
from fedmira.model.arena import lora_layout
from fedmira.model.base import BaseModel, freeze, load_base
from fedmira.types import Arena

END = 2


class Words:
    """A tokenizer whose tokens are numbers: just what generation asks of one."""

    eos_token_id = END
    pad_token_id: int | None = 0

    def decode(self, tokens: list[int], skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        assert skip_special_tokens
        assert not clean_up_tokenization_spaces
        return " ".join(str(token) for token in tokens)


def base_of(family: str) -> BaseModel:
    # the stock Gemma 2 gives NaN for padded prompts in float64: it lowers the float64 mask to float32, which overflows
    dtype = torch.float32 if family == "gemma2" else torch.float64
    return freeze(tiny_model(family, dtype), Words(), f"tiny-{family}")


def random_prompts(counts: tuple[int, ...], seed: int = 0) -> list[list[np.ndarray]]:
    draw = np.random.default_rng(seed)
    return [
        [draw.integers(3, 97, size=int(draw.integers(1, 20))).astype(np.int32) for _ in range(count)]
        for count in counts
    ]


def one_by_one(base: BaseModel, arena: Arena, prompts: list[list[np.ndarray]], max_new_tokens: int) -> list[list[str]]:
    """Stock PEFT, one prompt at a time, the most likely token at each step."""
    answers = []
    for client, client_prompts in enumerate(prompts):
        model: Any = peft_model(base, arena.layout, arena.values_KP[client])
        answers.append([])
        for prompt in client_prompts:
            tokens = torch.from_numpy(prompt).long()[None]
            new: list[int] = []
            while len(new) < max_new_tokens:
                with torch.no_grad():
                    new.append(int(model(input_ids=tokens, use_cache=False).logits[0, -1].argmax()))
                if new[-1] == END:
                    new.pop()
                    break
                tokens = torch.cat([tokens, torch.tensor([[new[-1]]])], dim=1)
            answers[-1].append(" ".join(str(token) for token in new))
    return answers


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "gemma2", "gemma3"])
@pytest.mark.parametrize("batch_sequences", [1, 4, 64])
def test_batches_answer_as_peft_does_one_by_one(family: str, batch_sequences: int) -> None:
    base = base_of(family)
    arena = random_arena(tiny_layout(base, family), 4, base.dtype)
    prompts = random_prompts((3, 0, 4, 2))
    expected = one_by_one(base, arena, prompts, 12)
    answers = generate(base, arena, prompts, 12, batch_sequences=batch_sequences)
    assert answers == expected
    assert len({answer for client in answers for answer in client}) > 2, "the prompts must matter"


def test_an_answer_ends_at_the_end_token() -> None:
    base = base_of("llama")
    arena = random_arena(tiny_layout(base, "llama"), 1)
    prompts = random_prompts((12,), seed=4)
    full = one_by_one(base, arena, prompts, 12)
    stop = int(full[0][0].split()[3])
    base.model.generation_config.eos_token_id = [END, stop]
    (answers,) = generate(base, arena, prompts, 12)
    assert answers == [" ".join(takewhile(lambda word: word != str(stop), answer.split())) for answer in full[0]]
    assert len(answers[0].split()) == 3


def test_sampling_and_penalties_of_the_model_are_left_out_and_put_back() -> None:
    base = base_of("llama")
    arena = random_arena(tiny_layout(base, "llama"), 1)
    prompts = random_prompts((4,))
    expected = generate(base, arena, prompts, 12)
    theirs = GenerationConfig(do_sample=True, temperature=5.0, repetition_penalty=9.0, eos_token_id=END, pad_token_id=0)
    base.model.generation_config = theirs
    assert generate(base, arena, prompts, 12) == expected
    assert base.model.generation_config is theirs


def test_a_tokenizer_without_a_pad_token_changes_nothing() -> None:
    base = base_of("gpt2")
    arena = random_arena(tiny_layout(base, "gpt2"), 2)
    prompts = random_prompts((3, 3))
    expected = generate(base, arena, prompts, 8)
    base.tokenizer.pad_token_id = None
    assert generate(base, arena, prompts, 8) == expected


def test_a_prompt_that_fills_the_context_loses_its_beginning() -> None:
    base = base_of("gpt2")
    arena = random_arena(tiny_layout(base, "gpt2"), 1)
    prompt = np.random.default_rng(0).integers(3, 97, size=140).astype(np.int32)
    answers = generate(base, arena, [[prompt]], 10)
    assert answers == one_by_one(base, arena, [[prompt[-118:]]], 10)


def test_no_prompts_no_answers() -> None:
    base = base_of("llama")
    assert generate(base, random_arena(tiny_layout(base, "llama"), 2), [[], []], 5) == [[], []]
    with pytest.raises(ValueError, match="2 adapters cannot answer for 1"):
        generate(base, random_arena(tiny_layout(base, "llama"), 2), [[]], 5)


def test_the_embedded_base_answers_in_text() -> None:
    base = load_base(ModelConfig(device="cpu"))
    arena = random_arena(lora_layout(base, AdapterConfig()), 2, torch.float32)
    arena = arena.replace(0.1 * arena.values_KP)
    prompts = [[np.asarray(base.tokenizer.encode("Name a colour.\n"), dtype=np.int32)] for _ in range(2)]
    answers = generate(base, arena, prompts, 8)
    assert all(isinstance(answer, str) and base.tokenizer.eos_token not in answer for (answer,) in answers)
