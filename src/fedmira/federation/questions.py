"""Several questions to the same clients, asked as one trial and taken apart when the answers are in.

Knows nothing about what is asked. Axes: S asked, Q candidates, P parameters of one adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from fedmira.federation.method import Info, Method, State
from fedmira.types import Losses, Participants, Trial


def only_to_judge(participants: Participants, num_clients: int) -> int:
    """Return how many more adapters cross when a client judges what it will start from: 0 or 1.

    Where everybody takes part it gets them anyway, and after the last round it takes them home. Else they are something
    else by the time of its next turn.
    """
    return int(not participants.last and len(participants.ids) < num_clients)


def bounded(trial: Trial, participants: Participants, most_examples: int | None) -> Trial:
    """Return the question put to at most that many validation examples of each client, or to all after the last round.

    Where it wants fewer itself, it gets those. Questions about training examples stay as they are.
    """
    if trial.split == "train":
        return trial
    if participants.last:
        return trial._replace(most_examples=None)
    limits = [limit for limit in (trial.most_examples, most_examples) if limit is not None]
    return trial._replace(most_examples=min(limits, default=None), turn=participants.round // trial.every - 1)


def together(first: Trial | None, rest: Trial | None) -> Trial | None:
    """Return both questions as one; `apart` undoes it. None if there is nothing to ask.

    It goes to the examples whose turn it is with the one that is asked more rarely, so both come to meet all of them.

    Raises:
        ValueError: the two go to other clients, or to other examples, or the first compares its candidates and would
            compare the other's as well.
    """
    if first is None and rest is None:
        return None
    one = first or rest
    assert one is not None
    if rest is not None and (one.ids, one.split) != (rest.ids, rest.split):
        raise ValueError("questions that are asked together go to other clients, or to other examples")
    before = 0 if first is None else first.num_candidates
    if first is not None and first.versus and rest is not None and rest.versus[:1] != (0,):
        raise ValueError("a question that compares its candidates is asked after all others, or before one that does")

    asking = [part for part in (first, rest) if part is not None and part.num_candidates]
    limits = [part.most_examples for part in asking if part.most_examples is not None]

    def candidate(number: int) -> torch.Tensor:
        part, place = (first, number) if number < before else (rest, number - before)
        assert part is not None
        return part.candidate(place)

    return one._replace(
        num_candidates=before + (rest.num_candidates if rest is not None else 0),
        candidate=candidate,
        most_examples=max(limits) if limits and len(limits) == len(asking) else None,
        sent=sum(part.sent for part in (first, rest) if part is not None),
        every=max(part.every for part in (first, rest) if part is not None),
        versus=(*(first.versus if first else ()), *(before + number for number in (rest.versus if rest else ()))),
        parts=(before, *((rest.parts or (rest.num_candidates,)) if rest is not None else ())),
    )


def apart(trial: Trial, losses: Losses) -> tuple[tuple[Trial | None, Losses], tuple[Trial | None, Losses]]:
    """Return the first question and the rest of a trial made by `together`, each with its answers."""
    before, *others = trial.parts
    first = rest = None
    if before or trial.compare_SP is not None:
        own = tuple(number for number in trial.versus if number < before)
        first = trial._replace(num_candidates=before, parts=(), versus=own)
    if others:
        rest = trial._replace(
            num_candidates=trial.num_candidates - before,
            candidate=lambda number: trial.candidate(before + number),
            parts=tuple(others),
            compare_SP=None,
            versus=tuple(number - before for number in trial.versus if number >= before),
        )
    return (first, _columns(losses, slice(None, before))), (rest, _columns(losses, slice(before, None)))


def answered(
    method: Method,
    state: State,
    trial: Trial,
    losses: Losses,
    hear: Callable[[Trial, Losses], Mapping[str, torch.Tensor]],
) -> tuple[State, Info]:
    """Return what follows from the answers to a trial of `together`: `hear` remembers, then `method` decides its own.

    Args:
        method: whose own question is the rest of the trial, if it has one.
        state: before the answers.
        trial: the question.
        losses: the answers.
        hear: from the first question and its answers to what replaces parts of the memory.
    """
    (first, first_losses), (own, own_losses) = apart(trial, losses)
    if first is not None:
        state = replace(state, memory={**state.memory, **hear(first, first_losses)})
    if own is None or method.decide is None:
        return state, Info({})
    return method.decide(state, own, own_losses)


def _columns(losses: Losses, candidates: slice) -> Losses:
    """The answers about some candidates."""
    scatter_SQ = None if losses.scatter_SQ is None else losses.scatter_SQ[:, candidates]
    return losses._replace(mean_SQ=losses.mean_SQ[:, candidates], scatter_SQ=scatter_SQ)
