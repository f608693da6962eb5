"""IFCA (Ghosh et al., NeurIPS 2020): a few models; each client belongs to the one with the lowest training loss.

Each model is averaged over the clients that chose it. Models that start alike would never part, and adapters do (B is
0), so the models begin as adapters of clients that differ most. Knows nothing about tasks.

Axes: K clients, M models, P parameters of one adapter.
"""

from __future__ import annotations

import numpy as np
import torch

from fedmira.config.method import IFCAConfig
from fedmira.federation.averaging import returned_weights
from fedmira.federation.client_clusters import UNKNOWN, cluster_graph, cluster_means, far_apart, nearest, num_clusters
from fedmira.federation.method import Info, Method, State
from fedmira.federation.mixing import linear
from fedmira.federation.questions import only_to_judge
from fedmira.federation.ranks import squares_between
from fedmira.federation.receiving import exchange_everything, first_state, own_adapters, received
from fedmira.types import Arena, Clients, Job, Losses, Participants, Results, Trial

_PRIVACY = "Clients get all models and tell the server how well each does on their training examples."


def build(config: IFCAConfig, clients: Clients) -> Method:
    """Return the method. Everybody trains alone until as many clients as models have returned.

    Who is away when the models begin takes the one nearest to its upload. A client that returns for the first time
    later has trained alone; it chooses afterwards. Choices are made after a round, for the client's next one.
    """
    num_first = min(config.models, len(clients.names))

    def init(initial: Arena, clients: Clients) -> State:
        state = first_state(initial, clients)
        memory = {
            "models": initial.values_KP[:1].repeat(config.models, 1),
            # how many of them there are, 0 before they began; clients that join bring none
            "started": torch.zeros(1, dtype=torch.int64),
            "choice": torch.full((initial.num_clients,), UNKNOWN, dtype=torch.int64),
        }
        return State(state.adapters, state.last_round_K, memory)

    def plan(state: State, participants: Participants) -> Job:
        job = exchange_everything(state, participants)
        return job if state.memory["started"] else job._replace(download=frozenset())

    def merge(state: State, participants: Participants, results: Results) -> tuple[State, Info]:
        trained, last_round_K = received(state.adapters, state, participants, results)
        choice_K = state.memory["choice"].cpu().numpy().copy()
        mixed = linear(cluster_means(choice_K, returned_weights(clients, results.ids)))(trained)
        memory = dict(state.memory)
        seen = [k for k, last in enumerate(last_round_K) if last]
        if memory["started"]:
            models_MP = memory["models"].clone()
            for model in set(choice_K.tolist()) - {UNKNOWN}:
                models_MP[model] = mixed.values_KP[int(np.flatnonzero(choice_K == model)[0])]
            memory["models"] = models_MP
        elif len(seen) >= num_first:
            models_MP, distance_CC = memory["models"].clone(), squares_between(trained, seen, clients.ranks_K)
            first = far_apart(distance_CC, num_first)
            models_MP[:num_first] = trained.values_KP[[seen[place] for place in first]]
            away = [place for place, k in enumerate(seen) if k not in results.ids]
            for place, model in zip(away, nearest(distance_CC, away, first), strict=True):
                choice_K[seen[place]] = first.index(model)
                mixed.values_KP[seen[place]] = trained.values_KP[seen[model]]
            memory |= {"models": models_MP, "started": torch.full((1,), num_first)}
        memory["choice"] = torch.from_numpy(choice_K)
        return State(mixed, last_round_K, memory), Info({"returned": float(len(results.ids))})

    def trial(state: State, participants: Participants, results: Results) -> Trial | None:
        models_MP, num_asked, num_models = state.memory["models"], len(results.ids), int(state.memory["started"])
        if not (num_models and num_asked):
            return None
        # one of the models is what the client starts from
        sent = num_models - 1 + only_to_judge(participants, len(clients.names))
        return Trial(results.ids, num_models, lambda m: models_MP[m : m + 1].repeat(num_asked, 1), sent, "train")

    def decide(state: State, trial: Trial, losses: Losses) -> tuple[State, Info]:
        choice_K, values_KP = state.memory["choice"].clone(), state.adapters.values_KP.clone()
        best_S = losses.mean_SQ.nan_to_num(nan=torch.inf).argmin(dim=1).to(choice_K)
        choice_K[list(trial.ids)] = best_S
        values_KP[list(trial.ids)] = state.memory["models"][best_S]
        labels_K = choice_K.cpu().numpy()
        info = Info({"clusters": float(num_clusters(labels_K))}, cluster_graph(labels_K, "ifca", {"privacy": _PRIVACY}))
        memory = {**state.memory, "choice": choice_K}
        return State(state.adapters.replace(values_KP), state.last_round_K, memory), info

    return Method(init, plan, merge, own_adapters, trial, decide)
