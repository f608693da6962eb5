"""Every client trains alone: the lower reference that each federated method must beat client by client.

Knows nothing about other clients: nothing is sent, nothing is mixed.
"""

from __future__ import annotations

from fedmira.federation.method import Method, State
from fedmira.federation.receiving import exchange_everything, first_state, own_adapters, stored
from fedmira.types import Job, Participants


def build() -> Method:
    """Return the method: the adapters stay at the clients, so no byte crosses the seam."""

    def plan(state: State, participants: Participants) -> Job:
        return exchange_everything(state, participants)._replace(download=frozenset(), upload=frozenset())

    return Method(init=first_state, plan=plan, merge=stored, personalise=own_adapters)
