"""FedOpt over the LoRA factors (Reddi et al., ICLR 2021): the server steps along the clients' mean change.

d = sum_k n_k (theta_k - theta) / sum_k n_k over those that returned is a pseudo-gradient, up to its sign.
FedAdam:  m <- b1 m + (1 - b1) d,  v <- b2 v + (1 - b2) d^2,  theta <- theta + lr m / (sqrt(v) + tau).
FedAvgM:  m <- b1 m + d,  theta <- theta + lr m  (Hsu, Qi and Brown, 2019).
What a client of smaller rank lacks it has not moved. Knows nothing about tasks or graphs.

Axes: K clients, S returned, P parameters of one adapter.
"""

from __future__ import annotations

import torch

from fedmira.config.method import FedAdamConfig
from fedmira.federation.averaging import follow, mean_of, one_start
from fedmira.federation.method import Info, Method, State
from fedmira.federation.ranks import trimmed
from fedmira.federation.receiving import exchange_everything, own_adapters, received
from fedmira.types import Arena, Clients, Participants, Results


def build(config: FedAdamConfig, clients: Clients) -> Method:
    """Return the method; `rule: momentum` with beta1 0 and server_lr 1 is FedIT for clients of one rank."""

    def init(initial: Arena, clients: Clients) -> State:
        state = one_start(initial, clients)
        like_P = initial.values_KP[0].to(torch.promote_types(initial.values_KP.dtype, torch.float32))
        memory = {"first": torch.zeros_like(like_P)}
        if config.rule == "adam":
            memory["second"] = torch.full_like(like_P, config.adaptivity**2)
        return State(state.adapters, state.last_round_K, memory)

    def merge(state: State, participants: Participants, results: Results) -> tuple[State, Info]:
        adapters, last_round_K = received(state.adapters, state, participants, results)
        info = Info({"returned": float(len(results.ids))})
        if not results.ids:
            return State(state.adapters, last_round_K, state.memory), info
        memory = dict(state.memory)
        if clients.ranks_K is not None:
            theta_SP = state.adapters.values_KP[:1].expand(len(results.ids), -1)
            had_SP = trimmed(adapters.layout, theta_SP, [clients.ranks_K[k] for k in results.ids])
            adapters.values_KP[list(results.ids)] += theta_SP - had_SP
        mean = mean_of(clients, results.ids)(adapters)
        theta_P = state.adapters.values_KP[0].to(memory["first"])
        change_P = mean.values_KP[0].to(memory["first"]) - theta_P
        if config.rule == "adam":
            memory["first"] = config.beta1 * memory["first"] + (1 - config.beta1) * change_P
            memory["second"] = config.beta2 * memory["second"] + (1 - config.beta2) * change_P.square()
            step_P = memory["first"] / (memory["second"].sqrt() + config.adaptivity)
        else:
            memory["first"] = config.beta1 * memory["first"] + change_P
            step_P = memory["first"]
        moved_P = (theta_P + config.server_lr * step_P).to(adapters.values_KP)
        moved = adapters.replace(moved_P.expand_as(adapters.values_KP).clone())
        return State(moved, last_round_K, memory), info

    return Method(init=init, plan=exchange_everything, merge=merge, personalise=own_adapters, join=follow())
