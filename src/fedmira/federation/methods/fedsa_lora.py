"""FedSA-LoRA (Guo et al., ICLR 2025): A is averaged, B stays with its client.

Knows nothing about tasks or graphs.
"""

from __future__ import annotations

from fedmira.federation.averaging import share
from fedmira.federation.method import Method
from fedmira.types import Clients


def build(clients: Clients) -> Method:
    """Return the method: A <- sum_k n_k A_k / sum_k n_k over those that returned; only A crosses."""
    return share(clients, frozenset({"lora_a"}))
