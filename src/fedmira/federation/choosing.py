"""Validated mixing: by the loss on its own validation examples each client decides how much of its mixture it keeps, and
whether it trains on from it.

Client k may keep (1 - alpha) theta_k + alpha x_k, theta_k its own upload and x_k what the server mixed for it, for each
alpha of a grid. It trains on from x_k unless that raises its loss by more than a tolerance, and then from theta_k: a
mixture is a little worse than what was just fitted, and still the better place to start from (docs/log.md has numbers).
Knows nothing about graphs or how x_k came to be.

Axes: K clients, S asked, Q candidates, P parameters of one adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from fedmira.federation.method import Info, State
from fedmira.method_config import ChoiceConfig
from fedmira.types import Arena, Losses, Participants, Results, Trial

ENDS = (0.0, 1.0)
"""What is judged while the run goes on: the own upload and the whole mixture."""


def first_choice(num_clients: int) -> dict[str, torch.Tensor]:
    """What is remembered before round 1: everybody keeps all of its mixture and trains on from it."""
    return {
        "alpha": torch.ones(num_clients, dtype=torch.float64),
        "start_alpha": torch.ones(num_clients, dtype=torch.float64),
    }


def blend(own: Arena, mixed: Arena, alpha_K: torch.Tensor) -> Arena:
    """Return (1 - alpha_k) own_k + alpha_k mixed_k, (K, P); rows with alpha 0 or 1 keep their bytes."""
    if (alpha_K == 1).all():
        return mixed
    share_K1 = alpha_K[:, None].to(own.values_KP)
    values_KP = torch.lerp(own.values_KP, mixed.values_KP, share_K1)
    values_KP = torch.where(share_K1 == 0, own.values_KP, values_KP)
    return own.replace(torch.where(share_K1 == 1, mixed.values_KP, values_KP))


def asked(
    config: ChoiceConfig, participants: Participants, results: Results, last_round_K: Sequence[int]
) -> tuple[int, ...]:
    """Return who is asked after this round: in the last one all that ever returned, else those that just did, or none."""
    if participants.last:
        return tuple(k for k, last in enumerate(last_round_K) if last)
    return results.ids if participants.round % config.every == 0 else ()


def ask(grid: Sequence[float], own: Arena, mixed: Arena, ids: tuple[int, ...]) -> Trial | None:
    """Return the question to `ids`: which alpha of `grid`? None if it goes to nobody.

    Nothing more crosses than without the question: x_k is what a client gets anyway, and it holds theta_k.

    Args:
        grid: shares of the mixture.
        own: theta of all K clients.
        mixed: x of all K clients.
        ids: rows of those asked, ascending.
    """
    rows = list(ids)

    def candidate(number: int) -> torch.Tensor:
        alpha_S = torch.full((len(rows),), grid[number], device=own.values_KP.device)
        own_S, mixed_S = own.replace(own.values_KP[rows]), mixed.replace(mixed.values_KP[rows])
        return blend(own_S, mixed_S, alpha_S).values_KP

    return Trial(ids, len(grid), candidate, sent=0) if rows else None


def choose(config: ChoiceConfig, state: State, trial: Trial, losses: Losses) -> tuple[State, Info]:
    """Return the state in which those asked keep the alpha that did best and start from what they tolerate.

    What counts is the change of a client's loss relative to that of its own upload; its weight is its validation
    tokens against `pooling` tokens of the mean over all that were asked. To keep anything but its own a client must
    lower the loss by `margin`; ties go to the smaller alpha. To leave the mixture as a start its loss must rise by
    more than `tolerance`. A client without validation examples follows the mean.
    """
    grid = torch.tensor(config.grid if trial.num_candidates == len(config.grid) else ENDS, dtype=torch.float64)
    change_SQ = losses.mean_SQ / losses.mean_SQ[:, :1] - 1.0
    heard_S = torch.isfinite(change_SQ).all(dim=1)
    if not heard_S.any():
        # nobody holds validation examples: everybody goes on as before
        return state, Info({})
    common_Q = change_SQ[heard_S].mean(dim=0)
    tokens_S = torch.where(heard_S, torch.tensor(losses.tokens_S, dtype=torch.float64), 0.0)
    weight_S1 = (tokens_S / (tokens_S + config.pooling).clamp(min=1e-9))[:, None]
    expected_SQ = weight_S1 * change_SQ.nan_to_num() + (1 - weight_S1) * common_Q
    start_S = (expected_SQ[:, -1] <= config.tolerance).double()
    expected_SQ[:, 1:] += config.margin
    alpha_S = grid[expected_SQ.argmin(dim=1)]
    chosen = {"alpha": alpha_S, "start_alpha": start_S}
    memory = dict(state.memory)
    for name, chosen_S in chosen.items():
        memory[name] = memory[name].clone()
        memory[name][list(trial.ids)] = chosen_S.to(memory[name])
    numbers = {"mean_alpha": float(alpha_S.mean()), "start_from_own": float((start_S == 0).double().mean())}
    return replace(state, memory=memory), Info(numbers)
