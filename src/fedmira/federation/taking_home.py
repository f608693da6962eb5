"""What clients take home as a moving average over rounds: theirs of this round and a share of what they had before.

Late in a run each round moves an adapter around a good place as much as towards it; the mean of a few rounds lies
closer (Polyak and Juditsky 1992; Izmailov et al., UAI 2018, for networks). Clients still train on from the last round.
Works for any method and knows nothing about it.

Axes: K clients, P parameters of one adapter.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fedmira.federation.method import Info, Method, State
from fedmira.types import Arena, Clients, Participants, Results


def averaged(method: Method, decay: float) -> Method:
    """Return `method` whose clients take home decay h + (1 - decay) x: x what they would, h what they had a round ago.

    In a client's first round there is no h, and it takes home x.

    Args:
        method: any.
        decay: in [0, 1); 0 returns `method` itself, and costs nothing.
    """
    if not decay:
        return method

    def init(initial: Arena, clients: Clients) -> State:
        state = method.init(initial, clients)
        before = {"home": initial.values_KP.clone(), "home_rounds": torch.zeros(initial.num_clients)}
        return replace(state, memory={**state.memory, **before})

    def merge(state: State, participants: Participants, results: Results) -> tuple[State, Info]:
        after, info = method.merge(state, participants, results)
        rounds_K = state.memory["home_rounds"] + float(any(state.last_round_K))
        before = {"home": personalise(state).values_KP, "home_rounds": rounds_K}
        return replace(after, memory={**after.memory, **before}), info

    def personalise(state: State) -> Arena:
        now, rounds_K = method.personalise(state), state.memory["home_rounds"]
        if not rounds_K.any():
            return now
        share_K1 = (decay * (rounds_K > 0)[:, None]).to(now.values_KP)
        return now.replace(torch.lerp(now.values_KP, state.memory["home"], share_K1))

    return method._replace(init=init, merge=merge, personalise=personalise)
