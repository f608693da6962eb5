"""Batches: which examples a client trains on in each step, and many clients' sequences as one run of rows.

A packed batch has no padding: the rows of all sequences of all clients lie behind one another. Its inputs lack every
sequence's last token (the end token): nothing follows it, so its row would be computed for nothing. What all examples
of a client begin with (the definition of its task, the template's opening) is there once: causal attention gives its
rows the same values in every example. The virtual tokens of a soft prompt are such a beginning: rows whose tokens mean
nothing, because whoever runs the model puts the client's own embeddings there. Knows nothing about models, losses or
optimizers.

Axes: N rows (input tokens of all sequences), M supervised rows, C clients of the batch, T tokens of a sequence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from fedmira.data.tokenization import TokenizedClient, TokenizedExample
from fedmira.randomness import generator

if TYPE_CHECKING:
    from fedmira.config.training import TrainingConfig

_SHORTEST_PREFIX = 8
"""Fewer common tokens are not worth the bookkeeping."""


class Prefix(NamedTuple):
    """Rows of an earlier sequence that a sequence begins with."""

    start: int
    length: int


class PackedBatch(NamedTuple):
    """Sequences of C clients as rows, sorted by client; the segments follow one another without gaps."""

    tokens_N: torch.Tensor
    """int64; input tokens."""
    positions_N: torch.Tensor
    """int64; 0 at the first token of every sequence."""
    sequence_lengths: tuple[int, ...]
    """Rows that each sequence adds: its tokens less one, less its prefix."""
    prefixes: tuple[Prefix, ...]
    """What each sequence begins with, of length 0 if it shares nothing."""
    rows_per_client: tuple[int, ...]
    """Length C, zero allowed. The first rows of a client that has any are its virtual tokens."""
    supervised_rows_M: torch.Tensor
    """int64, ascending; the rows whose next token is supervised."""
    labels_M: torch.Tensor
    """int64; the next token of each of those rows."""
    supervised_per_client: tuple[int, ...]
    """Length C, zero allowed; sums to M."""
    tokens_per_client: tuple[int, ...]
    """Length C; input tokens, counting a shared prefix in every example and virtual tokens in none."""


def pack(
    examples_per_client: Sequence[Sequence[TokenizedExample]], share_prefixes: bool = True, virtual_tokens: int = 0
) -> PackedBatch:
    """Pack the examples of C clients.

    Args:
        examples_per_client: for each client its examples, in order; a client may have none.
        share_prefixes: whether a client's common beginning is there once.
        virtual_tokens: rows of token 0 that every sequence begins with, in front of its own; there once per client.

    >>> example = TokenizedExample(np.array([5, 6, 7, 8], dtype=np.int32), prompt_length=2, id="a")
    >>> batch = pack([[example], []])
    >>> batch.tokens_N.tolist(), batch.supervised_rows_M.tolist(), batch.labels_M.tolist()
    ([5, 6, 7], [1, 2], [7, 8])
    >>> batch.rows_per_client, batch.supervised_per_client
    ((3, 0), (2, 0))
    """
    tokens, positions, supervised, labels = [], [], [], []
    lengths: list[int] = []
    prefixes: list[Prefix] = []
    rows_per_client = []
    num_rows = 0
    for examples in examples_per_client:
        first = num_rows
        shared = common_prefix(examples) if share_prefixes else 0
        if examples and virtual_tokens:
            tokens.append(np.zeros(virtual_tokens, dtype=np.int64))
        for index, example in enumerate(examples):
            skipped = virtual_tokens + shared if index else 0
            length = virtual_tokens + example.num_inputs
            tokens.append(example.tokens[shared if index else 0 : -1])
            positions.append(np.arange(skipped, length))
            supervised.append(num_rows - skipped + np.arange(virtual_tokens + example.prompt_length - 1, length))
            labels.append(example.tokens[example.prompt_length :])
            prefixes.append(Prefix(first, skipped))
            lengths.append(length - skipped)
            num_rows += length - skipped
        rows_per_client.append(num_rows - first)
    return PackedBatch(
        tokens_N=_joined(tokens),
        positions_N=_joined(positions),
        sequence_lengths=tuple(lengths),
        prefixes=tuple(prefixes),
        rows_per_client=tuple(rows_per_client),
        supervised_rows_M=_joined(supervised),
        labels_M=_joined(labels),
        supervised_per_client=tuple(sum(e.num_supervised for e in client) for client in examples_per_client),
        tokens_per_client=tuple(sum(e.num_inputs for e in client) for client in examples_per_client),
    )


def num_rows(examples: Sequence[TokenizedExample]) -> int:
    """How many rows `pack` makes of one client's examples where their common beginning is there once."""
    return sum(example.num_inputs for example in examples) - max(0, len(examples) - 1) * common_prefix(examples)


def common_prefix(examples: Sequence[TokenizedExample]) -> int:
    """How many rows all examples begin with; none of them supervised, and each example keeps a row of its own."""
    if len(examples) < 2:
        return 0
    first = examples[0].tokens
    length = min(example.prompt_length for example in examples) - 1
    for example in examples[1:]:
        differs = first[:length] != example.tokens[:length]
        if differs.any():
            length = int(differs.argmax())
    return length if length >= _SHORTEST_PREFIX else 0


def steps_of_row(steps: int, work: float) -> int:
    """How many of a client's steps a row takes that is trained for this share of them, at least one.

    Halves go up: two rows that share the work of one never get less than it, and of few steps more.

    >>> [steps_of_row(steps, 0.5) for steps in (1, 2, 3, 10)]
    [1, 1, 2, 5]
    """
    return max(1, math.floor(work * steps + 0.5))


def batches_in_round(
    client: TokenizedClient, training: TrainingConfig, seed: int, round_: int
) -> list[tuple[int, ...]]:
    """Return the example indices of each local step of `client` in one round of a run with `seed`.

    The order is drawn afresh from the stream `("batches", client.name, round_)`. By steps, a new pass in a new order
    begins where the data runs out, within the batch; a batch never holds one example twice, so a client with fewer
    than `batch_size` examples takes all of them in every step. By epochs, every pass ends with a smaller batch where
    the sizes do not divide.
    """
    rng = generator(training.order_seed(seed), "batches", client.name, round_)
    num_examples, batch_size = len(client.train), training.batch_size
    if training.local_epochs is not None:
        passes = [rng.permutation(num_examples).tolist() for _ in range(training.local_epochs)]
        return [
            tuple(order[start : start + batch_size]) for order in passes for start in range(0, num_examples, batch_size)
        ]
    batches: list[tuple[int, ...]] = []
    queue: list[int] = []
    for _ in range(training.steps_or_default or 0):
        batch: list[int] = []
        while len(batch) < min(batch_size, num_examples):
            fresh = next((index for index in queue if index not in batch), None)
            if fresh is None:
                queue += rng.permutation(num_examples).tolist()
                continue
            batch.append(fresh)
            queue.remove(fresh)
        batches.append(tuple(batch))
    return batches


def _joined(parts: Sequence[np.ndarray]) -> torch.Tensor:
    """One int64 tensor from many arrays; empty from none."""
    return torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *parts]).astype(np.int64))
