"""FedIT and then fine-tuning at each client: what a personalised method must beat at the same budget.

The last rounds of the run are local. Knows nothing about tasks or graphs.
"""

from __future__ import annotations

from fedmira.config.method import FedITFinetunedConfig
from fedmira.config.training import FederationConfig
from fedmira.federation.averaging import share
from fedmira.federation.method import Info, Method, State
from fedmira.federation.receiving import exchange_everything, stored
from fedmira.types import Clients, Job, Participants, Results


def build(config: FedITFinetunedConfig, clients: Clients, federation: FederationConfig) -> Method:
    """Return the method: FedIT for all rounds but the last `local_rounds`, in which nothing is mixed.

    A client that is not sampled in the local rounds keeps the global adapter.
    """
    local_rounds = round(federation.rounds / 4) if config.local_rounds is None else config.local_rounds
    global_rounds = max(0, federation.rounds - local_rounds)
    averaging = share(clients)

    def plan(state: State, participants: Participants) -> Job:
        job = exchange_everything(state, participants)
        if participants.round <= global_rounds:
            return job
        # a round with a client that has not fetched the last global adapter is counted as if nobody had
        latest = min(state.last_round_K[id_] for id_ in participants.ids) > global_rounds or not global_rounds
        return job._replace(download=frozenset() if latest else job.download, upload=frozenset())

    def merge(state: State, participants: Participants, results: Results) -> tuple[State, Info]:
        if participants.round <= global_rounds:
            return averaging.merge(state, participants, results)
        return stored(state, participants, results)

    return averaging._replace(plan=plan, merge=merge)
