"""FedDPA (Yang et al., NeurIPS 2024): a global pair that is averaged and an own pair that stays, both at each client.

y = W0 x + s B A x + s B_k A_k x. The two are trained in turn. Knows nothing about tasks or graphs.
"""

from __future__ import annotations

from fedmira.federation.averaging import follow, mean_of, one_start
from fedmira.federation.method import Info, Method, State
from fedmira.federation.receiving import exchange_everything, own_adapters, received
from fedmira.types import Clients, Job, Participants, Results

_GLOBAL = frozenset({"lora_a", "lora_b"})
_OWN = frozenset({"second_a", "second_b"})


def build(clients: Clients) -> Method:
    """Return the method: odd rounds train and average the global pair, even rounds train the own pair beside it."""

    def plan(state: State, participants: Participants) -> Job:
        round_ = participants.round
        job = exchange_everything(state, participants)._replace(download=_GLOBAL)
        if round_ % 2:
            # the round before moved own pairs only; who was there holds the global one
            if round_ > 1 and all(state.last_round_K[id_] == round_ - 1 for id_ in participants.ids):
                job = job._replace(download=frozenset())
            return job._replace(trainable=_GLOBAL, upload=_GLOBAL)
        return job._replace(trainable=_OWN, upload=frozenset())

    def merge(state: State, participants: Participants, results: Results) -> tuple[State, Info]:
        adapters, last_round_K = received(state.adapters, state, participants, results)
        if participants.round % 2:
            adapters = mean_of(clients, results.ids, _GLOBAL)(adapters)
        return State(adapters, last_round_K), Info({"returned": float(len(results.ids))})

    return Method(init=one_start, plan=plan, merge=merge, personalise=own_adapters, join=follow(_GLOBAL))
