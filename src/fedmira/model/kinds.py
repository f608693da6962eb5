"""The kinds of adapters by name: which tensors each has, and what they are before round 1.

Knows nothing about training or clients' data. Axes: K clients, P parameters of one adapter.
"""

from __future__ import annotations

import torch

from fedmira.config.run import AdapterConfig
from fedmira.model.arena import initial_arena, lora_layout
from fedmira.model.base import BaseModel
from fedmira.model.full import full_layout, is_full
from fedmira.model.soft_prompt import initial_prompt, p_tuning_layout, prompt_layout
from fedmira.types import Arena, Layout


def adapter_layout(base: BaseModel, adapter: AdapterConfig, num_pairs: int = 1) -> Layout:
    """The tensors of one adapter of the kind that `adapter` names.

    Args:
        base: the frozen model.
        adapter: kind and sizes.
        num_pairs: low-rank pairs per layer, for kind `lora`.

    Raises:
        ConfigError: the settings do not fit the base.
    """
    match adapter.kind:
        case "lora":
            return lora_layout(base, adapter, num_pairs)
        case "prompt":
            return prompt_layout(base, adapter)
        case "p_tuning":
            return p_tuning_layout(base, adapter)
        case "full":
            return full_layout(base)


def initial_adapters(base: BaseModel, layout: Layout, num_clients: int, seed: int) -> Arena:
    """The arena before round 1, (K, P), the same for all clients; in the base's `adapter_dtype` and on its device.

    Low-rank pairs add nothing yet, and neither do differences to all weights; soft prompts are drawn.
    """
    if layout.num_virtual_tokens:
        row_P = initial_prompt(base, layout, seed)
    elif is_full(layout):
        row_P = torch.zeros(layout.num_parameters)
    else:
        return initial_arena(layout, num_clients, seed, base.adapter_dtype, base.device)
    return Arena(layout, row_P.to(device=base.device, dtype=base.adapter_dtype).repeat(num_clients, 1))
