"""FLoRA (Wang et al., NeurIPS 2024): the exact mean of the products is merged into the base, every client starts anew.

What is sent are the stacked factors, [p_1 B_1 .. p_K B_K] and [A_1; ..; A_K]. Knows nothing about tasks or graphs.
"""

from __future__ import annotations

from fedmira.federation.merging import merged_each_round
from fedmira.federation.method import Method
from fedmira.types import Clients


def build(clients: Clients) -> Method:
    """Return the method."""
    return merged_each_round(clients, shorten=lambda factors: factors)
