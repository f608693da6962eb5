"""Federated averaging of some groups of tensors, the rest staying with its client: what several methods are made of.

Knows nothing about tasks or graphs. Axes: K clients, P parameters of one adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch

from fedmira.errors import ConfigError
from fedmira.federation.joining import with_rows
from fedmira.federation.method import Info, Method, State
from fedmira.federation.mixing import Mixer, average, by_group, keep
from fedmira.federation.receiving import exchange_everything, first_state, own_adapters, received
from fedmira.types import Arena, Clients, Job, Participants, Results


def returned_weights(clients: Clients, returned: Collection[int]) -> list[float]:
    """Return per client its number of training examples n_k if it returned, else 0."""
    there = set(returned)
    return [float(n) if k in there else 0.0 for k, n in enumerate(clients.num_examples_K)]


def one_start(initial: Arena, clients: Clients) -> State:
    """Return the state before round 1 in which everybody holds the initial adapter of the first client.

    One shared adapter needs one start; a mean of random factors would be a smaller start than any client's.
    """
    state = first_state(initial, clients)
    rows_KP = state.adapters.values_KP[:1].expand_as(initial.values_KP).clone()
    return State(initial.replace(rows_KP), state.last_round_K)


def mean_of(clients: Clients, returned: Collection[int], shared: Collection[str] | None = None) -> Mixer:
    """Return the mixer that gives everybody sum_k n_k theta_k / sum_k n_k in the groups `shared`; None: in all.

    The mean is over those that returned; if nobody did, everything stays as it is.
    """
    if not returned:
        return keep()
    mean = average(returned_weights(clients, returned))
    if shared is None:
        return mean
    return lambda arena: by_group({g: mean if g in shared else keep() for g in arena.layout.groups})(arena)


def follow(shared: Collection[str] | None = None) -> Callable[[State, int], State]:
    """Return `Method.join` of methods whose clients hold one adapter in the groups `shared`; None: in all.

    Raises:
        ConfigError: they no longer do, so that there is none to start from (when clients join).
    """

    def join(state: State, num_before: int) -> State:
        rows_NP = state.adapters.values_KP[num_before:].clone()
        for spec in state.adapters.layout.specs:
            if shared is None or spec.group in shared:
                columns = spec.columns
                held = state.adapters.values_KP[:num_before, columns]
                if not torch.equal(held, held[:1].expand_as(held)):
                    raise ConfigError(
                        "clients cannot join any more: the others no longer share an adapter that new ones could start "
                        "from, because their last rounds were local; start a new run, or resume without new clients"
                    )
                rows_NP[:, columns] = held[:1]
        return with_rows(state, num_before, rows_NP)

    return join


def share(clients: Clients, shared: frozenset[str] | None = None) -> Method:
    """Return the method that averages the groups `shared` over those that returned; None shares all groups.

    Only shared groups cross. The others are each client's own, never averaged. All clients start alike.

    Raises:
        ConfigError: the adapter lacks a shared group (when the state is made).
    """

    def init(initial: Arena, clients: Clients) -> State:
        groups = initial.layout.groups
        if shared is not None and not shared <= set(groups):
            raise ConfigError(
                f"this method averages {sorted(shared)}, but the adapter has the groups {sorted(groups)}; use "
                "model.adapter.kind = lora, or another method"
            )
        return one_start(initial, clients)

    def plan(state: State, participants: Participants) -> Job:
        job = exchange_everything(state, participants)
        return job if shared is None else job._replace(download=shared, upload=shared)

    def merge(state: State, participants: Participants, results: Results) -> tuple[State, Info]:
        adapters, last_round_K = received(state.adapters, state, participants, results)
        return State(mean_of(clients, results.ids, shared)(adapters), last_round_K), Info(
            {"returned": float(len(results.ids))}
        )

    return Method(init=init, plan=plan, merge=merge, personalise=own_adapters, join=follow(shared))
