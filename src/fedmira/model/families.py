"""Recognises the bodies that `fused` can compute and reads their weights.

A family that is not listed, or whose config asks for something else, has no fused body and runs through the stock
model. Knows nothing about adapters or batches.

Axes: N packed rows, T positions, D features of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fedmira.model.attention import Settings
from fedmira.model.body import Block, Body, Norm, Stack, state_dtype
from fedmira.model.products import as_OI


def fused_body(model: Any) -> Body | None:
    """The body of a transformers model, or None if it is not one that is known.

    Layers that share an input get their weights moved into one matrix; the model's own parameters become views of it.
    """
    build = _FAMILIES.get(model.config.model_type)
    return None if build is None else build(model)


def _llama(model: Any) -> Body | None:
    config, body = model.config, model.base_model
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    # other kinds of rotary embedding change with the length of a batch
    if config.hidden_act != "silu" or rope_type not in ("default", "linear", "llama3"):
        return None
    prefix = _path_of(model, body)
    blocks = []
    for index, layer in enumerate(body.layers):
        at = f"{prefix}layers.{index}."
        attention, feed = layer.self_attn, layer.mlp
        # Mistral's attention reads it from its config; Llama's has none, whatever its config holds
        of_config = getattr(config, "sliding_window", None) if config.model_type == "mistral" else None
        window = getattr(attention, "sliding_window", of_config)
        blocks.append(
            Block(
                _rms_norm(layer.input_layernorm),
                _stack(at + "self_attn.", attention, ("q_proj", "k_proj", "v_proj")),
                _stack(at + "self_attn.", attention, ("o_proj",)),
                Settings(attention.scaling, window, None),
                _rms_norm(layer.post_attention_layernorm),
                _stack(at + "mlp.", feed, ("gate_proj", "up_proj")),
                _stack(at + "mlp.", feed, ("down_proj",)),
            )
        )
    return Body(
        words=body.embed_tokens,
        places=None,
        rotate=_rotation(body),
        blocks=tuple(blocks),
        final_norm=_rms_norm(body.norm),
        num_heads=config.num_attention_heads,
        num_key_heads=config.num_key_value_heads,
        gated=True,
    )


def _gpt2(model: Any) -> Body | None:
    config, body = model.config, model.base_model
    if (
        config.activation_function not in ("gelu_new", "gelu_pytorch_tanh")
        or config.scale_attn_by_inverse_layer_idx
        or config.reorder_and_upcast_attn
        or config.add_cross_attention
    ):
        return None
    prefix = _path_of(model, body)
    blocks = []
    for index, layer in enumerate(body.h):
        at = f"{prefix}h.{index}."
        scaling = None if config.scale_attn_weights else 1.0
        blocks.append(
            Block(
                _layer_norm(layer.ln_1),
                _stack(at + "attn.", layer.attn, ("c_attn",)),
                _stack(at + "attn.", layer.attn, ("c_proj",)),
                Settings(scaling, None, None),
                _layer_norm(layer.ln_2),
                _stack(at + "mlp.", layer.mlp, ("c_fc",)),
                _stack(at + "mlp.", layer.mlp, ("c_proj",)),
            )
        )
    return Body(
        words=body.wte,
        places=body.wpe,
        rotate=None,
        blocks=tuple(blocks),
        final_norm=_layer_norm(body.ln_f),
        num_heads=config.n_head,
        num_key_heads=config.n_head,
        gated=False,
    )


_FAMILIES: Mapping[str, Callable[[Any], Body | None]] = {
    "gpt2": _gpt2,
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
}


def _path_of(model: Any, body: Any) -> str:
    return "".join(f"{name}." for name, module in model.named_modules() if module is body)


def _rms_norm(module: Any) -> Norm:
    return Norm(module.weight.to(state_dtype(module.weight)), None, module.variance_epsilon)


def _layer_norm(module: Any) -> Norm:
    dtype = state_dtype(module.weight)
    return Norm(module.weight.to(dtype), module.bias.to(dtype), module.eps)


def _stack(at: str, parent: Any, names: Sequence[str]) -> Stack:
    """The layers `names` of a module as one; a single layer is read where it is."""
    layers = [getattr(parent, name) for name in names]
    if len(layers) == 1:
        weight = as_OI(layers[0])
        return Stack(weight, layers[0].bias, {at + names[0]: slice(0, weight.shape[0])})
    weight_OI = torch.cat([layer.weight.detach() for layer in layers])
    biases = [layer.bias for layer in layers]
    bias_O = None if any(bias is None for bias in biases) else torch.cat([bias.detach() for bias in biases])
    columns = {}
    start = 0
    for name, layer in zip(names, layers, strict=True):
        stop = start + layer.weight.shape[0]
        columns[at + name] = slice(start, stop)
        layer.weight.data = weight_OI[start:stop]
        if bias_O is not None:
            layer.bias.data = bias_O[start:stop]
        start = stop
    return Stack(weight_OI, bias_O, columns)


def _rotation(body: Any) -> Callable[[int], tuple[torch.Tensor, torch.Tensor]]:
    """Cosines and sines of the first positions, kept from call to call."""
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def rotate(length: int) -> tuple[torch.Tensor, torch.Tensor]:
        tables = kept[0] if kept else None
        if tables is None or len(tables[0]) < length:
            weight = body.embed_tokens.weight
            like = weight.new_empty(0, dtype=state_dtype(weight))
            with torch.no_grad():
                both = body.rotary_emb(like, torch.arange(length, device=like.device)[None])
            # both halves of a head's features turn by the same angles
            cosine, sine = (table[0, :, None, : table.shape[-1] // 2].contiguous() for table in both)
            tables = cosine, sine
            # both at once, as several threads may ask
            kept[:] = [tables]
        return tables

    return rotate
