"""FFA-LoRA (Sun et al., ICLR 2024): A stays at the initial adapter's, which all share; B is trained and averaged.

The mean of B is the mean of the products then, and half the bytes cross. Knows nothing about tasks or graphs.
"""

from __future__ import annotations

from fedmira.federation.averaging import share
from fedmira.federation.method import Method
from fedmira.federation.receiving import exchange_groups
from fedmira.types import Clients

_TRAINED = frozenset({"lora_b"})


def build(clients: Clients) -> Method:
    """Return the method: B <- sum_k n_k B_k / sum_k n_k over those that returned; everybody draws A from one seed."""
    return share(clients, _TRAINED)._replace(plan=exchange_groups(_TRAINED))
