"""PCL (Wagner, Fan and Jaggi, 2024): each client mixes the others' adapters by how well they do on its own examples.

W_kl = softmax over l of -loss(theta_l on the validation examples of k) / temperature; theta_k <- sum_l W_kl theta_l.
Knows nothing about tasks. Axes: S returned, P parameters of one adapter.
"""

from __future__ import annotations

import numpy as np
import torch

from fedmira.config.method import PCLConfig
from fedmira.federation.graph import PRIVACY, validated
from fedmira.federation.method import Info, Method, State
from fedmira.federation.mixing import linear
from fedmira.federation.receiving import exchange_everything, first_state, own_adapters, stored
from fedmira.types import Clients, Job, Losses, Participants, Results, Trial


def build(config: PCLConfig, clients: Clients) -> Method:
    """Return the method: those that returned judge each other's adapters, all S of them, and mix for themselves.

    A loss that is not finite any more is worse than any that is. A client without validation examples, or without a
    loss that is finite, trusts itself alone.
    """
    num_clients = len(clients.names)

    def plan(state: State, participants: Participants) -> Job:
        # what a client starts from it made itself, from adapters it got for the trial
        return exchange_everything(state, participants)._replace(download=frozenset())

    def trial(state: State, participants: Participants, results: Results) -> Trial | None:
        if not results.ids:
            return None
        uploads_SP = state.adapters.values_KP[list(results.ids)]

        def candidate(number: int) -> torch.Tensor:
            return uploads_SP[number : number + 1].repeat(len(uploads_SP), 1)

        return Trial(results.ids, len(results.ids), candidate, sent=len(results.ids) - 1)

    def decide(state: State, trial: Trial, losses: Losses) -> tuple[State, Info]:
        loss_SS = losses.mean_SQ.double().nan_to_num(nan=torch.inf, posinf=torch.inf)
        trust_SS = torch.softmax(-loss_SS / config.temperature, dim=1).cpu().numpy()
        judged_S = np.isfinite(trust_SS).all(axis=1)
        trust_SS = np.where(judged_S[:, None], trust_SS, np.eye(len(trial.ids)))
        trust_KK = np.eye(num_clients)
        trust_KK[np.ix_(trial.ids, trial.ids)] = trust_SS
        both_KK = (trust_KK + trust_KK.T) / 2
        weights = "mean of both directions"
        details = {"temperature": config.temperature, "weights": weights, "privacy": PRIVACY["trust"]}
        graph = validated(both_KK - np.diag(np.diagonal(both_KK)), num_clients, "pcl", details)
        mixed = linear(trust_KK)(state.adapters)
        own_share = float(np.diagonal(trust_SS).mean())
        return State(mixed, state.last_round_K, dict(state.memory)), Info({"mixing_share": 1 - own_share}, graph)

    return Method(first_state, plan, stored, own_adapters, trial, decide)
