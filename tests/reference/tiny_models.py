"""Tiny random models of each family, layouts and examples: no files, made in milliseconds."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM

from fedmira.config.run import AdapterConfig
from fedmira.data.tokenization import TokenizedClient, TokenizedExample
from fedmira.model.arena import initial_arena, lora_layout
from fedmira.model.base import BaseModel, freeze
from fedmira.model.kinds import adapter_layout
from fedmira.types import Arena, Client, Layout

VOCABULARY = 97
COMMON: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA_LIKE: dict[str, Any] = {
    **COMMON,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2Config",
        {**COMMON, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.2},
    ),
    "llama": ("LlamaConfig", LLAMA_LIKE),
    "qwen2": ("Qwen2Config", LLAMA_LIKE),
    "qwen3": ("Qwen3Config", {**LLAMA_LIKE, "head_dim": 16}),
    "mistral": ("MistralConfig", {**LLAMA_LIKE, "sliding_window": 5}),
    "gemma": ("GemmaConfig", {**LLAMA_LIKE, "head_dim": 8}),
    "gemma2": (
        "Gemma2Config",
        {
            **LLAMA_LIKE,
            "head_dim": 8,
            "sliding_window": 5,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 16,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            **LLAMA_LIKE,
            "head_dim": 8,
            "sliding_window": 5,
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
}
TARGETS: dict[str, tuple[str, ...]] = {"gpt2": ("c_attn", "c_proj")}
"""What the adapters of a family sit on; the attention's projections where nothing is said."""


def tiny_model(family: str, dtype: torch.dtype = torch.float64) -> Any:
    """A transformers model with random weights, the same ones every time."""
    config_class, settings = FAMILIES[family]
    config = getattr(transformers, config_class)(**settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # biases and norms start at 0 and 1: move them, so that a forgotten one is noticed
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn(parameter.shape))
                assert torch.isfinite(parameter).all(), name
    return model.to(dtype).eval()


def tiny_base(family: str, dtype: torch.dtype = torch.float64) -> BaseModel:
    return freeze(tiny_model(family, dtype), tokenizer=None, name=f"tiny-{family}")


def tiny_layout(base: BaseModel, family: str, rank: int = 3) -> Layout:
    targets = TARGETS.get(family, ("q_proj", "k_proj", "v_proj", "o_proj"))
    return lora_layout(base, AdapterConfig(rank=rank, alpha=6.0, targets=targets))


def layout_of_kind(base: BaseModel, kind: str) -> Layout:
    """A layout of a kind of adapter other than LoRA, with sizes that differ from each other."""
    settings: dict[str, dict[str, Any]] = {
        "prompt": {"num_virtual_tokens": 5},
        "p_tuning": {"num_virtual_tokens": 5, "encoder_hidden_size": 7},
        "full": {},
    }
    return adapter_layout(base, AdapterConfig.model_validate({"kind": kind, **settings[kind]}))


def random_arena(layout: Layout, num_clients: int, dtype: torch.dtype = torch.float64, seed: int = 3) -> Arena:
    """Adapters that differ from client to client in A and in B."""
    arena = initial_arena(layout, num_clients, seed, dtype)
    noise = torch.randn(arena.values_KP.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return arena.replace(arena.values_KP + 0.1 * noise.to(dtype))


def random_examples(count: int, seed: int, longest: int = 14) -> tuple[TokenizedExample, ...]:
    """Examples of ragged lengths with prompts of ragged lengths."""
    draw = np.random.default_rng(seed)
    examples = []
    for index in range(count):
        length = int(draw.integers(3, longest + 1))
        tokens = draw.integers(3, VOCABULARY, size=length).astype(np.int32)
        tokens[-1] = 2
        examples.append(TokenizedExample(tokens, int(draw.integers(1, length)), f"example-{seed}-{index}"))
    return tuple(examples)


def client_of(name: str, examples: tuple[TokenizedExample, ...]) -> TokenizedClient:
    return TokenizedClient(name, examples, (), (), Client(name, (), (), ()))


def ragged_clients(counts: tuple[int, ...] = (5, 1, 7, 3, 4)) -> tuple[TokenizedClient, ...]:
    """Clients with different numbers of examples of different lengths."""
    return tuple(client_of(f"client-{k}", random_examples(count, seed=100 + k)) for k, count in enumerate(counts))
