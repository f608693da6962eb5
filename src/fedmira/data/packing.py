"""Batches: which examples a client trains on in each step, and many clients' sequences as one run of rows.

A packed batch has no padding: the rows of all sequences of all clients lie behind one another. Its inputs lack every
sequence's last token (the end token): nothing follows it, so its row would be computed for nothing. Knows nothing about
models, losses or optimizers.

Axes: N rows (input tokens of all sequences), M supervised rows, C clients of the batch, T tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch

from fedmira.data.tokenization import TokenizedExample
from fedmira.errors import DataError, UsageError
from fedmira.randomness import generator


class PackedBatch(NamedTuple):
    """Sequences of C clients as rows, sorted by client; the segments follow one another without gaps."""

    tokens_N: torch.Tensor
    """int64; input tokens."""
    positions_N: torch.Tensor
    """int64; 0 at the first row of every sequence."""
    sequence_lengths: tuple[int, ...]
    """Rows of each sequence: its tokens less one."""
    rows_per_client: tuple[int, ...]
    """Length C, zero allowed."""
    supervised_rows_M: torch.Tensor
    """int64, ascending; the rows whose next token is supervised."""
    labels_M: torch.Tensor
    """int64; the next token of each of those rows."""
    supervised_per_client: tuple[int, ...]
    """Length C, zero allowed; sums to M."""


def pack(examples_per_client: Sequence[Sequence[TokenizedExample]]) -> PackedBatch:
    """Pack the examples of C clients.

    Args:
        examples_per_client: for each client its examples, in order; a client may have none.

    >>> example = TokenizedExample(np.array([5, 6, 7, 8], dtype=np.int32), prompt_length=2, id="a")
    >>> batch = pack([[example], []])
    >>> batch.tokens_N.tolist(), batch.supervised_rows_M.tolist(), batch.labels_M.tolist()
    ([5, 6, 7], [1, 2], [7, 8])
    >>> batch.rows_per_client, batch.supervised_per_client
    ((3, 0), (2, 0))
    """
    examples = [example for client in examples_per_client for example in client]
    lengths = [len(example.tokens) - 1 for example in examples]
    starts = [0, *accumulate(lengths)][: len(lengths)]
    tokens = [example.tokens[:-1] for example in examples]
    positions = [np.arange(length) for length in lengths]
    supervised = [
        start + np.arange(example.prompt_length - 1, length)
        for example, start, length in zip(examples, starts, lengths, strict=True)
    ]
    labels = [example.tokens[example.prompt_length :] for example in examples]
    return PackedBatch(
        tokens_N=_joined(tokens),
        positions_N=_joined(positions),
        sequence_lengths=tuple(lengths),
        rows_per_client=tuple(sum(len(e.tokens) - 1 for e in client) for client in examples_per_client),
        supervised_rows_M=_joined(supervised),
        labels_M=_joined(labels),
        supervised_per_client=tuple(
            sum(len(e.tokens) - e.prompt_length for e in client) for client in examples_per_client
        ),
    )


def local_batches(
    num_examples: int,
    batch_size: int,
    steps: int | None,
    epochs: int | None,
    seed: int,
    client_name: str,
    round_: int,
) -> list[tuple[int, ...]]:
    """Return the example indices of each local step of one client in one round.

    The order is drawn afresh from the stream `("batches", client_name, round_)`. With `steps`, a new pass in a new
    order begins where the data runs out, within the batch; a batch never holds one example twice, so a client with
    fewer than `batch_size` examples takes all of them in every step. With `epochs`, every pass ends with a smaller
    batch where the sizes do not divide.

    Raises:
        UsageError: not exactly one of `steps` and `epochs` is given.
        DataError: the client has no examples.
    """
    if (steps is None) == (epochs is None):
        raise UsageError(f"give exactly one of steps and epochs; given: steps = {steps}, epochs = {epochs}.")
    if num_examples < 1:
        raise DataError(f"client {client_name!r} has no training examples. Give it some or remove it.")
    rng = generator(seed, "batches", client_name, round_)
    if epochs is not None:
        passes = [rng.permutation(num_examples).tolist() for _ in range(epochs)]
        return [
            tuple(order[start : start + batch_size]) for order in passes for start in range(0, num_examples, batch_size)
        ]
    batches: list[tuple[int, ...]] = []
    queue: list[int] = []
    for _ in range(steps or 0):
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
