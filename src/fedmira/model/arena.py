"""Which tensors an adapter has and where they lie: layouts and initial arenas.

Knows nothing about training, clients' data or how the low-rank product enters the forward pass.

Axes: K clients, P parameters of one adapter, R rank, I/O in and out features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from fedmira.config.run import AdapterConfig
from fedmira.errors import ConfigError, nearest
from fedmira.model.base import BaseModel
from fedmira.randomness import torch_generator
from fedmira.types import PAIRS, Arena, Layout


def lora_layout(base: BaseModel, adapter: AdapterConfig, num_pairs: int = 1) -> Layout:
    """The tensors of one LoRA adapter: per target layer `lora_a` (R, I) and `lora_b` (O, R).

    With `num_pairs` 2 also `second_a` and `second_b`, of the same shapes, whose product is added. R is the largest rank
    of any client; those of smaller rank leave components at 0.

    In module order, but the layers of one module have all their `lora_a` before their `lora_b`.

    Targets are `nn.Linear` and GPT-2's `Conv1D` layers whose module path equals a target or ends with `.target`;
    `all-linear` takes every one of them. The output head is never a target: it runs on supervised rows only.

    Raises:
        ConfigError: a target, or a name in `rank_pattern`, matches no layer; the message lists the names that exist.
    """
    linears = adaptable_layers(base)
    if adapter.targets == "all-linear":
        chosen = list(linears)
    else:
        chosen = [name for name in linears if any(_matches(name, target) for target in adapter.targets)]
        unmatched = [t for t in adapter.targets if not any(_matches(name, t) for name in linears)]
        if unmatched or not chosen:
            exist = sorted({name.rsplit(".", 1)[-1] for name in linears})
            hint = nearest(unmatched[0], exist) if unmatched else ""
            raise ConfigError(
                f"model.adapter.targets = {list(adapter.targets)}: no layer of {base.name} ends with "
                f"{', '.join(unmatched) or 'any of them'}{hint}; layers that exist: {', '.join(exist)}. "
                "Use some of these, or all-linear"
            )
    if not chosen:
        raise ConfigError(f"{base.name} has no linear layer that an adapter could be added to; use another model.path")
    ranks = _ranks(adapter, chosen)
    tensors: list[tuple[str, str, str, tuple[int, ...]]] = []
    for _, siblings in groupby(chosen, key=lambda name: name.rpartition(".")[0]):
        names = list(siblings)
        # the A of layers that share an input lie behind one another, so that together they are one matrix
        for group_a, group_b in PAIRS[:num_pairs]:
            tensors += [(f"{n}.{group_a}", group_a, n, (ranks[n], linears[n][0])) for n in names]
            tensors += [(f"{n}.{group_b}", group_b, n, (linears[n][1], ranks[n])) for n in names]
    return Layout.of(tensors, scaling=adapter.alpha / adapter.rank)


def _ranks(adapter: AdapterConfig, layers: Sequence[str]) -> dict[str, int]:
    """The rank of each adapted layer."""
    ranks = dict.fromkeys(layers, adapter.largest_rank)
    # backwards, so that the first match counts
    for pattern, rank in reversed(adapter.rank_pattern.items()):
        matched = [name for name in layers if _matches(name, pattern)]
        if not matched:
            exist = sorted({name.rsplit(".", 1)[-1] for name in layers})
            raise ConfigError(
                f"model.adapter.rank_pattern names {pattern!r}, but no adapted layer ends with it"
                f"{nearest(pattern, exist)}; adapted layers: {', '.join(exist)}"
            )
        ranks |= dict.fromkeys(matched, rank)
    return ranks


def initial_arena(
    layout: Layout,
    num_clients: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Arena:
    """The arena before round 1, (K, P): A as PEFT draws it, uniform in +-1/sqrt(I), and B zero.

    Drawn once, from the stream (seed, "adapter"), and the same for all clients: their products start equal (zero),
    and mixing factors stays close to mixing products while the A have not moved apart.
    """
    row_P = torch.zeros(layout.num_parameters, dtype=torch.float32)
    (first, _), *others = PAIRS
    draws = {first: torch_generator(seed, "adapter")}
    draws |= {group_a: torch_generator(seed, "adapter", group_a) for group_a, _ in others}
    for spec in layout.specs:
        if spec.group in draws:
            # kaiming_uniform with a = sqrt(5) has gain sqrt(1/3): the bound is gain * sqrt(3 / I)
            bound = 1.0 / math.sqrt(spec.shape[1])
            row_P[spec.columns].uniform_(-bound, bound, generator=draws[spec.group])
    return Arena(layout, row_P.to(device=device, dtype=dtype).repeat(num_clients, 1))


def adaptable_layers(base: BaseModel) -> dict[str, tuple[int, int]]:
    """Module path -> (in features, out features) of every layer that LoRA can be added to, in module order.

    Of a model that also sees or hears these are the layers of its language model: no text reaches the others.
    """
    head, text = base.model.get_output_embeddings(), base.language_path
    return {
        name: features
        for name, module in base.model.named_modules()
        if module is not head and name.startswith(text) and (features := _features(module)) is not None
    }


def _features(module: Any) -> tuple[int, int] | None:
    # a layer that computes something else, such as a router, is none
    if isinstance(module, torch.nn.Linear) and type(module).forward is torch.nn.Linear.forward:
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        num_inputs, num_outputs = module.weight.shape
        return int(num_inputs), int(num_outputs)
    return None


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
