"""Ditto (Li et al., ICML 2021): a global adapter, and personal ones that are pulled towards it.

Each client trains two rows: v_k, its personal adapter, on F_k(v) + lambda/2 |v - w|^2, and the global w, which is then
averaged. Knows nothing about tasks or graphs.
"""

from __future__ import annotations

import torch

from fedmira.config.method import DittoConfig
from fedmira.federation.averaging import mean_of, one_start
from fedmira.federation.method import Info, Method, State
from fedmira.federation.receiving import exchange_everything, own_adapters, received, split
from fedmira.types import Arena, Clients, Job, Participants, Pull, Results


def build(config: DittoConfig, clients: Clients) -> Method:
    """Return the method. Each row gets half of the local work, so that the budget is that of one adapter.

    The personal rows are the adapters of the state; the global adapter is remembered beside them.
    """

    def init(initial: Arena, clients: Clients) -> State:
        state = one_start(initial, clients)
        return State(state.adapters, state.last_round_K, {"global": state.adapters.values_KP[:1].clone()})

    def plan(state: State, participants: Participants) -> Job:
        job = exchange_everything(state, participants)
        global_SP = state.memory["global"].expand_as(job.start_SP)
        count = len(participants.ids)
        return job._replace(
            ids=participants.ids * 2,
            start_SP=torch.cat([global_SP, job.start_SP]),
            pull=Pull(torch.cat([global_SP, global_SP]), (0.0,) * count + (config.strength,) * count),
            work=0.5,
            local_rows=count,
        )

    def merge(state: State, participants: Participants, results: Results) -> tuple[State, Info]:
        of_global, personal = split(results, 2)
        adapters, last_round_K = received(state.adapters, state, participants, personal)
        everybody = state.adapters.replace(state.memory["global"].expand_as(adapters.values_KP))
        globals_, _ = received(everybody, state, participants, of_global)
        mean = mean_of(clients, of_global.ids)(globals_)
        memory = {"global": mean.values_KP[:1].clone()}
        return State(adapters, last_round_K, memory), Info({"returned": float(len(personal.ids))})

    return Method(init=init, plan=plan, merge=merge, personalise=own_adapters)
