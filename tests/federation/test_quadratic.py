"""The claims about graphs on problems with a known answer: quadratic clients in families, noisy local optima.

Client k minimises |theta - (family centre + small deviation)|^2 seen through few noisy examples, so its own optimum is
off by the noise of its examples and one global model is off by the distance between families. Distances from the true
optimum are averaged over draws; all methods see the same draws.

Axes: K clients, S participants, P parameters of one adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np
import pytest
import torch
from tests.federation.builders import FEDIT, LOCAL, initial, layout, mira, published

from fedmira.config.method import MethodConfig
from fedmira.config.training import FederationConfig
from fedmira.federation.graph import Graph, disagreement, weight_inside
from fedmira.federation.participation import draw
from fedmira.federation.registry import build_method
from fedmira.randomness import torch_generator
from fedmira.types import Clients, Results

FAMILIES, SIZE, ROUNDS, DRAWS = 4, 4, 12, 3
K = FAMILIES * SIZE
LAYOUT = layout(features=((12, 10), (9, 14)))


def family_clients(seed: int) -> Clients:
    tasks = tuple(str(k // SIZE) for k in range(K))
    same = np.equal.outer(np.array(tasks), np.array(tasks)).astype(np.float64) - np.eye(K)
    return Clients(tuple(f"client-{k}" for k in range(K)), (10,) * K, tasks, seed, same)


@cache
def problem(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """True and empirical optima (K, P): a part common to all, a family's part, a deviation, and sampling noise."""
    shape = (K, LAYOUT.num_parameters)

    def noise(purpose: str, rows: int) -> torch.Tensor:
        generator = torch_generator(seed, "quadratic", purpose)
        return torch.randn((rows, shape[1]), generator=generator, dtype=torch.float64)

    families = noise("family", FAMILIES).repeat_interleave(SIZE, dim=0)
    true_KP = noise("common", 1) + families + 0.2 * noise("deviation", K)
    return true_KP, true_KP + 0.8 * noise("examples", K)


def error(config: MethodConfig, participation: float = 1.0) -> tuple[float, list[Graph | None]]:
    """Mean squared distance of the clients' own adapters from their true optima, and the last graphs, over draws."""
    distances, graphs = [], []
    for seed in range(DRAWS):
        who, federation = family_clients(seed), FederationConfig(rounds=ROUNDS, participation=participation)
        true_KP, empirical_KP = problem(seed)
        method = build_method(config, who, federation=federation)
        state = method.init(initial(K, torch.float64, LAYOUT), who)
        graph = None
        for round_ in range(1, ROUNDS + 1):
            participants = draw(K, federation, seed, round_)
            job = method.plan(state, participants)
            ids = list(participants.ids)
            # ten gradient steps on 1/2 |theta - optimum|^2
            local_SP = empirical_KP[ids] + 0.9**10 * (job.start_SP - empirical_KP[ids])
            state, info = method.merge(state, participants, Results(participants.ids, local_SP, (), 0, 0, 0.0, 0))
            graph = info.graph
        distances.append(float((method.personalise(state).values_KP - true_KP).square().mean()))
        graphs.append(graph)
    return float(np.mean(distances)), graphs


@cache
def errors(participation: float) -> Mapping[str, float]:
    """Error of every method on the same draws."""
    configs: dict[str, MethodConfig] = {
        "local": LOCAL,
        "fedit": FEDIT,
        "published": published("random", strength=0.5, server_lr=0.0015),
        **{kind: mira(kind) for kind in ("gram", "true", "permuted", "random", "uniform")},
    }
    return {name: error(config, participation)[0] for name, config in configs.items()}


@pytest.mark.parametrize("participation", [1.0, 0.5])
def test_the_true_graph_beats_no_graph_and_a_permuted_one_is_worse_than_the_true(participation: float) -> None:
    of = errors(participation)
    assert of["true"] < 0.75 * of["local"]
    assert of["true"] < 0.5 * of["fedit"]
    assert of["permuted"] > 1.5 * of["true"]
    # averaging away noise repays at most what relating the wrong clients costs
    assert of["permuted"] > 0.95 * of["local"]
    assert min(of["random"], of["uniform"]) > of["true"]


@pytest.mark.parametrize("participation", [1.0, 0.5])
def test_the_learned_graph_is_nearly_as_good_as_the_true_one(participation: float) -> None:
    of = errors(participation)
    assert of["gram"] < 1.1 * of["true"]
    assert of["gram"] < 0.8 * of["local"]


@pytest.mark.parametrize("participation", [1.0, 0.5])
def test_the_learned_graph_recovers_the_families(participation: float) -> None:
    for graph in error(mira("gram"), participation)[1]:
        assert graph is not None
        assert weight_inside(graph, family_clients(0).tasks) > 0.9
        # almost every pair of a family is found, so nobody is left alone
        assert graph.num_edges > 0.8 * FAMILIES * SIZE * (SIZE - 1) / 2
        assert (graph.adjacency_KK.sum(axis=1) > 0).all()


def test_the_step_as_published_hardly_differs_from_training_alone() -> None:
    of = errors(1.0)
    assert of["published"] == pytest.approx(of["local"], rel=0.03)
    assert of["published"] != of["local"]


def test_more_strength_leaves_less_disagreement_within_families() -> None:
    who = family_clients(0)
    assert who.true_adjacency_KK is not None
    energies = []
    for strength in (0.0, 0.3, 1.0, 3.0):
        method = build_method(mira("true", strength=strength), who)
        state = method.init(initial(K, torch.float64, LAYOUT), who)
        everybody = draw(K, FederationConfig(), 0, 1)
        results = Results(everybody.ids, problem(0)[1], (), 0, 0, 0.0, 0)
        state, info = method.merge(state, everybody, results)
        assert info.graph is not None
        energies.append(disagreement(info.graph, method.personalise(state).values_KP))
    # in a complete family of four every eigenvalue but one is 4
    predicted = [energies[0] / (1 + 4 * strength) ** 2 for strength in (0.0, 0.3, 1.0, 3.0)]
    assert energies == pytest.approx(predicted)
