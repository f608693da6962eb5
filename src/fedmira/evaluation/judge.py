"""Judges every client with its own adapter: loss on a split, and answers compared with the references.

Knows nothing about how the adapters came to be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fedmira.data.tokenization import prompt_tokens
from fedmira.evaluation.generation import generate, tokens_for
from fedmira.evaluation.loss import evaluate_loss
from fedmira.evaluation.meters import ClientRecord
from fedmira.evaluation.rouge import exact_match, rouge_l
from fedmira.types import Arena, Layout

if TYPE_CHECKING:
    from fedmira.config.run import EvaluationConfig
    from fedmira.data.tokenization import TokenizedClient
    from fedmira.model.base import BaseModel

_LOST = {"beginning": "their beginning", "input": "the beginning of their input, or their own where that is not enough"}


def validation_losses(
    base: BaseModel, arena: Arena, clients: Sequence[TokenizedClient], evaluation: EvaluationConfig
) -> list[tuple[float, int]]:
    """Cross entropy in nats summed over supervised tokens of each client's validation split, and their number."""
    return evaluate_loss(base, arena, [client.validation for client in clients], evaluation.batch_tokens)


class Answer(NamedTuple):
    """What a client's adapter answered to one of its test examples."""

    client: str
    example: str
    """Its id."""
    answer: str
    rouge_l: float
    """0 to 1, the best over its references."""


def _ignore(answer: Answer) -> None: ...


def final_records(
    base: BaseModel,
    arena: Arena,
    clients: Sequence[TokenizedClient],
    evaluation: EvaluationConfig,
    on_answer: Callable[[Answer], None] = _ignore,
) -> list[ClientRecord]:
    """The record of each client on its test split; row k of `arena` (K, P) judges client k.

    `on_answer` is told every answer that was generated.
    """
    losses = evaluate_loss(base, arena, [client.test for client in clients], evaluation.batch_tokens)
    answers: list[list[str]] = [[] for _ in clients]
    if evaluation.generation.enabled:
        # what all clients are taught to end an answer with
        taught = {int(example.tokens[-1]) for client in clients for example in client.test}
        ends = taught if len(taught) == 1 else ()
        most = evaluation.generation.max_new_tokens
        _, room = tokens_for(base, arena.layout, most)
        prompts = _prompts(clients, evaluation)
        asked = [_shortened(base, client, own, room) for client, own in zip(clients, prompts, strict=True)]
        answers = generate(base, arena, asked, most, ends=ends)
    records = []
    for client, (loss_sum, tokens), client_answers in zip(clients, losses, answers, strict=True):
        asked_of = client.examples.test[: len(client_answers)]
        wanted = [example.references or (example.output,) for example in asked_of]
        pairs = list(zip(client_answers, wanted, strict=True))
        scores = [rouge_l(answer, references) for answer, references in pairs]
        for example, answer, score in zip(asked_of, client_answers, scores, strict=True):
            on_answer(Answer(client.name, example.id, answer, score))
        records.append(
            ClientRecord(
                name=client.name,
                task=client.examples.task,
                category=client.examples.category,
                loss_sum=loss_sum,
                tokens=tokens,
                rouge_l_sum=sum(scores),
                exact_match_sum=float(sum(exact_match(answer, references) for answer, references in pairs)),
                generated=len(pairs),
            )
        )
    return records


def shortened_line(
    base: BaseModel, layout: Layout, clients: Sequence[TokenizedClient], evaluation: EvaluationConfig
) -> str:
    """How many test prompts lose what so that an answer fits behind them; empty if none does."""
    if not (evaluation.test and evaluation.generation.enabled):
        return ""
    new_tokens, room = tokens_for(base, layout, evaluation.generation.max_new_tokens)
    lengths = [len(prompt) for prompts in _prompts(clients, evaluation) for prompt in prompts]
    shortened = sum(length > room for length in lengths)
    if not shortened:
        return ""
    return (
        f"{shortened} of {len(lengths)} test prompts are answered without {_LOST[clients[0].cut]}: {new_tokens} new "
        f"tokens leave {room} of the model's {base.max_length} for them; lower evaluation.generation.max_new_tokens or "
        "data.max_length to keep prompts whole"
    )


def _prompts(clients: Sequence[TokenizedClient], evaluation: EvaluationConfig) -> list[list[np.ndarray]]:
    """The test prompts that each client answers."""
    limit = evaluation.generation.examples_per_client
    return [[example.tokens[: example.prompt_length] for example in client.test[:limit]] for client in clients]


def _shortened(base: BaseModel, client: TokenizedClient, prompts: Sequence[np.ndarray], room: int) -> list[np.ndarray]:
    """The first test prompts of `client`; one of more than `room` tokens loses what it would have lost in training.

    Generation cuts beginnings itself, and prompts of which a single token has room, which may be the start token's.
    """
    if client.cut == "beginning" or room == 1:
        return list(prompts)
    return [
        prompt if len(prompt) <= room else prompt_tokens(example, base.tokenizer, client.template, room, cut=client.cut)
        for prompt, example in zip(prompts, client.examples.test, strict=False)
    ]
