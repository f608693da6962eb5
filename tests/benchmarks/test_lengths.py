"""The lengths that every workload takes from real data."""

from __future__ import annotations

import pytest
from benchmarks.lengths import make_clients, read_lengths
from benchmarks.measure_lengths import LONGEST, common_length, measure
from benchmarks.padding import padding_factor

from fedmira.data.prompts import ALPACA_WITH_INPUT
from fedmira.types import Example


@pytest.mark.parametrize("name", ["dolly", "natural_instructions"])
def test_lengths_are_those_of_a_few_hundred_examples_that_fit(name: str) -> None:
    lengths = read_lengths(name)
    assert len(lengths) == 8
    assert all(len(examples) == 40 for examples in lengths.values())
    for parts in (one for examples in lengths.values() for one in examples):
        assert parts.own >= 1
        assert parts.answer >= 2, "at least one token and the end token"
        assert sum(parts) <= LONGEST


@pytest.mark.parametrize(("name", "least"), [("dolly", 10), ("natural_instructions", 45)])
def test_the_examples_of_a_task_share_a_beginning(name: str, least: int) -> None:
    for examples in read_lengths(name).values():
        assert len({parts.shared for parts in examples}) == 1
        assert examples[0].shared >= least, "the words that the template's two forms, or one of them, begin with"


def test_clients_hold_what_the_lengths_say() -> None:
    [lengths] = [examples for task, examples in read_lengths("natural_instructions").items() if "paws" in task]
    clients = make_clients("natural_instructions", 8, vocabulary=50, longest=1024)
    [client] = [one for one in clients if "paws" in one.examples.task]
    assert [len(example.tokens) for example in client.train] == [sum(parts) for parts in lengths]
    assert [example.prompt_length for example in client.train] == [parts.shared + parts.own for parts in lengths]
    shared = lengths[0].shared
    assert len({tuple(example.tokens[:shared]) for example in client.train}) == 1, "the definition is the same"
    assert len({tuple(example.tokens[: shared + 4]) for example in client.train}) > 30
    assert all(example.tokens.min() >= 3 and example.tokens.max() < 50 for example in client.train)


def test_lengths_shrink_and_long_examples_are_left_out() -> None:
    full = make_clients("dolly", 1, vocabulary=50, longest=1024)[0]
    small = make_clients("dolly", 1, vocabulary=50, longest=1024, shrink=8)[0]
    few = make_clients("dolly", 1, vocabulary=50, longest=60)[0]
    assert len(small.train) == len(full.train)
    assert all(len(s.tokens) < len(f.tokens) / 4 for s, f in zip(small.train, full.train, strict=True))
    assert 0 < len(few.train) < len(full.train)
    assert max(len(example.tokens) for example in few.train) <= 60


def test_measuring_counts_characters_of_the_template() -> None:
    examples = tuple(Example("Add one.", "4" * 44, chr(64 + index), task="t") for index in range(1, 81))
    [(task, lengths)] = measure("test", examples).items()
    assert task == "t"
    assert len(lengths) == 40
    assert {answer for _, _, answer in lengths} == {11}, "44 characters and the end token"
    [shared] = {shared for shared, _, _ in lengths}
    before_input = ALPACA_WITH_INPUT.format(instruction="Add one.", input="|").index("|")
    assert shared == round(before_input / 4.4)


def test_common_length() -> None:
    assert common_length(["abcd", "abx", "abcdef"]) == 2
    assert common_length(["same", "same"]) == 4


def test_padding_factor_counts_positions_over_tokens() -> None:
    clients = make_clients("dolly", 2, vocabulary=50, longest=1024)
    batches = [list(client.train[:3]) for client in clients]
    lengths = [[len(example.tokens) for example in batch] for batch in batches]
    expected = sum(3 * max(batch) for batch in lengths) / sum(sum(batch) for batch in lengths)
    assert padding_factor(batches) == pytest.approx(expected)
