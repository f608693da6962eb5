"""FedALT (AAAI 2026): each client trains an adapter of its own beside a frozen mean of everybody else's.

y = W0 x + a s B_k A_k x + (1 - a) s B_k' A_k' x, where (A_k', B_k') is the mean of the others' (A_l, B_l): the rest of
the world. Nothing of the others is mixed into the own pair; where uploads are noised or compressed, the client goes on
from what the server got of it. Knows nothing about tasks or graphs.
"""

from __future__ import annotations

import numpy as np
import torch

from fedmira.config.method import FedALTConfig
from fedmira.federation.method import Info, Method, State
from fedmira.federation.multiply import multiply
from fedmira.federation.receiving import exchange_everything, first_state, own_adapters, received
from fedmira.types import Job, Participants, Results

_OWN = frozenset({"lora_a", "lora_b"})
_REST = frozenset({"second_a", "second_b"})


def build(config: FedALTConfig) -> Method:
    """Return the method. The first pair of a layer is the client's own, the second the rest of the world.

    Pairs add up with weight 1, so the stored B is a B_k, and the second B is (1 - a) / a times the mean of the stored
    ones. The rest of the world is the mean over all other clients that ever returned; all weigh the same.
    """
    foreign = (1.0 - config.own_weight) / config.own_weight

    def plan(state: State, participants: Participants) -> Job:
        return exchange_everything(state, participants)._replace(download=_REST, trainable=_OWN, upload=_OWN)

    def merge(state: State, participants: Participants, results: Results) -> tuple[State, Info]:
        adapters, last_round_K = received(state.adapters, state, participants, results)
        info = Info({"returned": float(len(results.ids))})
        seen_K = np.array([float(last > 0) for last in last_round_K])
        others_KK = seen_K[None, :] * (1.0 - np.eye(len(seen_K)))
        number_K = others_KK.sum(axis=1)
        there = np.flatnonzero(number_K)
        if len(there):
            for own, rest, factor in (("lora_a", "second_a", 1.0), ("lora_b", "second_b", foreign)):
                from_own, into_rest = (_columns(adapters.layout.slices(group)) for group in (own, rest))
                weights_MK = factor * others_KK[there] / number_K[there, None]
                mean_MP = multiply(weights_MK, adapters.values_KP[:, from_own])
                adapters.values_KP[torch.from_numpy(there)[:, None], into_rest[None, :]] = mean_MP
        return State(adapters, last_round_K), info

    return Method(init=first_state, plan=plan, merge=merge, personalise=own_adapters)


def _columns(slices: tuple[slice, ...]) -> torch.Tensor:
    """The columns of some tensors, layer after layer: the same layers in the same order for either pair."""
    return torch.cat([torch.arange(part.start, part.stop) for part in slices])
