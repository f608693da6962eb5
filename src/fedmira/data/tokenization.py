"""Clients' examples become token sequences with a marked answer; what is cut or dropped is counted.

Prompt and answer are tokenised separately, so that the prompt's tokens are exactly what generation sees: the beginning
of an answer never merges into the end of the prompt. A sequence is [start token] prompt, answer, end token (in a chat
what ends a turn there); the answer and the end token are supervised. A sequence that is too long loses the beginning of
its input, or of its prompt (after the start token), never a part of its answer; an answer that leaves no room for a
prompt is dropped.
Special tokens that are spelt out in the data stay plain text, except within a chat template. Knows nothing about
models, batches or devices.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fedmira.config.data import Cut
from fedmira.data.prompts import behind_answer, render
from fedmira.data.splits import SPLITS
from fedmira.errors import DataError, SetupError
from fedmira.types import Client, Example, Federation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUM_NAMED_DROPS = 3
_STAND_INS = ("x", "0")
"""Written instead of an input, to see which tokens of a prompt are not of it, whatever it begins and ends with."""


class TokenizedExample(NamedTuple):
    """One example as tokens."""

    tokens: np.ndarray
    """(T,) int32: start token if the tokenizer adds one, prompt, answer, end token."""
    prompt_length: int
    """The first `prompt_length` tokens are not supervised; at least 1, and smaller than T."""
    id: str

    @property
    def num_inputs(self) -> int:
        """Tokens that a model reads: all but the last, which nothing follows."""
        return len(self.tokens) - 1

    @property
    def num_supervised(self) -> int:
        """Tokens of the answer, its end token among them."""
        return len(self.tokens) - self.prompt_length


@dataclass(frozen=True, slots=True)
class TokenizedClient:
    """One client's examples as tokens, by split."""

    name: str
    train: tuple[TokenizedExample, ...]
    validation: tuple[TokenizedExample, ...]
    test: tuple[TokenizedExample, ...]
    examples: Client
    """The client without the dropped examples: `examples.test[i]` is the text of `test[i]`, in every split."""
    template: str = "plain"
    """How its examples became text."""
    cut: Cut = "beginning"
    """What its prompts lose that are too long."""


class ClientTokens(NamedTuple):
    """What tokenization did to one client, over all its splits."""

    name: str
    num_examples: int
    """Kept."""
    num_tokens: int
    num_supervised_tokens: int
    longest: int
    """Tokens of its longest sequence."""
    truncated_prompts: int
    dropped_examples: int
    first_dropped: tuple[str, ...]
    """Ids of the first dropped examples."""


class TokenizationReport(NamedTuple):
    """What tokenization did to all clients, in their order."""

    template: str
    max_length: int
    clients: tuple[ClientTokens, ...]

    @property
    def truncated_prompts(self) -> int:
        """Prompts that were cut, of all clients."""
        return sum(client.truncated_prompts for client in self.clients)

    @property
    def dropped_examples(self) -> int:
        """Examples whose answer leaves no room for a prompt, of all clients."""
        return sum(client.dropped_examples for client in self.clients)


def tokenize_federation(
    federation: Federation, tokenizer: PreTrainedTokenizerBase, template: str, max_length: int, cut: Cut = "input"
) -> tuple[tuple[TokenizedClient, ...], TokenizationReport]:
    """Tokenize every example of every client.

    Args:
        federation: the clients.
        tokenizer: the base model's.
        template: how an example becomes text, see `prompts.TEMPLATES`.
        max_length: tokens of a sequence at most, start and end token included.
        cut: what a prompt that is too long loses, see `data.cut`.

    Raises:
        SetupError: the tokenizer has no end token.
        DataError: a client has no example left in a split that had some, or the chat template refuses one.
        ConfigError: the template is unknown or does not go with the tokenizer.
    """
    end = end_token(tokenizer, template)
    clients, counts = [], []
    for client in federation.clients:
        tokenized, count = _tokenize_client(client, tokenizer, template, max_length, cut, end)
        clients.append(tokenized)
        counts.append(count)
    return tuple(clients), TokenizationReport(template, max_length, tuple(counts))


def prompt_tokens(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    room: int,
    cut: Cut = "input",
) -> np.ndarray:
    """Return the prompt of `example` as tokens (T,) int32, at most `room` of them.

    Where its answer and end token take the rest of the longest sequence these are exactly the unsupervised tokens of
    its `TokenizedExample`. The example's output is ignored.

    Raises:
        DataError: no prompt token fits, or the prompt has none.
    """
    [prompt] = _prompt_ids([example], tokenizer, template)
    [kept] = _kept([example], [prompt], [room], tokenizer, template, cut)
    if not kept:
        raise DataError(
            f"the prompt of {example.id or 'the text'} has {len(prompt)} tokens, and there is room for {room}. "
            "Give a longer max_length or ask for fewer new tokens."
        )
    return np.array(kept, dtype=np.int32)


def end_token(tokenizer: PreTrainedTokenizerBase, template: str) -> int:
    """Return the id of the token that ends an answer: the tokenizer's end-of-sequence token, or with `chat` the special
    token that the chat template ends an assistant's turn with, as in the turns before.

    Raises:
        SetupError: the tokenizer has no end-of-sequence token.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise SetupError(
            f"the tokenizer {tokenizer.name_or_path!r} has no end-of-sequence token (eos_token), so a model could not "
            "learn where an answer ends. Use a base model whose tokenizer defines one, or add eos_token to its "
            "tokenizer_config.json."
        )
    if template == "chat":
        special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        [behind] = _encode([behind_answer(tokenizer)], tokenizer, split_special_tokens=False)
        return next((token for token in behind if token in special), int(end))
    return int(end)


def digest(client: TokenizedClient) -> str:
    """Return the sha256 of all that a run computes from a client's data: its label, tokens and references by split.

    Not of names and ids: examples may move to another line of a file.
    """
    sha256 = hashlib.sha256(json.dumps(client.examples.task).encode())
    for split in SPLITS:
        texts = [(example.output, example.references) for example in getattr(client.examples, split)]
        sequences: tuple[TokenizedExample, ...] = getattr(client, split)
        lengths = [(len(sequence.tokens), sequence.prompt_length) for sequence in sequences]
        sha256.update(json.dumps([split, texts, lengths]).encode())
        for sequence in sequences:
            sha256.update(sequence.tokens.astype("<i4").tobytes())
    return sha256.hexdigest()


def _tokenize_client(
    client: Client,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    max_length: int,
    cut: Cut,
    end: int,
) -> tuple[TokenizedClient, ClientTokens]:
    sequences: dict[str, tuple[TokenizedExample, ...]] = {}
    texts: dict[str, tuple[Example, ...]] = {}
    truncated = 0
    dropped: list[str] = []
    for split in SPLITS:
        examples: tuple[Example, ...] = getattr(client, split)
        kept: list[tuple[Example, TokenizedExample]] = []
        prompts = _prompt_ids(examples, tokenizer, template)
        answers = _encode([example.output for example in examples], tokenizer)
        rooms = [max_length - len(answer) - 1 for answer in answers]
        visible = _kept(examples, prompts, rooms, tokenizer, template, cut)
        for example, prompt, read, answer in zip(examples, prompts, visible, answers, strict=True):
            if not read:
                dropped.append(example.id)
                continue
            tokens = np.array([*read, *answer, end], dtype=np.int32)
            truncated += len(read) < len(prompt)
            kept.append((example, TokenizedExample(tokens, len(read), example.id)))
        if examples and not kept:
            first = examples[0].id or "unnamed"
            raise DataError(
                f"client {client.name!r} has no usable {split} example: the answers of all {len(examples)} are so long "
                f"that max_length = {max_length} tokens leave no room for a prompt (first: {first}, "
                f"answer and end token {len(answers[0]) + 1} tokens). Raise data.max_length or remove the client."
            )
        texts[split] = tuple(example for example, _ in kept)
        sequences[split] = tuple(sequence for _, sequence in kept)
    everything = [sequence for split in SPLITS for sequence in sequences[split]]
    count = ClientTokens(
        name=client.name,
        num_examples=len(everything),
        num_tokens=sum(len(sequence.tokens) for sequence in everything),
        num_supervised_tokens=sum(sequence.num_supervised for sequence in everything),
        longest=max((len(sequence.tokens) for sequence in everything), default=0),
        truncated_prompts=truncated,
        dropped_examples=len(dropped),
        first_dropped=tuple(dropped[:NUM_NAMED_DROPS]),
    )
    remaining = replace(client, train=texts["train"], validation=texts["validation"], test=texts["test"])
    return TokenizedClient(client.name, **sequences, examples=remaining, template=template, cut=cut), count


def _prompt_ids(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, template: str) -> list[list[int]]:
    prompts = [render(example, template, tokenizer).prompt for example in examples]
    if template == "chat":
        # a chat template writes its special tokens, the start token among them, into the text
        return _encode(prompts, tokenizer, split_special_tokens=False)
    encoded = _encode(prompts, tokenizer, add_special_tokens=True)
    end = tokenizer.eos_token_id
    # some tokenizers also append the end token, which must not stand between prompt and answer
    return [ids[:-1] if ids and ids[-1] == end else ids for ids in encoded]


def _encode(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    add_special_tokens: bool = False,
    split_special_tokens: bool = True,
) -> list[list[int]]:
    if not texts:
        return []
    encoding = tokenizer(
        list(texts),
        add_special_tokens=add_special_tokens,
        split_special_tokens=split_special_tokens,
        return_attention_mask=False,
        verbose=False,
    )
    return [list(ids) for ids in encoding["input_ids"]]


def _kept(
    examples: Sequence[Example],
    prompts: Sequence[list[int]],
    rooms: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    cut: Cut,
) -> list[list[int]]:
    """The tokens that are read of each prompt: as many as there is room for; none if no text fits."""
    kept = [_keep_end(prompt, room, tokenizer) for prompt, room in zip(prompts, rooms, strict=True)]
    if cut == "beginning":
        return kept
    long = [n for n, example in enumerate(examples) if example.input and 0 < len(kept[n]) < len(prompts[n])]
    frames = [
        _prompt_ids([replace(examples[n], input=stand_in) for n in long], tokenizer, template)
        for stand_in in _STAND_INS
    ]
    for n, *frames_of_n in zip(long, *frames, strict=True):
        kept[n] = _cut_within(prompts[n], frames_of_n, rooms[n]) or kept[n]
    return kept


def _cut_within(prompt: list[int], frames: Sequence[list[int]], room: int) -> list[int]:
    """`prompt` without the first of the tokens between those that it begins and ends with as all `frames` do, so that
    `room` are left; nothing if leaving out all of them is not enough.

    >>> _cut_within([1, 2, 10, 11, 12, 3], [[1, 2, 10, 3], [1, 2, 9, 3]], 5)
    [1, 2, 11, 12, 3]
    """
    before = min(_num_alike(prompt, frame) for frame in frames)
    behind = min(_num_alike(prompt[before:][::-1], frame[before:][::-1]) for frame in frames)
    spare = room - before - behind
    return prompt[:before] + prompt[len(prompt) - behind - spare :] if spare > 0 else []


def _num_alike(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _keep_end(prompt: Sequence[int], room: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The start token, if the prompt has one, and the last tokens of `prompt` that fit; empty if no text fits."""
    start = list(prompt[:1]) if prompt and prompt[0] == tokenizer.bos_token_id else []
    text = list(prompt[len(start) :])
    room -= len(start)
    if room < 1 or not text:
        return []
    return start + text[-room:]
