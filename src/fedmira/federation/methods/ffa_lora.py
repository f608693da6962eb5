"""FFA-LoRA (Sun et al., ICLR 2024): A stays at the initial adapter's, which all share; B is trained and averaged.

The mean of B is the mean of the products then, and half the bytes cross. Knows nothing about tasks or graphs.
"""

from __future__ import annotations

from fedmira.federation.averaging import share
from fedmira.federation.method import Method, State
from fedmira.types import Clients, Job, Participants

_TRAINED = frozenset({"lora_b"})


def build(clients: Clients) -> Method:
    """Return the method: B <- sum_k n_k B_k / sum_k n_k over those that returned; everybody draws A from one seed."""
    averaged = share(clients, _TRAINED)

    def plan(state: State, participants: Participants) -> Job:
        return averaged.plan(state, participants)._replace(trainable=_TRAINED)

    return averaged._replace(plan=plan)
