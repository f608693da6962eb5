"""RoLoRA (Chen et al., NeurIPS 2025): rounds in which only B is trained and averaged alternate with rounds for A.

The factor that rests is the same at all clients, so the mean of the other is the mean of the products in every round.
Knows nothing about tasks or graphs.
"""

from __future__ import annotations

from fedmira.federation.averaging import follow, share
from fedmira.federation.method import Method, State
from fedmira.types import Clients, Job, Participants


def build(clients: Clients) -> Method:
    """Return the method: B in odd rounds, A in even ones; while B is 0, A has no gradient."""
    moving = {0: frozenset({"lora_a"}), 1: frozenset({"lora_b"})}
    averaged = {parity: share(clients, groups) for parity, groups in moving.items()}

    def plan(state: State, participants: Participants) -> Job:
        round_ = participants.round
        job = averaged[round_ % 2].plan(state, participants)
        # who took part in the round before lacks only what moved in it
        up_to_date = round_ > 1 and all(state.last_round_K[id_] == round_ - 1 for id_ in participants.ids)
        download = moving[(round_ - 1) % 2] if up_to_date else moving[0] | moving[1]
        return job._replace(trainable=moving[round_ % 2], download=download)

    return averaged[1]._replace(
        plan=plan, merge=lambda *round_: averaged[round_[1].round % 2].merge(*round_), join=follow()
    )
