"""What methods that merge into the base weights remember: the shift of the adapted layers and who knows how much of it.

A shift travels as the stacked factors whose product it is, or dense where that is smaller. A client that was away
catches up with all it missed. Knows nothing about how a shift comes to be.

Axes: K clients, W elements of all adapted layers, Q stacked ranks, I/O in and out features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedmira.federation.averaging import one_start
from fedmira.federation.method import State
from fedmira.federation.similarity import low_rank_pairs
from fedmira.types import Arena, Clients, Job, Participants

Factors = tuple[torch.Tensor, torch.Tensor]
"""B (O, Q) and A (Q, I)."""


def unshifted(initial: Arena, clients: Clients) -> State:
    """Return the state before round 1: one start, and no shift, which everybody knows. Kept in float32 at least."""
    state = one_start(initial, clients)
    size = sum(spec_a.shape[1] * spec_b.shape[0] for spec_a, spec_b in low_rank_pairs(initial.layout))
    dtype = torch.promote_types(initial.values_KP.dtype, torch.float32)
    device = initial.values_KP.device
    memory = {
        "shift": torch.zeros(size, dtype=dtype, device=device),
        "shift_sent": torch.zeros(1, dtype=torch.int64, device=device),
        "shift_known": torch.zeros(initial.num_clients, dtype=torch.int64, device=device),
    }
    return State(state.adapters, state.last_round_K, memory)


def pair_bytes(b_OQ: torch.Tensor, a_QI: torch.Tensor, element_size: int) -> int:
    """Return the bytes of two factors as they cross: components that are 0 in both, beyond a client's rank, do not."""
    there = int((b_OQ.any(dim=0) | a_QI.any(dim=1)).sum())
    return there * (b_OQ.shape[0] + a_QI.shape[1]) * element_size


def shifted_by(
    state: State, by_layer: Sequence[Factors], own_bytes: Sequence[int], returned: Sequence[int]
) -> dict[str, torch.Tensor]:
    """Return the memory after each layer's shift grew by the product of its factors.

    Args:
        state: before the round.
        by_layer: B and A for each layer of the layout, in its order; the scaling is applied here.
        own_bytes: what a client needs of each layer's factors to make the product itself.
        returned: who returned this round, and therefore knows the shift as it was before.
    """
    memory, layout = state.memory, state.adapters.layout
    change_W = torch.cat([(b_OQ.double() @ a_QI.double()).flatten() for b_OQ, a_QI in by_layer])
    shift_W = memory["shift"] + (layout.scaling * change_W).to(memory["shift"])
    size = state.adapters.values_KP.element_size()
    dense = [b_OQ.shape[0] * a_QI.shape[1] * size for b_OQ, a_QI in by_layer]
    sent = memory["shift_sent"] + sum(min(pair) for pair in zip(own_bytes, dense, strict=True))
    known_K = memory["shift_known"].clone()
    known_K[list(returned)] = memory["shift_sent"]
    return {"shift": shift_W, "shift_sent": sent, "shift_known": known_K}


def with_shift(job: Job, state: State, participants: Participants) -> Job:
    """Return `job` over the shifted base; its bytes are what the participants miss of the shift, on average."""
    memory = state.memory
    missing_S = memory["shift_sent"] - memory["shift_known"][list(participants.ids)]
    dense = memory["shift"].numel() * state.adapters.values_KP.element_size()
    return job._replace(
        shift_W=memory["shift"], shift_bytes=int(missing_S.clamp(max=dense).double().mean().round().item())
    )


def shifted_adapters(state: State) -> Arena:
    """Return the adapters over the shifted base: what each client is judged by."""
    return Arena(state.adapters.layout, state.adapters.values_KP, state.memory["shift"])
