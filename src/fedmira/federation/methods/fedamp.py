"""FedAMP (Huang et al., AAAI 2021): each adapter is pulled towards a mean in which similar clients weigh more.

u_k = sum_l xi_kl w_l with xi_kl falling with the distance of w_k and w_l; client k trains F_k(w) + lambda/2 |w - u_k|^2
from its own adapter. Knows nothing about tasks.
"""

from __future__ import annotations

import numpy as np
import torch

from fedmira.config.method import FedAMPConfig
from fedmira.federation.graph import PRIVACY, Matrix, validated
from fedmira.federation.method import Info, Method, State
from fedmira.federation.multiply import multiply
from fedmira.federation.ranks import squares_between
from fedmira.federation.receiving import exchange_everything, first_state, own_adapters, received
from fedmira.types import Arena, Clients, Job, Participants, Pull, Results


def build(config: FedAMPConfig, clients: Clients) -> Method:
    """Return the method. Similarity is between the last uploads of all clients that ever returned.

    What crosses downwards is u_k, one adapter a client; each keeps its own, as the server got it where uploads are
    noised or compressed.
    """
    num_clients = len(clients.names)

    def init(initial: Arena, clients: Clients) -> State:
        state = first_state(initial, clients)
        return State(state.adapters, state.last_round_K, {"attention": torch.eye(num_clients, dtype=torch.float64)})

    def plan(state: State, participants: Participants) -> Job:
        job = exchange_everything(state, participants)
        weights_SK = state.memory["attention"].cpu().numpy()[list(participants.ids)]
        # a client never seen has nothing that it could be pulled towards
        strength_S = tuple(config.strength if state.last_round_K[id_] else 0.0 for id_ in participants.ids)
        return job._replace(pull=Pull(multiply(weights_SK, state.adapters.values_KP), strength_S))

    def merge(state: State, participants: Participants, results: Results) -> tuple[State, Info]:
        adapters, last_round_K = received(state.adapters, state, participants, results)
        seen = [k for k, last in enumerate(last_round_K) if last]
        attention_KK = np.eye(num_clients)
        if len(seen) > 1:
            block = np.ix_(seen, seen)
            attention_KK[block] = attention(squares_between(adapters, seen, clients.ranks_K), config)
        numbers = {"returned": float(len(results.ids)), "mixing_share": float(1 - np.diagonal(attention_KK).mean())}
        details = {"attention": config.attention, "sigma": config.sigma, "privacy": PRIVACY["gram"]}
        graph = validated(attention_KK - np.diag(np.diagonal(attention_KK)), num_clients, "fedamp", details)
        memory = {"attention": torch.from_numpy(attention_KK)}
        return State(adapters, last_round_K, memory), Info(numbers, graph)

    return Method(init=init, plan=plan, merge=merge, personalise=own_adapters)


def attention(squares_CC: Matrix, config: FedAMPConfig) -> Matrix:
    """Return xi_kl = attention / (C - 1) * exp(-|w_k - w_l|^2 / (sigma m)), xi_kk = 1 - sum_l xi_kl; (C, C).

    m is the mean of the squared distances between clients. A convex combination for any sigma.
    """
    num_compared = len(squares_CC)
    mean = squares_CC.sum() / (num_compared * (num_compared - 1))
    weights_CC = config.attention / (num_compared - 1) * np.exp(-squares_CC / (config.sigma * mean or 1.0))
    np.fill_diagonal(weights_CC, 0.0)
    return np.asarray(weights_CC + np.diag(1.0 - weights_CC.sum(axis=1)))
