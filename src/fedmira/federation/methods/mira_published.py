"""MIRA as printed (Elbakary et al., IEEE Networking Letters 2025, arXiv 2410.15524): Eq. (8) and (9).

dW_k <- dW_k - eta lambda sum_l a_kl (dW_k - dW_l) over the sampled clients that returned, on the factors A and B
separately; everybody else keeps its adapter. Knows nothing about unsampled neighbours, as the paper does not.

The step must satisfy tau * lambda_max(L) <= 2 on every subgraph it meets. The draws of a run are known beforehand, so
all of them are checked before the first round; a client that fails only makes a subgraph, and its eigenvalue, smaller.
Of a graph that is learned only what stands for it in round 1 is known by then; later rounds check their own.
"""

from __future__ import annotations

from fedmira.config.mira import MiraPublishedConfig
from fedmira.config.training import FederationConfig
from fedmira.federation.graph import Graph, subgraph
from fedmira.federation.known_graphs import uniform
from fedmira.federation.learned_graphs import Seen, learner
from fedmira.federation.method import Info, Method, State
from fedmira.federation.mixing import laplacian_explicit, refuse_unstable, step_numbers
from fedmira.federation.participation import planned_ids
from fedmira.federation.receiving import exchange_everything, first_state, own_adapters, received
from fedmira.types import Arena, Clients, Participants, Results


def build(config: MiraPublishedConfig, clients: Clients, graph: Graph | None, federation: FederationConfig) -> Method:
    """Return the method on `graph`; None means the graph is learned from the returned adapters.

    Raises:
        ConfigError: server_lr * strength is beyond the stable bound of a subgraph that a round will meet.
    """
    tau = config.server_lr * config.strength
    everybody = tuple(range(len(clients.names)))
    first = graph
    if graph is None and config.graph.warmup == "uniform" and config.graph.settled:
        first = uniform(len(everybody))
    if first is not None:
        for ids in planned_ids(len(everybody), federation, clients.seed):
            refuse_unstable(subgraph(first, ids), tau)

    learns = None if graph is not None else learner(config.graph, clients)

    def init(initial: Arena, clients: Clients) -> State:
        state = first_state(initial, clients)
        return state if learns is None else State(state.adapters, state.last_round_K, learns.init(initial))

    def merge(state: State, participants: Participants, results: Results) -> tuple[State, Info]:
        trained, last_round_K = received(state.adapters, state, participants, results)
        whole, memory = graph, dict(state.memory)
        if learns is not None:
            # as printed, only those that take part are related to each other
            now_K = tuple(participants.round if k in results.ids else 0 for k in everybody)
            seen = Seen(trained, state.adapters, now_K, results.ids, participants.round)
            memory, whole = learns.learn(memory, seen)
        assert whole is not None
        if not results.ids:
            return State(trained, last_round_K, memory), Info({"returned": 0.0}, whole)
        among = subgraph(whole, results.ids)
        mixer = laplacian_explicit(among, tau)
        before = trained.replace(trained.values_KP[list(results.ids)])
        after = mixer(before)
        values_KP = trained.values_KP.clone()
        values_KP[list(results.ids)] = after.values_KP
        numbers = {"returned": float(len(results.ids)), **step_numbers(among, mixer, before, after)}
        # above 1 the step is stable but no longer a convex combination of clients
        numbers["tau_times_max_degree"] = tau * numbers["max_degree"]
        return State(trained.replace(values_KP), last_round_K, memory), Info(numbers, whole)

    return Method(init=init, plan=exchange_everything, merge=merge, personalise=own_adapters)
