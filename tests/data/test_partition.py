"""A partition is a partition, no text is in two splits, and nobody's examples depend on who else takes part."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmira.config.data import PartitionConfig
from fedmira.data.partition import check_names, partition
from fedmira.data.sources.source import Source
from fedmira.data.splits import SPLITS, content_key, split_sizes
from fedmira.errors import DataError
from fedmira.types import Client, Example, Federation

REFUSED = r"cannot be used( because of .* \(U\+[0-9A-F]{4,5}\)|, as .*)?\. Allowed:"


def example(number: int, task: str = "t", client: str = "", prompt: str | None = None) -> Example:
    text = f"question {task} {client} {number}" if prompt is None else prompt
    return Example(instruction=text, output=str(number), task=task, client=client, id=f"{task}/{client}/{number}")


def build(examples: Iterable[Example], seed: int = 0, **settings_: Any) -> Federation:
    return partition(Source(tuple(examples), {}), PartitionConfig(**settings_), seed)


def held(client: Client) -> list[Example]:
    return [*client.train, *client.validation, *client.test]


def split_ids(client: Client) -> dict[str, list[str]]:
    return {split: [e.id for e in getattr(client, split)] for split in SPLITS}


def assert_no_text_in_two_splits(clients: Sequence[Client]) -> None:
    splits: dict[str, set[str]] = {}
    for client in clients:
        for split in SPLITS:
            for e in getattr(client, split):
                splits.setdefault(content_key(e), set()).add(split)
    assert all(len(found) == 1 for found in splits.values())


prompts = st.lists(st.integers(0, 40), min_size=30, max_size=80)


@settings(max_examples=40, deadline=None)
@given(prompts, st.integers(0, 5), st.sampled_from(["task", "field", "iid", "dirichlet"]))
def test_every_example_is_held_once_and_no_text_is_in_two_splits(numbers: list[int], seed: int, by: str) -> None:
    distinct = [*range(100, 112), *numbers]  # enough different texts for every client, and duplicates as they come
    examples = [
        Example(instruction=f"q{n}", output=f"{i}", task=f"t{i % 2}", client=f"c{i % 2}", id=str(i))
        for i, n in enumerate(distinct)
    ]
    options: dict[str, Any] = {"num_clients": 2, "alpha": 1.0} if by == "dirichlet" else {}
    options |= {"num_clients": 3} if by == "iid" else {}
    federation = build(examples, seed, by=by, **options)
    assert Counter(e.id for c in federation.clients for e in held(c)) == Counter(e.id for e in examples)
    assert_no_text_in_two_splits(federation.clients)
    for client in federation.clients:
        assert client.train
        assert client.validation
        assert client.test


def test_sizes_follow_the_shares() -> None:
    federation = build((example(i) for i in range(80)), clients_per_task=2, validation=0.15, test=0.25)
    assert [(len(c.train), len(c.validation), len(c.test)) for c in federation.clients] == [(24, 6, 10)] * 2
    assert federation.names == ("t-0", "t-1")


def test_sizes_count_examples_however_many_have_one_text() -> None:
    [client] = build(example(i, prompt=f"question {i % 20}") for i in range(40)).clients
    assert (len(client.train), len(client.validation), len(client.test)) == (24, 6, 10)


def test_sizes_are_rounded_half_up() -> None:
    assert list(split_sizes(10, PartitionConfig(validation=0.15, test=0.25)).values()) == [5, 2, 3]


def test_the_same_seed_gives_the_same_splits_and_another_seed_others() -> None:
    examples = [example(i) for i in range(60)]
    first, again, other = (build(examples, seed) for seed in (0, 0, 1))
    assert first.clients == again.clients
    assert split_ids(first.clients[0])["test"] != split_ids(other.clients[0])["test"]


@pytest.mark.parametrize(
    "options", [{"by": "task"}, {"by": "task", "clients_per_task": 2}, {"by": "field", "examples_per_client": 12}]
)
def test_another_task_or_client_leaves_the_others_as_they_are(options: dict[str, Any]) -> None:
    few = [example(i, task, client=task) for task in ("b", "c") for i in range(30)]
    more = [example(i, "a", client="a") for i in range(30)] + few + [example(i, "d", client="d") for i in range(30)]
    before = {c.name: c for c in build(few, **options).clients}
    after = {c.name: c for c in build(more, **options).clients}
    assert len(after) == 2 * len(before)
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize("options", [{"by": "task"}, {"by": "iid"}, {"by": "dirichlet", "alpha": 0.5}])
def test_another_client_leaves_capped_clients_as_they_are(options: dict[str, Any]) -> None:
    examples = [example(i, task) for task in ("a", "b", "c") for i in range(100)]
    option = "clients_per_task" if options["by"] == "task" else "num_clients"
    before = build(examples, examples_per_client=20, **options, **{option: 3})
    after = build(examples, examples_per_client=20, **options, **{option: 4})
    by_name = {c.name: c for c in after.clients}
    assert len(after.clients) > len(before.clients)
    assert all(by_name[c.name] == c for c in before.clients)


def test_known_clients_come_first_and_keep_the_split_of_every_text() -> None:
    few = [example(i, client=c) for c in ("b", "c") for i in range(30)]
    # a has all the texts of b and some of its own
    more = [*(example(i, client="a", prompt=e.instruction) for i, e in enumerate(few[:30])), *few]
    more += [example(i, client="a") for i in range(30)]
    before = build(few, by="field")
    unknowing, knowing = (
        partition(Source(tuple(more), {}), PartitionConfig(by="field"), 0, known) for known in ((), ("b", "c"))
    )
    assert unknowing.names == ("a", "b", "c")
    assert unknowing.clients[1] != before.clients[0]
    assert knowing.names == ("b", "c", "a")
    assert knowing.clients[:2] == before.clients
    assert_no_text_in_two_splits(knowing.clients)


def test_the_order_of_the_records_does_not_matter() -> None:
    examples = [example(i) for i in range(50)]
    assert build(examples, clients_per_task=2).clients == build(examples[::-1], clients_per_task=2).clients


def test_the_same_text_at_two_clients_is_in_the_same_split() -> None:
    shared = [f"shared {i}" for i in range(20)]
    examples = [example(i, client=c, prompt=p) for c in ("a", "b") for i, p in enumerate(shared)]
    examples += [example(i, client=c) for c in ("a", "b") for i in range(20)]
    federation = build(examples, by="field")
    assert_no_text_in_two_splits(federation.clients)
    assert [len(held(c)) for c in federation.clients] == [40, 40]


def test_duplicates_with_other_case_spacing_or_answer_stay_together() -> None:
    # the other one has a wide letter
    pairs = [(f"Say {i}", f"\uff53ay  {i} ") for i in range(20)]
    examples = [Example(instruction=p, output=str(k), task="t", id=p) for pair in pairs for k, p in enumerate(pair)]
    [client] = build(examples).clients
    for split in SPLITS:
        counts = Counter(e.instruction.lower().split()[1] for e in getattr(client, split))
        assert set(counts.values()) == {2}


def test_the_input_and_earlier_turns_make_another_text() -> None:
    asked = {"instruction": "q", "output": "a"}
    turns = (("user", "hello"), ("assistant", "hi"))
    texts = [Example(**asked), Example(**asked, input="i"), Example(**asked, turns=turns)]
    assert len({content_key(text) for text in texts}) == 3


def test_a_cap_is_kept_and_what_is_left_out_is_counted() -> None:
    federation = build((example(i) for i in range(100)), clients_per_task=2, examples_per_client=12)
    assert [len(held(c)) for c in federation.clients] == [12, 12]
    assert federation.provenance["partition"]["examples_left_out"] == 76


def test_clients_take_caps_in_turn_also_where_later_ones_join() -> None:
    few = [example(i, task) for task in ("b", "d") for i in range(50)]
    before = build(few, clients_per_task=2, examples_per_client=(24, 12, 6))
    assert [(c.name, len(held(c))) for c in before.clients] == [("b-0", 24), ("b-1", 12), ("d-0", 6), ("d-1", 24)]
    more = [*few, *(example(i, "a") for i in range(50))]
    config = PartitionConfig(clients_per_task=2, examples_per_client=(24, 12, 6))
    after = partition(Source(tuple(more), {}), config, 0, known=before.names)
    assert after.clients[:4] == before.clients
    assert [(c.name, len(held(c))) for c in after.clients[4:]] == [("a-0", 12), ("a-1", 6)]


@pytest.mark.parametrize("options", [{"clients_per_task": 3}, {"by": "iid", "num_clients": 3}])
def test_caps_that_fit_together_are_reached_in_any_order(options: dict[str, Any]) -> None:
    for caps in ((16, 8, 4), (4, 8, 16), (8, 16, 4)):
        for count, sizes in ((28, caps), (40, caps)):
            federation = build([example(i, "t") for i in range(count)], examples_per_client=caps, **options)
            assert tuple(len(held(c)) for c in federation.clients) == sizes
            assert federation.provenance["partition"]["examples_left_out"] == count - 28


def test_a_cap_cuts_a_large_group_of_duplicates() -> None:
    examples = [example(i, prompt="the same") for i in range(50)] + [example(i) for i in range(20)]
    federation = build(examples, examples_per_client=20)
    assert len(held(federation.clients[0])) == 20
    assert_no_text_in_two_splits(federation.clients)


@pytest.mark.parametrize("seed", range(4))
def test_a_group_that_is_cut_leaves_no_room_unused(seed: int) -> None:
    examples = [example(i, prompt="the same") for i in range(50)] + [example(i) for i in range(2)]
    [client] = build(examples, seed, examples_per_client=12).clients
    assert len(held(client)) == 12


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("cap", [None, 20])
def test_one_large_group_of_duplicates_leaves_every_split_something(seed: int, cap: int | None) -> None:
    examples = [example(i, prompt="the same") for i in range(30)] + [example(i) for i in range(8)]
    federation = build(examples, seed, by="iid", num_clients=3, examples_per_client=cap)
    assert_no_text_in_two_splits(federation.clients)
    for client in federation.clients:
        assert client.train
        assert client.validation
        assert client.test
        assert cap is None or len(held(client)) <= cap


def test_small_alpha_means_one_label_and_large_alpha_means_all() -> None:
    examples = [example(i, task) for task in "abcd" for i in range(200)]

    def largest_share(alpha: float) -> float:
        clients = build(examples, by="dirichlet", num_clients=8, alpha=alpha, examples_per_client=20).clients
        counts = [Counter(e.task for e in held(c)) for c in clients]
        return sum(max(count.values()) for count in counts) / sum(sum(count.values()) for count in counts)

    assert largest_share(0.001) > 0.95
    assert largest_share(1000.0) < 0.5


def test_each_client_draws_its_own_shares_and_its_own_examples() -> None:
    examples = [example(i, task) for task in "abcd" for i in range(200)]

    def counts(alpha: float) -> list[Counter[str]]:
        clients = build(examples, by="dirichlet", num_clients=8, alpha=alpha, examples_per_client=20).clients
        return [Counter(e.task for e in held(client)) for client in clients]

    # nearly all of one label, which is not the same for all
    assert {count.most_common(1)[0][0] for count in counts(0.001)} == set("abcd")
    # labels are as likely as each other, and yet fall otherwise for each
    assert len({tuple(sorted(count.items())) for count in counts(1e6)}) > 4


def test_a_client_has_a_task_only_if_all_its_examples_do() -> None:
    examples = [example(i, "x", client="one") for i in range(9)] + [example(i, "xy"[i % 2], "two") for i in range(9)]
    assert [c.task for c in build(examples, by="field").clients] == ["x", ""]


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "name",
    [
        "../evil",
        "a/b",
        "a\\b",
        "/etc/passwd",
        "",
        ".hidden",
        "..",
        "nul\0",
        "x" * 101,
        "tab\t",
        " a",
        "a ",
        "no\u00a0break",
        "zero\u200bwidth",
        "joined\u200d",
        "un\u202edone",
        "line\u2028",
        "filled\u3164",
        "varied\ufe0f",
        "\u0308a",
        "2\u00b2",
        "\U0001f600",
        "con",
        "Aux.txt",
        "\u533b" * 67,
    ],
)
def test_unsafe_client_names_are_refused_by_name(name: str) -> None:
    examples = [example(i, client="fine") for i in range(9)] + [example(i, client=name) for i in range(9)]
    if name:
        with pytest.raises(DataError, match=REFUSED) as caught:
            build(examples, by="field")
        assert repr(name)[1:40] in str(caught.value)
    else:
        with pytest.raises(DataError, match=r"9 of 18 examples name no client"):
            build(examples, by="field")


def test_a_run_that_goes_on_keeps_names_that_windows_takes_for_devices() -> None:
    examples = [example(i, client=name) for name in ("aux", "fine") for i in range(9)]
    federation = partition(Source(tuple(examples), {}), PartitionConfig(by="field"), 0, known=("aux",))
    assert federation.names == ("aux", "fine")
    with pytest.raises(DataError, match="'con' cannot be used, as Windows takes it for a device"):
        check_names(["aux", "con"], known=["aux"])


def test_names_that_differ_in_case_only_are_refused() -> None:
    with pytest.raises(DataError, match="'Ward' and 'ward'"):
        check_names(["Ward", "other", "ward"])
    with pytest.raises(DataError, match="'a-1' and 'a-1'"):
        check_names(["a-1", "a-1"])
    for one, other in (("S\u00fcd", "Su\u0308d"), ("S\u00fcd", "S\u00dcD"), ("stra\u00dfe", "STRASSE")):
        with pytest.raises(DataError, match="differ by more than case and the way accents are encoded"):
            check_names([one, other])


@pytest.mark.parametrize("by", ["task", "field"])
def test_names_are_kept_in_one_unicode_form(by: str) -> None:
    examples = [example(i, "Su\u0308d", client="S\u00fcd") for i in range(9)]
    assert build(examples, by=by).names == ("S\u00fcd",)


def test_safe_names_pass() -> None:
    check_names(["task033_winogrande", "Ward 7", "a.b-c_d", "x" * 100, "-", "_", "console", "com10"])
    check_names(
        ["Radiologie S\u00fcd", "Chirurgie \u2013 West", "\u5916\u79d1", "\u0915\u093f\u0924\u093e\u092c \u0967"]
    )


def test_a_client_with_too_few_texts_is_named() -> None:
    examples = [example(i, "big") for i in range(20)] + [example(i, "small", prompt="same") for i in range(5)]
    with pytest.raises(DataError, match=r"client 'small' has no example left for train.*5 examples with 1 different"):
        build(examples)


def test_more_clients_than_texts_names_the_empty_one() -> None:
    with pytest.raises(DataError, match=r"client 'client-00\d'"):
        build((example(i) for i in range(10)), by="iid", num_clients=30)


def test_all_clients_that_are_refused_are_named_at_once() -> None:
    few = [example(i, f"small-{k}") for k in range(14) for i in range(100 * k, 100 * k + 1 + (k == 3))]
    examples = [example(i, "big") for i in range(5000, 5020)] + few
    with pytest.raises(DataError, match=r"client 'small-0' has .* The same goes for 'small-1', .* and 3 more\."):
        build(examples)
    with pytest.raises(DataError, match=r"'a\*' cannot be used because of '\*'.* The same goes for 'b/', 'A-1'\."):
        check_names(["a*", "a-1", "b/", "A-1"])


@pytest.mark.parametrize(
    ("count", "advice"),
    [
        (2, "remove it, or set data.partition.validation to 0."),
        (1, "remove it, or set data.partition.validation and test to 0 and evaluation.test to false."),
    ],
)
def test_what_is_advised_for_a_small_client_helps(count: int, advice: str) -> None:
    examples = [example(i, "big") for i in range(20)] + [example(50 + i, "small") for i in range(count)]
    with pytest.raises(DataError, match=re.escape(advice)):
        build(examples)
    build(examples, validation=0, **({} if count == 2 else {"test": 0}))


def test_a_cap_that_is_too_small_is_named() -> None:
    with pytest.raises(DataError, match=r"examples_per_client allows it 2 examples"):
        build((example(i) for i in range(10)), examples_per_client=2)
    with pytest.raises(DataError, match=r"client 't-1'.*examples_per_client allows it 2 examples"):
        build((example(i) for i in range(20)), clients_per_task=2, examples_per_client=(9, 2))
    with pytest.raises(ValueError, match=r"examples_per_client is an empty list; give it a number for each size"):
        PartitionConfig(examples_per_client=())


def test_nothing_is_held_out_where_nothing_is_asked_for() -> None:
    [client] = build((example(i) for i in range(10)), test=0.0).clients
    assert client.test == ()
    [client] = build((example(i) for i in range(10)), test=0.0, validation=0.0).clients
    assert len(client.train) == 10


def test_no_validation_is_possible() -> None:
    [client] = build((example(i) for i in range(10)), validation=0.0).clients
    assert client.validation == ()
    assert len(client.train) + len(client.test) == 10


def test_missing_labels_say_which_field_to_set() -> None:
    unlabelled = [example(i, task="") for i in range(10)]
    with pytest.raises(DataError, match=r"10 of 10 examples name no task.*data\.task_field"):
        build(unlabelled)
    with pytest.raises(DataError, match=r"no label.*data\.task_field"):
        build(unlabelled, by="dirichlet", num_clients=2)


def test_no_examples_at_all() -> None:
    with pytest.raises(DataError, match="no examples"):
        build([])
