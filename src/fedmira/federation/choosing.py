"""Validated mixing: each client chooses, by the loss on its own validation examples, how much of the mixture it takes.

Client k may start from (1 - alpha) theta_k + alpha x_k, theta_k its own upload and x_k what the server mixed for it,
for each alpha of a grid; it judges all of them. Few examples say little, so what they say is remembered over rounds and
drawn towards what all clients say together. Knows nothing about graphs or how x_k came to be.

Axes: K clients, S asked, Q candidates, P parameters of one adapter.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fedmira.federation.method import Info, State
from fedmira.method_config import ChoiceConfig
from fedmira.types import Arena, Losses, Results, Trial


def first_choice(config: ChoiceConfig, num_clients: int) -> dict[str, torch.Tensor]:
    """What is remembered before round 1: everybody takes the last alpha of the grid, and nobody has said anything."""
    return {
        "choice": torch.full((num_clients,), config.grid[-1], dtype=torch.float64),
        "evidence": torch.zeros(num_clients, len(config.grid), dtype=torch.float64),
        "evidence_tokens": torch.zeros(num_clients, dtype=torch.float64),
    }


def blend(own: Arena, mixed: Arena, alpha_K: torch.Tensor) -> Arena:
    """Return (1 - alpha_k) own_k + alpha_k mixed_k, (K, P); rows with alpha 0 or 1 keep their bytes."""
    share_K1 = alpha_K[:, None].to(own.values_KP)
    values_KP = torch.lerp(own.values_KP, mixed.values_KP, share_K1)
    values_KP = torch.where(share_K1 == 0, own.values_KP, values_KP)
    return own.replace(torch.where(share_K1 == 1, mixed.values_KP, values_KP))


def ask(config: ChoiceConfig, own: Arena, mixed: Arena, results: Results) -> Trial | None:
    """Return the question to those that returned: which alpha? None if nobody did.

    Nothing more crosses than without the question: x_k is what a client gets anyway, and it holds theta_k.
    """
    if not results.ids:
        return None
    rows = list(results.ids)
    own_S, mixed_S = own.replace(own.values_KP[rows]), mixed.replace(mixed.values_KP[rows])

    def candidate(number: int) -> torch.Tensor:
        alpha_S = torch.full((len(rows),), config.grid[number], device=own.values_KP.device)
        return blend(own_S, mixed_S, alpha_S).values_KP

    return Trial(results.ids, len(config.grid), candidate, sent=0)


def choose(config: ChoiceConfig, state: State, trial: Trial, losses: Losses) -> tuple[State, Info]:
    """Return the state in which those asked take the alpha that did best, and how much they take on average.

    The evidence of a client is the relative change of its loss from that at the smallest alpha, a moving average over
    its rounds; its weight is its validation tokens against `pooling` tokens of the mean over all clients. Anything but
    the smallest alpha must lower the loss by `margin`; ties go to the smaller alpha. A client without validation
    examples follows the mean of the others.
    """
    rows = list(trial.ids)
    gains_SQ = losses.mean_SQ / losses.mean_SQ[:, :1] - 1.0
    heard_S = torch.isfinite(gains_SQ).all(dim=1)
    memory = {name: tensor.clone() for name, tensor in state.memory.items() if name.startswith(("choice", "evidence"))}
    evidence_KQ, tokens_K, choice_K = memory["evidence"], memory["evidence_tokens"], memory["choice"]
    for s, k in enumerate(rows):
        if heard_S[s]:
            past = config.memory if tokens_K[k] else 0.0
            evidence_KQ[k] = past * evidence_KQ[k] + (1 - past) * gains_SQ[s].to(evidence_KQ.device)
            tokens_K[k] = losses.tokens_S[s]
    known_K = tokens_K > 0
    if not known_K.any():
        # nobody holds validation examples: everybody goes on as before
        return state, Info({})
    common_Q = evidence_KQ[known_K].mean(dim=0)
    weight_K1 = (tokens_K / (tokens_K + config.pooling).clamp(min=1e-9))[:, None]
    expected_KQ = weight_K1 * evidence_KQ + (1 - weight_K1) * common_Q
    expected_KQ[:, 1:] += config.margin
    best_K = expected_KQ.argmin(dim=1)
    chosen = best_K[rows].tolist()
    values_KP = state.adapters.values_KP.clone()
    for number in sorted(set(chosen)):
        takes = [s for s, its in enumerate(chosen) if its == number]
        values_KP[[rows[s] for s in takes]] = trial.candidate(number)[takes]
    choice_K[rows] = torch.tensor(config.grid, dtype=torch.float64, device=choice_K.device)[chosen]
    numbers = {"mean_alpha": float(choice_K[rows].mean()), "alpha_zero": float((choice_K[rows] == 0).double().mean())}
    after: Mapping[str, torch.Tensor] = {**state.memory, **memory}
    return State(state.adapters.replace(values_KP), state.last_round_K, after), Info(numbers)
