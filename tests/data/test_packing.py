"""Packing loses nothing, and local batches are fair, fresh every round and independent of other clients."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmira.config.training import TrainingConfig
from fedmira.data.packing import PackedBatch, batches_in_round, num_rows, pack
from fedmira.data.tokenization import TokenizedClient, TokenizedExample
from fedmira.types import Client


@st.composite
def examples(draw: st.DrawFn) -> TokenizedExample:
    common = draw(st.sampled_from([0, 0, 7, 20]))
    tokens = [5] * common + draw(st.lists(st.integers(0, 99), min_size=2, max_size=12))
    return TokenizedExample(np.array(tokens, dtype=np.int32), draw(st.integers(1, len(tokens) - 1)), "e")


def unpack(batch: PackedBatch) -> list[tuple[list[int], int]]:
    """Slow twin of `pack`, backwards: the tokens and the prompt length of every sequence."""
    labels = dict(zip(batch.supervised_rows_M.tolist(), batch.labels_M.tolist(), strict=True))
    sequences, row = [], 0
    for length, prefix in zip(batch.sequence_lengths, batch.prefixes, strict=True):
        own = range(row, row + length)
        rows = [*range(prefix.start, prefix.start + prefix.length), *own]
        assert [int(batch.positions_N[r]) for r in rows] == list(range(len(rows)))
        supervised = [r for r in own if r in labels]
        assert supervised == list(range(own.stop - len(supervised), own.stop))
        # where a row and the one before it are supervised, the label before is this row's token
        assert all(labels[r - 1] == int(batch.tokens_N[r]) for r in supervised[1:])
        tokens = [int(batch.tokens_N[r]) for r in rows] + [labels[own.stop - 1]]
        sequences.append((tokens, len(tokens) - len(supervised)))
        row += length
    assert row == len(batch.tokens_N)
    return sequences


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(examples(), max_size=4), max_size=5))
def test_packing_round_trips(clients: list[list[TokenizedExample]]) -> None:
    batch = pack(clients)
    assert unpack(batch) == [(e.tokens.tolist(), e.prompt_length) for client in clients for e in client]
    assert tuple(map(num_rows, clients)) == batch.rows_per_client
    tokens = tuple(sum(len(e.tokens) - 1 for e in client) for client in clients)
    assert batch.tokens_per_client == pack(clients, share_prefixes=False).rows_per_client == tokens
    assert len(batch.tokens_N) + sum(prefix.length for prefix in batch.prefixes) == sum(tokens)
    assert sum(batch.supervised_per_client) == len(batch.labels_M) == len(batch.supervised_rows_M)
    # rows and supervised rows are sorted by client
    bounds = np.cumsum([0, *batch.rows_per_client])
    owners = np.searchsorted(bounds, batch.supervised_rows_M.numpy(), side="right") - 1
    counts = Counter(owners.tolist())
    assert batch.supervised_per_client == tuple(counts[c] for c in range(len(clients)))
    for tensor in (batch.tokens_N, batch.positions_N, batch.supervised_rows_M, batch.labels_M):
        assert tensor.dtype == torch.int64


def test_what_a_clients_examples_begin_with_is_there_once() -> None:
    def example(*tail: int, prompt_length: int = 12) -> TokenizedExample:
        return TokenizedExample(np.array([*range(10), *tail], dtype=np.int32), prompt_length, "e")

    clients = [[example(20, 21, 22), example(20, 31, 32, 33)], [example(20, 21, 22)]]
    batch = pack(clients)
    # the eleventh token is common too
    assert batch.prefixes == ((0, 0), (0, 11), (14, 0))
    assert batch.sequence_lengths == (12, 2, 12)
    assert batch.rows_per_client == (14, 12)
    # a row that predicts a supervised token is never shared, however alike the answers are
    early = [example(20, 21, prompt_length=9), example(20, 21, prompt_length=9)]
    assert pack([early]).prefixes == ((0, 0), (0, 8))
    assert pack([[example(20, prompt_length=5)] * 2]).prefixes == ((0, 0), (0, 0))


def test_nothing_packs_to_nothing() -> None:
    batch = pack([[], []])
    assert batch.tokens_N.shape == batch.labels_M.shape == (0,)
    assert batch.rows_per_client == batch.supervised_per_client == (0, 0)


sizes = st.integers(1, 20)


def drawn(num_examples: int, seed: int = 0, name: str = "c", round_: int = 1, **work: int) -> list[tuple[int, ...]]:
    one = TokenizedExample(np.array([1, 2], dtype=np.int32), 1, "e")
    client = TokenizedClient(name, (one,) * num_examples, (), (), Client(name, (), (), ()))
    return batches_in_round(client, TrainingConfig(**work), seed, round_)


@settings(max_examples=100, deadline=None)
@given(sizes, sizes, st.integers(1, 12), st.integers(0, 3))
def test_steps_use_examples_equally_often_and_never_twice_in_a_batch(
    num_examples: int, batch_size: int, steps: int, seed: int
) -> None:
    batches = drawn(num_examples, seed, batch_size=batch_size, local_steps=steps)
    assert len(batches) == steps
    for batch in batches:
        assert len(batch) == min(batch_size, num_examples)
        assert len(set(batch)) == len(batch)
    uses = Counter(index for batch in batches for index in batch)
    counts = [uses[index] for index in range(num_examples)]
    assert sum(uses.values()) == sum(counts)
    assert max(counts) - min(counts) <= 1


@settings(max_examples=60, deadline=None)
@given(sizes, sizes, st.integers(1, 4))
def test_an_epoch_is_one_pass(num_examples: int, batch_size: int, epochs: int) -> None:
    batches = drawn(num_examples, batch_size=batch_size, local_epochs=epochs)
    per_epoch = -(-num_examples // batch_size)
    assert len(batches) == epochs * per_epoch
    for start in range(0, len(batches), per_epoch):
        one_pass = [index for batch in batches[start : start + per_epoch] for index in batch]
        assert sorted(one_pass) == list(range(num_examples))
        assert all(len(batch) == batch_size for batch in batches[start : start + per_epoch - 1])


def test_rounds_clients_and_seeds_have_orders_of_their_own() -> None:
    def order(seed: int = 0, client: str = "c", round_: int = 1) -> list[tuple[int, ...]]:
        return drawn(30, seed, client, round_, batch_size=5, local_steps=6)

    assert order() == order()
    assert order() != order(round_=2)
    assert order() != order(client="d")
    assert order() != order(seed=1)


def test_fewer_steps_are_the_beginning_of_more() -> None:
    assert drawn(7, batch_size=3, local_steps=10)[:4] == drawn(7, batch_size=3, local_steps=4)
