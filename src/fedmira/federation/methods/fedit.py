"""FedIT (Zhang et al., ICASSP 2024): FedAvg over the LoRA factors, one global adapter for everybody.

Knows nothing about tasks or graphs. Factors are averaged separately, as published: the mean of the products differs
by half the weighted mean of (B_k - B_l)(A_k - A_l).
"""

from __future__ import annotations

from fedmira.federation.averaging import share
from fedmira.federation.method import Method
from fedmira.types import Clients


def build(clients: Clients) -> Method:
    """Return the method: theta <- sum_k n_k theta_k / sum_k n_k over the clients that returned, n_k training examples.

    Every row of the state is the global adapter, so every client, sampled or not, is judged by it.
    """
    return share(clients)
