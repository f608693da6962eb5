"""The planted tasks are what they claim: local data is not enough, families conflict, the graph is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedmira.config.data import PartitionConfig, PlantedConfig
from fedmira.data.partition import build_federation
from fedmira.data.sources.planted import codebooks, load, made_up_codes, made_up_words, seen_words
from fedmira.data.splits import SPLITS, content_key
from fedmira.errors import ConfigError
from fedmira.types import Client, Example


def words_of(examples: tuple[Example, ...]) -> set[str]:
    return {word for e in examples for word in e.instruction.removeprefix("encode: ").split()}


def planted(**options: Any) -> PlantedConfig:
    return PlantedConfig(source="planted", **options)


def test_deterministic_by_seed() -> None:
    config = planted()
    assert load(config, 3).examples == load(config, 3).examples
    assert load(config, 3).examples != load(config, 4).examples
    assert build_federation(config, 3).clients == build_federation(config, 3).clients


def test_answers_follow_the_clients_codebook() -> None:
    config = planted()
    books = codebooks(config, 0)
    for client in build_federation(config, 0).clients:
        for e in client.train + client.validation + client.test:
            prompt = e.instruction.removeprefix("encode: ").split()
            assert e.output == " ".join(books[client.name][word] for word in prompt)
            assert len(set(prompt)) == config.words_per_example


@pytest.mark.parametrize("seed", range(3))
def test_training_shows_part_of_the_words_and_the_held_out_examples_ask_for_all(seed: int) -> None:
    config = planted()
    federation = build_federation(config, seed)
    by_family: dict[str, list[Client]] = {}
    for client in federation.clients:
        by_family.setdefault(client.task, []).append(client)
        assert (len(client.train), len(client.validation), len(client.test)) == (24, 6, 10)
        assert len(words_of(client.train)) == 12
        # 10 examples of 2 words ask for nearly all 16, among them words that this client was never shown
        assert len(words_of(client.test)) >= 14
        assert len(words_of(client.test) - words_of(client.train)) >= 2
    for clients in by_family.values():
        assert len(set().union(*(words_of(c.train) for c in clients))) >= 15


def test_three_quarters_of_the_words_are_seen_rounded_up() -> None:
    assert [len(seen_words(made_up_words(0, count), 0, "a")) for count in (8, 9, 10)] == [6, 7, 8]


def test_every_word_is_tested_where_there_are_examples_enough() -> None:
    config = planted(examples=64)
    for client in build_federation(config, 0).clients:
        assert words_of(client.test) == set(made_up_words(0, config.words))


def test_no_prompt_is_in_two_splits_at_any_client() -> None:
    splits: dict[str, set[str]] = {}
    for client in build_federation(planted(), 0).clients:
        for split in SPLITS:
            for e in getattr(client, split):
                splits.setdefault(content_key(e), set()).add(split)
    assert all(len(found) == 1 for found in splits.values())


def test_families_agree_as_much_as_asked_and_contradict_each_other() -> None:
    config = planted(words=40, codes=10, shared=0.9)
    books = codebooks(config, 0)
    words = made_up_words(0, 40)

    def agreement(one: str, two: str) -> float:
        return float(np.mean([books[one][word] == books[two][word] for word in words]))

    # each member redraws 4 of 40 entries, so two members differ in 4 to 8
    assert 0.8 <= agreement("family-0-client-0", "family-0-client-1") <= 0.9
    assert agreement("family-0-client-0", "family-1-client-0") < 0.4


@pytest.mark.parametrize(("shared", "kept"), [(1.0, 16), (0.5, 8), (0.0, 0)])
def test_a_member_keeps_exactly_the_shared_entries(shared: float, kept: int) -> None:
    family = codebooks(planted(shared=1.0), 0)["family-0-client-0"]
    member = codebooks(planted(shared=shared), 0)["family-0-client-0"]
    assert sum(member[word] == family[word] for word in family) == kept


def test_frequency_gives_nothing_away() -> None:
    book = codebooks(planted(shared=1.0, words=24, codes=12), 0)["family-0-client-0"]
    assert sorted(book.values()) == sorted(made_up_codes(0, 12) * 2)


def test_more_clients_and_families_change_nothing_for_the_others() -> None:
    small = {c.name: c for c in build_federation(planted(families=2, clients_per_family=2), 0).clients}
    large = {c.name: c for c in build_federation(planted(families=5, clients_per_family=7), 0).clients}
    assert len(small) == 4
    assert {name: large[name] for name in small} == small


def test_the_true_graph_joins_the_families() -> None:
    federation = build_federation(planted(families=2, clients_per_family=3), 0)
    assert federation.names == tuple(f"family-{f}-client-{m}" for f in range(2) for m in range(3))
    block = np.ones((3, 3)) - np.eye(3)
    expected = np.block([[block, np.zeros((3, 3))], [np.zeros((3, 3)), block]])
    assert federation.true_adjacency_KK is not None
    assert federation.true_adjacency_KK.dtype == np.float64
    np.testing.assert_array_equal(federation.true_adjacency_KK, expected)
    assert {c.task for c in federation.clients} == {"family-0", "family-1"} == {c.category for c in federation.clients}
    assert 0.7 < federation.provenance["agreement_within_families"] <= 1.0
    assert federation.provenance["agreement_across_families"] < 0.3


@pytest.mark.parametrize("count", [2, 69, 70, 71, 300])
def test_codes_and_words_are_different(count: int) -> None:
    assert len(set(made_up_codes(0, count))) == count
    assert len(set(made_up_words(0, count))) == count


def test_the_cap_limits_the_examples_made() -> None:
    config = planted(partition=PartitionConfig(by="field", examples_per_client=20))
    client = build_federation(config, 0).clients[0]
    assert len(client.train) + len(client.validation) + len(client.test) == 20


def test_caps_in_turn_make_clients_of_unequal_size_each_split_as_any() -> None:
    config = planted(partition=PartitionConfig(by="field", examples_per_client=(40, 20), validation=0.15, test=0.25))
    sizes = [(len(c.train), len(c.validation), len(c.test)) for c in build_federation(config, 0).clients]
    assert sizes[:3] == [(24, 6, 10), (12, 3, 5), (24, 6, 10)]


def test_one_family_of_one_client_has_no_pairs_to_compare() -> None:
    federation = build_federation(planted(families=1, clients_per_family=1), 0)
    assert federation.provenance["agreement_within_families"] is None
    assert federation.provenance["agreement_across_families"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"words_per_example": 1}, r"words_per_example = 1.*allowed: 2 to 12"),
        ({"words": 4, "words_per_example": 4}, r"words_per_example = 4.*data\.words = 4.*allowed: 2 to 3"),
        ({"words": 4, "examples": 400}, r"too few different prompts: client 'family-0-client-0'"),
        ({"partition": PartitionConfig(by="task")}, r"partition\.by = task does not go with.*Set .* to field"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(planted(**options), 0)
