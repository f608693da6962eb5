"""Answers prompts of many clients by greedy generation, each with its own adapter, in shared batches.

Knows nothing about references or scores.

Axes: K clients, P parameters of one adapter, B prompts of a batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from fedmira.model.base import BaseModel
from fedmira.model.lora import attached
from fedmira.types import Arena


def generate(
    base: BaseModel,
    arena: Arena,
    prompts_per_client: Sequence[Sequence[np.ndarray]],
    max_new_tokens: int,
    *,
    batch_sequences: int = 64,
) -> list[list[str]]:
    """Answer every prompt greedily and return the answers without special tokens, in the order of the prompts.

    An answer ends at an end token (the tokenizer's, or one that the model's generation config names) or after
    `max_new_tokens`. Settings of the model's generation config that change what is chosen, such as sampling or a
    repetition penalty, are left out.

    Args:
        base: the frozen model with its tokenizer.
        arena: (K, P); row k answers for client k.
        prompts_per_client: K lists of token ids, (T,) each. A prompt that leaves no room for `max_new_tokens` in the
            model's context loses its beginning.
        max_new_tokens: at most this many tokens per answer.
        batch_sequences: prompts answered together.

    Raises:
        ValueError: the arena has not one row per client.
    """
    if arena.num_clients != len(prompts_per_client):
        raise ValueError(f"{arena.num_clients} adapters cannot answer for {len(prompts_per_client)} clients")
    arena = arena.replace(arena.values_KP.to(base.device))
    new_tokens = min(max_new_tokens, base.max_length - 1)
    room = base.max_length - new_tokens
    answers = [[""] * len(prompts) for prompts in prompts_per_client]
    places = [(client, index) for client, prompts in enumerate(prompts_per_client) for index in range(len(prompts))]
    # prompts of similar length share a batch; inside it, rows must be sorted by client
    places.sort(key=lambda place: len(prompts_per_client[place[0]][place[1]]))
    with torch.inference_mode(), _plain_greedy(base, new_tokens) as end_tokens:
        for start in range(0, len(places), batch_sequences):
            chunk = sorted(places[start : start + batch_sequences])
            prompts = [prompts_per_client[client][index][-room:] for client, index in chunk]
            counts = [0] * arena.num_clients
            for client, _ in chunk:
                counts[client] += 1
            with attached(base, arena, counts):
                new_BT = _continue(base, prompts)
            for (client, index), new_T in zip(chunk, new_BT.tolist(), strict=True):
                end = next((i for i, token in enumerate(new_T) if token in end_tokens), len(new_T))
                answers[client][index] = base.tokenizer.decode(
                    new_T[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
                )
    return answers


def _continue(base: BaseModel, prompts: Sequence[np.ndarray]) -> torch.Tensor:
    """The new tokens after each prompt, (B, T), padded behind the end."""
    longest = max(len(prompt) for prompt in prompts)
    pad = base.model.generation_config.pad_token_id
    tokens_BT = torch.full((len(prompts), longest), pad, dtype=torch.int64)
    mask_BT = torch.zeros((len(prompts), longest), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, longest - len(prompt) :] = torch.from_numpy(np.asarray(prompt, dtype=np.int64))
        mask_BT[row, longest - len(prompt) :] = 1
    output_BT: torch.Tensor = base.model.generate(
        input_ids=tokens_BT.to(base.device), attention_mask=mask_BT.to(base.device)
    )
    return output_BT[:, longest:]


@contextmanager
def _plain_greedy(base: BaseModel, max_new_tokens: int) -> Iterator[frozenset[int]]:
    """Inside the `with` block the model generates greedily and nothing else; gives the end tokens."""
    from transformers import GenerationConfig

    before: Any = base.model.generation_config
    named = before.eos_token_id if before.eos_token_id is not None else []
    end_tokens = {*(named if isinstance(named, list) else [named]), base.tokenizer.eos_token_id} - {None}
    pad = base.tokenizer.pad_token_id
    base.model.generation_config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(end_tokens) or None,
        pad_token_id=pad if pad is not None else min(end_tokens, default=0),
    )
    try:
        yield frozenset(end_tokens)
    finally:
        base.model.generation_config = before
