"""MR-MTL (Liu et al., NeurIPS 2022): mean-regularised multi-task learning; each adapter is pulled towards their mean.

Client k trains F_k(w) + lambda/2 |w - mean|^2 from its own adapter. Knows nothing about tasks or graphs.
"""

from __future__ import annotations

import numpy as np

from fedmira.config.method import MrMtlConfig
from fedmira.federation.method import Method, State
from fedmira.federation.multiply import multiply
from fedmira.federation.receiving import exchange_everything, first_state, own_adapters, stored
from fedmira.types import Job, Participants, Pull


def build(config: MrMtlConfig) -> Method:
    """Return the method. The mean is over the last uploads of all clients that ever returned, all weighing the same.

    What crosses downwards is the mean, one adapter a client; each keeps its own, as the server got it where uploads are
    noised or compressed.
    """

    def plan(state: State, participants: Participants) -> Job:
        job = exchange_everything(state, participants)
        seen_K = np.array([float(last > 0) for last in state.last_round_K])
        if not seen_K.any():
            return job
        mean_1P = multiply(seen_K[None, :] / seen_K.sum(), state.adapters.values_KP)
        return job._replace(pull=Pull(mean_1P.expand_as(job.start_SP), (config.strength,) * len(job.ids)))

    return Method(init=first_state, plan=plan, merge=stored, personalise=own_adapters)
