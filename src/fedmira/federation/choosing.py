"""Validated mixing: by the loss on its own validation examples, and what those of all say, each client decides how much
of its mixture it keeps, and by its own whether it trains on from it.

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

from fedmira.config.mira import ChoiceConfig
from fedmira.federation.method import Info, State
from fedmira.federation.questions import only_to_judge
from fedmira.types import Arena, Losses, Participants, Results, Trial

_HOPELESS = 5.0
"""The change of the logarithm of a loss that is not finite any more; a hundred times the loss is no better."""
_FURTHEST = 2.0
"""Standard errors by which what all say may move an answer (docs/log.md)."""

KEPT = ("alpha",)
"""What of its memory says what clients keep; the rest says where they train on from."""


def first_choice(num_clients: int) -> dict[str, torch.Tensor]:
    """What is remembered before round 1: everybody keeps all of its mixture and trains on from it; nobody was asked."""
    return {
        "alpha": torch.ones(num_clients, dtype=torch.float64),
        "start_alpha": torch.ones(num_clients, dtype=torch.float64),
        "rise": torch.zeros(num_clients, dtype=torch.float64),
        "asked": torch.zeros(num_clients, dtype=torch.float64),
    }


def blend(own: Arena, mixed: Arena, alpha_K: torch.Tensor) -> Arena:
    """Return (1 - alpha_k) own_k + alpha_k mixed_k, (K, P); rows with alpha 0 or 1 keep their bytes.

    To be read only: where all are 0, or all 1, it is what was handed in.
    """
    if (alpha_K == 1).all():
        return mixed
    if (alpha_K == 0).all():
        return own
    values_KP = mixed.values_KP.clone()
    for k in torch.nonzero(alpha_K != 1).flatten().tolist():
        values_KP[k] = own.values_KP[k]
        if alpha_K[k] != 0:
            values_KP[k].lerp_(mixed.values_KP[k], float(alpha_K[k]))
    return mixed.replace(values_KP)


def blended(state: State, alpha_K: torch.Tensor, ids: Sequence[int] | None = None) -> Arena:
    """Return what clients get by these shares, (S, P), to be read only, see `blend`.

    Args:
        state: its adapters are x, `uploads` in its memory is theta.
        alpha_K: shares of all clients.
        ids: whose rows; None for all clients.
    """
    own, mixed = state.adapters.replace(state.memory["uploads"]), state.adapters
    if ids is None:
        return blend(own, mixed, alpha_K)
    return blend(own.rows(ids), mixed.rows(ids), alpha_K[list(ids)])


def taken(state: State, share: str, ids: Sequence[int] | None = None) -> Arena:
    """Return what clients chose, (S, P), see `blended`: all of the mixture where nobody chooses.

    `share` is `alpha`, what they keep, or `start_alpha`, what they train on from.
    """
    return blended(state, state.memory.get(share, torch.ones(state.adapters.num_clients)), ids)


def asked(
    config: ChoiceConfig, participants: Participants, results: Results, last_round_K: Sequence[int]
) -> tuple[int, ...]:
    """Return who is asked after this round: in the last one all that ever returned, else those that just did."""
    if participants.last:
        return tuple(k for k, last in enumerate(last_round_K) if last)
    return results.ids if participants.round % config.every == 0 else ()


def ask(
    config: ChoiceConfig,
    state: State,
    participants: Participants,
    results: Results,
    groups: frozenset[str] | None = None,
) -> Trial | None:
    """Return the question after a round: which alpha of the grid? None if it goes to nobody.

    A client holds theta_k; x_k crosses for it only where it would not get that anyway, see `only_to_judge`.

    Args:
        config: has the grid, and says when to ask.
        state: after merging, see `blended`.
        participants: of the round that is over.
        results: of that round.
        groups: of tensors that cross; None means all.
    """
    ids, num_clients = asked(config, participants, results, state.last_round_K), state.adapters.num_clients

    def candidate(number: int) -> torch.Tensor:
        alpha_K = torch.full((num_clients,), config.grid[number], device=state.adapters.values_KP.device)
        return blended(state, alpha_K, ids).values_KP

    if not ids:
        return None
    return Trial(
        ids,
        len(config.grid),
        candidate,
        only_to_judge(participants, num_clients),
        groups=groups,
        most_examples=config.most_examples(),
        every=config.every,
        versus=(0,) if config.shrinkage else (),
    )


def choose(config: ChoiceConfig, state: State, trial: Trial, losses: Losses) -> tuple[State, Info]:
    """Return the state in which those asked keep the alpha that promises most and start from what they tolerate.

    What counts is by what share a client's loss differs from that of its own upload. To keep anything but its own a
    client must expect its loss to fall by `margin`, from its answer and all others, see `expected`, or from its answer
    alone without `shrinkage`; ties go to the smaller alpha. To leave the mixture as a start its own answers, a moving
    average over the rounds it was asked in, must be a rise by more than `tolerance`: who is in trouble says so itself.
    A loss that is not finite any more is one. A client without examples, or whose own loss is not finite, follows the
    mean of those that have both.
    """
    rows, memory = list(trial.ids), dict(state.memory)
    heard_S = torch.isfinite(losses.mean_SQ[:, 0])
    if not heard_S.any():
        # nobody holds validation examples: everybody goes on as before
        return state, Info({})
    # where nothing is lost there is nothing to gain: no change is not a loss that is not finite any more
    mean_SQ = losses.mean_SQ.clamp(min=torch.finfo(losses.mean_SQ.dtype).tiny)
    change_SQ = torch.log(mean_SQ / mean_SQ[:, :1])
    change_SQ = change_SQ.nan_to_num(nan=_HOPELESS).clamp(-_HOPELESS, _HOPELESS)
    usual_S = heard_S & (change_SQ < _HOPELESS).all(dim=1)
    change_SQ[~heard_S] = change_SQ[usual_S if usual_S.any() else heard_S].mean(dim=0)
    expected_SQ = change_SQ.clone()
    if config.shrinkage:
        assert losses.scatter_SQ is not None
        examples_S = torch.tensor(losses.examples_S, dtype=torch.float64)
        expected_SQ[heard_S] = expected(change_SQ[heard_S], losses.scatter_SQ[heard_S], examples_S[heard_S])
    past_S = config.memory * memory["asked"][rows].cpu()
    rise_S = past_S * memory["rise"][rows].cpu() + (1 - past_S) * change_SQ[:, -1].expm1()
    start_S = (rise_S <= config.tolerance).double()
    expected_SQ = expected_SQ.expm1()
    expected_SQ[:, 1:] += config.margin
    alpha_S = torch.tensor(config.grid, dtype=torch.float64)[expected_SQ.argmin(dim=1)]
    now = {"alpha": alpha_S, "start_alpha": start_S, "rise": rise_S, "asked": torch.ones_like(rise_S)}
    for name, now_S in now.items():
        memory[name] = memory[name].clone()
        memory[name][rows] = now_S.to(memory[name])
    numbers = {"mean_alpha": float(alpha_S.mean()), "start_from_own": float((start_S == 0).double().mean())}
    return replace(state, memory=memory), Info(numbers)


def expected(change_SQ: torch.Tensor, scatter_SQ: torch.Tensor, examples_S: torch.Tensor) -> torch.Tensor:
    """Return what clients can expect their log losses to change by, (S, Q): m + t^2 / (t^2 + v_s) (c_s - m).

    A few examples say little. But how far c_s would move with others of its kind, v_s, shows in how they scatter, and
    t^2 = var(c) - mean(v), at least 0, is what is left of the differences between clients without that: where there is
    nothing left all answers are one, and where clients differ each has its own (parametric empirical Bayes, Morris,
    JASA 1983, with the variance component of Hedges and Olkin, 1985). v_s = u / N_s, u the mean of what one example
    scatters by, weighted by N_s - 1, and m the mean weighted by 1 / (t^2 + v_s), candidate by candidate. No answer is
    moved further than two standard errors, its own or, if larger, those by the median of what examples scatter by
    (limited translation, Efron and Morris, JASA 1972): one client that is ruined, or lies, cannot decide for others
    that are sure. Where nobody holds two examples chance cannot be told, and each answer counts alone.

    Args:
        change_SQ: c_s of each candidate; those that are hopeless stay, and say nothing about others.
        scatter_SQ: see `Losses`.
        examples_S: N_s, 1 or more.
    """
    expected_SQ = change_SQ.clone()
    for number, (change_S, scatter_S) in enumerate(zip(change_SQ.T, scatter_SQ.T, strict=True)):
        usual_S = change_S.abs() < _HOPELESS
        known_S = usual_S & (examples_S > 1) & (scatter_S >= 0) & torch.isfinite(scatter_S)
        if usual_S.sum() < 2 or not known_S.any():
            continue
        freedom_S = examples_S[known_S] - 1
        noise_S = (freedom_S * scatter_S[known_S]).sum() / freedom_S.sum() / examples_S[usual_S]
        own_S = change_S[usual_S]
        between = (own_S.var() - noise_S.mean()).clamp(min=0)
        if not noise_S.any():
            # nothing scatters
            continue
        mean = (own_S / (between + noise_S)).sum() / (1 / (between + noise_S)).sum()
        moved_S = noise_S / (between + noise_S) * (mean - own_S)
        # a few examples hardly say how they scatter: where it is less than usual that is taken for chance
        typical = scatter_S[known_S].median()
        one_S = torch.where(known_S, scatter_S.clamp(min=typical), typical)[usual_S]
        furthest_S = _FURTHEST * (one_S / examples_S[usual_S]).sqrt()
        expected_SQ[usual_S, number] = own_S + moved_S.clamp(-furthest_S, furthest_S)
    return expected_SQ
