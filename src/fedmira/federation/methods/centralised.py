"""Centralised multi-task training: one adapter, trained on the examples of everybody as one data set.

A reference, not a federated method: examples leave their clients, no adapter crosses. Knows nothing about tasks.
"""

from __future__ import annotations

from fedmira.federation.averaging import follow, one_start
from fedmira.federation.method import Info, Method, State
from fedmira.federation.receiving import exchange_everything, own_adapters, received
from fedmira.types import Job, Participants, Results


def build() -> Method:
    """Return the method: one adapter takes the steps of all participants, on batches of all their examples."""

    def plan(state: State, participants: Participants) -> Job:
        job = exchange_everything(state, participants)
        return job._replace(download=frozenset(), upload=frozenset(), pooled=True)

    def merge(state: State, participants: Participants, results: Results) -> tuple[State, Info]:
        adapters, last_round_K = received(state.adapters, state, participants, results)
        if results.ids:
            # all rows of a pooled job are the same
            adapters = adapters.replace(
                results.values_SP[:1].to(adapters.values_KP).expand_as(adapters.values_KP).clone()
            )
        return State(adapters, last_round_K), Info({"returned": float(len(results.ids))})

    return Method(init=one_start, plan=plan, merge=merge, personalise=own_adapters, join=follow())
