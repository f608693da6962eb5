"""Neighbours that are not to be trusted: what each form of doubt does by hand, and what hostile clients can still do.

Axes: K clients, H honest ones, P parameters of one adapter.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.federation.builders import clients, initial, layout, mira_with, play, same_bytes
from tests.reference import robust_twin

from fedmira.federation.registry import build_method
from fedmira.federation.robust import ROBUST, clip, geometric_median, heard, krum
from fedmira.federation.similarity import row_distances
from fedmira.randomness import torch_generator
from fedmira.types import Arena, Clients, Participants, Results

every_form = pytest.mark.parametrize("name", list(ROBUST))


def distances(values_KP: np.ndarray) -> np.ndarray:
    return ((values_KP[:, None] - values_KP[None]) ** 2).sum(axis=2)


def random_step(seed: int, num_clients: int, edges: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """A row-stochastic matrix with some shares of 0, and clients' vectors."""
    draw = np.random.default_rng(seed)
    matrix_KK = draw.dirichlet(np.ones(num_clients), size=num_clients)
    matrix_KK = np.where((draw.random(matrix_KK.shape) < edges) | np.eye(num_clients, dtype=bool), matrix_KK, 0.0)
    return matrix_KK / matrix_KK.sum(axis=1, keepdims=True), draw.normal(size=(num_clients, 5))


@every_form
@given(seed=st.integers(0, 1000), num_clients=st.integers(1, 9), edges=st.floats(0, 1))
def test_rows_stay_shares_and_nobody_loses_a_share_of_its_own_upload(
    name: str, seed: int, num_clients: int, edges: float
) -> None:
    matrix_KK, values_KP = random_step(seed, num_clients, edges)
    values_KP[0] *= 30
    revised_KK = ROBUST[name](matrix_KK, distances(values_KP), (10,) * num_clients)
    assert (revised_KK >= 0).all()
    assert revised_KK.sum(axis=1) == pytest.approx(np.ones(num_clients))
    assert (np.diagonal(revised_KK) >= np.diagonal(matrix_KK) - 1e-12).all()
    # nobody listens to somebody new, and who listened to nobody still does, bit for bit
    assert not revised_KK[matrix_KK == 0].any()
    alone = (matrix_KK == np.eye(num_clients)).all(axis=1)
    assert np.array_equal(revised_KK[alone], matrix_KK[alone])


@every_form
def test_clients_that_are_equal_are_mixed_as_before(name: str) -> None:
    matrix_KK, _ = random_step(0, 6)
    assert ROBUST[name](matrix_KK, np.zeros((6, 6)), (10,) * 6) == pytest.approx(matrix_KK, abs=1e-15)


@every_form
def test_one_far_client_among_four_by_hand(name: str) -> None:
    # three at 0, 1 and 2 on a line, one at 100; everybody takes a quarter from each
    values_KP = np.array([[0.0], [1.0], [2.0], [100.0]])
    mixed_K = ROBUST[name](np.full((4, 4), 0.25), distances(values_KP), (10,) * 4) @ values_KP
    if name == "clip":
        # client 0: distances 1, 2, 100, the median is 2; client 3: 98, 99, 100, the median is 99
        assert mixed_K[0, 0] == pytest.approx((1 + 2 + 2) / 4)
        assert mixed_K[3, 0] == pytest.approx(100 - (98 + 99 + 99) / 4)
    elif name == "krum":
        # scores with the two nearest: 1 + 4, 1 + 1, 1 + 4 and 98^2 + 99^2
        assert mixed_K[0, 0] == pytest.approx(0.75 * (1 + 2) / 2)
        assert mixed_K[1, 0] == pytest.approx(0.25 + 0.75 * (0 + 2) / 2)
        assert mixed_K[3, 0] == pytest.approx(25 + 0.75 * (0 + 1 + 2) / 3)
    else:
        # the median of all four lies between 1 and 2, 100 is some sixty times as far from it as they are
        assert 0.75 < mixed_K[0, 0] < 4


@given(seed=st.integers(0, 1000), num_clients=st.integers(2, 8))
def test_clipping_is_that_of_the_vectors_themselves(seed: int, num_clients: int) -> None:
    matrix_KK, values_KP = random_step(seed, num_clients, 0.8)
    mixed_KP = clip(matrix_KK, distances(values_KP)) @ values_KP
    np.testing.assert_allclose(mixed_KP, robust_twin.clipped(matrix_KK, values_KP), atol=1e-9)


def test_of_as_many_nearer_as_farther_others_clipping_takes_the_nearer() -> None:
    values_KP = np.array([[0.0], [1.0], [2.0], [3.0], [100.0]])
    mixed_KP = clip(np.full((5, 5), 0.2), distances(values_KP)) @ values_KP
    # client 0: distances 1, 2, 3 and 100; client 4: 97, 98, 99 and 100
    assert mixed_KP[0, 0] == pytest.approx((1 + 2 + 2 + 2) / 5)
    assert mixed_KP[4, 0] == pytest.approx(100 - (97 + 98 + 98 + 98) / 5)


@given(seed=st.integers(0, 1000), num_clients=st.integers(3, 9), sizes=st.sampled_from([(10,), (10, 10, 400)]))
def test_krum_leaves_out_those_whose_score_is_four_times_the_median(
    seed: int, num_clients: int, sizes: tuple[int, ...]
) -> None:
    matrix_KK, values_KP = random_step(seed, num_clients)
    values_KP *= np.random.default_rng(seed + 1).choice([1.0, 6.0], size=(num_clients, 1))
    examples = [sizes[k % len(sizes)] for k in range(num_clients)]
    scores = np.array(robust_twin.krum_scores(values_KP, examples))
    silent_K = scores > 4 * np.median(scores)
    revised_KK = krum(matrix_KK, distances(values_KP), examples)
    others_KK = revised_KK - np.diag(np.diagonal(revised_KK))
    assert np.array_equal(~others_KK.any(axis=0), silent_K)
    if not silent_K.any():
        assert np.array_equal(revised_KK, matrix_KK)


@pytest.mark.parametrize(("steps", "far"), [((20, 2, 1), ()), ((1, 1, 1), ()), ((1, 1, 100), (2, 5, 8))])
def test_krum_hears_clients_with_many_examples(steps: tuple[int, ...], far: tuple[int, ...]) -> None:
    # 200, 20 and 10 examples in turn, each client so many noisy steps away from one place: where they are those of its
    # examples, or as many for all, everybody is heard; where those of the fewest examples went furthest, they are not
    draw = np.random.default_rng(0)
    values_KP = draw.normal(size=(9, 400)) * np.sqrt(np.array(steps * 3))[:, None]
    revised_KK = krum(np.full((9, 9), 1 / 9), distances(values_KP), (200, 20, 10) * 3)
    assert set(range(9)) - set(heard(revised_KK)) == set(far)


@pytest.mark.parametrize(("examples", "listened_to"), [(9, [0, 1, 2]), (19, [0, 1, 2, 3])])
def test_distances_count_by_the_examples_of_both_ends_together(examples: int, listened_to: list[int]) -> None:
    # scores with the two nearest: 2.5, 1, 2.5 and (8^2 + 9^2) / (1 + examples); beyond 4 * 2.5 it is outlying
    values_KP = np.array([[0.0], [1.0], [2.0], [10.0]])
    revised_KK = krum(np.full((4, 4), 0.25), distances(values_KP), (1, 1, 1, examples))
    assert heard(revised_KK) == listened_to


@given(sizes=st.lists(st.integers(1, 10**6), min_size=3, max_size=30))
def test_where_all_went_as_far_examples_silence_nobody(sizes: list[int]) -> None:
    num_clients = len(sizes)
    matrix_KK = np.full((num_clients, num_clients), 1 / num_clients)
    assert krum(matrix_KK, 2.0 * (1 - np.eye(num_clients)), sizes) is matrix_KK


def test_where_most_uploads_are_the_same_krum_hears_the_others_too() -> None:
    values_KP = np.zeros((7, 4))
    values_KP[5:] = np.random.default_rng(0).normal(size=(2, 4))
    matrix_KK = np.full((7, 7), 1 / 7)
    assert krum(matrix_KK, distances(values_KP), (10,) * 7) is matrix_KK


def test_the_median_is_the_one_that_small_steps_find() -> None:
    matrix_KK, values_KP = random_step(3, 7)
    revised_KK = geometric_median(matrix_KK, distances(values_KP))
    for k in range(7):
        point_P = robust_twin.geometric_median(matrix_KK[k], values_KP)
        apart_K = np.linalg.norm(values_KP - point_P, axis=1)
        weights_K = np.delete(matrix_KK[k] / np.maximum(apart_K, 1e-6 * apart_K.max()), k)
        expected = (1 - matrix_KK[k, k]) * weights_K / weights_K.sum()
        assert np.delete(revised_KK[k], k) == pytest.approx(expected, rel=2e-2, abs=2e-3)


def test_distances_of_rows_are_those_of_the_rows() -> None:
    arena = Arena(layout(), torch.randn(5, layout().num_parameters, generator=torch.Generator().manual_seed(0)))
    np.testing.assert_allclose(row_distances(arena.values_KP), distances(arena.values_KP.double().numpy()), atol=1e-10)


def test_distances_keep_their_digits_where_rows_share_large_numbers() -> None:
    values_KP = torch.randn(5, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    np.testing.assert_allclose(row_distances(values_KP + 2**20), row_distances(values_KP), rtol=0, atol=1e-7)


# ------------------------------------------------------------------------------------------ what hostile clients can do

HONEST, ROUNDS = 8, 12
LAYOUT = layout(features=((12, 10), (9, 14)))


@cache
def problem(families: int) -> tuple[torch.Tensor, torch.Tensor]:
    """True and empirical optima of the honest clients, (H, P): families, small deviations, sampling noise."""

    def noise(purpose: str, rows: int) -> torch.Tensor:
        generator = torch_generator(0, "quadratic", purpose)
        return torch.randn((rows, LAYOUT.num_parameters), generator=generator, dtype=torch.float64)

    of_family_HP = noise("family", families).repeat(HONEST // families, 1) if families > 1 else 0.0
    true_HP = noise("common", 1) + of_family_HP + 0.2 * noise("deviation", HONEST)
    return true_HP, true_HP + 0.8 * noise("examples", HONEST)


@cache
def error(robust: str, attack: str, num_hostile: int = 1, kind: str = "uniform") -> float:
    """Mean squared distance of the honest clients' adapters from their optima; learned graphs find two families."""
    true_HP, empirical_HP = problem(1 if kind == "uniform" else 2)
    num_clients = HONEST + (num_hostile if attack else 0)
    names = tuple(f"client-{k}" for k in range(num_clients))
    who = Clients(names, (10,) * num_clients, ("",) * num_clients, 0)
    method = build_method(mira_with(kind, robust=robust, strength=4.0), who)
    state = method.init(initial(num_clients, torch.float64, LAYOUT), who)
    draw = torch.Generator().manual_seed(0)
    for round_ in range(1, ROUNDS + 1):
        everybody = Participants(round_, tuple(range(num_clients)))
        start_KP = method.plan(state, everybody).start_SP
        # ten gradient steps on 1/2 |theta - optimum|^2
        local_HP = empirical_HP + 0.9**10 * (start_KP[:HONEST] - empirical_HP)
        updates_HP = local_HP - start_KP[:HONEST]
        if attack == "flip":
            bad_P = -10 * updates_HP.mean(dim=0)
        else:
            noise_P = torch.randn(LAYOUT.num_parameters, generator=draw, dtype=torch.float64)
            bad_P = 10 * updates_HP.norm(dim=1).median() * noise_P / noise_P.norm()
        sent_KP = torch.cat([local_HP, start_KP[HONEST:] + bad_P])
        state, _ = method.merge(state, everybody, Results(everybody.ids, sent_KP, (), 0, 0, 0.0, 0))
    return float((method.personalise(state).values_KP[:HONEST] - true_HP).square().mean())


@pytest.mark.parametrize("attack", ["flip", "random"])
def test_one_hostile_client_spoils_the_mean_of_nine_but_no_robust_one(attack: str) -> None:
    peace = error("none", "")
    assert error("none", attack) > 5 * peace
    for robust in ROBUST:
        assert error(robust, attack) < 1.25 * peace
        assert error(robust, "") < 1.05 * peace


@pytest.mark.parametrize("attack", ["flip", "random"])
def test_a_learned_graph_does_not_let_a_hostile_client_in_by_the_back_door(attack: str) -> None:
    peace = error("none", "", kind="gram")
    if attack == "flip":
        # among few clients lengths do not count, so that noise relates nobody
        assert error("none", attack, kind="gram") > 1.5 * peace
    for robust in ROBUST:
        assert error(robust, attack, kind="gram") < 1.1 * peace
        assert error(robust, "", kind="gram") < 1.05 * peace


def test_three_hostile_clients_of_eleven_do_not_double_the_error() -> None:
    for robust in ROBUST:
        assert error(robust, "flip", 3) < 2 * error("none", "")


@pytest.mark.parametrize("robust", list(ROBUST))
def test_a_client_never_seen_does_not_start_from_the_hostile_either(robust: str) -> None:
    # eight of nine take part, one of them sends minus fifty times what the others do on the mean
    who, everybody = clients(9)._replace(num_examples_K=(10,) * 9), Participants(1, tuple(range(8)))
    first = initial(9, torch.float64)
    noise_SP = torch.randn((8, layout().num_parameters), generator=torch.Generator().manual_seed(0)).double()
    honest_SP = first.values_KP[:7] + 1.0 + 0.1 * noise_SP[:7]
    hostile_P = first.values_KP[7] - 50 * (honest_SP - first.values_KP[:7]).mean(dim=0)
    results = Results(everybody.ids, torch.cat([honest_SP, hostile_P[None]]), (), 0, 0, 0.0, 0)
    away = {}
    for name in (robust, "none"):
        method = build_method(mira_with("gram", robust=name), who)
        state, _ = method.merge(method.init(first, who), everybody, results)
        start_P = method.plan(state, Participants(2, (8,))).start_SP[0]
        away[name] = float((start_P - honest_SP.mean(dim=0)).norm() / (honest_SP[0] - first.values_KP[0]).norm())
    assert away["none"] > 3
    assert away[robust] < (0.1 if robust != "clip" else 0.5)


def test_distances_are_taken_where_adapters_are_mixed() -> None:
    # client 0 writes its update with a huge B and a tiny A: as products nobody is far away, as factors it is
    who, everybody = clients(4), Participants(1, (0, 1, 2, 3))
    noise_KP = torch.randn((4, layout().num_parameters), generator=torch.Generator().manual_seed(0))
    sent = initial(4, torch.float64).replace(initial(4, torch.float64).values_KP + 0.1 * noise_KP)
    for spec in sent.layout.specs:
        sent.view(spec)[0] *= 1e-3 if spec.group == "lora_a" else 1e3
    results = Results(everybody.ids, sent.values_KP, (), 0, 0, 0.0, 0)
    shares, largest, unheard = {}, {}, {}
    for mixing in ("factors", "products"):
        for robust in ("none", "krum"):
            method = build_method(mira_with("uniform", mixing=mixing, robust=robust), who)
            state, info = method.merge(method.init(initial(4, torch.float64), who), everybody, results)
            shares[mixing, robust] = info.numbers["mixing_share"]
            if robust == "krum":
                unheard[mixing, robust] = info.numbers["unheard"]
            else:
                assert "unheard" not in info.numbers
            largest[mixing, robust] = float(state.adapters.values_KP[1:].abs().max())
    assert shares["products", "krum"] == shares["products", "none"]
    assert unheard == {("factors", "krum"): 1.0, ("products", "krum"): 0.0}
    assert largest["factors", "none"] > 10
    assert largest["factors", "krum"] < 5


def test_without_strength_doubt_changes_nothing() -> None:
    who = clients()
    rounds = [(0, 1, 3), (1, 2, 4), (0, 2, 3, 5)]
    alone = build_method(mira_with(strength=0.0), who)
    expected = play(alone, alone.init(initial(), who), who.names, rounds).adapters.values_KP
    for robust in ROBUST:
        method = build_method(mira_with(strength=0.0, robust=robust), who)
        assert same_bytes(play(method, method.init(initial(), who), who.names, rounds).adapters.values_KP, expected)


def test_clipping_leaves_nothing_of_a_client_of_which_nothing_is_known() -> None:
    apart = np.array([[0.0, 1.0, 4.0, 9.0], [1.0, 0.0, 1.0, 4.0], [4.0, 1.0, 0.0, 1.0], [9.0, 4.0, 1.0, 0.0]])
    matrix = np.array([[0.0, 0.4, 0.3, 0.3], [0.1, 0.5, 0.2, 0.2], [0.1, 0.2, 0.5, 0.2], [0.1, 0.2, 0.2, 0.5]])
    clipped = clip(matrix, apart)
    assert clipped[0, 0] == pytest.approx(0, abs=1e-15)
    assert clipped.sum(axis=1) == pytest.approx(np.ones(4))
    # the radius of client 0 is 2: client 3 at distance 3 counts for two thirds
    assert clipped[0, 1:] == pytest.approx(np.array([0.4, 0.3, 0.2]) / 0.9)
    assert clipped[3, 3] > matrix[3, 3]
