"""Tasks made by fedmira with a known graph: private codebooks that the members of a family mostly share.

Every client encodes made-up words with a codebook of its own. Members of a family share a given part of their entries,
families are drawn independently and so contradict each other on the very same prompts: one global model cannot be
right. A client's training examples show only three quarters of the words, another draw at every client, while
validation and test ask for all of them: local data is not enough. No prompt is ever in two splits, at any client.

Knows nothing about models, tokens or how examples become clients.

Axes: K clients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fedmira.config.data import PlantedConfig
from fedmira.data.sources.source import Source
from fedmira.data.splits import content_key, split_sizes
from fedmira.errors import ConfigError
from fedmira.randomness import generator, stream_seed
from fedmira.types import Example

SEEN_SHARE = 0.75
"""Share of the words that one client's training examples show."""
CONSONANTS = "bdfgklmnprstvz"
VOWELS = "aeiou"
NUM_SYLLABLES = len(CONSONANTS) * len(VOWELS)
MAX_TRIES = 400


def load(config: PlantedConfig, seed: int) -> Source:
    """Make the examples of all clients, with the graph they were planted on.

    Client names are `family-0-client-2`; task and category are the family. Nothing of a client changes when clients or
    families are added.

    Raises:
        ConfigError: the partition is not by field, or there are too few words for the examples asked for.
    """
    _check(config)
    words = made_up_words(seed, config.words)
    books = codebooks(config, seed)
    examples: list[Example] = []
    splits: dict[str, str] = {}
    for (name, book), cap in zip(books.items(), config.partition.caps(len(books)), strict=True):
        num_examples = config.examples if cap is None else min(config.examples, cap)
        sizes = split_sizes(num_examples, config.partition)
        family = _family(name)
        seen = seen_words(words, seed, name)
        for split, size in sizes.items():
            rng = generator(seed, "planted", "examples", name, split)
            prompts = _prompts(config, seed, split, seen if split == "train" else words, size, rng, name)
            for number, prompt in enumerate(prompts):
                example = Example(
                    instruction=" ".join(("encode:", *prompt)),
                    output=" ".join(book[word] for word in prompt),
                    task=family,
                    category=family,
                    id=f"{name}-{split}-{number}",
                    client=name,
                )
                examples.append(example)
                splits[content_key(example)] = split
    within, across = _agreements(books)
    provenance = {
        "source": "planted",
        "seed": seed,
        "clients": len(books),
        "examples": len(examples),
        "words": len(words),
        "words_in_training_of_one_client": _num_seen(config.words),
        "agreement_within_families": within,
        "agreement_across_families": across,
    }
    return Source(tuple(examples), provenance, splits, true_adjacency=adjacency)


def adjacency(names: Sequence[str]) -> np.ndarray:
    """Return the true graph (K, K), float64: 1 between two members of a family, else 0; zero diagonal."""
    families = np.array([_family(name) for name in names])
    adjacency_KK: np.ndarray = (families[:, None] == families[None, :]).astype(np.float64)
    np.fill_diagonal(adjacency_KK, 0.0)
    return adjacency_KK


def codebooks(config: PlantedConfig, seed: int) -> dict[str, dict[str, str]]:
    """Return client name -> word -> code.

    A family's codebook uses every code equally often, so that frequency gives nothing away. A client keeps
    `round(shared * words)` of its entries; each other entry is redrawn among the remaining codes.
    """
    words, codes = made_up_words(seed, config.words), made_up_codes(seed, config.codes)
    kept = int(config.shared * config.words + 0.5)
    books = {}
    for family_number in range(config.families):
        family = f"family-{family_number}"
        family_codes = generator(seed, "planted", "codebook", family).permutation(config.words) % config.codes
        for member in range(config.clients_per_family):
            name = f"{family}-client-{member}"
            rng = generator(seed, "planted", "codebook", name)
            indices = family_codes.copy()
            own = rng.permutation(config.words)[kept:]
            indices[own] = (indices[own] + rng.integers(1, config.codes, size=len(own))) % config.codes
            books[name] = {word: codes[index] for word, index in zip(words, indices, strict=True)}
    return books


def made_up_words(seed: int, count: int) -> tuple[str, ...]:
    """Return `count` different words of two syllables (of more when those run out), the same for all clients."""
    return _syllables(seed, "words", count, shortest=2)


def made_up_codes(seed: int, count: int) -> tuple[str, ...]:
    """Return `count` different codes of one syllable (of more when those run out), the same for all clients."""
    return _syllables(seed, "codes", count, shortest=1)


def seen_words(words: Sequence[str], seed: int, name: str) -> tuple[str, ...]:
    """Return the words that the training examples of client `name` show.

    Drawn independently of the family, so that which words two clients know says nothing about whose code they share.
    """
    order = generator(seed, "planted", "seen", name).permutation(len(words))
    return tuple(words[index] for index in sorted(order[: _num_seen(len(words))]))


def _num_seen(num_words: int) -> int:
    return int(np.ceil(SEEN_SHARE * num_words))


def _check(config: PlantedConfig) -> None:
    if config.partition.by != "field":
        raise ConfigError(
            f"data.partition.by = {config.partition.by} does not go with data.source = planted, whose clients are made "
            "with the data. Set data.partition.by to field."
        )
    largest = _num_seen(config.words)
    if not 2 <= config.words_per_example <= largest:
        raise ConfigError(
            f"data.words_per_example = {config.words_per_example} is not possible with data.words = {config.words}; "
            f"allowed: 2 to {largest}, three quarters of the words (with 1, a prompt kept from training would be a "
            "word kept from everyone). Change one of the two."
        )


def _syllables(seed: int, purpose: str, count: int, shortest: int) -> tuple[str, ...]:
    rng = generator(seed, "planted", purpose)
    found: dict[str, None] = {}
    length = shortest
    while len(found) < count:
        if length == 1:
            # so few of them that they are shuffled rather than drawn
            found.update((_syllable(int(index)), None) for index in rng.permutation(NUM_SYLLABLES))
        else:
            for row in rng.integers(0, NUM_SYLLABLES, size=(2 * count, length)):
                found["".join(_syllable(int(index)) for index in row)] = None
        length += 1
    return tuple(found)[:count]


def _syllable(index: int) -> str:
    return CONSONANTS[index // len(VOWELS)] + VOWELS[index % len(VOWELS)]


def _family(name: str) -> str:
    return name.rsplit("-client-", 1)[0]


def _pool(config: PlantedConfig, seed: int, prompt: Sequence[str]) -> str:
    """The split that a prompt belongs to at every client that uses it."""
    uniform = stream_seed(seed, "planted", "pool", *prompt) / 2**63
    if uniform < config.partition.test:
        return "test"
    return "validation" if uniform < config.partition.test + config.partition.validation else "train"


def _prompts(
    config: PlantedConfig,
    seed: int,
    split: str,
    words: Sequence[str],
    count: int,
    rng: np.random.Generator,
    name: str,
) -> list[tuple[str, ...]]:
    """Draw `count` different prompts of the split's pool that use the words as evenly as they can."""
    uses = np.zeros(len(words))
    prompts: dict[tuple[str, ...], None] = {}
    while len(prompts) < count:
        for attempt in range(MAX_TRIES):
            # the least used words first; where that fails for long, it matters less and less
            eagerness = uses + rng.random(len(words)) * max(1.0, attempt / 40)
            chosen = rng.permutation(np.argsort(eagerness)[: config.words_per_example])
            prompt = tuple(words[index] for index in chosen)
            if prompt not in prompts and _pool(config, seed, prompt) == split:
                prompts[prompt] = None
                uses[chosen] += 1
                break
        else:
            raise ConfigError(
                f"data.words = {config.words} and data.words_per_example = {config.words_per_example} give too few "
                f"different prompts: client {name!r} needs {count} for {split}, {len(prompts)} were found. "
                "Raise words or words_per_example, or lower data.examples."
            )
    return list(prompts)


def _agreements(books: Mapping[str, Mapping[str, str]]) -> tuple[float | None, float | None]:
    """Share of entries that two clients have in common: mean over pairs within families, and across families."""
    names = list(books)
    table = np.unique([list(book.values()) for book in books.values()], return_inverse=True)[1].reshape(len(names), -1)
    # counted code by code, so that thousands of clients need no (K, K, words) array
    common_KK = np.zeros((len(names), len(names)))
    for code in range(int(table.max()) + 1):
        has_code = (table == code).astype(np.float64)
        common_KK += has_code @ has_code.T / table.shape[1]
    within_KK = adjacency(names) > 0
    across_KK = ~within_KK & ~np.eye(len(names), dtype=bool)
    return (
        float(np.mean(common_KK[within_KK])) if within_KK.any() else None,
        float(np.mean(common_KK[across_KK])) if across_KK.any() else None,
    )
