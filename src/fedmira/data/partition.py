"""Examples become clients: who holds what, and in which split. Deterministic by seed and by content.

Every draw has a stream of its own, named by the task or the client, and groups are ordered by a hash of their text:
adding a task or a client leaves the others as they are. A prompt has one split in the whole federation: the first
client that holds it decides, so a text tested at one client is never trained on at another. Knows nothing about files,
templates or tokens.
"""

from __future__ import annotations

import re
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from fedmira.config.data import DataConfig, PartitionConfig
from fedmira.data.sources import load_examples
from fedmira.data.sources.source import Source
from fedmira.data.splits import SPLITS, Group, grouped, needed_splits, shuffled, split_client
from fedmira.errors import DataError
from fedmira.randomness import generator
from fedmira.types import Client, Example, Federation

_NUM_NAMED = 10
"""Clients that a refusal of several names beside the first."""
_MOST_CHARACTERS, _MOST_BYTES = 100, 200
"""Of a name, which becomes that of a folder: most file systems allow 255 bytes of UTF-8."""
_UNSEEN = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")
"""Letters and marks that nothing is shown for."""
_RESERVED = re.compile(r"(con|prn|aux|nul|com[1-9]|lpt[1-9])(\..*)?", re.IGNORECASE)
"""What Windows takes for a device, whatever follows a dot."""


class _Place(NamedTuple):
    """Where one client is dealt its examples from, before any are."""

    name: str
    pool: _Pool
    num_sharers: int
    """How many clients share what is left in the pool then: this one and those that follow it."""
    pick: Callable[[Sequence[str]], str]
    """Chooses one of the labels that are left."""


def build_federation(config: DataConfig, seed: int, known: Sequence[str] = ()) -> Federation:
    """Load the examples that the `data` section of a config describes and `partition` them.

    Raises:
        DataError: a file, a client or its name cannot be used.
        ConfigError: settings that contradict each other.
        SetupError: the source needs a package that is not installed.
    """
    return partition(load_examples(config, seed), config.partition, seed, known)


def partition(source: Source, config: PartitionConfig, seed: int, known: Sequence[str] = ()) -> Federation:
    """Hand the examples of a source to clients and split each client's.

    Args:
        source: the examples.
        config: how they become clients.
        seed: of every draw.
        known: clients of a run that goes on. They come first, in this order, so that whoever joined takes neither their
            rows nor the split of a text that they hold, also where its own records name another.

    Raises:
        DataError: there are no examples; labels or client names that the partition needs are missing or unsafe; a
            client has too few different texts for its splits.
    """
    if not source.examples:
        raise DataError("the data source has no examples. Check data.path and the fields of its records.")
    places = {"task": _by_task, "field": _by_field, "dirichlet": _by_dirichlet, "iid": _iid}[config.by](
        source.examples, config, seed
    )
    check_names((place.name for place in places), known)
    position = {name: number for number, name in enumerate(known)}
    order = sorted((place.name for place in places), key=lambda name: position.get(name, len(position)))
    caps = dict(zip(order, config.caps(len(order)), strict=True))
    placed = _placed(source, places, known)
    if source.namers and config.examples_per_client is not None:
        for pool in {id(place.pool): place.pool for place in places}.values():
            pool.lay_apart(placed)
    dealt = {}
    allowed = [0, *accumulate(caps[place.name] or 0 for place in places)]
    for number, place in enumerate(places):
        allowed_later = allowed[number + place.num_sharers] - allowed[number + 1]
        dealt[place.name] = _deal(place, caps[place.name], allowed_later, config)
    clients, refused = [], dict[str, DataError]()
    for name in order:
        # messages name the client's own cap
        own = config.model_copy(update={"examples_per_client": caps[name]})
        try:
            clients.append(_client(name, dealt[name], own, seed, placed))
        except DataError as error:
            refused[name] = error
    _refuse_together(refused)
    num_held = sum(len(client.train) + len(client.validation) + len(client.test) for client in clients)
    provenance = {
        **source.provenance,
        "partition": {
            "by": config.by,
            "seed": seed,
            "clients": len(clients),
            "examples_held": num_held,
            "examples_left_out": len(source.examples) - num_held,
            "different_prompts_held": len({group.key for groups in dealt.values() for group in groups}),
        },
    }
    names = tuple(client.name for client in clients)
    true_adjacency_KK = None if source.true_adjacency is None else source.true_adjacency(names)
    return Federation(tuple(clients), true_adjacency_KK, provenance)


def _placed(source: Source, places: Iterable[_Place], known: Sequence[str]) -> dict[str, str]:
    """The split of each content key that has one before any is drawn; a newcomer names none for what others hold."""
    if not (source.namers and known):
        return dict(source.splits)
    held, named, older = set[str](), set[str](), set(known)
    for pool in {id(place.pool): place.pool for place in places if place.name in older}.values():
        for group in pool.left():
            held.add(group.key)
            if not source.namers.isdisjoint(group.examples):
                named.add(group.key)
    return {key: split for key, split in source.splits.items() if key not in held or key in named}


def check_names(names: Iterable[str], known: Sequence[str] = ()) -> None:
    """Refuse client names that are unsafe as names of folders, or the same but for case and Unicode form.

    Args:
        names: of all clients.
        known: those of a run that goes on, which may be older than the rule about devices.

    Raises:
        DataError: names the clients.
    """
    seen: dict[str, str] = {}
    refused: dict[str, DataError] = {}
    older = set(known)
    for name in names:
        key = unicodedata.normalize("NFC", name).casefold()
        if (problem := _name_problem(name, name in older)) is not None:
            refused[name] = DataError(
                f"the client name {_shown(name)} cannot be used{problem}. Allowed: letters and digits of any script, "
                f"space, dot, dash and underscore, 1 to {_MOST_CHARACTERS} characters and at most {_MOST_BYTES} bytes "
                "of UTF-8, not beginning with a dot, a space or a mark and not ending with a space. Rename it in the "
                "data (the client field, the task or the file name)."
            )
        elif key in seen:
            refused[name] = DataError(
                f"two clients are called {_shown(seen[key])} and {_shown(name)}; names must differ by more than case "
                "and the way accents are encoded. Rename one of them in the data (the client field, the task or the "
                "file name)."
            )
        seen.setdefault(key, name)
    _refuse_together(refused)


def _name_problem(name: str, is_known: bool) -> str | None:
    """Why a client cannot be called so, as the end of a sentence that may be empty; None if it can."""
    strange = next((letter for letter in name if not _is_allowed(letter)), None)
    if strange is not None:
        return f" because of {strange!r} (U+{ord(strange):04X})"
    if _RESERVED.fullmatch(name) and not is_known:
        return ", as Windows takes it for a device"
    num_bytes = len(name.encode())
    if len(name) > _MOST_CHARACTERS or num_bytes > _MOST_BYTES:
        return f", as it has {len(name)} characters and {num_bytes} bytes"
    if not name or name[0] in ". " or name[-1] == " " or unicodedata.category(name[0])[0] == "M":
        return ""
    return None


def _is_allowed(letter: str) -> bool:
    """Whether a client's name may have it: a letter, mark, digit or dash, a plain space, a dot or an underscore.

    >>> [_is_allowed(letter) for letter in ("\u00fc", "\u2013", "\u0661", "/", "\u200b", "\u202e", "\u00a0")]
    [True, True, True, False, False, False, False]
    """
    category = unicodedata.category(letter)
    return letter in " ._" or ((category[0] in "LM" or category in ("Nd", "Pd")) and not _UNSEEN.match(letter))


def _refuse_together(refused: Mapping[str, DataError]) -> None:
    """Raise the first of the errors, which names who has the others, so that they are mended in one go."""
    if not refused:
        return
    (_, first), *more = refused.items()
    if not more:
        raise first
    shown = ", ".join(_shown(name) for name, _ in more[:_NUM_NAMED])
    rest = f" and {len(more) - _NUM_NAMED} more" if len(more) > _NUM_NAMED else ""
    raise DataError(f"{first} The same goes for {shown}{rest}.") from first


def _shown(name: str) -> str:
    return repr(name if len(name) <= 110 else name[:100] + "...")


def _client(name: str, groups: list[Group], config: PartitionConfig, seed: int, placed: dict[str, str]) -> Client:
    examples = [example for group in groups for example in group.examples]
    return Client(
        name,
        **split_client(name, groups, config, seed, placed),
        task=_common(example.task for example in examples),
        category=_common(example.category for example in examples),
    )


def _common(labels: Iterable[str]) -> str:
    """The one label that all share, or an empty string."""
    distinct = set(labels)
    return distinct.pop() if len(distinct) == 1 else ""


# ---------------------------------------------------------------------------------------------------- four partitions


def _by_task(examples: Sequence[Example], config: PartitionConfig, seed: int) -> list[_Place]:
    tasks: dict[str, list[Example]] = {}
    for example in examples:
        tasks.setdefault(example.task, []).append(example)
    if "" in tasks:
        raise DataError(
            f"data.partition.by = task, but {len(tasks[''])} of {len(examples)} examples name no task (first: "
            f"{tasks[''][0].id or 'unnamed'}). Set data.task_field to the field that names it, or data.partition.by to "
            "field or iid."
        )
    places = []
    for task, members in tasks.items():
        called = unicodedata.normalize("NFC", task)
        pool = _Pool({"": shuffled(grouped(members), seed, "partition", "deal", task)})
        for number in range(config.clients_per_task):
            name = called if config.clients_per_task == 1 else f"{called}-{number}"
            places.append(_Place(name, pool, config.clients_per_task - number, _first))
    return places


def _by_field(examples: Sequence[Example], config: PartitionConfig, seed: int) -> list[_Place]:
    clients: dict[str, list[Example]] = {}
    for example in examples:
        clients.setdefault(example.client, []).append(example)
    if "" in clients:
        raise DataError(
            f"data.partition.by = field, but {len(clients[''])} of {len(examples)} examples name no client (first: "
            f"{clients[''][0].id or 'unnamed'}). With data.source jsonl or huggingface set data.client_field "
            "to the field that names it; else set data.partition.by to task or iid."
        )
    return [
        _Place(name, _Pool({"": shuffled(grouped(members), seed, "partition", "deal", name)}), 1, _first)
        for name, members in clients.items()
    ]


def _iid(examples: Sequence[Example], config: PartitionConfig, seed: int) -> list[_Place]:
    num_clients = config.num_clients or 1
    pool = _Pool({"": shuffled(grouped(examples), seed, "partition", "deal")})
    return [_Place(f"client-{number:03d}", pool, num_clients - number, _first) for number in range(num_clients)]


def _by_dirichlet(examples: Sequence[Example], config: PartitionConfig, seed: int) -> list[_Place]:
    """Each client's label shares are drawn from Dirichlet(alpha), its examples from the labels' groups.

    A label without groups drops out and the other shares are scaled up (Hsu et al. 2019, arXiv 1909.06335).
    """
    num_clients = config.num_clients or 1
    groups: dict[str, list[Group]] = {}
    for group in shuffled(grouped(examples), seed, "partition", "deal"):
        groups.setdefault(group.examples[0].task or group.examples[0].category, []).append(group)
    if "" in groups:
        raise DataError(
            f"data.partition.by = dirichlet, but some examples have no label (first: "
            f"{groups[''][0].examples[0].id or 'unnamed'}). Set data.task_field or data.category_field to the field "
            "that names it, or data.partition.by to iid."
        )
    pool = _Pool(groups)
    names = [f"client-{number:03d}" for number in range(num_clients)]
    return [
        _Place(name, pool, num_clients - number, _label_picker(name, list(groups), config.alpha, seed))
        for number, name in enumerate(names)
    ]


def _label_picker(name: str, labels: Sequence[str], alpha: float, seed: int) -> Callable[[Sequence[str]], str]:
    """Draw a client's label shares; return what draws one of the labels that are left by them."""
    rng = generator(seed, "partition", "dirichlet", name)
    log_shares = {label: _log_gamma_draw(alpha, seed, name, label) for label in labels}

    def pick(left: Sequence[str]) -> str:
        logs = np.array([log_shares[label] for label in left])
        shares = np.exp(logs - logs.max())
        return left[int(rng.choice(len(left), p=shares / shares.sum()))]

    return pick


def _log_gamma_draw(alpha: float, seed: int, name: str, label: str) -> float:
    """The logarithm of a Gamma(alpha) draw; normalised over labels such draws are Dirichlet.

    As Gamma(alpha + 1) * uniform^(1 / alpha), which cannot underflow in logarithms however small alpha is.
    """
    rng = generator(seed, "partition", "dirichlet", name, label)
    return float(np.log(rng.gamma(alpha + 1.0)) + np.log1p(-rng.random()) / alpha)


# -------------------------------------------------------------------------------------------------------------- dealing


class _Pool:
    """Groups not yet dealt, by label and, where they are laid apart, by named split, in order."""

    def __init__(self, groups: Mapping[str, Iterable[Group]]) -> None:
        self._groups = {label: {"": deque(members)} for label, members in groups.items()}
        self.num_groups = sum(1 for _ in self.left())
        self.num_examples = sum(len(group.examples) for group in self.left())
        self.num_examples_of = {"": self.num_examples}
        """By named split, of all that was ever in the pool; an empty string: none is named."""

    def left(self) -> Iterator[Group]:
        """The groups that are not dealt."""
        return (group for apart in self._groups.values() for members in apart.values() for group in members)

    def lay_apart(self, placed: Mapping[str, str]) -> None:
        """Order the groups, of which none is dealt yet, by the splits in which `placed` says they are."""
        self.num_examples_of = dict.fromkeys((*SPLITS, ""), 0)
        for label, apart in self._groups.items():
            self._groups[label] = {split: deque[Group]() for split in self.num_examples_of}
            for group in apart[""]:
                split = placed.get(group.key, "")
                self._groups[label][split].append(group)
                self.num_examples_of[split] += len(group.examples)

    def draw(self, pick: Callable[[Sequence[str]], str], prefer: Callable[[Sequence[str]], str]) -> tuple[Group, str]:
        """Remove and return the next group, and its named split: of those that have groups left, `pick` chooses the
        label and `prefer` the split."""
        label = pick([label for label, apart in self._groups.items() if any(apart.values())])
        split = prefer([split for split, members in self._groups[label].items() if members])
        group = self._groups[label][split].popleft()
        self.num_groups -= 1
        self.num_examples -= len(group.examples)
        return group, split


def _first(labels: Sequence[str]) -> str:
    return labels[0]


def _deal(place: _Place, cap: int | None, allowed_later: int, config: PartitionConfig) -> list[Group]:
    """Deal a client its groups: an equal part of the examples that are left, at most the cap; or more of them, up to
    the cap, which those that follow are not allowed.

    Every client gets as many groups as there are splits to fill, while there are enough. With a cap, a group that
    is too large is cut; the rest of it is left out, as no other client may hold the same text. Of a pool that is laid
    apart the client gets something for each split, and then of each named split the share that this has of the pool.
    """
    pool, size = place.pool, -(-place.pool.num_examples // place.num_sharers)
    if cap is not None:
        size = min(cap, max(size, pool.num_examples - allowed_later))
    needed = needed_splits(config)
    fewest = len(needed)
    reserved = fewest * (place.num_sharers - 1)
    dealt: list[Group] = []
    held = num_free = 0
    held_of = dict.fromkeys(pool.num_examples_of, 0)

    def prefer(left: Sequence[str]) -> str:
        lacking = [split for split in needed if not held_of.get(split)]
        if named := [split for split in lacking if split in left]:
            return named[0]
        if "" in left and num_free < len(lacking):
            return ""
        return min(left, key=lambda split: (2 * held_of[split] + 1) / pool.num_examples_of[split])

    while pool.num_groups and (len(dealt) < fewest or (held < size and pool.num_groups > reserved)):
        if cap is not None and held >= cap:
            break
        group, split = pool.draw(place.pick, prefer)
        if cap is not None:
            still_needed = max(0, fewest - len(dealt) - 1)
            group = Group(group.key, group.examples[: max(1, cap - held - still_needed)])
        dealt.append(group)
        held += len(group.examples)
        held_of[split] += len(group.examples)
        num_free += split == ""
    return dealt
