"""A Llama written for fast training on one processor core: same parameters and function as Hugging Face's.

Parameters carry the names of `LlamaForCausalLM`, so exporting is saving. Against that class it is about twice as
fast on a core with bfloat16 matrix units: activations are bfloat16, attention skips most of the masked half,
and the whole loss compiles into two graphs. Knows nothing about data, optimizers or files.

Axes: B sequences, T tokens, D model width, H query heads, G key/value heads, E head width, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import LlamaConfig

ATTENTION_BLOCK = 128


def llama_config(vocab_size: int, pad: int, bos: int, eos: int) -> LlamaConfig:
    """The shape of the embedded base model: 3.2 million parameters."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=48,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        pad_token_id=pad,
        bos_token_id=bos,
        eos_token_id=eos,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )


def initial_parameters(config: LlamaConfig, seed: int, device: str) -> dict[str, torch.Tensor]:
    """float32 leaves by Hugging Face name; the head is tied to the embedding and has no entry."""
    generator = torch.Generator().manual_seed(seed)
    width, hidden, head = config.hidden_size, config.intermediate_size, config.head_dim
    narrow = config.num_key_value_heads * head
    shapes = {
        "self_attn.q_proj": (config.num_attention_heads * head, width),
        "self_attn.k_proj": (narrow, width),
        "self_attn.v_proj": (narrow, width),
        "self_attn.o_proj": (width, config.num_attention_heads * head),
        "mlp.gate_proj": (hidden, width),
        "mlp.up_proj": (hidden, width),
        "mlp.down_proj": (width, hidden),
    }
    parameters = {"model.embed_tokens.weight": torch.randn(config.vocab_size, width, generator=generator) * 0.02}
    for layer in range(config.num_hidden_layers):
        for name, (rows, columns) in shapes.items():
            # The branches that add to the residual start smaller, so depth does not raise its variance.
            shrink = (2 * config.num_hidden_layers) ** -0.5 if name.endswith(("o_proj", "down_proj")) else 1.0
            values = torch.randn(rows, columns, generator=generator) * columns**-0.5 * 0.5 * shrink
            parameters[f"model.layers.{layer}.{name}.weight"] = values
        parameters[f"model.layers.{layer}.input_layernorm.weight"] = torch.ones(width)
        parameters[f"model.layers.{layer}.post_attention_layernorm.weight"] = torch.ones(width)
    parameters["model.norm.weight"] = torch.ones(width)
    return {name: value.to(device).requires_grad_() for name, value in parameters.items()}


def rotary_table(length: int, head_width: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines `(T, E)` in Hugging Face's half-split order."""
    frequencies = 10000.0 ** (-torch.arange(0, head_width, 2, dtype=torch.float32) / head_width)
    angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies[None]
    doubled = torch.cat([angles, angles], dim=-1).to(device)
    return doubled.cos(), doubled.sin()


def next_token_loss(parameters: dict[str, torch.Tensor], config: LlamaConfig, tokens_BT: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy, nats, of each token given those before it in its row; matrices run in bfloat16."""
    inputs, targets = tokens_BT[:, :-1], tokens_BT[:, 1:]
    batch, length = inputs.shape
    heads, groups, head = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    half = {name: value.to(torch.bfloat16) for name, value in parameters.items() if value.dim() == 2}
    cosines, sines = (t.to(torch.bfloat16) for t in rotary_table(length, head, str(inputs.device)))
    hidden = F.embedding(inputs, half["model.embed_tokens.weight"]).float()
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        normed = _rms_norm(hidden, parameters[prefix + "input_layernorm.weight"], config.rms_norm_eps)
        fused = torch.cat([half[f"{prefix}self_attn.{n}_proj.weight"] for n in ("q", "k", "v")])
        heads_BHTE = F.linear(normed, fused).view(batch, length, heads + 2 * groups, head).transpose(1, 2)
        query, key, value = torch.split(heads_BHTE, [heads, groups, groups], dim=1)
        query = (query * cosines + _rotate_half(query) * sines) * head**-0.5
        key = key * cosines + _rotate_half(key) * sines
        attended = _causal_attention(query, key, value).transpose(1, 2).reshape(batch, length, heads * head)
        hidden = hidden + F.linear(attended, half[prefix + "self_attn.o_proj.weight"])
        normed = _rms_norm(hidden, parameters[prefix + "post_attention_layernorm.weight"], config.rms_norm_eps)
        both = torch.cat([half[prefix + "mlp.gate_proj.weight"], half[prefix + "mlp.up_proj.weight"]])
        gate, up = F.linear(normed, both).chunk(2, dim=-1)
        hidden = hidden + F.linear(F.silu(gate) * up, half[prefix + "mlp.down_proj.weight"])
    normed = _rms_norm(hidden, parameters["model.norm.weight"], config.rms_norm_eps)
    logits = F.linear(normed, half["model.embed_tokens.weight"])
    return F.cross_entropy(logits.float().view(-1, config.vocab_size), targets.reshape(-1))


def _rms_norm(hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    scale = torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + epsilon)
    return (hidden * scale * weight).to(torch.bfloat16)


def _rotate_half(values: torch.Tensor) -> torch.Tensor:
    first, second = values.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def _causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention of scaled queries `(B, H, T, E)` over keys and values `(B, G, T, E)`.

    On a CPU the queries go in blocks that meet only the keys before their end: close to half the scores of a
    causal mask are never computed.
    """
    batch, heads, length, width = query.shape
    groups = key.shape[1]
    if query.device.type == "cuda":
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=1.0, enable_gqa=True)
    rows = batch * groups
    query = query.reshape(rows, heads // groups, length, width)
    key, value = key.reshape(rows, length, width), value.reshape(rows, length, width)
    mask = torch.triu(torch.full((length, length), float("-inf"), device=query.device), diagonal=1)
    blocks = []
    for start in range(0, length, ATTENTION_BLOCK):
        end = min(start + ATTENTION_BLOCK, length)
        size = end - start
        block = query[:, :, start:end].reshape(rows, heads // groups * size, width)
        scores = torch.bmm(block, key[:, :end].transpose(1, 2)).view(rows, heads // groups, size, end)
        weights = torch.softmax(scores.float() + mask[start:end, :end], dim=-1).to(torch.bfloat16)
        mixed = torch.bmm(weights.view(rows, heads // groups * size, end), value[:, :end])
        blocks.append(mixed.view(batch, heads, size, width))
    return torch.cat(blocks, dim=2)
