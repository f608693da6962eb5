"""Texts of the server's own, on which it compares how adapters predict: from a file, or made of random tokens.

They are rendered and tokenized as clients' examples are, so that adapters meet what they were trained to answer. Knows
nothing about models or graphs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedmira.config.data import Cut, JsonlConfig
from fedmira.data.sources import jsonl
from fedmira.data.tokenization import TokenizedExample, tokenize_federation
from fedmira.errors import DataError
from fedmira.randomness import generator
from fedmira.types import Client, Example, Federation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_INSTRUCTION_TOKENS, _ANSWER_TOKENS = 16, 8


def probe_texts(
    path: str | None,
    count: int,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    max_length: int,
    cut: Cut,
    seed: int,
) -> tuple[TokenizedExample, ...]:
    """Return at most `count` tokenized texts: the first of the file, or `count` made of random tokens.

    Args:
        path: a file, folder or glob as the source jsonl reads them; None draws the texts.
        count: how many.
        tokenizer: the base model's.
        template: how an example becomes text, that of the clients.
        max_length: tokens of a sequence at most.
        cut: what a prompt that is too long loses.
        seed: of the draws.

    Raises:
        DataError: the file is missing, unusable or holds no example that fits.
    """
    if path is None:
        examples = _random_examples(count, tokenizer, seed)
    else:
        source = jsonl.load(JsonlConfig(source="jsonl", path=path), seed, nameable=False)
        examples = source.examples[:count]
        if not examples:
            raise DataError(f"method.graph.probe_path: {path} holds no example; give instructions with answers")
    probe = Federation((Client("probe", examples, (), ()),))
    [client], _ = tokenize_federation(probe, tokenizer, template, max_length, cut)
    return client.train


def _random_examples(count: int, tokenizer: PreTrainedTokenizerBase, seed: int) -> tuple[Example, ...]:
    """Instructions and answers of random tokens, decoded: no text that anybody wrote."""
    special = set(tokenizer.all_special_ids)
    words = [token for token in range(tokenizer.vocab_size) if token not in special]
    stream = generator(seed, "probe")

    def text(length: int) -> str:
        return str(tokenizer.decode([words[place] for place in stream.integers(len(words), size=length)]))

    return tuple(
        Example(instruction=text(_INSTRUCTION_TOKENS), output=text(_ANSWER_TOKENS), id=f"probe-{number}")
        for number in range(count)
    )
