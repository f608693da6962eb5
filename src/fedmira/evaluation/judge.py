"""Judges every client with its own adapter: loss on a split, and answers compared with the references.

Knows nothing about how the adapters came to be.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedmira.evaluation.generation import generate
from fedmira.evaluation.loss import evaluate_loss
from fedmira.evaluation.meters import ClientRecord
from fedmira.evaluation.rouge import exact_match, rouge_l
from fedmira.types import Arena

if TYPE_CHECKING:
    from fedmira.config import EvaluationConfig
    from fedmira.data.tokenization import TokenizedClient
    from fedmira.model.base import BaseModel


def validation_losses(
    base: BaseModel, arena: Arena, clients: Sequence[TokenizedClient], evaluation: EvaluationConfig
) -> list[tuple[float, int]]:
    """Cross entropy in nats summed over supervised tokens of each client's validation split, and their number."""
    return evaluate_loss(base, arena, [client.validation for client in clients], evaluation.batch_tokens)


def final_records(
    base: BaseModel, arena: Arena, clients: Sequence[TokenizedClient], evaluation: EvaluationConfig
) -> list[ClientRecord]:
    """The record of each client on its test split; row k of `arena` (K, P) judges client k."""
    losses = evaluate_loss(base, arena, [client.test for client in clients], evaluation.batch_tokens)
    limit = evaluation.generation.examples_per_client if evaluation.generation.enabled else 0
    asked = [client.test[:limit] for client in clients]
    answers: list[list[str]] = [[] for _ in clients]
    if evaluation.generation.enabled:
        prompts = [[example.tokens[: example.prompt_length] for example in examples] for examples in asked]
        answers = generate(base, arena, prompts, evaluation.generation.max_new_tokens)
    records = []
    for client, (loss_sum, tokens), client_answers in zip(clients, losses, answers, strict=True):
        wanted = [example.references or (example.output,) for example in client.examples.test[: len(client_answers)]]
        pairs = list(zip(client_answers, wanted, strict=True))
        records.append(
            ClientRecord(
                name=client.name,
                task=client.examples.task,
                category=client.examples.category,
                loss_sum=loss_sum,
                tokens=tokens,
                rouge_l_sum=sum(rouge_l(answer, references) for answer, references in pairs),
                exact_match_sum=float(sum(exact_match(answer, references) for answer, references in pairs)),
                generated=len(pairs),
            )
        )
    return records
