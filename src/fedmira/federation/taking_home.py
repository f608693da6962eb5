"""What clients take home as a moving average over rounds: theirs of this round and a share of what they had before.

Late in a run each round moves an adapter around a good place as much as towards it; the mean of a few rounds lies
closer (Polyak and Juditsky 1992; Izmailov et al., UAI 2018, for networks). Clients still train on from the last round.
Knows nothing about how a method came to what it hands out.

Axes: K clients, P parameters of one adapter.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fedmira.federation.method import Info, Method, State
from fedmira.types import Arena, Clients, Participants, Results


def over_rounds(method: Method, decay: float) -> Method:
    """Return `method` whose clients take home decay h + (1 - decay) x: x what they would, h what they had a round ago.

    A client that had not returned by then has no h, and takes home x.

    Args:
        method: any that leaves the base as it is; to another base earlier adapters do not fit.
        decay: in [0, 1); 0 returns `method` itself, and costs nothing.
    """
    if not decay:
        return method

    def init(initial: Arena, clients: Clients) -> State:
        state = method.init(initial, clients)
        before = {"home": initial.values_KP.clone(), "has_home": torch.zeros(initial.num_clients)}
        return replace(state, memory={**state.memory, **before})

    def merge(state: State, participants: Participants, results: Results) -> tuple[State, Info]:
        after, info = method.merge(state, participants, results)
        has_home_K = torch.tensor([float(last > 0) for last in state.last_round_K]).to(state.memory["has_home"])
        before = {"home": personalise(state).values_KP, "has_home": has_home_K}
        return replace(after, memory={**after.memory, **before}), info

    def personalise(state: State) -> Arena:
        now, has_home_K = method.personalise(state), state.memory["has_home"]
        if not has_home_K.any():
            return now
        share_K1 = (decay * has_home_K[:, None]).to(now.values_KP)
        return now.replace(torch.lerp(now.values_KP, state.memory["home"], share_K1))

    return method._replace(init=init, merge=merge, personalise=personalise)
