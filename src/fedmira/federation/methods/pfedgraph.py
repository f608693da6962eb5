"""pFedGraph (Ye et al., ICML 2023): each client gets a mean of its own, weighted by similarity and data size.

Row k of the weights minimises lambda |w - p|^2 - <cos_k, w> over the simplex, p the shares of the training examples and
cos_kl the cosine between how clients k and l moved from the common start. Knows nothing about tasks.
"""

from __future__ import annotations

import numpy as np
import torch

from fedmira.config.method import PFedGraphConfig
from fedmira.federation.averaging import one_start
from fedmira.federation.graph import Matrix, explained, validated
from fedmira.federation.method import Info, Method, State
from fedmira.federation.mixing import linear
from fedmira.federation.ranks import between
from fedmira.federation.receiving import exchange_everything, own_adapters, received
from fedmira.federation.simplex import collaboration
from fedmira.types import Arena, Clients, Job, Participants, Pull, Results

_ALIKE = 0.9
"""Cosines above this count as 1, as in the authors' code."""


def build(config: PFedGraphConfig, clients: Clients) -> Method:
    """Return the method: theta_k <- sum_l w_kl theta_l among those that returned; the others keep theirs."""
    num_clients = len(clients.names)

    def init(initial: Arena, clients: Clients) -> State:
        state = one_start(initial, clients)
        return State(state.adapters, state.last_round_K, {"start": state.adapters.values_KP[:1].clone()})

    def plan(state: State, participants: Participants) -> Job:
        job = exchange_everything(state, participants)
        if not config.pull:
            return job
        # the start is the client's own mean, so that is what it is pulled towards
        return job._replace(pull=Pull(job.start_SP.clone(), (config.pull,) * len(job.ids)))

    def merge(state: State, participants: Participants, results: Results) -> tuple[State, Info]:
        adapters, last_round_K = received(state.adapters, state, participants, results)
        rows = list(results.ids)
        weights_KK = np.eye(num_clients)
        if rows:
            moved = adapters.replace((adapters.values_KP[rows] - state.memory["start"]).double())
            ranks_S = clients.ranks_K and [clients.ranks_K[k] for k in rows]
            (cosine_SS,) = between(moved, range(len(rows)), ranks_S, _cosines)
            cosine_SS = np.where(cosine_SS > _ALIKE, 1.0, cosine_SS)
            examples_S = [clients.num_examples_K[k] for k in rows]
            weights_KK[np.ix_(rows, rows)] = collaboration(cosine_SS, examples_S, config.strength)
        numbers = {"returned": float(len(rows)), "mixing_share": float(1 - np.diagonal(weights_KK).mean())}
        both_KK = (weights_KK + weights_KK.T) / 2
        details = {"strength": config.strength, "round": participants.round, "weights": "mean of both directions"}
        graph = explained(validated(both_KK - np.diag(np.diagonal(both_KK)), num_clients, "pfedgraph", details))
        return State(linear(weights_KK)(adapters), last_round_K, dict(state.memory)), Info(numbers, graph)

    return Method(init=init, plan=plan, merge=merge, personalise=own_adapters)


def _cosines(moved: Arena) -> tuple[Matrix]:
    """The cosines between rows, (S, S)."""
    unit_SP = torch.nn.functional.normalize(moved.values_KP, dim=1)
    return ((unit_SP @ unit_SP.T).cpu().numpy(),)
