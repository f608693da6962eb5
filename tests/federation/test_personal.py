"""Personalised methods: their equations by hand, and what they reduce to.

Axes: K clients, S rows of a job, P parameters of one adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tests.federation.builders import (
    FEDIT,
    LOCAL,
    clients,
    initial,
    layout,
    layout_for,
    one_round,
    play,
    same_bytes,
    step,
    trained,
)
from tests.reference import clusters_twin, mixing_twin

from fedmira.config.graph import GraphConfig
from fedmira.config.method import FedAMPConfig, MethodConfig, method_with_defaults
from fedmira.config.training import FederationConfig
from fedmira.errors import ConfigError
from fedmira.federation import known_graphs as known
from fedmira.federation.client_clusters import best_cut, far_apart, layer_distances
from fedmira.federation.clustering import partitions
from fedmira.federation.method import Method, State
from fedmira.federation.methods.fedamp import attention
from fedmira.federation.methods.fedtreelora import cut_layers
from fedmira.federation.receiving import split
from fedmira.federation.registry import build_method
from fedmira.federation.similarity import row_distances
from fedmira.federation.simplex import collaboration, project_to_simplex
from fedmira.types import Arena, ClientReport, Job, Losses, Participants, Results, Trial

EVERYBODY = tuple(range(6))
ROUNDS = [(0, 1, 3), (1, 2, 4), (0, 2, 3, 5), EVERYBODY]


def section(name: str, **settings: Any) -> Any:
    return type(method_with_defaults(name)).model_validate({"name": name, **settings})


def fresh(config: MethodConfig, num_clients: int = 6) -> tuple[Method, State]:
    who = clients(num_clients)
    method = build_method(config, who)
    return method, method.init(initial(num_clients, torch.float64, layout_for(config)), who)


def rows_of(ids: Sequence[int], round_: int = 1, like: torch.Tensor | None = None) -> list[torch.Tensor]:
    """The steps that the stand-in for training makes."""
    like = torch.zeros(layout().num_parameters, dtype=torch.float64) if like is None else like
    return [step(clients().names[k], round_, like) for k in ids]


def columns(*groups: str, num_pairs: int = 1) -> torch.Tensor:
    of = layout(num_pairs=num_pairs)
    return torch.cat([torch.arange(part.start, part.stop) for group in groups for part in of.slices(group)])


def descended(job: Job, optimum_KP: torch.Tensor, rate: float = 0.1, steps: int = 20) -> Results:
    """Gradient descent on 1/2 |x - optimum|^2 and the job's pull, for the job's share of `steps`."""
    values_SP = job.start_SP.clone()
    for _ in range(round(job.work * steps)):
        gradient_SP = values_SP - optimum_KP[list(job.ids)]
        if job.pull is not None:
            strength_S = torch.tensor(job.pull.strength_S, dtype=values_SP.dtype)
            gradient_SP = gradient_SP + strength_S[:, None] * (values_SP - job.pull.target_SP)
        values_SP = values_SP - rate * gradient_SP
    return trained(job, clients().names)._replace(values_SP=values_SP)


def optima(num_clients: int = 6) -> torch.Tensor:
    like = torch.zeros(layout().num_parameters, dtype=torch.float64)
    return torch.stack([step(f"client-{k}", 9, like) for k in range(num_clients)])


def descend(config: MethodConfig, rounds: Sequence[tuple[int, ...]]) -> tuple[Method, State]:
    method, state = fresh(config)
    for round_, ids in enumerate(rounds, start=1):
        participants = Participants(round_, ids)
        state, _ = method.merge(state, participants, descended(method.plan(state, participants), optima()))
    return method, state


# ------------------------------------------------------------------------------------------------------ fedit_finetuned


def test_fedit_finetuned_is_fedit_first_and_local_then() -> None:
    names = clients().names
    method, state = fresh(section("fedit_finetuned", local_rounds=2))
    averaging, averaged = fresh(FEDIT)
    for round_ in range(1, 7):
        state = play(method, state, names, [EVERYBODY], first=round_)
        averaged = play(averaging, averaged, names, [EVERYBODY], first=round_)
        assert same_bytes(state.adapters.values_KP, averaged.adapters.values_KP)
    alone, local = fresh(LOCAL)[0], averaged
    for round_ in (7, 8):
        job = method.plan(state, Participants(round_, EVERYBODY))
        assert (bool(job.download), bool(job.upload)) == (round_ == 7, False)
        state, local = (play(m, s, names, [EVERYBODY], first=round_) for m, s in ((method, state), (alone, local)))
    assert same_bytes(state.adapters.values_KP, local.adapters.values_KP)
    assert not torch.allclose(state.adapters.values_KP[0], state.adapters.values_KP[1], atol=1e-3)


def test_a_quarter_of_the_rounds_is_local_by_default() -> None:
    for rounds, local in ((8, 2), (4, 1), (60, 15)):
        method = build_method(section("fedit_finetuned"), clients(), federation=FederationConfig(rounds=rounds))
        state = method.init(initial(), clients())
        uploads = [bool(method.plan(state, Participants(r, EVERYBODY)).upload) for r in range(1, rounds + 1)]
        assert uploads == [True] * (rounds - local) + [False] * local


# -------------------------------------------------------------------------------------------------------- ditto, mr_mtl


def test_ditto_trains_a_global_row_and_a_personal_row_pulled_to_it() -> None:
    method, state = descend(section("ditto", strength=0.5), [(0, 2)])
    start_P, optimum_KP = initial(dtype=torch.float64).values_KP[0], optima()
    # half of 20 steps: x - fixed point shrinks by 1 - rate (1 + strength) a step
    factor = (1 - 0.1 * 1.5) ** 10
    for k in (0, 2):
        fixed_P = (optimum_KP[k] + 0.5 * start_P) / 1.5
        assert torch.allclose(state.adapters.values_KP[k], fixed_P + factor * (start_P - fixed_P), atol=1e-12)
    trained_KP = optimum_KP + 0.9**10 * (start_P - optimum_KP)
    weights = [clients().num_examples_K[k] for k in (0, 2)]
    mean_P = mixing_twin.weighted_mean([trained_KP[0], trained_KP[2]], weights)
    assert torch.allclose(state.memory["global"][0], mean_P, atol=1e-12)
    job = method.plan(state, Participants(2, (0, 1)))
    assert job.ids == (0, 1, 0, 1)
    assert same_bytes(job.start_SP[0], job.start_SP[1])
    assert same_bytes(job.start_SP[:1], state.memory["global"])
    assert job.pull is not None
    assert job.pull.strength_S == (0.0, 0.0, 0.5, 0.5)
    assert (job.work, job.local_rows, job.num_crossing) == (0.5, 2, 2)


def test_ditto_without_a_pull_is_local_training_and_fedit_each_with_half_the_work() -> None:
    _, state = descend(section("ditto", strength=0.0), ROUNDS)
    start_P, optimum_KP = initial(dtype=torch.float64).values_KP[0], optima()
    taken_K = [sum(k in ids for ids in ROUNDS) for k in EVERYBODY]
    for k, taken in enumerate(taken_K):
        alone_P = optimum_KP[k] + 0.9 ** (10 * taken) * (start_P - optimum_KP[k])
        assert torch.allclose(state.adapters.values_KP[k], alone_P, atol=1e-12)
    averaging, averaged = fresh(FEDIT)
    for round_, ids in enumerate(ROUNDS, start=1):
        job = averaging.plan(averaged, Participants(round_, ids))._replace(work=0.5)
        averaged, _ = averaging.merge(averaged, Participants(round_, ids), descended(job, optimum_KP))
    assert torch.allclose(state.memory["global"][0], averaged.adapters.values_KP[0], atol=1e-12)


def test_ditto_keeps_its_global_adapter_through_a_round_in_which_nobody_returns() -> None:
    method, state = descend(section("ditto"), [(0, 2)])
    after, _ = one_round(method, state, clients().names, Participants(2, (0, 1)), failed={0, 1})
    assert same_bytes(after.memory["global"], state.memory["global"])
    assert not torch.allclose(after.memory["global"], after.adapters.values_KP[:1])


def test_a_client_that_lost_one_of_its_two_rows_is_missing_in_both() -> None:
    lost = [ClientReport(k, 3, 1, 1.0, 1, 1, failure) for k, failure in ((0, ""), (2, ""), (0, ""), (2, "lost"))]
    values_SP = torch.tensor([[1.0], [2.0], [3.0]])
    of_global, personal = split(Results((0, 2, 0), values_SP, tuple(lost), 0, 0, 0.0), 2)
    assert of_global.ids == personal.ids == (0,)
    assert (of_global.values_SP.tolist(), personal.values_SP.tolist()) == ([[1.0]], [[3.0]])


def test_mr_mtl_pulls_to_the_mean_of_those_seen() -> None:
    method, state = descend(section("mr_mtl", strength=0.5), [(0, 2), (2, 4)])
    job = method.plan(state, Participants(3, (0, 1)))
    mean_P = state.adapters.values_KP[[0, 2, 4]].mean(dim=0)
    assert job.pull is not None
    assert job.pull.strength_S == (0.5, 0.5)
    assert torch.allclose(job.pull.target_SP, mean_P.expand(2, -1), atol=1e-14)
    assert same_bytes(job.start_SP, state.adapters.values_KP[[0, 1]])
    # before anybody was seen there is no mean
    assert fresh(section("mr_mtl"))[0].plan(fresh(section("mr_mtl"))[1], Participants(1, (0, 1))).pull is None


def test_mr_mtl_without_a_pull_is_local_and_with_a_strong_one_all_come_together() -> None:
    _, alone = descend(LOCAL, ROUNDS)
    _, free = descend(section("mr_mtl", strength=0.0), ROUNDS)
    assert torch.allclose(free.adapters.values_KP, alone.adapters.values_KP, atol=1e-14)
    spread = [
        float(descend(section("mr_mtl", strength=strength), [EVERYBODY] * 8)[1].adapters.values_KP.std(dim=0).mean())
        for strength in (0.0, 1.0, 8.0)
    ]
    assert spread[0] > 1.5 * spread[1] > 1.5 * spread[2]


# ------------------------------------------------------------------------------------------------------ parts of a pair


@pytest.mark.parametrize(
    ("name", "shared", "own"), [("fedsa_lora", "lora_a", "lora_b"), ("fed_alora", "lora_b", "lora_a")]
)
def test_one_factor_is_averaged_and_crosses_and_the_other_stays(name: str, shared: str, own: str) -> None:
    method, state = fresh(section(name))
    job = method.plan(state, Participants(1, (0, 3)))
    assert job.download == job.upload == {shared}
    assert job.trainable == {"lora_a", "lora_b"}
    results = trained(job, clients().names)
    state, _ = method.merge(state, Participants(1, (0, 3)), results)
    mean_P = mixing_twin.weighted_mean(list(results.values_SP), [clients().num_examples_K[k] for k in (0, 3)])
    values_KP, shared_columns, own_columns = state.adapters.values_KP, columns(shared), columns(own)
    assert torch.allclose(values_KP[:, shared_columns], mean_P[shared_columns].expand(6, -1), atol=1e-14)
    assert same_bytes(values_KP[[0, 3]][:, own_columns], results.values_SP[:, own_columns])
    start_KP = initial(dtype=torch.float64).values_KP
    assert same_bytes(values_KP[[1, 2]][:, own_columns], start_KP[[1, 2]][:, own_columns])


def test_sharing_both_factors_is_fedit() -> None:
    """FedSA-LoRA's A and Fed-ALoRA's B after one round are those of FedIT."""
    states = [
        play(*fresh(config), clients().names, [(0, 2, 5)])
        for config in (section("fedsa_lora"), section("fed_alora"), FEDIT)
    ]
    one, other, both = (state.adapters.values_KP for state in states)
    assert torch.allclose(one[:, columns("lora_a")], both[:, columns("lora_a")], atol=1e-14)
    assert torch.allclose(other[:, columns("lora_b")], both[:, columns("lora_b")], atol=1e-14)


def test_an_adapter_without_factors_is_refused() -> None:
    from fedmira.types import Layout, TensorSpec

    prompts = Arena(Layout((TensorSpec("prompt", "prompt", "", (4, 10), 0),)), torch.zeros(6, 40))
    for name in ("fedsa_lora", "fed_alora", "fedlease", "fedtreelora"):
        with pytest.raises(ConfigError, match="lora"):
            build_method(section(name), clients()).init(prompts, clients())


# ------------------------------------------------------------------------------------------------------- feddpa, fedalt


def test_feddpa_averages_the_global_pair_in_odd_rounds_and_trains_the_own_in_even_ones() -> None:
    names, first, second = (
        clients().names,
        columns("lora_a", "lora_b", num_pairs=2),
        columns("second_a", "second_b", num_pairs=2),
    )
    method, state = fresh(section("feddpa"))
    job = method.plan(state, Participants(1, EVERYBODY))
    assert job.trainable == job.upload == job.download == {"lora_a", "lora_b"}
    results = trained(job, names)
    before = state.adapters.values_KP
    state, _ = method.merge(state, Participants(1, EVERYBODY), results)
    mean_P = mixing_twin.weighted_mean(list(results.values_SP), clients().num_examples_K)
    assert torch.allclose(state.adapters.values_KP[:, first], mean_P[first].expand(6, -1), atol=1e-14)
    assert same_bytes(state.adapters.values_KP[:, second], before[:, second])
    job = method.plan(state, Participants(2, (1, 4)))
    assert (job.trainable, job.upload) == ({"second_a", "second_b"}, frozenset())
    after, _ = method.merge(state, Participants(2, (1, 4)), trained(job, names))
    assert same_bytes(after.adapters.values_KP[:, first], state.adapters.values_KP[:, first])
    moved_K = (after.adapters.values_KP != state.adapters.values_KP).any(dim=1)
    assert moved_K.tolist() == [False, True, False, False, True, False]
    # who was there holds the global pair, which rested; who was not may lack it
    assert method.plan(after, Participants(3, (1, 4))).download == frozenset()
    assert method.plan(after, Participants(3, (1, 5))).download == {"lora_a", "lora_b"}


def test_feddpa_in_odd_rounds_alone_is_fedit() -> None:
    names = clients().names
    method, state = fresh(section("feddpa"))
    averaging = build_method(FEDIT, clients())
    averaged = averaging.init(initial(dtype=torch.float64), clients())
    averaged = State(
        averaged.adapters.replace(state.adapters.values_KP[:, columns("lora_a", "lora_b", num_pairs=2)]),
        averaged.last_round_K,
    )
    for round_ in (1, 3):
        participants = Participants(round_, (0, 1, 4))
        results = trained(method.plan(state, participants), names)
        part = results._replace(values_SP=results.values_SP[:, columns("lora_a", "lora_b", num_pairs=2)])
        state, _ = method.merge(state, participants, results)
        averaged, _ = averaging.merge(averaged, participants, part)
    kept = state.adapters.values_KP[:, columns("lora_a", "lora_b", num_pairs=2)]
    assert torch.allclose(kept, averaged.adapters.values_KP, atol=1e-14)


def test_fedalt_gives_each_client_the_mean_of_the_others_and_leaves_its_own_alone() -> None:
    method, state = fresh(section("fedalt", own_weight=0.8))
    job = method.plan(state, Participants(1, (0, 2, 3)))
    assert (job.trainable, job.upload) == ({"lora_a", "lora_b"}, {"lora_a", "lora_b"})
    assert job.download == {"second_a", "second_b"}
    results = trained(job, clients().names)
    state, _ = method.merge(state, Participants(1, (0, 2, 3)), results)
    own, values_KP = {0: 0, 2: 1, 3: 2}, state.adapters.values_KP
    for k in EVERYBODY:
        others = [row for id_, row in own.items() if id_ != k]
        for number, (first, second) in enumerate((("lora_a", "second_a"), ("lora_b", "second_b"))):
            mean_P = results.values_SP[others].mean(dim=0)[columns(first, num_pairs=2)]
            expected_P = mean_P if number == 0 else 0.25 * mean_P
            assert torch.allclose(values_KP[k, columns(second, num_pairs=2)], expected_P, atol=1e-14)
    both = columns("lora_a", "lora_b", num_pairs=2)
    assert same_bytes(values_KP[[0, 2, 3]][:, both], results.values_SP[:, both])


def test_fedalt_with_all_weight_on_its_own_adds_nothing() -> None:
    method, state = fresh(section("fedalt", own_weight=1.0))
    state = play(method, state, clients().names, ROUNDS)
    assert not state.adapters.values_KP[:, columns("second_b", num_pairs=2)].any()


def test_fedalt_with_one_client_has_no_rest_of_the_world() -> None:
    method, state = fresh(section("fedalt"), 1)
    before = state.adapters.values_KP[:, columns("second_a", "second_b", num_pairs=2)].clone()
    state = play(method, state, clients(1).names, [(0,)] * 2)
    assert same_bytes(state.adapters.values_KP[:, columns("second_a", "second_b", num_pairs=2)], before)


# ---------------------------------------------------------------------------------------------------- fedamp, pfedgraph


def test_attention_falls_with_distance_and_sums_to_one() -> None:
    squares = clusters_twin.squared_distances(np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0]]))
    weights = attention(squares, FedAMPConfig(name="fedamp", attention=0.4, sigma=2.0))
    mean = (1 + 9 + 10) / 3
    expected = 0.2 * np.exp(-np.array([1.0, 9.0, 10.0]) / (2 * mean))
    assert np.allclose(weights[[0, 0, 1], [1, 2, 2]], expected)
    assert np.allclose(weights.sum(axis=1), 1)
    assert (weights >= 0).all()
    # equal clients are no trouble
    equal = attention(np.zeros((3, 3)), FedAMPConfig(name="fedamp", attention=0.4))
    assert np.allclose(equal, 0.6 * np.eye(3) + 0.2 * (1 - np.eye(3)))


def test_fedamp_pulls_to_the_attentive_mean() -> None:
    config = section("fedamp", strength=0.3, attention=0.6)
    method, state = descend(config, [(0, 2, 3)])
    seen = [0, 2, 3]
    squares = clusters_twin.squared_distances(state.adapters.values_KP[seen].numpy())
    expected_SP = attention(squares, config) @ state.adapters.values_KP[seen].numpy()
    job = method.plan(state, Participants(2, (1, 2, 3)))
    assert job.pull is not None
    assert job.pull.strength_S == (0.0, 0.3, 0.3)
    assert np.allclose(job.pull.target_SP[1:], expected_SP[1:], atol=1e-12)
    assert same_bytes(job.start_SP, state.adapters.values_KP[[1, 2, 3]])


def test_fedamp_without_a_pull_is_local() -> None:
    _, alone = descend(LOCAL, ROUNDS)
    _, free = descend(section("fedamp", strength=0.0), ROUNDS)
    assert torch.allclose(free.adapters.values_KP, alone.adapters.values_KP, atol=1e-14)


def test_the_closed_form_solves_the_quadratic_programme() -> None:
    rng = np.random.default_rng(0)
    for size, strength in ((2, 0.8), (5, 0.1), (9, 3.0)):
        cosine = np.clip(rng.normal(size=(size, size)), -1, 1)
        np.fill_diagonal(cosine, 1)
        sizes = rng.integers(1, 100, size)
        share = sizes / sizes.sum()
        weights = collaboration(cosine, sizes.tolist(), strength)
        assert np.allclose(weights.sum(axis=1), 1)
        assert (weights >= 0).all()
        for k in range(size):
            assert np.allclose(weights[k], clusters_twin.simplex_weights(cosine[k], share, strength), atol=1e-5)
    inside = np.array([[0.2, 0.3, 0.5]])
    assert np.allclose(project_to_simplex(inside), inside)


@pytest.mark.parametrize("far", [1e3, 1e7, 5e16, 1e300])
def test_on_the_simplex_only_differences_count_however_far_it_is(far: float) -> None:
    inside = np.array([[0.2, 0.3, 0.5]])
    if far < 1e10:
        assert np.allclose(project_to_simplex([inside[0] + far, inside[0] - far]), inside, atol=1e-15 * far)
    rows = project_to_simplex(
        [[far, far, 0.0], [far, far, far], [-far, -far, 0.0], [-far, -far, -far], [0.3, 0.3, -far]]
    )
    assert np.allclose(rows, [[0.5, 0.5, 0], [1 / 3] * 3, [0, 0, 1], [1 / 3] * 3, [0.5, 0.5, 0]])
    # without a regulariser everything goes to the most similar
    cosine = np.array([[1.0, 0.9, 0.1], [0.9, 1.0, 1.0], [0.1, 1.0, 1.0]])
    weights = collaboration(cosine, [3, 3, 4], 1 / far)
    assert np.allclose(weights.sum(axis=1), 1)
    assert np.allclose(weights, [[1, 0, 0], [0, 0.5, 0.5], [0, 0.5, 0.5]], atol=0.06)


def test_pfedgraph_by_hand_on_three_clients() -> None:
    method, state = fresh(section("pfedgraph", strength=0.8), 3)
    results = trained(method.plan(state, Participants(1, (0, 1, 2))), clients(3).names)
    mixed, info = method.merge(state, Participants(1, (0, 1, 2)), results)
    moved = (results.values_SP - initial(3, torch.float64).values_KP).numpy()
    unit = moved / np.linalg.norm(moved, axis=1, keepdims=True)
    share = np.array(clients(3).num_examples_K) / sum(clients(3).num_examples_K)
    weights = np.stack([clusters_twin.simplex_weights(row, share, 0.8) for row in unit @ unit.T])
    assert np.allclose(mixed.adapters.values_KP, weights @ results.values_SP.numpy(), atol=1e-4)
    assert info.numbers["mixing_share"] == pytest.approx(1 - np.trace(weights) / 3, abs=1e-4)


def test_pfedgraph_takes_those_that_moved_nearly_the_same_way_for_equal() -> None:
    method, state = fresh(section("pfedgraph", strength=0.8), 3)
    moved_SP = torch.zeros_like(state.adapters.values_KP)
    # cosines of 0.95, 0.5 and 0.475
    moved_SP[:, :3] = torch.tensor([[1.0, 0, 0], [0.95, 0.0975**0.5, 0], [0.5, 0, 0.75**0.5]], dtype=torch.float64)
    participants = Participants(1, (0, 1, 2))
    results = returned(state.adapters.values_KP + moved_SP, method.plan(state, participants))
    mixed, _ = method.merge(state, participants, results)
    cosine = np.array([[1.0, 1.0, 0.5], [1.0, 1.0, 0.475], [0.5, 0.475, 1.0]])
    weights = collaboration(cosine, clients(3).num_examples_K, 0.8)
    assert np.allclose(mixed.adapters.values_KP, weights @ results.values_SP.numpy(), rtol=0, atol=1e-12)


def test_pfedgraph_pulls_each_client_to_its_own_mean() -> None:
    method, state = fresh(section("pfedgraph", pull=0.1))
    state = play(method, state, clients().names, [EVERYBODY])
    job = method.plan(state, Participants(2, (1, 4)))
    assert job.pull is not None
    assert job.pull.strength_S == (0.1, 0.1)
    assert same_bytes(job.pull.target_SP, job.start_SP)
    assert same_bytes(job.start_SP, state.adapters.values_KP[[1, 4]])
    assert not same_bytes(job.start_SP[:1], job.start_SP[1:])


def test_pfedgraph_with_boundless_strength_is_fedit_and_with_none_is_local() -> None:
    names = clients().names
    for strength, other in ((1e9, FEDIT), (1e-6, LOCAL)):
        state, expected = (
            play(*fresh(config), names, [EVERYBODY] * 2) for config in (section("pfedgraph", strength=strength), other)
        )
        assert torch.allclose(state.adapters.values_KP, expected.adapters.values_KP, atol=1e-7)


# ------------------------------------------------------------------------------------------------------------- clusters


def two_families(num_clients: int = 6) -> torch.Tensor:
    """Uploads of clients of two families (even and odd), the same A and B near the family's."""
    start_P = initial(1, torch.float64).values_KP[0]
    rows_KP = start_P.repeat(num_clients, 1)
    part = columns("lora_b")
    like = torch.zeros(len(start_P), dtype=torch.float64)
    for k in range(num_clients):
        family_P, own_P = step(f"family-{10 * (k % 2)}", 0, like), step(f"client-{40 + 2 * k}", 1, like)
        rows_KP[k, part] = (family_P + 0.3 * own_P)[part]
    return rows_KP


def returned(rows_SP: torch.Tensor, job: Job) -> Results:
    return trained(job, clients().names)._replace(values_SP=rows_SP)


def test_fast_distances_equal_slow_ones() -> None:
    arena = initial(5, torch.float64)
    arena = arena.replace(arena.values_KP + torch.stack(rows_of(range(5))))
    assert np.allclose(row_distances(arena.values_KP), clusters_twin.squared_distances(arena.values_KP.numpy()))
    for number, spec in enumerate(s for s in arena.layout.specs if s.group == "lora_b"):
        flat = arena.view(spec).flatten(1).numpy()
        unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
        assert np.allclose(layer_distances(arena, "cosine")[number], 1 - unit @ unit.T)
        euclidean = np.sqrt(clusters_twin.squared_distances(flat))
        assert np.allclose(layer_distances(arena, "euclidean")[number], euclidean)
    # zeros are no trouble
    assert all(np.isfinite(one).all() for one in layer_distances(initial(3), "cosine"))


def test_the_best_cut_is_the_one_with_the_highest_silhouette() -> None:
    rng = np.random.default_rng(3)
    for _ in range(5):
        distance = clusters_twin.squared_distances(rng.normal(size=(7, 3)))
        tree = partitions(distance)
        for least, most in ((1, 6), (2, 4), (3, 6)):
            labels = best_cut(distance, tree, most, least)
            assert len(set(labels.tolist())) == clusters_twin.best_cut(distance, list(tree), least, most)
    # where nothing else is left each is alone
    pair = np.array([[0.0, 1.0], [1.0, 0.0]])
    assert best_cut(pair, partitions(pair), 4, 2).tolist() == [0, 1]


def test_far_apart_spreads_over_the_groups() -> None:
    values = np.array([[0.0, 0.1], [0.0, 0.0], [9.0, 0.0], [9.1, 0.0], [0.0, 9.0], [0.1, 9.0]])
    chosen = far_apart(clusters_twin.squared_distances(values), 3)
    assert sorted(k // 2 for k in chosen) == [0, 1, 2]
    # the third is far from both: the one beside the second is not, though far from the first
    assert far_apart(clusters_twin.squared_distances(np.array([[0.0]] * 10 + [[5.0], [10.0], [10.1]])), 3) == [
        0,
        12,
        10,
    ]


def test_fedlease_finds_families_after_the_warm_up_and_averages_inside_them() -> None:
    method, state = fresh(section("fedlease", warmup_rounds=2))
    rows_KP = two_families()
    for round_ in (1, 2):
        job = method.plan(state, Participants(round_, EVERYBODY))
        assert job.download == frozenset()
        before = state
        state, info = method.merge(state, Participants(round_, EVERYBODY), returned(rows_KP, job))
        assert info.numbers["clusters"] == (0 if round_ == 1 else 2)
        if round_ == 1:
            assert same_bytes(state.adapters.values_KP, rows_KP)
    assert before.memory["clusters"].tolist() == [[-1] * 6]
    assert info.graph is not None
    assert np.array_equal(info.graph.adjacency_KK > 0, known.labels(clients().tasks).adjacency_KK > 0)
    for members in ([0, 2, 4], [1, 3, 5]):
        mean_P = mixing_twin.weighted_mean(
            [rows_KP[k] for k in members], [clients().num_examples_K[k] for k in members]
        )
        assert torch.allclose(state.adapters.values_KP[members], mean_P.expand(3, -1), atol=1e-12)


@pytest.mark.parametrize("name", ["fedlease", "fedtreelora"])
def test_a_late_client_joins_the_nearest_cluster(name: str) -> None:
    method, state = fresh(section(name, warmup_rounds=1))
    rows_KP = two_families()
    early = (0, 1, 2, 3)
    job = method.plan(state, Participants(1, early))
    state, _ = method.merge(state, Participants(1, early), returned(rows_KP[list(early)], job))
    assert (state.memory["clusters"].reshape(-1, 6)[:, 4:] == -1).all()
    job = method.plan(state, Participants(2, (4, 5)))
    assert job.download
    state, _ = method.merge(state, Participants(2, (4, 5)), returned(rows_KP[[4, 5]], job))
    labels_LK = state.memory["clusters"].reshape(-1, 6)
    assert (labels_LK[:, 4] == labels_LK[:, 0]).all()
    assert (labels_LK[:, 5] == labels_LK[:, 1]).all()
    # what was begun from scratch does not move those who are further
    assert torch.allclose(state.adapters.values_KP[4], state.adapters.values_KP[0], atol=1e-12)
    assert not torch.allclose(state.adapters.values_KP[0], rows_KP[4], atol=1e-3)


@pytest.mark.parametrize("name", ["fedlease", "fedtreelora"])
def test_how_short_the_b_of_a_late_client_is_does_not_choose_its_cluster(name: str) -> None:
    method, state = fresh(section(name, warmup_rounds=1))
    rows_KP, part = two_families(), columns("lora_b")
    # the family of client 4 went further, and client 4 itself has trained for a round only
    for rows in (rows_KP[:3:2], rows_KP[4:5]):
        rows[:, part] *= 4.0 if len(rows) > 1 else 0.1
    for round_, ids in ((1, (0, 1, 2, 3)), (2, (4,))):
        job = method.plan(state, Participants(round_, ids))
        state, _ = method.merge(state, Participants(round_, ids), returned(rows_KP[list(ids)], job))
    labels_LK = state.memory["clusters"].reshape(-1, 6)
    assert (labels_LK[:, 0] != labels_LK[:, 1]).any()
    assert torch.equal(labels_LK[:, 4], labels_LK[:, 0])


def test_fedlease_after_the_warm_up_is_the_oracle_where_it_found_the_truth() -> None:
    names, rows_KP = clients().names, two_families()
    method, state = fresh(section("fedlease", warmup_rounds=1))
    oracle, other = fresh(section("oracle_clusters"))
    for one in (1, 2):
        participants = Participants(1, EVERYBODY)
        if one == 1:
            state, _ = method.merge(state, participants, returned(rows_KP, method.plan(state, participants)))
        else:
            other, _ = oracle.merge(other, participants, returned(rows_KP, oracle.plan(other, participants)))
    state, other = (play(m, s, names, [(0, 1, 4), EVERYBODY], first=2) for m, s in ((method, state), (oracle, other)))
    assert torch.allclose(state.adapters.values_KP, other.adapters.values_KP, atol=1e-12)


def test_fedtreelora_cuts_deeper_layers_into_more_clusters() -> None:
    # the first layer knows two groups, the second one splits the first of them again
    first = clusters_twin.squared_distances(np.array([[0.0], [0.1], [0.2], [0.3], [9.0], [9.1]]))
    second = clusters_twin.squared_distances(np.array([[0.0], [0.1], [40.0], [40.1], [90.0], [90.1]]))
    labels = cut_layers((first, second), most_clusters=6)
    assert [len(set(row.tolist())) for row in labels] == [2, 3]
    assert labels[0].tolist() == [0, 0, 0, 0, 4, 4]
    assert labels[1].tolist() == [0, 0, 2, 2, 4, 4]
    # never fewer than the layer before, although this layer alone would choose two
    labels = cut_layers((second, first), most_clusters=6)
    assert [len(set(row.tolist())) for row in labels] == [3, 3]
    assert [len(set(row.tolist())) for row in cut_layers((first, second), most_clusters=1)] == [1, 1]


def test_fedtreelora_averages_each_layer_within_its_own_cut() -> None:
    method, state = fresh(section("fedtreelora", warmup_rounds=1))
    results = trained(method.plan(state, Participants(1, EVERYBODY)), clients().names)
    state, info = method.merge(state, Participants(1, EVERYBODY), results)
    labels_LK = state.memory["clusters"].numpy()
    assert info.numbers["clusters_first"] <= info.numbers["clusters"]
    for layer, labels_K in zip(("layer0", "layer1"), labels_LK, strict=True):
        part = torch.cat([torch.arange(s.offset, s.offset + s.size) for s in layout().specs if s.layer == layer])
        for label in set(labels_K.tolist()):
            members = np.flatnonzero(labels_K == label).tolist()
            weights = [clients().num_examples_K[k] for k in members]
            mean_P = mixing_twin.weighted_mean([results.values_SP[k, part] for k in members], weights)
            assert torch.allclose(
                state.adapters.values_KP[members][:, part], mean_P.expand(len(members), -1), atol=1e-12
            )


def test_fedtreelora_with_one_cluster_is_fedit_after_the_first_round() -> None:
    names = clients().names
    state, averaged = (
        play(*fresh(config), names, [EVERYBODY] * 2) for config in (section("fedtreelora", most_clusters=1), FEDIT)
    )
    assert torch.allclose(state.adapters.values_KP, averaged.adapters.values_KP, atol=1e-12)


def test_oracle_clusters_is_fedavg_within_tasks() -> None:
    method, state = fresh(section("oracle_clusters"))
    results = trained(method.plan(state, Participants(1, (0, 1, 2))), clients().names)
    state, _ = method.merge(state, Participants(1, (0, 1, 2)), results)
    mean_P = mixing_twin.weighted_mean(
        [results.values_SP[0], results.values_SP[2]], [clients().num_examples_K[k] for k in (0, 2)]
    )
    assert torch.allclose(state.adapters.values_KP[[0, 2, 4]], mean_P.expand(3, -1), atol=1e-14)
    assert torch.allclose(state.adapters.values_KP[[1, 3, 5]], results.values_SP[1].expand(3, -1), atol=1e-14)


def test_oracle_clusters_of_everybody_is_fedit() -> None:
    names = clients().names
    everybody = section("oracle_clusters", graph={"kind": "uniform"})
    state, averaged = (play(*fresh(config), names, ROUNDS) for config in (everybody, FEDIT))
    assert torch.allclose(state.adapters.values_KP, averaged.adapters.values_KP, atol=1e-12)


@pytest.mark.parametrize("name", ["oracle_clusters", "fedu"])
def test_methods_that_need_a_known_graph_refuse_a_learned_one(name: str) -> None:
    with pytest.raises(ValueError, match="known before; allowed: labels, given"):
        section(name, graph=GraphConfig(kind="gram"))


# --------------------------------------------------------------------------------------------------------------- trials


def answers(trial: Trial, losses: Sequence[Sequence[float]]) -> Losses:
    return Losses(torch.tensor(losses, dtype=torch.float64), (3,) * len(trial.ids), 0, 0)


def test_ifca_starts_from_clients_that_differ_and_averages_those_that_chose_alike() -> None:
    method, state = fresh(section("ifca", models=2))
    rows_KP = two_families()
    participants = Participants(1, EVERYBODY)
    results = returned(rows_KP, method.plan(state, participants))
    state, _ = method.merge(state, participants, results)
    models_MP = state.memory["models"]
    assert {int((rows_KP == model_P).all(dim=1).nonzero()[0]) % 2 for model_P in models_MP} == {0, 1}
    assert method.trial is not None
    assert method.decide is not None
    trial = method.trial(state, participants, results)
    assert trial is not None
    assert (trial.split, trial.sent, trial.num_candidates) == ("train", 1, 2)
    assert same_bytes(trial.candidate(1), models_MP[1].expand(6, -1).clone())
    state, info = method.decide(state, trial, answers(trial, [[1, 2], [2, 1]] * 3))
    assert info.numbers["clusters"] == 2
    assert state.memory["choice"].tolist() == [0, 1] * 3
    assert same_bytes(state.adapters.values_KP[::2], models_MP[:1].expand(3, -1).clone())
    participants = Participants(2, (0, 1, 2))
    results = trained(method.plan(state, participants), clients().names)
    state, _ = method.merge(state, participants, results)
    mean_P = mixing_twin.weighted_mean(
        [results.values_SP[0], results.values_SP[2]], [clients().num_examples_K[k] for k in (0, 2)]
    )
    assert torch.allclose(state.memory["models"][0], mean_P, atol=1e-14)
    assert torch.allclose(state.adapters.values_KP[4], mean_P, atol=1e-14)
    assert torch.allclose(state.memory["models"][1], results.values_SP[1], atol=1e-14)


def test_with_ifca_nobody_chooses_a_model_whose_loss_is_not_finite() -> None:
    method, state = fresh(section("ifca", models=2))
    participants = Participants(1, EVERYBODY)
    results = returned(two_families(), method.plan(state, participants))
    state, _ = method.merge(state, participants, results)
    assert method.trial is not None
    assert method.decide is not None
    trial = method.trial(state, participants, results)
    assert trial is not None
    nan, inf = float("nan"), float("inf")
    told = [[nan, 2.0], [1.0, nan], [inf, 2.0], [1.0, inf], [1.0, 2.0], [2.0, 1.0]]
    state, _ = method.decide(state, trial, answers(trial, told))
    assert state.memory["choice"].tolist() == [1, 0, 1, 0, 0, 1]


def test_with_ifca_who_is_away_when_the_models_begin_takes_the_nearest_and_does_not_train_in_vain() -> None:
    method, state = fresh(section("ifca", models=4))
    rows_KP = two_families()
    for round_, ids in ((1, (0, 1, 2)), (2, (3, 4))):
        participants = Participants(round_, ids)
        results = returned(rows_KP[list(ids)], method.plan(state, participants))
        state, _ = method.merge(state, participants, results)
    models_MP, choice_K = state.memory["models"], state.memory["choice"].tolist()
    assert int(state.memory["started"]) == 4
    assert choice_K[3:] == [-1, -1, -1], "who returned is asked, and client 5 was never seen"
    apart_KM = torch.cdist(rows_KP[:3], models_MP)
    assert choice_K[:3] == apart_KM.argmin(dim=1).tolist()
    assert same_bytes(state.adapters.values_KP[:3], models_MP[choice_K[:3]])
    # what client 0 does next is the next round of its model
    participants = Participants(3, (0,))
    results = trained(method.plan(state, participants), clients().names)
    assert not torch.equal(results.values_SP[0], models_MP[choice_K[0]])
    state, _ = method.merge(state, participants, results)
    assert same_bytes(state.memory["models"][choice_K[0]], results.values_SP[0])


def test_ifca_with_one_model_is_fedit_after_the_first_choice() -> None:
    names = clients().names
    method, state = fresh(section("ifca", models=1))
    state = play(method, state, names, [EVERYBODY])
    assert all(same_bytes(row, state.adapters.values_KP[0]) for row in state.adapters.values_KP)
    averaging = build_method(FEDIT, clients())
    averaged = State(state.adapters, state.last_round_K)
    state, averaged = (
        play(m, s, names, [(0, 2), (1, 4)], first=2) for m, s in ((method, state), (averaging, averaged))
    )
    assert torch.allclose(state.memory["models"][0], averaged.adapters.values_KP[0], atol=1e-12)


def pcl_asks(ids: tuple[int, ...], **settings: Any) -> tuple[State, Results, Trial, Callable[..., Any]]:
    """State and results of a first round in which `ids` take part, what they are asked, and what decides by it."""
    method, state = fresh(section("pcl", **settings))
    participants = Participants(1, ids)
    results = trained(method.plan(state, participants), clients().names)
    state, _ = method.merge(state, participants, results)
    assert method.trial is not None
    assert method.decide is not None
    trial = method.trial(state, participants, results)
    assert trial is not None
    return state, results, trial, method.decide


def test_pcl_mixes_by_the_softmax_of_negative_losses() -> None:
    state, results, trial, decide = pcl_asks((1, 3, 4), temperature=0.5)
    assert (trial.num_candidates, trial.sent, trial.split) == (3, 2, "validation")
    assert same_bytes(trial.candidate(2), results.values_SP[2].expand(3, -1).clone())
    losses = [[1.0, 1.5, 2.0], [2.0, 0.5, 0.5], [float("nan")] * 3]
    after, _ = decide(state, trial, answers(trial, losses))
    for row, k in ((0, 1), (1, 3)):
        trust = np.exp(-np.array(losses[row]) / 0.5)
        expected_P = (trust / trust.sum()) @ results.values_SP.numpy()
        assert np.allclose(after.adapters.values_KP[k], expected_P, atol=1e-12)
    # without validation examples a client keeps its own
    assert same_bytes(after.adapters.values_KP[4], results.values_SP[2])


@pytest.mark.parametrize("worst", [float("inf"), float("nan"), 1e30])
def test_pcl_gives_an_adapter_that_ruins_a_client_no_weight_and_the_others_theirs(worst: float) -> None:
    state, results, trial, decide = pcl_asks((1, 3, 4))
    told = answers(trial, [[1.0, 1.0, worst], [1.0, 1.0, worst], [worst, 1.0, worst]])
    after, info = decide(state, trial, told)
    mean_P = results.values_SP[:2].mean(dim=0)
    for k, expected_P in ((1, mean_P), (3, mean_P), (4, results.values_SP[1])):
        assert torch.allclose(after.adapters.values_KP[k], expected_P, atol=1e-12)
    assert info.numbers["mixing_share"] == pytest.approx(1 - (0.5 + 0.5 + 0.0) / 3)


def test_pcl_is_local_when_nobody_trusts_and_the_plain_mean_when_all_are_alike() -> None:
    state, results, trial, decide = pcl_asks(EVERYBODY)
    alone, _ = decide(state, trial, answers(trial, (1000 * (1 - np.eye(6))).tolist()))
    assert torch.allclose(alone.adapters.values_KP, results.values_SP, atol=1e-12)
    equal, _ = decide(state, trial, answers(trial, np.ones((6, 6)).tolist()))
    assert torch.allclose(equal.adapters.values_KP, results.values_SP.mean(dim=0).expand(6, -1), atol=1e-12)


# ---------------------------------------------------------------------------------------------------- fedu, centralised


def fedu(kind: str = "uniform", strength: float = 1.0, server_lr: float = 0.1) -> MethodConfig:
    return section("fedu", graph={"kind": kind}, strength=strength, server_lr=server_lr)


def test_fedu_moves_those_that_returned_towards_all_that_were_ever_seen() -> None:
    names = clients().names
    method, state = fresh(fedu())
    state = play(method, state, names, [(0, 1, 2)])
    results = trained(method.plan(state, Participants(2, (2, 3))), names)
    after, _ = method.merge(state, Participants(2, (2, 3)), results)
    seen_KP = torch.cat([state.adapters.values_KP[:2], results.values_SP])
    for row, k in ((2, 2), (3, 3)):
        pull_P = sum((seen_KP[row] - other for other in seen_KP), torch.zeros(()))
        assert torch.allclose(after.adapters.values_KP[k], seen_KP[row] - 0.1 * pull_P, atol=1e-12)
    assert same_bytes(after.adapters.values_KP[[0, 1, 4, 5]], state.adapters.values_KP[[0, 1, 4, 5]])


def test_fedu_is_miras_published_step_when_everybody_takes_part_and_local_at_strength_zero() -> None:
    names = clients().names
    published = section("mira_published", graph={"kind": "random"}, strength=1.0, server_lr=0.1)
    one, other = (play(*fresh(config), names, [EVERYBODY] * 3) for config in (fedu("random"), published))
    assert torch.allclose(one.adapters.values_KP, other.adapters.values_KP, atol=1e-12)
    zero, alone = (play(*fresh(config), names, ROUNDS) for config in (fedu(strength=0.0), LOCAL))
    assert same_bytes(zero.adapters.values_KP, alone.adapters.values_KP)


def test_fedu_refuses_a_step_that_diverges() -> None:
    with pytest.raises(ConfigError, match="diverge"):
        fresh(fedu(server_lr=0.4))


def test_centralised_gives_everybody_the_one_adapter_and_sends_nothing() -> None:
    method, state = fresh(section("centralised"))
    job = method.plan(state, Participants(1, (0, 2)))
    assert job.pooled
    assert job.upload == job.download == frozenset()
    results = trained(job, clients().names)
    state, info = one_round(method, state, clients().names, Participants(1, (0, 2)))
    assert same_bytes(state.adapters.values_KP, results.values_SP[:1].expand(6, -1).clone())
    assert info.numbers["returned"] == 2


@pytest.mark.parametrize("name", ["fedamp", "pfedgraph", "ifca", "fedlease", "fedtreelora", "pcl"])
def test_every_graph_says_what_is_learned_about_clients(name: str) -> None:
    method, state = fresh(section(name))
    for round_ in (1, 2):
        state, info = one_round(method, state, clients().names, Participants(round_, EVERYBODY))
    assert info.graph is not None
    assert info.graph.name == name
    assert info.graph.num_edges > 0
    assert "lients" in str(info.graph.provenance["privacy"]) or "server" in str(info.graph.provenance["privacy"])


@pytest.mark.parametrize("name", ["fedlease", "fedtreelora"])
@pytest.mark.parametrize("beside", [(), (0,)])
def test_who_comes_after_the_clusters_takes_an_adapter_and_changes_nobodys(name: str, beside: tuple[int, ...]) -> None:
    who = clients()
    method, state = fresh(section(name, warmup_rounds=2))
    state = play(method, state, who.names, [(0, 1, 2, 3, 4)] * 6)
    with_it, _ = one_round(method, state, who.names, Participants(7, (*beside, 5)))
    without = one_round(method, state, who.names, Participants(7, beside))[0] if beside else state
    rows_KP = with_it.adapters.values_KP
    assert same_bytes(rows_KP[:5], without.adapters.values_KP[:5])
    labels_GK = with_it.memory["clusters"]
    twins = [k for k in range(5) if torch.equal(labels_GK[:, k], labels_GK[:, 5])]
    assert twins
    assert any(same_bytes(rows_KP[5], rows_KP[k]) for k in twins)
