"""FLoRIST (Ramesh and Dass, MLSys 2026): FLoRA whose sum is cut to the singular values that hold most of its energy.

Energy is the sum of squared singular values; each layer keeps the fewest that hold the wanted share of it. Knows
nothing about tasks or graphs.
"""

from __future__ import annotations

from fedmira.federation.merging import merged_each_round
from fedmira.federation.method import Method
from fedmira.federation.products import energy_rank, spectrum
from fedmira.federation.shifting import Factors
from fedmira.types import Clients


def build(clients: Clients, energy: float) -> Method:
    """Return the method; `energy`, in (0, 1], is the share that is kept."""

    def cut(factors: Factors) -> Factors:
        whole = spectrum(*factors)
        rank = energy_rank(whole.values_Q, energy)
        return whole.u_OQ[:, :rank] * whole.values_Q[:rank], whole.v_QI[:rank]

    return merged_each_round(clients, shorten=cut)
