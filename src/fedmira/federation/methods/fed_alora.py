"""Fed-ALoRA (Ban and Ji, 2025): B is averaged, A stays with its client.

Knows nothing about tasks or graphs.
"""

from __future__ import annotations

from fedmira.federation.averaging import share
from fedmira.federation.method import Method
from fedmira.types import Clients


def build(clients: Clients) -> Method:
    """Return the method: B <- sum_k n_k B_k / sum_k n_k over those that returned; only B crosses."""
    return share(clients, frozenset({"lora_b"}))
