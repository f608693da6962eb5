"""Cross entropy of many clients' examples under their own adapters, on packed rows of many clients at once.

Knows nothing about splits, rounds or how the adapters came to be.

Axes: K clients, P parameters of one adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TypeAlias

import torch

from fedmira.data.packing import pack
from fedmira.data.tokenization import TokenizedExample
from fedmira.model.adapted import AdaptedModel, computes_in_parts
from fedmira.model.base import BaseModel
from fedmira.model.full import is_full, one_by_one
from fedmira.model.shift import shifted
from fedmira.side_by_side import side_by_side
from fedmira.training.memory import AT_ONCE
from fedmira.training.objective import sums_per_client, token_losses
from fedmira.types import Arena, Layout

Part: TypeAlias = dict[int, list[TokenizedExample]]
"""Examples that are judged in one computation, by client."""


def evaluate_loss(
    base: BaseModel,
    arena: Arena,
    examples_per_client: Sequence[Sequence[TokenizedExample]],
    batch_tokens: int,
) -> list[tuple[float, int]]:
    """Per client the cross entropy in nats summed over its supervised tokens, and their number.

    Args:
        base: the frozen model.
        arena: (K, P); row k judges client k.
        examples_per_client: K lists of examples; a client without examples gets (0.0, 0).
        batch_tokens: packed tokens judged together at most; a longer example is judged on its own.

    Raises:
        ValueError: the arena has not one row per client.
    """
    if arena.num_clients != len(examples_per_client):
        raise ValueError(f"{arena.num_clients} adapters cannot judge {len(examples_per_client)} clients")
    if is_full(arena.layout):
        alone = zip(one_by_one(base, arena), examples_per_client, strict=True)
        return [evaluate_loss(moved, bare, [examples], batch_tokens)[0] for (moved, bare), examples in alone]
    adapted = AdaptedModel(base, arena.replace(arena.values_KP.to(base.device)))

    def judge(part: Part) -> list[float]:
        examples = [part.get(client, []) for client in range(arena.num_clients)]
        batch = pack(examples, virtual_tokens=arena.layout.num_virtual_tokens)
        with torch.inference_mode():
            losses_M = token_losses(base, adapted.hidden(batch), batch.labels_M)
            sums = sums_per_client(losses_M, batch.supervised_per_client).tolist()
        return [sums[client] for client in part]

    parts, at_once = parts_to_judge(base, arena.layout, examples_per_client, batch_tokens)
    with shifted(base, arena.layout, arena.shift_W):
        judged = side_by_side([partial(judge, part) for part in parts], at_once)
    sums = [0.0] * arena.num_clients
    for part, sums_of_part in zip(parts, judged, strict=True):
        for client, sum_ in zip(part, sums_of_part, strict=True):
            sums[client] += sum_
    counts = [sum(example.num_supervised for example in examples) for examples in examples_per_client]
    return list(zip(sums, counts, strict=True))


def parts_to_judge(
    base: BaseModel,
    layout: Layout,
    examples_per_client: Sequence[Sequence[TokenizedExample]],
    batch_tokens: int,
) -> tuple[list[Part], int]:
    """What `evaluate_loss` computes at a time, in its order, and how many of these at once.

    On several threads of a CPU two, with half of the tokens each, unless an example is longer than that.
    """
    lengths = [example.num_inputs for examples in examples_per_client for example in examples]
    longest = max(lengths, default=0)
    at_once = AT_ONCE if computes_in_parts(base, layout) and longest <= batch_tokens // AT_ONCE else 1
    # what would fit into one batch falls into parts of about the same size
    tokens = min(batch_tokens // at_once, -(-(sum(lengths) + longest) // at_once))
    held = batches(examples_per_client, tokens)
    return [{client: examples for client, examples in enumerate(batch) if examples} for batch in held], at_once


def batches(
    examples_per_client: Sequence[Sequence[TokenizedExample]], batch_tokens: int
) -> Iterator[list[list[TokenizedExample]]]:
    """Fill batches in client order; each is a list per client, empty for those it does not hold."""
    batch: list[list[TokenizedExample]] = [[] for _ in examples_per_client]
    filled = 0
    for client, examples in enumerate(examples_per_client):
        for example in examples:
            length = example.num_inputs
            if filled and filled + length > batch_tokens:
                yield batch
                batch = [[] for _ in examples_per_client]
                filled = 0
            batch[client].append(example)
            filled += length
    if filled:
        yield batch
