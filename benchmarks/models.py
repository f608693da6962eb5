"""Base models of the benchmark: the embedded one, and Hugging Face models of given shapes with random weights.

Where only speed matters, the shape of the weights decides and their values do not. Knows nothing about adapters,
clients or peers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import transformers

from fedmira.config.run import ModelConfig
from fedmira.model.base import BaseModel, freeze, load_base

_SPECIAL: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_WITHOUT_DROPOUT: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_CONTEXT = 1024
_TWIN_VOCABULARY = 2500
"""More than the logits that are computed at a time on a CPU."""


class Shape(NamedTuple):
    """A transformers config class and its settings."""

    family: str
    settings: dict[str, Any]


def _llama(width: int, layers: int, heads: int, inner: int, vocabulary: int) -> Shape:
    settings = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
        "max_position_embeddings": _CONTEXT,
        "tie_word_embeddings": True,
    }
    return Shape("LlamaConfig", settings | _SPECIAL)


def _gpt2(width: int, layers: int, heads: int, vocabulary: int = 50257) -> Shape:
    settings = {
        "n_embd": width,
        "n_layer": layers,
        "n_head": heads,
        "vocab_size": vocabulary,
        "n_positions": _CONTEXT,
    }
    return Shape("GPT2Config", settings | _WITHOUT_DROPOUT | _SPECIAL)


SHAPES = {
    "llama-tiny": _llama(32, 2, 4, 48, 97),
    "gpt2-tiny": _gpt2(32, 2, 4, 97),
    "llama-twin": _llama(32, 2, 4, 48, _TWIN_VOCABULARY),
    "gpt2-twin": _gpt2(32, 2, 4, _TWIN_VOCABULARY),
    "llama-15m": _llama(288, 6, 6, 768, 32000),
    "gpt2-124m": _gpt2(768, 12, 12),
    "gpt2-large": _gpt2(1280, 36, 20),
    "llama-1.3b": _llama(2048, 24, 16, 5504, 32000),
}
EMBEDDED = "embedded"
TINY = {"LlamaConfig": "llama-twin", "GPT2Config": "gpt2-twin"}
"""The small model of each family, for checks in float64."""


def tiny_twin(name: str) -> str:
    """The tiny model of the same family as `name`."""
    return TINY["LlamaConfig" if name == EMBEDDED else SHAPES[name].family]


def make_base(name: str, device: str, dtype: torch.dtype) -> BaseModel:
    """The frozen base model `name`: `embedded` or one of `SHAPES`, the same weights every time."""
    if name == EMBEDDED:
        spelt = str(dtype).removeprefix("torch.")
        return load_base(ModelConfig(path=EMBEDDED, dtype=spelt, device=device))
    shape = SHAPES[name]
    config = getattr(transformers, shape.family)(**shape.settings)
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return freeze(model.to(device), tokenizer=None, name=name)
