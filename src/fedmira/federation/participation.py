"""Who takes part in a round: uniform sampling without replacement from a named random stream.

Knows nothing about what the participants do. Axes: K clients, S participants.
"""

from __future__ import annotations

from fedmira.config.training import FederationConfig
from fedmira.errors import ConfigError
from fedmira.randomness import generator
from fedmira.types import Participants


def num_participants(num_clients: int, federation: FederationConfig) -> int:
    """Return S, how many of `num_clients` clients are sampled per round: at least one, `participation` rounded.

    >>> num_participants(80, FederationConfig(participation=0.1))
    8
    >>> num_participants(3, FederationConfig(participation=0.1))
    1

    Raises:
        ConfigError: `clients_per_round` exceeds `num_clients`, or there is no client.
    """
    if num_clients < 1:
        raise ConfigError("the federation has no clients; at least 1 is needed: check the data section of the config")
    if federation.clients_per_round is None:
        return max(1, round(federation.participation * num_clients))
    if federation.clients_per_round > num_clients:
        raise ConfigError(
            f"federation.clients_per_round = {federation.clients_per_round} exceeds the number of clients, "
            f"{num_clients}; set it to 1 .. {num_clients}, or use federation.participation"
        )
    return federation.clients_per_round


def draw(num_clients: int, federation: FederationConfig, seed: int, round_: int) -> Participants:
    """Return the participants of round `round_` (1 for the first), uniform without replacement.

    Who they are depends on `seed`, `round_`, `num_clients` and their number alone, so every method meets the same ones.

    Raises:
        ConfigError: more clients per round than clients.
    """
    size, last = num_participants(num_clients, federation), round_ == federation.rounds
    if size == num_clients:
        return Participants(round_, tuple(range(num_clients)), last)
    ids = generator(seed, "participation", round_).choice(num_clients, size=size, replace=False)
    return Participants(round_, tuple(sorted(int(id_) for id_ in ids)), last)


def planned_ids(num_clients: int, federation: FederationConfig, seed: int) -> frozenset[tuple[int, ...]]:
    """Return the distinct sets of participants that the rounds of a run will draw."""
    return frozenset(draw(num_clients, federation, seed, round_).ids for round_ in range(1, federation.rounds + 1))
