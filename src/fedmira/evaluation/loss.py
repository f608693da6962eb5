"""Cross entropy of many clients' examples under their own adapters, on packed rows of many clients at once.

Knows nothing about splits, rounds or how the adapters came to be.

Axes: K clients, P parameters of one adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from fedmira.data.packing import pack
from fedmira.data.tokenization import TokenizedExample
from fedmira.model.adapted import AdaptedModel
from fedmira.model.base import BaseModel
from fedmira.model.full import is_full, one_by_one
from fedmira.model.shift import shifted
from fedmira.training.objective import sums_per_client, token_losses
from fedmira.types import Arena


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
    sums = [0.0] * arena.num_clients
    counts = [0] * arena.num_clients
    with shifted(base, arena.layout, arena.shift_W):
        for batch_examples in batches(examples_per_client, batch_tokens):
            batch = pack(batch_examples, virtual_tokens=arena.layout.num_virtual_tokens)
            with torch.inference_mode():
                losses_M = token_losses(base, adapted.hidden(batch), batch.labels_M)
                sums_K = sums_per_client(losses_M, batch.supervised_per_client).tolist()
            for client, count in enumerate(batch.supervised_per_client):
                sums[client] += sums_K[client]
                counts[client] += count
    return list(zip(sums, counts, strict=True))


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
