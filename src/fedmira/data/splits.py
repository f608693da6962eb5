"""Which texts are the same, and how one client's texts are split into train, validation and test.

The unit is the content group: all examples with the same prompt after normalisation, whatever their answers. A group
never falls into two splits. Knows nothing about where examples come from or which client gets what.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import NamedTuple

from fedmira.config.data import PartitionConfig
from fedmira.errors import DataError
from fedmira.randomness import stream_seed
from fedmira.types import Example

SPLITS = ("train", "validation", "test")


class Group(NamedTuple):
    """Examples that must stay together because their prompts are the same text."""

    key: str
    """`content_key` of each of them."""
    examples: tuple[Example, ...]


def content_key(example: Example) -> str:
    """Return the hash of the example's prompt text, blind to case, white space and Unicode form; not to its answer.

    >>> one = Example(instruction="Name the capital.", input="France", output="Paris")
    >>> two = Example(instruction="name  the capital. FRANCE", output="Lyon")
    >>> content_key(one) == content_key(two)
    True
    """
    turns = (text for turn in example.turns for text in turn)
    text = "\n".join((*turns, example.instruction, example.input))
    normalised = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return hashlib.blake2b(normalised.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def named_splits(examples: Iterable[Example], splits: Iterable[str]) -> tuple[dict[str, str], frozenset[Example]]:
    """Return the split of each content key for which one of its examples names it, and the examples that do.

    Args:
        examples: of all clients.
        splits: what each names, or an empty string.

    Raises:
        DataError: one prompt is said to be in two splits.
    """
    named: dict[str, tuple[str, str]] = {}
    namers = set()
    for example, split in zip(examples, splits, strict=True):
        if not split:
            continue
        namers.add(example)
        first, there = named.setdefault(content_key(example), (example.id, split))
        if there != split:
            raise DataError(
                f"the records {first} and {example.id} have the same prompt, but one says that it is in {there}, the "
                f"other in {split}; one prompt never falls into two splits. Correct or remove one of them, or leave "
                "data.split_field out to have all splits drawn."
            )
    return {key: split for key, (_, split) in named.items()}, frozenset(namers)


def grouped(examples: Iterable[Example]) -> list[Group]:
    """Group examples by content key, in order of first appearance."""
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(content_key(example), []).append(example)
    return [Group(key, tuple(members)) for key, members in groups.items()]


def shuffled(groups: Iterable[Group], seed: int, *purpose: str | int) -> list[Group]:
    """Order groups by a hash of their content: the order of two groups depends on no third one."""
    return sorted(groups, key=lambda group: (stream_seed(seed, *purpose, group.key), group.key))


def split_sizes(num_examples: int, partition: PartitionConfig) -> dict[str, int]:
    """Return how many of a client's examples go into each split: what is closest to the shares, at least one where a
    share is positive.

    >>> split_sizes(40, PartitionConfig(validation=0.15, test=0.25))
    {'train': 24, 'validation': 6, 'test': 10}
    """
    test = max(1, int(num_examples * partition.test + 0.5)) if partition.test else 0
    validation = max(1, int(num_examples * partition.validation + 0.5)) if partition.validation else 0
    return {"train": num_examples - validation - test, "validation": validation, "test": test}


def needed_splits(partition: PartitionConfig) -> tuple[str, ...]:
    """Return the splits that must not be empty at any client."""
    wanted = (True, partition.validation > 0, partition.test > 0)
    return tuple(split for split, there in zip(SPLITS, wanted, strict=True) if there)


def split_client(
    name: str,
    groups: Sequence[Group],
    partition: PartitionConfig,
    seed: int,
    placed: MutableMapping[str, str],
) -> dict[str, tuple[Example, ...]]:
    """Split one client's groups; a group that another client or the source has placed keeps its split.

    Args:
        name: the client's, for its random stream and for messages.
        groups: its content groups.
        partition: the shares.
        seed: of the partition.
        placed: content key to split of the groups placed so far, in the whole federation. This client's groups are
            added to it, so that a text tested at one client is never trained on at another.

    Raises:
        DataError: a split that must not be empty is.
    """
    wanted = split_sizes(_num_examples(groups), partition)
    chosen: dict[str, list[Group]] = {split: [] for split in SPLITS}
    free: list[Group] = []
    num_placed = sum(group.key in placed for group in groups)
    for group in shuffled(groups, seed, "partition", "split", name):
        if group.key in placed:
            chosen[placed[group.key]].append(group)
        else:
            free.append(group)
    for split, later in (("test", ("validation", "train")), ("validation", ("train",))):
        if not wanted[split]:
            continue
        # every later split that is still empty must find a group, however few and however large the groups are
        spare = len(free) - sum(bool(wanted[other] and not chosen[other]) for other in later)
        missing = wanted[split] - _num_examples(chosen[split])
        rest = []
        for group in free:
            if spare > 0 and len(group.examples) <= missing:
                chosen[split].append(group)
                missing -= len(group.examples)
                spare -= 1
            else:
                rest.append(group)
        free = rest
        if free and not chosen[split]:
            smallest = min(free, key=lambda group: len(group.examples))
            chosen[split].append(smallest)
            free.remove(smallest)
    chosen["train"].extend(free)
    _refuse_empty(name, groups, chosen, partition, num_placed)
    for split, members in chosen.items():
        for group in members:
            placed.setdefault(group.key, split)
    return {split: tuple(e for group in chosen[split] for e in group.examples) for split in SPLITS}


def _num_examples(groups: Iterable[Group]) -> int:
    return sum(len(group.examples) for group in groups)


def _refuse_empty(
    name: str,
    groups: Sequence[Group],
    chosen: Mapping[str, Sequence[Group]],
    partition: PartitionConfig,
    num_placed: int,
) -> None:
    needed = needed_splits(partition)
    empty = [split for split in needed if not chosen[split]]
    if not empty:
        return
    if not groups:
        raise DataError(
            f"client {name!r} has no examples; every client needs at least {len(needed)}. "
            "Give it examples, ask for fewer clients, or remove it from the data."
        )
    instead = " or remove it"
    for without, how in (
        ({"validation"}, "data.partition.validation to 0"),
        ({"validation", "test"}, "data.partition.validation and test to 0 and evaluation.test to false"),
    ):
        left = set(needed) - without
        # what the data has placed stays where it is, however few splits are needed
        helps = set(empty) <= without if num_placed else len(groups) >= len(left)
        if left < set(needed) and helps:
            instead = f", remove it, or set {how}"
            break
    most = partition.examples_per_client
    cap = "" if most is None else f" (data.partition.examples_per_client allows it {most} examples.)"
    raise DataError(
        f"client {name!r} has no example left for {' and '.join(empty)}: it holds {_num_examples(groups)} examples "
        f"with {len(groups)} different prompts, {num_placed} of them in the split that the data or another client "
        f"gave them, and one prompt never falls into two splits. It needs prompts for each of {', '.join(needed)}. "
        f"Give it more examples, ask for fewer clients{instead}.{cap}"
    )
