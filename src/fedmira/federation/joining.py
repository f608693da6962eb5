"""Clients that join between two rounds: a state of K clients becomes one of more, the new ones last and never seen.

Clients that were there keep every bit of their rows and of what is remembered about them. Knows nothing about data,
files or who joins.

Axes: K clients after, P parameters of one adapter.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fedmira.federation.method import Method, State
from fedmira.types import Participants, Results


def joined(method: Method, state: State, first: State, round_: int) -> State:
    """Return `state` with the clients that joined after round `round_`.

    What is remembered about them is what `init` remembers of a client. The axes of a tensor that count clients are
    those that are longer in `first` than in `state`: no other axis depends on how many there are.

    Args:
        method: over all K clients.
        state: of those that were there, which are the first rows of the K.
        first: what `method.init` makes of all K.
        round_: the last round that is over; 0 before the first.
    """
    num_before, num_clients = state.adapters.num_clients, first.adapters.num_clients
    grown = State(
        state.adapters.replace(_grown(state.adapters.values_KP, first.adapters.values_KP)),
        (*state.last_round_K, *(0,) * (num_clients - num_before)),
        {name: _grown(tensor, first.memory[name]) for name, tensor in state.memory.items()},
    )
    if method.join is not None:
        return method.join(grown, num_before)
    nobody = Results((), grown.adapters.values_KP[:0], (), 0, 0, 0.0)
    merged, _ = method.merge(grown, Participants(round_, ()), nobody)
    return with_rows(grown, num_before, merged.adapters.values_KP[num_before:])


def with_rows(state: State, num_before: int, rows_NP: torch.Tensor) -> State:
    """Return `state` in which the clients from row `num_before` on hold `rows_NP`, or all of them its one row."""
    values_KP = state.adapters.values_KP.clone()
    values_KP[num_before:] = rows_NP
    return replace(state, adapters=state.adapters.replace(values_KP))


def _grown(before: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """Return `first` with `before` in its leading corner."""
    grown = first.to(before, copy=True)
    grown[tuple(slice(extent) for extent in before.shape)] = before
    return grown
