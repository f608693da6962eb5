"""Clients of random tokens whose lengths are those of real data (`lengths.json`, see `measure_lengths.py`).

Knows nothing about models, peers or time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedmira.data.tokenization import TokenizedClient, TokenizedExample
from fedmira.randomness import generator
from fedmira.types import Client

LENGTHS_FILE = Path(__file__).with_name("lengths.json")
FIRST_ORDINARY_TOKEN = 3
"""The ids below are special tokens of every shape."""


class Parts(NamedTuple):
    """Tokens of one example."""

    shared: int
    """Beginning of the prompt that all examples of the client have in common."""
    own: int
    """The rest of the prompt."""
    answer: int
    """The supervised tokens, the end token among them."""


def read_lengths(name: str) -> dict[str, list[Parts]]:
    """Task -> lengths of its examples, for `dolly` or `natural_instructions`."""
    content = json.loads(LENGTHS_FILE.read_text(encoding="ascii"))
    return {task: [Parts(*parts) for parts in lengths] for task, lengths in content[name].items()}


def make_clients(
    name: str, num_clients: int, vocabulary: int, *, longest: int, shrink: int = 1
) -> tuple[TokenizedClient, ...]:
    """Clients that hold random tokens in the lengths of the tasks of `name`, one task after the other.

    Args:
        name: `dolly` or `natural_instructions`.
        num_clients: client k takes task k modulo the number of tasks.
        vocabulary: tokens are drawn below it.
        longest: examples of more tokens are left out.
        shrink: every part is divided by it and rounded up, for tiny models.
    """
    tasks = list(read_lengths(name).items())
    clients = []
    for index in range(num_clients):
        task, lengths = tasks[index % len(tasks)]
        rng = generator(0, "benchmark tokens", index)
        shared = rng.integers(FIRST_ORDINARY_TOKEN, vocabulary, size=_shrunk(lengths[0], shrink).shared)
        examples: list[TokenizedExample] = []
        for parts in (_shrunk(one, shrink) for one in lengths):
            rest = rng.integers(FIRST_ORDINARY_TOKEN, vocabulary, size=parts.own + parts.answer)
            if sum(parts) <= longest:
                tokens = np.concatenate([shared, rest]).astype(np.int32)
                prompt_length = parts.shared + parts.own
                examples.append(TokenizedExample(tokens, prompt_length, f"{task}:{len(examples)}"))
        client = f"client-{index:03d}"
        clients.append(TokenizedClient(client, tuple(examples), (), (), Client(client, (), (), (), task=task)))
    return tuple(clients)


def _shrunk(parts: Parts, shrink: int) -> Parts:
    return Parts(*(-(-part // shrink) for part in parts))
