"""Cross entropy of many clients' examples under their own adapters, on packed rows of many clients at once.

Knows nothing about splits, rounds or how the adapters came to be.

Axes: K clients, P parameters of one adapter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from fedmira.data.packing import pack
from fedmira.data.tokenization import TokenizedExample
from fedmira.model.adapted import AdaptedModel
from fedmira.model.base import BaseModel
from fedmira.model.full import is_full, one_by_one
from fedmira.model.shift import shifted
from fedmira.training.objective import sums_of_parts, token_losses
from fedmira.types import Arena


def evaluate_loss(
    base: BaseModel,
    arena: Arena,
    examples_per_client: Sequence[Sequence[TokenizedExample]],
    batch_tokens: int,
) -> list[tuple[float, int]]:
    """Per client the cross entropy in nats summed over its supervised tokens, and their number.

    See `example_losses`; a client without examples gets (0.0, 0).
    """
    losses = example_losses(base, arena, examples_per_client, batch_tokens)
    return [
        (sum(of_client), sum(example.num_supervised for example in examples))
        for of_client, examples in zip(losses, examples_per_client, strict=True)
    ]


def example_losses(
    base: BaseModel,
    arena: Arena,
    examples_per_client: Sequence[Sequence[TokenizedExample]],
    batch_tokens: int,
) -> list[list[float]]:
    """Per client the cross entropy of each of its examples, in nats, summed over the example's supervised tokens.

    Args:
        base: the frozen model.
        arena: (K, P); row k judges client k.
        examples_per_client: K lists of examples, empty or not.
        batch_tokens: packed tokens judged together at most; a longer example is judged on its own.

    Raises:
        ValueError: the arena has not one row per client.
    """
    if arena.num_clients != len(examples_per_client):
        raise ValueError(f"{arena.num_clients} adapters cannot judge {len(examples_per_client)} clients")
    if is_full(arena.layout):
        alone = zip(one_by_one(base, arena), examples_per_client, strict=True)
        return [example_losses(moved, bare, [examples], batch_tokens)[0] for (moved, bare), examples in alone]
    adapted = AdaptedModel(base, arena.replace(arena.values_KP.to(base.device)))
    losses: list[list[float]] = [[] for _ in examples_per_client]
    with shifted(base, arena.layout, arena.shift_W):
        for batch_examples in batches(examples_per_client, batch_tokens):
            batch = pack(batch_examples, virtual_tokens=arena.layout.num_virtual_tokens)
            with torch.inference_mode():
                losses_M = token_losses(base, adapted.hidden(batch), batch.labels_M)
                sums = sums_of_parts(
                    losses_M, [example.num_supervised for examples in batch_examples for example in examples]
                ).tolist()
            for of_client, examples in zip(losses, batch_examples, strict=True):
                of_client += sums[: len(examples)]
                sums = sums[len(examples) :]
    return losses


def scatter(losses_N: Sequence[float], versus_N: Sequence[float]) -> float:
    """Return the sampling variance of log(sum losses_N / sum versus_N), times N; nan of fewer than two examples.

    How far a ratio of sums over N examples would move with other examples of the kind: sum_i r_i^2 / (N - 1) over the
    square of mean losses_N, r_i = losses_i - ratio versus_i what example i does otherwise than all together
    (linearised ratio estimator; Cochran, Sampling Techniques, 1977, 6.4).

    >>> scatter([2.0, 4.0], [1.0, 2.0]), scatter([1.0, 3.0], [2.0, 2.0])
    (0.0, 0.5)
    """
    num, whole, versus = len(losses_N), sum(losses_N), sum(versus_N)
    if num < 2 or not whole or not versus:
        return math.nan
    squares = sum((loss - whole / versus * of_it) ** 2 for loss, of_it in zip(losses_N, versus_N, strict=True))
    return squares / (num - 1) / (whole / num) ** 2


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
