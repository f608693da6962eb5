"""The text the embedded base model learns from: corpus records in the three templates, and generated puzzles.

The puzzles are made of made-up words and grow what adapters build on: looking a word up in a list, copying,
reordering, continuing a pattern. None of them is a task of a public benchmark. Knows nothing about tokens,
models or training.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from fedmira.data.prompts import Rendered, render
from fedmira.types import Example

HELD_OUT_ONE_IN = 50
TEMPLATE_SHARES = {"alpaca": 0.45, "plain": 0.35, "chat": 0.20}
PIECE_CHARACTERS = 40
BOILERPLATE_RECORDS = 60
SMALLEST_VOCABULARY = 100


class Corpus(NamedTuple):
    """The records, split so that no sentence of the held-out ones is trained on."""

    train: tuple[Example, ...]
    held_out: tuple[Example, ...]


def read_corpus(path: Path) -> Corpus:
    """Read `path` (gzipped JSON lines with task, instruction, input, output) and split it.

    Records that share a sentence or line of at least 40 characters, in input or answer, form one group; a group
    is held out when the sha256 of its smallest text says so, about one in fifty. A sentence that occurs in
    more than 60 records is boilerplate and joins nothing.
    """
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    examples = [
        Example(instruction=r["instruction"], input=r["input"], output=r["output"], task=r["task"]) for r in records
    ]
    groups = _groups([_pieces(example) for example in examples])
    smallest: dict[int, str] = {}
    for example, group in zip(examples, groups, strict=True):
        text = f"{example.task}\n{example.input}\n{example.output}"
        smallest[group] = min(smallest.get(group, text), text)
    held_out_groups = {group for group, text in smallest.items() if _is_held_out(text)}
    return Corpus(
        train=tuple(e for e, group in zip(examples, groups, strict=True) if group not in held_out_groups),
        held_out=tuple(e for e, group in zip(examples, groups, strict=True) if group in held_out_groups),
    )


def _is_held_out(text: str) -> bool:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % HELD_OUT_ONE_IN == 0


def _pieces(example: Example) -> list[str]:
    """What two records must not share across the split: the long sentences, or the whole text of a short record."""
    sentences = re.split(r"[.!?\n]+", f"{example.input}\n{example.output}")
    pieces = [" ".join(s.lower().split()) for s in sentences]
    long_pieces = [piece for piece in pieces if len(piece) >= PIECE_CHARACTERS]
    return long_pieces or [f"{example.task} {example.input.lower()}"]


def _groups(pieces_of_record: list[list[str]]) -> list[int]:
    """Connected components of records that share a piece (union-find with path halving)."""
    records_of_piece: dict[str, list[int]] = {}
    for record, pieces in enumerate(pieces_of_record):
        for piece in set(pieces):
            records_of_piece.setdefault(piece, []).append(record)
    parent = list(range(len(pieces_of_record)))

    def root(record: int) -> int:
        while parent[record] != record:
            parent[record] = parent[parent[record]]
            record = parent[record]
        return record

    for records in records_of_piece.values():
        if len(records) <= BOILERPLATE_RECORDS:
            for other in records[1:]:
                parent[root(other)] = root(records[0])
    return [root(record) for record in range(len(parent))]


def render_varied(example: Example, tokenizer: PreTrainedTokenizerBase, random: Random) -> Rendered:
    """Render in a drawn template, with the whole instruction, one sentence of it, or none.

    The corpus has few distinct instructions; spelling each out every time would spend a third of the training
    on texts the model already knows by heart.
    """
    template = random.choices(list(TEMPLATE_SHARES), weights=list(TEMPLATE_SHARES.values()))[0]
    draw = random.random()
    if draw < 0.35:
        varied = example
    elif draw < 0.70:
        sentences = [s for s in re.split(r"(?<=[.!?])\s+", example.instruction) if len(s) > 20]
        varied = Example(random.choice(sentences or [example.instruction]), example.output, example.input)
    else:
        varied = Example(instruction=example.input, output=example.output)
    return render(varied, template, tokenizer)


# ------------------------------------------------------------------------------------------------- generated puzzles

ONSETS = ["b", "d", "f", "g", "h", "j", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "kl", "st", "tr", "sh"]
VOWELS = ["a", "e", "i", "o", "u", "ai", "ou"]
CODAS = ["", "", "", "n", "r", "s", "l", "k", "m"]
ARROWS = [" means {}", ": {}", " -> {}", " = {}", " is {}", " stands for {}", " becomes {}", "\t{}", " ({})"]


def made_up_word(random: Random) -> str:
    """A pronounceable word of one to three syllables."""
    syllables = random.choices([1, 2, 3], weights=[1, 4, 2])[0]
    return "".join(random.choice(ONSETS) + random.choice(VOWELS) for _ in range(syllables)) + random.choice(CODAS)


def code(random: Random) -> str:
    """A short code of letters and digits."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return "".join(
        random.choice(letters if random.random() < 0.5 else "0123456789") for _ in range(random.randint(2, 4))
    )


def distinct(count: int, draw: Callable[[Random], str], random: Random) -> list[str]:
    """`count` different draws."""
    values: dict[str, None] = {}
    while len(values) < count:
        values[draw(random)] = None
    return list(values)


def puzzle(random: Random, vocabulary: list[str]) -> Example:
    """One generated puzzle; a `vocabulary` of 100 words or more lends real words to some of them."""
    kind = random.choices(PUZZLES, weights=PUZZLE_WEIGHTS)[0]
    draws: list[Draw] = [made_up_word, made_up_word, code]
    if len(vocabulary) >= SMALLEST_VOCABULARY:
        draws.append(lambda r: r.choice(vocabulary))
    return kind(random, random.choice(draws))


Draw = Callable[[Random], str]


def _lookup(random: Random, draw: Draw) -> Example:
    """A word list, then one to four questions about it."""
    count = random.randint(2, 10)
    keys = distinct(count, made_up_word if random.random() < 0.5 else draw, random)
    values = [draw(random) for _ in keys]
    arrow = random.choice(ARROWS)
    separator = random.choice(["\n", "; ", ", ", ". "])
    listed = separator.join(key + arrow.format(value) for key, value in zip(keys, values, strict=True))
    asked = random.sample(range(count), min(count, random.randint(1, 4)))
    question = random.choice(["What is {}?", "{}?", "Look up {}.", "{}", "Which entry belongs to {}?"])
    instruction = random.choice(
        ["Use the list to answer.", "Look up each word in the list.", "Answer from the list.", ""]
    )
    joiner = random.choice([" ", ", ", "\n"])
    wanted = joiner.join(keys[i] for i in asked)
    answer = joiner.join(values[i] for i in asked)
    body = f"{listed}\n{question.format(wanted)}"
    return Example(instruction, answer, body) if instruction else Example(body, answer)


def _substitute(random: Random, draw: Draw) -> Example:
    """A key, and a message to write with it word by word."""
    keys = distinct(random.randint(3, 8), made_up_word, random)
    values = distinct(len(keys), draw, random)
    table = dict(zip(keys, values, strict=True))
    message = [random.choice(keys) for _ in range(random.randint(2, 6))]
    listed = ", ".join(f"{key}={value}" for key, value in table.items())
    instruction = random.choice(["Write the message with the key.", "Replace every word by its entry in the key."])
    return Example(instruction, " ".join(table[m] for m in message), f"Key: {listed}\nMessage: {' '.join(message)}")


def _by_examples(random: Random, draw: Draw) -> Example:
    """Pairs made by one hidden rule on made-up words, then a word to treat alike."""
    front, back = made_up_word(random)[:3], made_up_word(random)[:3]
    rules: list[Callable[[str], str]] = [
        lambda w: w + back,
        lambda w: front + w,
        lambda w: f"{w} {w}",
        lambda w: f"{front} {w}",
        lambda w: f"{w} {back}",
        lambda w: f"{front} {w} {back}",
        lambda w: f"{w}, {w}, {w}",
        lambda w: f"[{w}]",
    ]
    rule = random.choice(rules)
    words = distinct(random.randint(3, 7), draw, random)
    arrow = random.choice([" -> ", ": ", " => ", " | "])
    shown = "\n".join(word + arrow + rule(word) for word in words[:-1])
    return Example(f"{shown}\n{words[-1]}{arrow.rstrip()}", rule(words[-1]))


def _reorder(random: Random, draw: Draw) -> Example:
    """A list to copy, reverse, sort, rotate or pick from."""
    items = distinct(random.randint(3, 9), draw, random)
    position = random.randrange(len(items))
    name, result = random.choice(
        [
            ("Copy the list.", items),
            ("Repeat the words in the same order.", items),
            ("Reverse the list.", items[::-1]),
            ("Write the words from last to first.", items[::-1]),
            ("Sort the list.", sorted(items)),
            ("Move the first item to the end.", items[1:] + items[:1]),
            (f"Give item {position + 1} of the list.", [items[position]]),
            (f"Which word comes after {items[position - 1]}?", [items[position]]),
            (f"Leave {items[position]} out of the list.", items[:position] + items[position + 1 :]),
            ("Give the last word.", items[-1:]),
        ]
    )
    joiner = random.choice([" ", ", ", "\n", " - "])
    return Example(name, joiner.join(result), joiner.join(items))


def _pattern(random: Random, draw: Draw) -> Example:
    """A repeating pattern to continue for one more period."""
    period = distinct(random.randint(2, 6), draw, random)
    stop = random.randrange(len(period))
    shown = period * random.randint(2, 4) + period[:stop]
    joiner = random.choice([" ", ", ", " / "])
    continued = (period[stop:] + period)[: len(period)]
    name = random.choice(["Continue the pattern.", "What comes next?", "Go on:"])
    return Example(name, joiner.join(continued), joiner.join(shown))


def _record_field(random: Random, draw: Draw) -> Example:
    """Records with named fields, then a question about one field of one record."""
    fields = distinct(random.randint(2, 4), made_up_word, random)
    names = distinct(random.randint(2, 5), draw, random)
    cells = {name: {field: draw(random) for field in fields} for name in names}
    style = random.choice(["{name} ({cells})", "{name}: {cells}", "[{name}] {cells}"])
    lines = [
        style.format(name=name, cells=", ".join(f"{field} {value}" for field, value in row.items()))
        for name, row in cells.items()
    ]
    name, field = random.choice(names), random.choice(fields)
    question = random.choice([f"What is the {field} of {name}?", f"{name}, {field}?", f"Give {name}'s {field}."])
    listed = "\n".join(lines)
    return Example(question, cells[name][field], listed)


def _notebook(random: Random, draw: Draw) -> Example:
    """A long run of lines from one small word list, each line predictable once its key was seen."""
    keys = distinct(random.randint(3, 8), made_up_word, random)
    table = {key: draw(random) for key in keys}
    arrow = random.choice(ARROWS)
    lines = [key + arrow.format(table[key]) for key in random.choices(keys, k=random.randint(8, 20))]
    return Example("\n".join(lines), table[keys[0]] if random.random() < 0.5 else lines[0])


PUZZLES = [_lookup, _substitute, _by_examples, _reorder, _pattern, _record_field, _notebook]
PUZZLE_WEIGHTS = [30, 16, 14, 16, 8, 10, 6]


def common_words(examples: tuple[Example, ...], count: int = 2000) -> list[str]:
    """The most frequent lower-case words of three to nine letters in the inputs, alphabetically."""
    frequency: dict[str, int] = {}
    for example in examples[::5]:
        for word in re.findall(r"\b[a-z]{3,9}\b", example.input):
            frequency[word] = frequency.get(word, 0) + 1
    return sorted(sorted(frequency, key=lambda word: (-frequency[word], word))[:count])


def shard_documents(
    train: tuple[Example, ...],
    vocabulary: list[str],
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    shard: int,
    records_per_shard: int = 1024,
    puzzles_per_shard: int = 500,
) -> Iterator[Rendered]:
    """The documents of one shard in random order, a function of `(seed, shard)` alone.

    Shards walk through a new permutation of the corpus in every epoch, so that a training resumed at a shard
    sees what it would have seen without the interruption.
    """
    shards_per_epoch = max(1, len(train) // records_per_shard)
    epoch, place = divmod(shard, shards_per_epoch)
    order = list(range(len(train)))
    Random(f"{seed}/epoch/{epoch}").shuffle(order)
    random = Random(f"{seed}/shard/{shard}")
    rendered = [
        render_varied(train[record], tokenizer, random)
        for record in order[place * records_per_shard : (place + 1) * records_per_shard]
    ]
    templates, weights = list(TEMPLATE_SHARES), list(TEMPLATE_SHARES.values())
    rendered += [
        render(puzzle(random, vocabulary), random.choices(templates, weights=weights)[0], tokenizer)
        for _ in range(puzzles_per_shard)
    ]
    random.shuffle(rendered)
    return iter(rendered)
