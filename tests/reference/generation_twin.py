"""The slow twins of generation: stock PEFT, prompt by prompt without a cache or client by client with padding."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tests.reference.engine_twin import peft_model
from transformers import GenerationConfig

from fedmira.model.base import BaseModel
from fedmira.types import Arena


def one_by_one(
    base: BaseModel, arena: Arena, prompts: list[list[np.ndarray]], max_new_tokens: int, end: int
) -> list[list[str]]:
    """One prompt at a time, everything computed again for each token: the most likely one at each step."""
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
                if new[-1] == end:
                    new.pop()
                    break
                tokens = torch.cat([tokens, torch.tensor([[new[-1]]])], dim=1)
            answers[-1].append(_decode(base, new))
    return answers


def client_by_client(
    base: BaseModel, arena: Arena, prompts: list[list[np.ndarray]], max_new_tokens: int, end: int
) -> list[list[str]]:
    """transformers' `generate` on the left-padded prompts of one client after another."""
    answers = []
    for client, client_prompts in enumerate(prompts):
        longest = max(len(prompt) for prompt in client_prompts)
        tokens_BT = torch.zeros(len(client_prompts), longest, dtype=torch.int64)
        mask_BT = torch.zeros_like(tokens_BT)
        for row, prompt in enumerate(client_prompts):
            tokens_BT[row, longest - len(prompt) :] = torch.from_numpy(prompt).long()
            mask_BT[row, longest - len(prompt) :] = 1
        settings = GenerationConfig(
            do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=end, pad_token_id=base.tokenizer.pad_token_id
        )
        model: Any = peft_model(base, arena.layout, arena.values_KP[client])
        with torch.inference_mode():
            output_BT = model.generate(input_ids=tokens_BT, attention_mask=mask_BT, generation_config=settings)
        answers.append(
            [_decode(base, new[: new.index(end)] if end in new else new) for new in output_BT[:, longest:].tolist()]
        )
    return answers


def _decode(base: BaseModel, tokens: list[int]) -> str:
    text: str = base.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text
