"""FedIT (Zhang et al., ICASSP 2024): FedAvg over the LoRA factors, one global adapter for everybody.

Knows nothing about tasks or graphs. Factors are averaged separately, as published: the mean of the products differs
by half the weighted mean of (B_k - B_l)(A_k - A_l).
"""

from __future__ import annotations

from fedmira.federation.method import Info, Method, State
from fedmira.federation.mixing import average
from fedmira.federation.receiving import exchange_everything, first_state, own_adapters, received
from fedmira.types import Arena, Clients, Participants, Results


def build(clients: Clients) -> Method:
    """Return the method: theta <- sum_k n_k theta_k / sum_k n_k over the clients that returned, n_k training examples.

    Every row of the state is the global adapter, so every client, sampled or not, is judged by it.
    """

    def init(initial: Arena, clients: Clients) -> State:
        state = first_state(initial, clients)
        # one global adapter needs one start; a mean of random factors would be a smaller start than any client's
        rows_KP = state.adapters.values_KP[:1].expand_as(initial.values_KP).clone()
        return State(initial.replace(rows_KP), state.last_round_K)

    def merge(state: State, participants: Participants, results: Results) -> tuple[State, Info]:
        adapters, last_round_K = received(state.adapters, state, participants, results)
        returned = set(results.ids)
        info = Info({"returned": float(len(returned))})
        if not returned:
            return State(state.adapters, last_round_K), info
        weights_K = [float(n) if k in returned else 0.0 for k, n in enumerate(clients.num_examples_K)]
        return State(average(weights_K)(adapters), last_round_K), info

    return Method(init=init, plan=exchange_everything, merge=merge, personalise=own_adapters)
