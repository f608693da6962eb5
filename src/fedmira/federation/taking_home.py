"""What clients take home as a moving average over rounds: theirs of this round and a share of what they had before.

Late in a run each round moves an adapter around a good place as much as towards it; the mean of a few rounds lies
closer (Polyak and Juditsky 1992; Izmailov et al., UAI 2018, for networks). Where rounds still lead somewhere, at a low
learning rate, it lags behind; so clients that judge what they keep can judge it as well. They still train on from the
last round. Knows nothing about how a method came to what it hands out.

Axes: K clients, S asked, Q candidates, P parameters of one adapter.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch

from fedmira.federation.method import Info, Method, State
from fedmira.federation.questions import apart, together
from fedmira.federation.receiving import share_of_round
from fedmira.types import Arena, Clients, Losses, Participants, Results, Trial

_ABOUT_AVERAGE = "average."
"""Begins the names of what is decided about the average."""


def over_rounds(method: Method, decay: float, judged: Collection[str] = ()) -> Method:
    """Return `method` whose clients take home d h + (1 - d) x: x what they would, h what they had a round ago.

    d is `decay` to the power of the share of the clients that returned: a round of a quarter of them is a quarter of a
    round. A client that had not returned by then has no h, and takes home x.

    Args:
        method: any that leaves the base as it is; to another base earlier adapters do not fit.
        decay: in [0, 1); 0 returns `method` itself, and costs nothing.
        judged: what `method` remembers of a decision what clients keep. After the last round they then judge x and the
            average, each as `method` asks about it, and keep of each what it decides about it; all take home x if the
            mean of their losses is smaller with it: one client's few examples could not tell. Where they train on from
            and what later averages are made of is decided about x. Empty where nobody is asked.
    """
    if not decay:
        return method

    def init(initial: Arena, clients: Clients) -> State:
        nobody_K = torch.zeros(initial.num_clients)
        return remembering(method.init(initial, clients), initial.values_KP.clone(), nobody_K, decay)

    def merge(state: State, participants: Participants, results: Results) -> tuple[State, Info]:
        after, info = method.merge(state, participants, results)
        has_home_K = torch.tensor([float(last > 0) for last in state.last_round_K]).to(state.memory["has_home"])
        share = decay ** share_of_round(results, state.adapters.num_clients)
        # the average goes on as if clients had not been asked whether they want it
        home_KP = averaged(state, method.personalise(state).values_KP, slice(None))
        return remembering(after, home_KP, has_home_K, share), info

    def remembering(state: State, home_KP: torch.Tensor, has_home_K: torch.Tensor, share: float) -> State:
        home = {
            "home": home_KP,
            "has_home": has_home_K,
            "home_share": torch.full((1,), share, dtype=torch.float64),
            "takes_average": torch.ones(1),
        }
        return replace(state, memory={**state.memory, **home, **about_average(state)})

    def averaged(state: State, now_SP: torch.Tensor, rows: Sequence[int] | slice) -> torch.Tensor:
        has_home_S = state.memory["has_home"][rows]
        if not has_home_S.any():
            return now_SP
        # a checkpoint of before it was kept has none
        share = float(state.memory.get("home_share", torch.tensor([decay])))
        return torch.lerp(now_SP, state.memory["home"][rows], (share * has_home_S[:, None]).to(now_SP))

    def personalise(state: State) -> Arena:
        if not state.memory["takes_average"]:
            return method.personalise(state)
        decided = {
            name: state.memory[_ABOUT_AVERAGE + name] for name in judged if _ABOUT_AVERAGE + name in state.memory
        }
        now = method.personalise(replace(state, memory={**state.memory, **decided}))
        return now.replace(averaged(state, now.values_KP, slice(None)))

    def trial(state: State, participants: Participants, results: Results) -> Trial | None:
        own = method.trial(state, participants, results) if method.trial else None
        if own is None or not participants.last or not state.memory["has_home"][list(own.ids)].any():
            return together(None, own)
        rows, sent = list(own.ids), int(len(participants.ids) < state.adapters.num_clients)
        candidates = own._replace(
            candidate=lambda number: averaged(state, own.candidate(number), rows), sent=sent, parts=(), compare_SP=None
        )
        return together(candidates, own)

    def decide(state: State, trial: Trial, losses: Losses) -> tuple[State, Info]:
        (average, average_losses), (own, own_losses) = apart(trial, losses)
        assert own is not None
        assert method.decide is not None
        without, info = method.decide(state, own, own_losses)
        if average is None:
            return replace(without, memory={**without.memory, **about_average(without)}), info
        with_, its_info = method.decide(state, own, average_losses)
        heard_S = torch.tensor(losses.examples_S) > 0
        without_S, with_S = (
            what_was_taken(after, own, answers)[heard_S].nan_to_num(nan=torch.inf)
            for after, answers in ((without, own_losses), (with_, average_losses))
        )
        # a loss that is not finite any more is worse than any that is, and two of them are equal
        gain = (without_S - with_S).nan_to_num(nan=0.0).sum()
        better = float(gain.isnan() or gain >= 0)
        taken = {"takes_average": torch.full((1,), better), **about_average(with_)}
        kept = {
            name: number for name, number in its_info.numbers.items() if better and name.removeprefix("mean_") in judged
        }
        numbers = {**info.numbers, **kept, "takes_average": better}
        return replace(without, memory={**without.memory, **taken}), info._replace(numbers=numbers)

    def about_average(decided: State) -> dict[str, torch.Tensor]:
        """What is remembered of a decision as the one about the average."""
        return {_ABOUT_AVERAGE + name: decided.memory[name].clone() for name in judged}

    def what_was_taken(after: State, own: Trial, answers: Losses) -> torch.Tensor:
        """Losses (S,) with the candidates that clients took; nearest and not equal, as candidates may have been cut to
        a client's rank."""
        taken_SP = method.personalise(after).values_KP[list(own.ids)]

        def distances(candidate_SP: torch.Tensor) -> torch.Tensor:
            # row by row, as differences of all would take the memory of all adapters twice more
            pairs = zip(candidate_SP, taken_SP, strict=True)
            return torch.stack([torch.linalg.vector_norm(one_P - taken_P) for one_P, taken_P in pairs])

        distance_SQ = torch.stack([distances(own.candidate(q)) for q in range(own.num_candidates)], dim=1)
        taken_S1 = distance_SQ.argmin(dim=1, keepdim=True).cpu()
        return answers.mean_SQ.gather(1, taken_S1)[:, 0]

    over = method._replace(init=init, merge=merge, personalise=personalise)
    return over._replace(trial=trial, decide=decide) if judged else over
