"""Several questions to the same clients, asked as one trial and taken apart when the answers are in.

Knows nothing about what is asked. Axes: S asked, Q candidates, P parameters of one adapter.
"""

from __future__ import annotations

import torch

from fedmira.types import Losses, Participants, Trial


def only_to_judge(participants: Participants, num_clients: int) -> int:
    """Return how many more adapters cross when a client judges what it will start from: 0 or 1.

    Where everybody takes part it gets them anyway, and after the last round it takes them home. Else they are something
    else by the time of its next turn.
    """
    return int(not participants.last and len(participants.ids) < num_clients)


def bounded(trial: Trial, participants: Participants, most_examples: int | None) -> Trial:
    """Return the question put to at most that many validation examples of each client, or to all after the last round.

    Questions about training examples stay as they are.
    """
    if participants.last or trial.split == "train":
        return trial
    return trial._replace(most_examples=most_examples, turn=participants.round - 1)


def together(first: Trial | None, rest: Trial | None) -> Trial | None:
    """Return both questions as one; `apart` undoes it. None if there is nothing to ask.

    Raises:
        ValueError: the two go to other clients, or to other examples, or the first compares its candidates.
    """
    if first is None and rest is None:
        return None
    one = first or rest
    assert one is not None
    if rest is not None and (one.ids, one.split) != (rest.ids, rest.split):
        raise ValueError("questions that are asked together go to other clients, or to other examples")
    before = 0 if first is None else first.num_candidates
    if rest is not None and first is not None and first.versus is not None:
        raise ValueError("a question that compares its candidates is asked after all others")

    def candidate(number: int) -> torch.Tensor:
        part, place = (first, number) if number < before else (rest, number - before)
        assert part is not None
        return part.candidate(place)

    return one._replace(
        num_candidates=before + (rest.num_candidates if rest is not None else 0),
        candidate=candidate,
        sent=sum(part.sent for part in (first, rest) if part is not None),
        versus=one.versus if rest is None or rest.versus is None else before + rest.versus,
        parts=(before, *((rest.parts or (rest.num_candidates,)) if rest is not None else ())),
    )


def apart(trial: Trial, losses: Losses) -> tuple[tuple[Trial | None, Losses], tuple[Trial | None, Losses]]:
    """Return the first question and the rest of a trial made by `together`, each with its answers."""
    before, *others = trial.parts
    first = rest = None
    if before or trial.compare_SP is not None:
        first = trial._replace(num_candidates=before, parts=(), versus=None if others else trial.versus)
    if others:
        rest = trial._replace(
            num_candidates=trial.num_candidates - before,
            candidate=lambda number: trial.candidate(before + number),
            parts=tuple(others),
            compare_SP=None,
            versus=None if trial.versus is None else trial.versus - before,
        )
    return (first, _columns(losses, slice(None, before))), (rest, _columns(losses, slice(before, None)))


def _columns(losses: Losses, candidates: slice) -> Losses:
    """The answers about some candidates."""
    scatter_SQ = None if losses.scatter_SQ is None else losses.scatter_SQ[:, candidates]
    return losses._replace(mean_SQ=losses.mean_SQ[:, candidates], scatter_SQ=scatter_SQ)
