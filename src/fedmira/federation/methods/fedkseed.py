"""FedKSeed (Qin et al., ICML 2024): one global adapter, trained along directions from a pool of seeds; scalars cross.

At each step a client draws j from the pool and moves along z_j ~ N(0, I) by the slope of its loss f on its batch,
theta <- theta - rate g z_j,  g = (f(theta + eps z_j) - f(theta - eps z_j)) / (2 eps); it uploads the pairs (j, rate g).
The server adds them up, a_j <- a_j + sum_k n_k / n sum_(steps of k along z_j) rate g, and a client of the next round
rebuilds theta = theta_0 - sum_j a_j z_j; theta_0 follows from the run's seed. Each trained row is the same start less
its own sum of rate g z_j, so the mean of rows by training examples n_k is exactly that, which is how it is computed
here. Knows nothing about tasks or graphs, nor how a step is done.
"""

from __future__ import annotations

from fedmira.config.method import FedKSeedConfig
from fedmira.federation.averaging import share
from fedmira.federation.method import Method, State
from fedmira.types import Clients, Job, Participants, SeedPool


def build(config: FedKSeedConfig, clients: Clients) -> Method:
    """Return the method: FedIT whose clients move along z_1 .. z_K, K = `seeds`, and exchange scalars."""
    averaged = share(clients)
    pool = SeedPool(config.seeds, config.epsilon)

    def plan(state: State, participants: Participants) -> Job:
        job = averaged.plan(state, participants)
        # until somebody has returned all a_j are 0
        download = job.download if any(state.last_round_K) else frozenset[str]()
        return job._replace(download=download, seeds=pool)

    return averaged._replace(plan=plan)
