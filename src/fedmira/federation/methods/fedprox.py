"""FedProx over the LoRA factors (Li et al., MLSys 2020): FedAvg whose clients are held near what they downloaded.

Each client minimises f_k(theta) + mu/2 |theta - theta_t|^2, theta_t the global adapter. Knows nothing about tasks.
"""

from __future__ import annotations

from fedmira.config.method import FedProxConfig
from fedmira.federation.averaging import share
from fedmira.federation.method import Method, State
from fedmira.types import Clients, Job, Participants, Pull


def build(config: FedProxConfig, clients: Clients) -> Method:
    """Return the method; strength 0 is FedIT."""
    averaged = share(clients)

    def plan(state: State, participants: Participants) -> Job:
        job = averaged.plan(state, participants)
        return job._replace(pull=Pull(job.start_SP.clone(), (config.strength,) * len(job.ids)))

    return averaged._replace(plan=plan)
