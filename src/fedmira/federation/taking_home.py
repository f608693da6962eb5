"""What clients take home as a moving average over rounds: theirs of this round and a share of what they had before.

Late in a run each round moves an adapter around a good place as much as towards it; the mean of a few rounds lies
closer (Polyak and Juditsky 1992; Izmailov et al., UAI 2018, for networks). Where rounds still lead somewhere, at a low
learning rate, it lags behind; so clients that judge what they keep can judge it as well. They still train on from the
last round. Knows nothing about how a method came to what it hands out.

Axes: K clients, S asked, Q candidates, P parameters of one adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from fedmira.federation.method import Info, Method, State
from fedmira.federation.questions import apart, together
from fedmira.types import Arena, Clients, Losses, Participants, Results, Trial


def over_rounds(method: Method, decay: float, *, judged: bool = False) -> Method:
    """Return `method` whose clients take home decay h + (1 - decay) x: x what they would, h what they had a round ago.

    A client that had not returned by then has no h, and takes home x.

    Args:
        method: any that leaves the base as it is; to another base earlier adapters do not fit.
        decay: in [0, 1); 0 returns `method` itself, and costs nothing.
        judged: after the last round clients judge x and the average, and all take home x if the mean of their losses is
            smaller with it: one client's few examples could not tell. Needs a method whose own question is about what
            clients may take home.
    """
    if not decay:
        return method

    def init(initial: Arena, clients: Clients) -> State:
        state = method.init(initial, clients)
        before = {
            "home": initial.values_KP.clone(),
            "has_home": torch.zeros(initial.num_clients),
            "takes_average": torch.ones(1),
        }
        return replace(state, memory={**state.memory, **before})

    def merge(state: State, participants: Participants, results: Results) -> tuple[State, Info]:
        after, info = method.merge(state, participants, results)
        has_home_K = torch.tensor([float(last > 0) for last in state.last_round_K]).to(state.memory["has_home"])
        # the average goes on as if clients had not been asked whether they want it
        home_KP = averaged(state, method.personalise(state).values_KP, slice(None))
        before = {"home": home_KP, "has_home": has_home_K, "takes_average": torch.ones(1)}
        return replace(after, memory={**after.memory, **before}), info

    def averaged(state: State, now_SP: torch.Tensor, rows: Sequence[int] | slice) -> torch.Tensor:
        has_home_S = state.memory["has_home"][rows]
        if not has_home_S.any():
            return now_SP
        return torch.lerp(now_SP, state.memory["home"][rows], (decay * has_home_S[:, None]).to(now_SP))

    def personalise(state: State) -> Arena:
        now = method.personalise(state)
        return now.replace(averaged(state, now.values_KP, slice(None))) if state.memory["takes_average"] else now

    def trial(state: State, participants: Participants, results: Results) -> Trial | None:
        own = method.trial(state, participants, results) if method.trial else None
        if own is None or not participants.last or not state.memory["has_home"][list(own.ids)].any():
            return together(None, own)
        rows, sent = list(own.ids), int(len(participants.ids) < state.adapters.num_clients)
        candidates = own._replace(
            candidate=lambda number: averaged(state, own.candidate(number), rows),
            sent=sent,
            parts=(),
            compare_SP=None,
            versus=None,
        )
        return together(candidates, own)

    def decide(state: State, trial: Trial, losses: Losses) -> tuple[State, Info]:
        (average, average_losses), (own, own_losses) = apart(trial, losses)
        assert own is not None
        assert method.decide is not None
        state, info = method.decide(state, own, own_losses)
        if average is None:
            return state, info
        # which candidate each client took; nearest and not equal, as candidates may have been cut to a client's rank
        taken_SP = method.personalise(state).values_KP[list(trial.ids)]
        distance_SQ = [(own.candidate(q) - taken_SP).square().sum(dim=1) for q in range(own.num_candidates)]
        taken_S1 = torch.stack(distance_SQ, dim=1).argmin(dim=1, keepdim=True).cpu()
        heard_S = torch.tensor(losses.examples_S) > 0
        with_S, without_S = (
            answers.mean_SQ.gather(1, taken_S1)[heard_S, 0].nan_to_num(nan=torch.inf)
            for answers in (average_losses, own_losses)
        )
        # a loss that is not finite any more is worse than any that is, and two of them are equal
        gain = (without_S - with_S).nan_to_num(nan=0.0).sum()
        better = float(gain.isnan() or gain >= 0)
        state = replace(state, memory={**state.memory, "takes_average": torch.full((1,), better)})
        return state, info._replace(numbers={**info.numbers, "takes_average": better})

    over = method._replace(init=init, merge=merge, personalise=personalise)
    return over._replace(trial=trial, decide=decide) if judged else over
