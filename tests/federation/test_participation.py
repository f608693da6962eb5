"""Who takes part."""

from __future__ import annotations

import pytest

from fedmira.config.training import FederationConfig
from fedmira.errors import ConfigError
from fedmira.federation.participation import draw, num_participants, planned_ids


@pytest.mark.parametrize(
    ("num_clients", "settings", "expected"),
    [
        (80, {"participation": 0.1}, 8),
        (7, {"participation": 0.5}, 4),
        (3, {"participation": 0.01}, 1),
        (1, {}, 1),
        (5, {"clients_per_round": 5}, 5),
        (5, {"clients_per_round": 2}, 2),
    ],
)
def test_number(num_clients: int, settings: dict[str, float], expected: int) -> None:
    federation = FederationConfig.model_validate(settings)
    assert num_participants(num_clients, federation) == expected
    ids = draw(num_clients, federation, seed=3, round_=1).ids
    assert len(ids) == expected
    assert list(ids) == sorted(set(ids))
    assert set(ids) <= set(range(num_clients))


def test_more_clients_per_round_than_clients_is_a_config_mistake_that_names_both() -> None:
    with pytest.raises(ConfigError, match=r"clients_per_round = 9 exceeds the number of clients, 4") as caught:
        draw(4, FederationConfig(clients_per_round=9), 0, 1)
    assert caught.value.exit_code == 2


def test_draws_depend_on_seed_and_round_alone() -> None:
    federation = FederationConfig(participation=0.2)
    first = [draw(40, federation, 0, round_).ids for round_ in range(1, 9)]
    assert [draw(40, federation, 0, round_).ids for round_ in range(8, 0, -1)] == first[::-1]
    assert len(set(first)) == 8
    assert draw(40, federation, 1, 1).ids != first[0]
    assert draw(40, federation, 0, 5).round == 5


def test_everybody_is_sampled_equally_often() -> None:
    federation = FederationConfig(participation=0.25)
    counts = [0] * 12
    for round_ in range(1, 2001):
        for id_ in draw(12, federation, 0, round_).ids:
            counts[id_] += 1
    # binomial(2000, 1/4): mean 500, standard deviation 19
    assert all(abs(count - 500) < 90 for count in counts)


def test_planned_ids_are_those_drawn() -> None:
    federation = FederationConfig(rounds=7, participation=0.3)
    assert planned_ids(9, federation, 4) == {draw(9, federation, 4, round_).ids for round_ in range(1, 8)}
    assert planned_ids(9, FederationConfig(rounds=100), 4) == {tuple(range(9))}


@pytest.mark.parametrize("participation", [0.3, 1.0])
def test_the_last_round_is_known_as_such(participation: float) -> None:
    federation = FederationConfig(rounds=3, participation=participation)
    assert [draw(9, federation, 0, round_).last for round_ in (1, 2, 3)] == [False, False, True]
