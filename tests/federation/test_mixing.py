"""Mixers: equations on two clients by hand, the twin, reductions to known methods, and properties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.federation.builders import initial, layout, same_bytes
from tests.federation.test_graph import adjacencies
from tests.reference import mixing_twin

from fedmira.errors import ConfigError
from fedmira.federation import known_graphs as known
from fedmira.federation.graph import (
    Graph,
    connected_components,
    degrees,
    disagreement,
    laplacian,
    largest_eigenvalue,
    validated,
)
from fedmira.federation.mixing import (
    average,
    by_group,
    chain,
    implicit_matrix,
    keep,
    laplacian_explicit,
    laplacian_implicit,
    linear,
    matrix_of,
    step_numbers,
    welcomed,
)
from fedmira.types import Arena

PAIR = validated([[0, 0.5], [0.5, 0]], 2, "given")


def arena(num_clients: int, dtype: torch.dtype = torch.float64) -> Arena:
    noise = torch.randn(num_clients, layout().num_parameters, generator=torch.Generator().manual_seed(0))
    return initial(num_clients, dtype).replace(noise.to(dtype))


def scalars(*values: float) -> Arena:
    """An arena whose rows are constant, for equations by hand."""
    like = arena(len(values))
    return like.replace(torch.tensor(values, dtype=torch.float64)[:, None].expand_as(like.values_KP).clone())


# ------------------------------------------------------------------------------------------------- two clients, by hand


def test_explicit_step_of_two_clients() -> None:
    # w1 - 0.4 * 0.5 * (w1 - w2) = 1 - 0.2 * (1 - 3) = 1.4
    assert laplacian_explicit(PAIR, 0.4)(scalars(1, 3)).values_KP[:, 0].tolist() == pytest.approx([1.4, 2.6])


def test_implicit_step_of_two_clients() -> None:
    # tau a = 2 * 0.5 = 1, so x1 = (c1 w1 + x2) / (c1 + 1), x2 = (c2 w2 + x1) / (c2 + 1)
    assert laplacian_implicit(PAIR, 2.0, [1, 1])(scalars(1, 4)).values_KP[:, 0].tolist() == pytest.approx([2, 3])
    # c = (2, 1): 3 x1 = 2 + x2, 2 x2 = 4 + x1  ->  x1 = 8/5, x2 = 14/5
    assert laplacian_implicit(PAIR, 2.0, [2, 1])(scalars(1, 4)).values_KP[:, 0].tolist() == pytest.approx([1.6, 2.8])


def test_a_client_without_confidence_takes_its_neighbours_value() -> None:
    path = validated([[0, 1, 0], [1, 0, 3], [0, 3, 0]], 3, "given")
    mixed = laplacian_implicit(path, 1e-3, [1, 0, 1])(scalars(1, 100, 5)).values_KP[:, 0]
    # (1 * x0 + 3 * x2) / 4, with x0 and x2 hardly moved
    assert mixed.tolist() == pytest.approx([1, 4, 5], abs=0.02)


def test_a_client_of_infinite_confidence_keeps_its_value_and_pulls_its_neighbours_to_it() -> None:
    path = validated([[0, 1, 0], [1, 0, 3], [0, 3, 0]], 3, "given")
    values, inf = scalars(1, 100, 5), float("inf")
    # 2 x0 = 1 + 100 and 4 x2 = 5 + 3 * 100
    assert laplacian_implicit(path, 1.0, [1, inf, 1])(values).values_KP[:, 0].tolist() == [50.5, 100, 76.25]
    assert laplacian_implicit(path, 0.5, [inf, 0, inf])(values).values_KP[:, 0].tolist() == [1, 4, 5]
    assert same_bytes(laplacian_implicit(path, 1.0, [inf] * 3)(values).values_KP, values.values_KP)


# ------------------------------------------------------------------------------------------------------------- the twin


@pytest.mark.parametrize("seed", range(4))
def test_both_steps_equal_their_twins(seed: int) -> None:
    graph = known.random(7, seed)
    values = arena(7)
    confidence = [0.0, 0.2, 1.0, 3.0, 0.0, 1.0, 0.5]
    explicit = mixing_twin.explicit_step(values.values_KP.numpy(), graph.adjacency_KK, 0.2)
    implicit = mixing_twin.implicit_step(values.values_KP.numpy(), graph.adjacency_KK, 1.7, confidence)
    assert np.allclose(laplacian_explicit(graph, 0.2)(values).values_KP, explicit, rtol=0, atol=1e-12)
    assert np.allclose(laplacian_implicit(graph, 1.7, confidence)(values).values_KP, implicit, rtol=0, atol=1e-10)


# ----------------------------------------------------------------------------------------------------------- reductions


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_strength_zero_keeps_every_bit(dtype: torch.dtype) -> None:
    values = arena(5, dtype)
    values.values_KP[0, 0] = -0.0
    graph = known.random(5, 0)
    for mixer in (laplacian_explicit(graph, 0.0), laplacian_implicit(graph, 0.0, [1, 2, 3, 4, 0]), keep()):
        assert same_bytes(mixer(values).values_KP, values.values_KP)


def test_complete_unit_graph_with_explicit_step_one_over_k_is_the_mean() -> None:
    values = arena(6)
    mixed = laplacian_explicit(known.uniform(6), 1 / 6)(values).values_KP
    assert torch.allclose(mixed, average([1.0] * 6)(values).values_KP, rtol=0, atol=1e-14)
    assert torch.allclose(mixed, values.values_KP.mean(dim=0).expand_as(mixed), rtol=0, atol=1e-14)


@pytest.mark.parametrize("tau", [1e12, 1e200])
def test_implicit_step_without_bound_is_the_weighted_mean_of_each_component(tau: float) -> None:
    graph = known.labels(["a", "b", "a", "a", "b", ""])
    values, confidence = arena(6), [1.0, 2.0, 0.5, 0.0, 1e-9, 3.0]
    mixed = laplacian_implicit(graph, tau, confidence)(values).values_KP
    for members in connected_components(graph):
        ids = list(members)
        mean = mixing_twin.weighted_mean([values.values_KP[k] for k in ids], [confidence[k] for k in ids])
        assert torch.allclose(mixed[ids], mean.expand(len(ids), -1), atol=1e-8)


@pytest.mark.parametrize("seed", range(5))
def test_edges_that_nobody_would_notice_do_not_join_groups(seed: int) -> None:
    """Weights exp(-d^2) of four groups far apart, of which few clients are known: the groups are hardly connected."""
    draw = np.random.default_rng(seed)
    points = np.repeat(7.0 * draw.permutation(4), 5)[:, None] + 0.3 * draw.normal(size=(20, 1))
    weights = np.exp(-((points - points.T) ** 2))
    np.fill_diagonal(weights, 0.0)
    graph = validated(weights, 20, "given")
    assert len(connected_components(graph)) == 4
    assert graph.provenance["negligible_edges_dropped"] > 0
    confidence = [0.0] * 20
    for k in draw.choice(20, 2, replace=False):
        confidence[k] = 1.0
    matrix = implicit_matrix(graph, 2.0, confidence)
    assert np.allclose(matrix.sum(axis=1), 1.0)
    assert (matrix >= 0).all()
    # edges a million times weaker than others still count
    weak = validated([[0, 1, 1e-6], [1, 0, 0], [1e-6, 0, 0]], 3, "given")
    assert weak.num_edges == 2
    # and so does one that is nothing to one of its clients and all that the other has
    assert validated([[0, 1, 1e-15], [1, 0, 0], [1e-15, 0, 0]], 3, "given").num_edges == 2


def test_beyond_what_float64_solves_a_strength_acts_no_more_and_weak_links_stay_short_of_the_mean() -> None:
    graph = validated([[0, 1, 0], [1, 0, 1e-9], [0, 1e-9, 0]], 3, "given")
    # confidence 3 and degree 1 + 1e-9
    bound = 1e10 * 3 / (2 * (1 + 1e-9))
    at_bound = implicit_matrix(graph, bound, [3.0] * 3)
    assert 0.4 < at_bound[2, 2] < 0.42
    assert np.allclose(implicit_matrix(graph, 1e3 * bound, [3.0] * 3), at_bound, rtol=0, atol=1e-6)
    assert implicit_matrix(graph, 0.1 * bound, [3.0] * 3)[2, 2] > at_bound[2, 2] + 0.1


def test_who_is_in_a_component_without_confidence_gets_the_mean_of_all() -> None:
    edges = np.zeros((5, 5))
    edges[0, 1] = edges[1, 0] = edges[2, 3] = edges[3, 2] = 1
    graph = validated(edges, 5, "given")
    values = arena(5)
    mixed = linear(welcomed(np.eye(5), graph, [1.0, 0.0, 3.0, float("inf"), 0.0]))(values).values_KP
    assert same_bytes(mixed[:4], values.values_KP[:4]), "client 1 has a neighbour that is known"
    mean = mixing_twin.weighted_mean([values.values_KP[k] for k in (0, 2, 3)], [1.0, 3.0, 1.0])
    assert np.allclose(mixed[4], mean, rtol=0, atol=1e-12)
    for confidence in ([0.0] * 5, [1.0, 0.0, 0.0, 1.0, 1.0]):
        assert np.array_equal(welcomed(np.eye(5), graph, confidence), np.eye(5))
    # however long ago everybody was seen
    assert np.allclose(welcomed(np.eye(5), graph, [1e-300, 0.0, 3e-300, 0.0, 0.0])[4], [0.25, 0, 0.75, 0, 0])


def test_the_mean_of_all_uploads_is_that_of_what_the_step_makes_of_them() -> None:
    graph, values = known.labels(["a", "a", "b", "b", ""]), arena(5)
    confidence = [0.3, 2.0, 0.0, 1.0, 0.0]
    matrix_KK = implicit_matrix(graph, 3.0, confidence)
    before = linear(welcomed(matrix_KK, graph, confidence))(values).values_KP[4]
    after = linear(matrix_KK)(values).values_KP
    assert np.allclose(before, mixing_twin.weighted_mean(list(after[:4]), confidence[:4]), rtol=0, atol=1e-12)


def test_a_component_nobody_has_confidence_in_keeps_its_bits_and_vanishing_confidence_still_mixes() -> None:
    graph, values = known.labels(["a", "a", "b", "b"]), arena(4, torch.float32)
    mixed = laplacian_implicit(graph, 1.0, [0, 0, 1e-300, 3e-300])(values).values_KP
    assert same_bytes(mixed[:2], values.values_KP[:2])
    mean = mixing_twin.weighted_mean(list(values.values_KP[2:]), [1, 3])
    assert torch.allclose(mixed[2:], mean.expand(2, -1), atol=1e-6)


def test_clients_unseen_for_long_agree_on_their_mean_along_a_path() -> None:
    path = validated([[0, 1, 0], [1, 0, 3], [0, 3, 0]], 3, "given")
    for confidence in ([1e-20, 3e-20, 0.0], [1e-300, 3e-300, 0.0]):
        assert np.allclose(implicit_matrix(path, 1.0, confidence), [[0.25, 0.75, 0.0]] * 3, rtol=0, atol=1e-8)


def test_clients_without_neighbours_keep_their_bits() -> None:
    graph, values = known.labels(["a", "", "a", ""]), arena(4, torch.float32)
    # what an unrelated client holds must not reach anybody, whatever it is
    values.values_KP[1] = torch.nan
    for mixer in (laplacian_explicit(graph, 0.3), laplacian_implicit(graph, 5.0, [1, 1, 1, 1])):
        mixed = mixer(values).values_KP
        assert same_bytes(mixed[[1, 3]], values.values_KP[[1, 3]])
        assert torch.isfinite(mixed[[0, 2]]).all()
        assert not torch.equal(mixed[0], values.values_KP[0])


def test_average_gives_everybody_the_same_bytes() -> None:
    values = arena(7, torch.float32)
    mixed = average([1, 2, 3, 4, 5, 6, 0])(values).values_KP
    assert all(same_bytes(row, mixed[0]) for row in mixed)
    expected = mixing_twin.weighted_mean(list(values.values_KP.double()[:6]), [1, 2, 3, 4, 5, 6])
    assert torch.allclose(mixed[0].double(), expected, atol=1e-6)


@pytest.mark.parametrize("weights", [[0.0, 0.0], [-1.0, 2.0], [float("nan"), 1.0]])
def test_average_refuses_weights_that_are_none(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights of a mean"):
        average(weights)


@pytest.mark.parametrize(
    ("tau", "confidence"), [(-1.0, [1, 1]), (float("inf"), [1, 1]), (1.0, [-1, 1]), (1.0, [float("nan"), 1])]
)
def test_implicit_step_refuses_negative_and_infinite_settings(tau: float, confidence: list[float]) -> None:
    with pytest.raises(ValueError, match="finite and at least 0"):
        laplacian_implicit(PAIR, tau, confidence)


# ----------------------------------------------------------------------------------------------------------- properties


@given(adjacencies(), st.floats(0, 1e6), st.data())
def test_implicit_matrix_is_row_stochastic_and_non_negative(
    adjacency: np.ndarray, tau: float, data: st.DataObject
) -> None:
    size = len(adjacency)
    graph = validated(adjacency, size, "given")
    confidence = data.draw(st.lists(st.one_of(st.just(0.0), st.floats(1e-12, 10)), min_size=size, max_size=size))
    matrix = implicit_matrix(graph, tau, confidence)
    assert (matrix >= 0).all()
    assert np.allclose(matrix.sum(axis=1), 1, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tau", [5e-324, 1e-308])
def test_the_least_strength_still_leads_those_without_confidence(tau: float) -> None:
    assert implicit_matrix(PAIR, tau, [0.0, 2.0]).tolist() == [[0.0, 1.0], [0.0, 1.0]]


@pytest.mark.parametrize("tau", [1e-9, 1.0, 1e9])
def test_hundreds_of_clients_keep_the_signs_and_the_sums(tau: float) -> None:
    confidence = np.random.Generator(np.random.Philox(0)).lognormal(sigma=4, size=300)
    confidence[::7] = 0.0
    matrix = implicit_matrix(known.random(300, 0), tau, confidence.tolist())
    assert (matrix >= 0).all()
    assert np.allclose(matrix.sum(axis=1), 1, rtol=0, atol=1e-12)


@given(adjacencies(), st.floats(0, 100))
def test_equal_confidence_preserves_the_mean_and_is_symmetric(adjacency: np.ndarray, tau: float) -> None:
    graph = validated(adjacency, len(adjacency), "given")
    matrix = implicit_matrix(graph, tau, [1.0] * len(adjacency))
    assert np.allclose(matrix, matrix.T, rtol=0, atol=1e-9)
    assert np.allclose(matrix.sum(axis=0), 1, rtol=0, atol=1e-9)


@given(adjacencies(), st.floats(0.01, 1))
def test_stable_explicit_step_preserves_the_mean_and_never_adds_disagreement(
    adjacency: np.ndarray, share_of_bound: float
) -> None:
    graph = validated(adjacency, len(adjacency), "given")
    bound = 2 / largest_eigenvalue(graph) if graph.num_edges else 1.0
    values = arena(len(adjacency))
    mixed = laplacian_explicit(graph, share_of_bound * bound)(values).values_KP
    assert torch.allclose(mixed.mean(dim=0), values.values_KP.mean(dim=0), rtol=0, atol=1e-9)
    before, after = disagreement(graph, values.values_KP), disagreement(graph, mixed)
    assert after <= before * (1 + 1e-9)


@pytest.mark.parametrize("tau", [0.05, 0.3])
def test_disagreement_along_each_eigenvector_falls_by_the_predicted_factor(tau: float) -> None:
    graph = known.random(6, 3)
    eigenvalues, vectors = np.linalg.eigh(laplacian(graph))
    for eigenvalue, vector in zip(eigenvalues[1:], vectors.T[1:], strict=True):
        values = scalars(*vector)
        before = disagreement(graph, values.values_KP)
        explicit = disagreement(graph, laplacian_explicit(graph, tau)(values).values_KP)
        implicit = disagreement(graph, laplacian_implicit(graph, tau, [1] * 6)(values).values_KP)
        assert explicit / before == pytest.approx((1 - tau * eigenvalue) ** 2, rel=1e-9)
        assert implicit / before == pytest.approx(1 / (1 + tau * eigenvalue) ** 2, rel=1e-9)


def test_explicit_step_is_a_convex_combination_only_up_to_the_largest_degree() -> None:
    graph = known.random(5, 1)
    inside = matrix_of(laplacian_explicit(graph, 1 / degrees(graph).max()), 5)
    beyond = matrix_of(laplacian_explicit(graph, 1.05 / degrees(graph).max()), 5)
    assert inside.min() >= -1e-15
    assert beyond.min() < 0


def test_an_unstable_explicit_step_is_refused_with_the_numbers() -> None:
    graph = known.uniform(4)
    laplacian_explicit(graph, 0.5)
    with pytest.raises(
        ConfigError, match=r"= 0\.51 .*eigenvalue 4 .*4 clients.*is 2\.04, allowed.* <= 0\.5,"
    ) as caught:
        laplacian_explicit(graph, 0.51)
    assert caught.value.exit_code == 2


# -------------------------------------------------------------------------------------------------- dtypes, composition


def test_bfloat16_rows_are_mixed_with_exact_weights() -> None:
    values = arena(9, torch.bfloat16)
    confidence = [1.0, 2, 3, 4, 5, 6, 7, 8, 9]
    mixed = laplacian_implicit(known.uniform(9), 0.3, confidence)(values).values_KP
    exact = torch.from_numpy(implicit_matrix(known.uniform(9), 0.3, confidence)) @ values.values_KP.double()
    assert mixed.dtype == torch.bfloat16
    # only the result is rounded: weights of 8 bits would change most values
    assert (mixed == exact.to(torch.bfloat16)).double().mean() > 0.99


def test_by_group_mixes_each_group_on_its_own() -> None:
    values = arena(3, torch.float32)
    mixed = by_group({"lora_a": average([1, 1, 1]), "lora_b": keep()})(values)
    for spec in values.layout.specs:
        before, after = values.view(spec), mixed.view(spec)
        if spec.group == "lora_b":
            assert same_bytes(after, before)
        else:
            assert torch.allclose(after, before.mean(dim=0).expand_as(after), atol=1e-6)


def test_by_group_sees_the_layout_of_its_group() -> None:
    seen: list[Arena] = []

    def spy(part: Arena) -> Arena:
        seen.append(part)
        return part

    values = arena(3)
    assert same_bytes(by_group({"lora_a": keep(), "lora_b": spy})(values).values_KP, values.values_KP)
    part_specs = seen[0].layout.specs
    whole_specs = [spec for spec in values.layout.specs if spec.group == "lora_b"]
    assert [spec.name for spec in part_specs] == [spec.name for spec in whole_specs]
    for part_spec, spec in zip(part_specs, whole_specs, strict=True):
        assert torch.equal(seen[0].view(part_spec), values.view(spec))


@pytest.mark.parametrize("mixers", [{"lora_a": keep()}, {"lora_a": keep(), "lora_b": keep(), "prompt": keep()}])
def test_by_group_must_name_every_group(mixers: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"but the adapter has \['lora_a', 'lora_b'\]"):
        by_group(mixers)(arena(2))  # type: ignore[arg-type]


def test_chain_applies_from_left_to_right() -> None:
    values, first, second = arena(4), laplacian_explicit(known.random(4, 0), 0.1), average([1, 0, 0, 0])
    assert torch.equal(chain(first, second)(values).values_KP, second(first(values)).values_KP)
    assert not torch.allclose(chain(first, second)(values).values_KP, chain(second, first)(values).values_KP)
    assert chain()(values) is values


def test_step_numbers() -> None:
    graph, values = known.uniform(4), arena(4)
    mixer = laplacian_implicit(graph, 0.5, [1, 1, 1, 1])
    numbers = step_numbers(graph, mixer, values, mixer(values))
    assert numbers["edges"] == 6
    assert numbers["mean_degree"] == numbers["max_degree"] == 3
    # (I + L/2)^-1 with L = 4 I - 11^T: I/3 + 11^T/6, so 3 of 6 parts come from others
    assert numbers["mixing_share"] == pytest.approx(0.5)
    # every eigenvalue but one is 4, so the energy falls by (1 + 0.5 * 4)^2
    assert numbers["disagreement_before"] / numbers["disagreement_after"] == pytest.approx(9)
    alone = step_numbers(graph, keep(), values, values)
    assert alone["mixing_share"] == 0
    everybody = step_numbers(graph, average([1] * 4), values, values)
    assert everybody["mixing_share"] == pytest.approx(0.75)


def test_the_mixing_share_is_the_mean_over_layers_however_they_share_graphs() -> None:
    everybody_KK, pair_KK = known.uniform(4).adjacency_KK, np.zeros((4, 4))
    pair_KK[0, 1] = pair_KK[1, 0] = 1
    by_layer = {"layer0": everybody_KK, "layer1": everybody_KK, "layer2": pair_KK}
    graph = Graph(np.mean(list(by_layer.values()), axis=0), "gram_layers", {}, by_layer)
    of = layout(features=((5, 4), (3, 6), (2, 3)))
    values = Arena(of, torch.zeros(4, of.num_parameters, dtype=torch.float64))
    mixer = laplacian_implicit(graph, 0.5, [1, 1, 1, 1])
    # a half as above in two layers; in the third (I + L/2)^-1 gives each of the two a quarter of the other
    share = step_numbers(graph, mixer, values, mixer(values))["mixing_share"]
    assert share == pytest.approx((0.5 + 0.5 + 2 * 0.25 / 4) / 3)
