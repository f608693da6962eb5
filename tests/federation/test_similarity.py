"""The Gram matrix of low-rank products and the graph drawn from it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm
from tests.federation.builders import layout
from tests.reference import mixing_twin

import fedmira.federation.similarity as similarity
from fedmira.config.graph import GraphConfig
from fedmira.errors import ConfigError
from fedmira.federation.graph import weight_inside
from fedmira.federation.learning import neighbour_graph
from fedmira.types import Arena, Layout, TensorSpec


def noise(num_clients: int, seed: int = 0, of: Layout | None = None) -> Arena:
    of = of or layout()
    shape = (num_clients, of.num_parameters)
    return Arena(of, torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def alike(after: Arena, before: Arena | None = None) -> np.ndarray:
    return similarity.similarity(similarity.layer_grams(after, before))


def families(sizes: tuple[int, ...], own: float = 0.3, common: float = 3.0) -> tuple[Arena, list[str]]:
    """Adapters that share a common part, a part of their family, and a part of their own."""
    num_clients, of = sum(sizes), layout(features=((12, 10), (9, 14)))
    labels = [str(family) for family, size in enumerate(sizes) for _ in range(size)]
    parts = noise(num_clients + len(sizes) + 1, seed=1, of=of).values_KP
    rows = [common * parts[0] + parts[1 + int(label)] + own * parts[-1 - k] for k, label in enumerate(labels)]
    return Arena(of, torch.stack(rows)), labels


@pytest.mark.parametrize("block_elements", [1 << 24, 1])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_gram_equals_inner_products_of_dense_updates(
    rank: int, block_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(similarity, "_BLOCK_ELEMENTS", block_elements)
    arena = noise(5, of=layout(rank=rank, scaling=0.5))
    assert np.allclose(similarity.layer_grams(arena), mixing_twin.layer_grams(arena), rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_clients", [1, 3, 4, 9])
@pytest.mark.parametrize(("rank", "formed"), [(1, False), (6, True)])
def test_products_are_formed_where_that_is_less_work(
    num_clients: int, rank: int, formed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    way = "_gram_of_products" if formed else "_gram_of_factors"
    original, calls = getattr(similarity, way), []
    monkeypatch.setattr(similarity, way, lambda *given: calls.append(1) or original(*given))
    arena = noise(num_clients, of=layout(rank=rank, features=((12, 10), (9, 14))))
    grams = similarity.layer_grams(arena)
    assert len(calls) == (0 if formed and num_clients == 1 else 2)
    assert np.allclose(grams, mixing_twin.layer_grams(arena), rtol=1e-12, atol=1e-12)
    assert all(np.array_equal(gram, gram.T) for gram in grams)


@pytest.mark.parametrize("num_clients", [3, 6, 9, 10, 12])
def test_compared_is_where_the_clients_were_heading(num_clients: int) -> None:
    before, after = noise(num_clients, 1), noise(num_clients, 2)
    seen = alike(after, before)
    assert np.allclose(seen, mixing_twin.similarity(after, before), rtol=0, atol=1e-12)
    # clients that did not move were heading where they are
    still = alike(after, after)
    assert np.allclose(still, alike(after), rtol=0, atol=1e-12)


@pytest.mark.parametrize("sizes", [(2, 1), (2, 2), (2, 2, 1), (3, 3), (2, 2, 2), (4, 2, 2), (3, 3, 3)])
def test_kin_are_told_from_strangers_also_where_clients_are_few(sizes: tuple[int, ...]) -> None:
    arena, labels = families(sizes, own=0.6)
    cosine = alike(arena)
    same = np.array([[one == other for other in labels] for one in labels])
    kin, strangers = cosine[same & ~np.eye(len(labels), dtype=bool)], cosine[~same]
    assert kin.min() > 0.1
    assert strangers.mean() < 0
    assert strangers.max() < kin.min()


@given(st.integers(0, 1000))
def test_gram_does_not_see_the_gauge(seed: int) -> None:
    arena = noise(4, seed)
    turned = arena.values_KP.clone()
    for k in range(4):
        matrix = torch.eye(2, dtype=torch.float64) + 0.4 * torch.from_numpy(
            np.random.Generator(np.random.Philox(seed + k)).uniform(-1, 1, (2, 2))
        )
        other = arena.replace(turned)
        for spec_a, spec_b in similarity.low_rank_pairs(arena.layout):
            other.view(spec_a)[k] = torch.linalg.inv(matrix) @ arena.view(spec_a)[k]
            other.view(spec_b)[k] = arena.view(spec_b)[k] @ matrix
    assert not torch.allclose(turned, arena.values_KP)
    assert np.allclose(similarity.layer_grams(arena.replace(turned)), similarity.layer_grams(arena), atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gram_is_float64_whatever_the_arena(dtype: torch.dtype) -> None:
    arena = noise(4)
    rounded = arena.replace(arena.values_KP.to(dtype))
    grams = similarity.layer_grams(rounded)
    assert all(gram.dtype == np.float64 for gram in grams)
    exact = similarity.layer_grams(rounded.replace(rounded.values_KP.double()))
    assert np.allclose(grams, exact, rtol=1e-12)


def test_gram_needs_low_rank_pairs() -> None:
    prompt = Layout((TensorSpec("prompt", "prompt", "", (4, 3), 0),))
    with pytest.raises(ConfigError, match=r"has the groups \['prompt'\]"):
        similarity.layer_grams(Arena(prompt, torch.zeros(3, 12)))


def test_centred_cosine_equals_its_twin() -> None:
    arena = noise(6)
    for gram, updates in zip(similarity.layer_grams(arena), mixing_twin.dense_by_layer(arena), strict=True):
        centred = similarity.centred_cosine(gram)
        assert np.allclose(centred, mixing_twin.centred_cosine(updates), rtol=0, atol=1e-12)
        assert np.allclose(np.diagonal(centred), 1)


def test_each_group_has_something_in_common_of_its_own() -> None:
    before, after, groups = noise(12, 1), noise(12, 2), (0, 1, 2) * 4
    grams = similarity.layer_grams(after, before)
    twin = [mixing_twin.cosines_beside_the_common(updates, groups) for updates in mixing_twin.headings(after, before)]
    assert np.allclose(similarity.similarity(grams, groups_C=groups), np.mean(twin, axis=0), rtol=0, atol=1e-12)
    assert np.array_equal(similarity.similarity(grams, groups_C=(3,) * 12), similarity.similarity(grams))


def test_a_group_whose_members_cancel_out_has_nothing_in_common() -> None:
    rows = noise(6).values_KP.numpy()
    gram = np.concatenate([rows, -rows]) @ np.concatenate([rows, -rows]).T
    norms = np.sqrt(np.diagonal(gram))
    assert np.allclose(similarity.update_cosines(gram), gram / np.outer(norms, norms), rtol=0, atol=1e-12)


def test_clients_that_have_come_further_are_not_alike_for_that() -> None:
    # four tasks; some clients still learn what everybody has to, others hardly any more
    draws = np.random.Generator(np.random.Philox(0)).normal(size=(17, 200)) / np.sqrt(200)
    tasks, still_to_learn = np.arange(12) // 3, np.array([2.0, 3.0, 5.0] * 4)
    updates = still_to_learn[:, None] * draws[16] + draws[12 + tasks] + 0.3 * draws[:12]
    same, strangers = np.equal.outer(tasks, tasks) & ~np.eye(12, dtype=bool), ~np.equal.outer(tasks, tasks)
    seen = similarity.update_cosines(updates @ updates.T)
    assert seen[same].min() > seen[strangers].max() + 0.2
    centred = similarity.cosines(updates @ updates.T)
    assert centred[same].min() < centred[strangers].max()


@pytest.mark.parametrize("num_clients", [3, 9, 12])
@pytest.mark.parametrize("times", [1e-3, 1e4, 1e8, 1e12])
def test_an_upload_counts_by_its_direction_alone_however_long_it_is(times: float, num_clients: int) -> None:
    before, after = noise(num_clients, 1), noise(num_clients, 2)
    plain = alike(after, before)
    for arena in (before, after):
        for _, spec_b in similarity.low_rank_pairs(arena.layout):
            arena.view(spec_b)[0] *= times
    assert np.allclose(alike(after, before), plain, rtol=0, atol=1e-9)


@pytest.mark.parametrize("num_clients", [4, 12])
def test_rounding_beside_what_others_moved_is_no_direction(num_clients: int) -> None:
    updates = np.random.Generator(np.random.Philox(0)).normal(size=(num_clients, 50))
    # fewer than half: who moved is the measure
    still = num_clients // 2 - 1
    updates[:still] *= 1e-9
    seen = similarity.update_cosines(updates @ updates.T)
    assert not seen[:still].any()
    assert np.allclose(np.diagonal(seen)[still:], 1)


@given(st.lists(st.sampled_from([1, 2, 4, 8, 16]), max_size=20))
def test_rank_groups_are_large_enough_and_in_the_order_of_ranks(ranks: list[int]) -> None:
    groups = similarity.rank_groups(ranks)
    sizes = [groups.count(group) for group in sorted(set(groups))]
    assert len(sizes) < 2 or min(sizes) >= 4
    assert sorted(groups) == [group for _, group in sorted(zip(ranks, groups, strict=True))]
    assert len(set(zip(ranks, groups, strict=True))) == len(set(ranks))


def test_what_clients_of_one_rank_have_in_common_is_not_their_task() -> None:
    # four tasks, ranks 1 to 3 in turn: those of small rank still learn what everybody has to
    arena, labels = families((3, 3, 3, 3))
    ranks = (1, 2, 3) * 4
    slow = torch.tensor([{1: 4.0, 2: 1.0, 3: 0.0}[rank] for rank in ranks], dtype=torch.float64)
    arena = arena.replace(arena.values_KP + slow[:, None] * noise(1, seed=9, of=arena.layout).values_KP)
    grams = similarity.layer_grams(arena)
    same = np.equal.outer(labels, labels) & ~np.eye(12, dtype=bool)
    strangers = ~np.equal.outer(labels, labels)
    apart = similarity.similarity(grams, groups_C=similarity.rank_groups(ranks))
    assert apart[same].min() > apart[strangers].max()
    mistaken = similarity.similarity(grams)
    assert mistaken[strangers].max() > mistaken[same].min()


def test_centring_removes_what_all_learn_alike() -> None:
    arena, labels = families((4, 4, 4))
    gram = sum(similarity.layer_grams(arena))
    norms = np.sqrt(np.diagonal(gram))
    plain = gram / norms[:, None] / norms[None, :]
    centred = similarity.centred_cosine(gram)
    same = np.array([[one == other for other in labels] for one in labels]) & ~np.eye(12, dtype=bool)
    different = np.array([[one != other for other in labels] for one in labels])
    assert plain[different].min() > 0.5
    assert centred[different].max() < 0.1
    assert centred[same].min() > 0.5


@pytest.mark.parametrize("num_clients", [1, 2])
def test_fewer_than_three_clients_say_nothing(num_clients: int) -> None:
    assert not alike(noise(num_clients)).any()


@pytest.mark.parametrize("rows", ["zero", "equal", "equal but for rounding", "one different"])
def test_clients_that_equal_the_mean_get_no_similarity_and_no_nan(rows: str) -> None:
    arena = noise(5)
    values = arena.values_KP
    if rows == "zero":
        values = torch.zeros_like(values)
    else:
        values[:] = values[0].clone()
    if rows == "equal but for rounding":
        values = values * (1 + 1e-9 * noise(5, seed=3).values_KP)
    if rows == "one different":
        values[4] += 1.0
    cosine = alike(arena.replace(values))
    assert np.isfinite(cosine).all()
    if rows == "one different":
        assert cosine[0, 1] == pytest.approx(1)
        assert cosine[0, 4] == pytest.approx(-1)
    else:
        assert not cosine.any()


@given(st.integers(2, 9), st.integers(1, 9), st.sampled_from([1.0, 2.0]), st.integers(0, 100))
def test_mutual_neighbours_equal_their_twin(num_clients: int, neighbours: int, power: float, seed: int) -> None:
    draws = np.random.Generator(np.random.Philox(seed)).uniform(-1, 1, (num_clients, num_clients))
    symmetric = (draws + draws.T) / 2
    untouched = symmetric.copy()
    adjacency = similarity.mutual_neighbours(symmetric, neighbours, power)
    assert np.allclose(adjacency, mixing_twin.mutual_neighbours(symmetric, neighbours, power), rtol=1e-12, atol=0)
    assert np.allclose(adjacency, adjacency.T, rtol=1e-12, atol=0)
    assert np.array_equal(symmetric, untouched)


def groups_of_clients(sizes: Sequence[int], kin: float, others: float, noise: float, seed: int = 0) -> np.ndarray:
    """Similarities of groups of clients: those in one group, those of two, and what both scatter by."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    scatter = noise * np.random.default_rng(seed).normal(size=(len(labels), len(labels)))
    alike = np.where(labels[:, None] == labels, kin, others) + (scatter + scatter.T) / 2**0.5
    np.fill_diagonal(alike, 1.0)
    return np.asarray(alike)


@pytest.mark.parametrize("seed", range(5))
def test_kin_below_zero_are_told_from_strangers_that_lie_lower(seed: int) -> None:
    # as measured on planted tasks at a rate of 0.01: kin -0.01, strangers -0.08, both by 0.02
    alike = groups_of_clients((4, 4, 4, 4), -0.01, -0.08, 0.02, seed)
    kin = np.kron(np.eye(4), np.ones((4, 4))) > 0
    least = similarity.strangers(alike)
    assert -0.06 < least < 0
    hidden, told = (similarity.mutual_neighbours(alike - zero, 5, 1.0) for zero in (0.0, least))
    assert (hidden[kin] > 0).sum() < 0.5 * 48
    assert (told[kin] > 0).sum() >= (hidden[kin] > 0).sum() + 8
    assert told[kin].sum() > 0.9 * told.sum()


@given(st.integers(3, 20), st.floats(-0.2, 0.2), st.floats(0.001, 0.2), st.integers(0, 20))
def test_strangers_end_two_deviations_above_their_middle_and_never_above_zero(
    size: int, others: float, noise: float, seed: int
) -> None:
    alike = groups_of_clients((1,) * size, others, others, noise, seed)
    off = sorted(alike[one, other] for one in range(size) for other in range(one))
    middle = np.median(off)
    spread = middle - np.quantile(off, norm.cdf(-1))
    assert similarity.strangers(alike) == pytest.approx(min(0.0, middle + 2 * spread), abs=1e-2 * noise)


def test_pairs_that_were_never_compared_do_not_say_where_strangers_end() -> None:
    alike = groups_of_clients((1,) * 12, -0.1, -0.1, 0.02)
    more = np.eye(16)
    more[:12, :12] = alike
    assert similarity.strangers(more) == similarity.strangers(alike) < 0


@pytest.mark.parametrize(
    "alike",
    [
        np.eye(1),
        groups_of_clients((12, 2, 2), 0.05, -0.15, 0.02),  # the middle pair is kin
        groups_of_clients((3, 3, 3), 0.6, -0.1, 0.1),
    ],
)
def test_where_the_lower_half_is_wide_the_zero_stays(alike: np.ndarray) -> None:
    assert similarity.strangers(alike) == 0


@pytest.mark.parametrize("seed", range(5))
def test_rounding_makes_no_kin(seed: int) -> None:
    alike = groups_of_clients((1,) * 12, -1 / 11, -1 / 11, 1e-14, seed)
    assert not similarity.mutual_neighbours(alike - similarity.strangers(alike), 5, 1.0).any()


def test_ties_do_not_depend_on_the_order_of_clients() -> None:
    alike = np.ones((5, 5))
    assert similarity.mutual_neighbours(alike, 2, 1.0).sum() == 20


def test_only_pairs_with_a_client_that_returned_are_compared_anew() -> None:
    start, after = noise(6, 5), noise(6)
    nothing = np.zeros((2, 6, 6))
    first = similarity.heading_grams(nothing, after, start, (0, 2, 3), (0, 2, 3))
    rows = [0, 2, 3]
    twin = mixing_twin.layer_grams(after, start)
    assert np.allclose(first[:, rows][:, :, rows], np.stack(twin)[:, rows][:, :, rows], rtol=1e-12)
    assert not np.delete(first, rows, axis=1).any()
    assert not nothing.any()
    # 2 and 3 have not moved; that they did, if they had, would not be looked at
    later = after.replace(after.values_KP.clone())
    later.values_KP[[0, 1, 4, 5]] = noise(6, seed=9).values_KP[[0, 1, 4, 5]]
    second = similarity.heading_grams(first, later, start, range(6), (0, 1, 4, 5))
    assert np.allclose(second, mixing_twin.layer_grams(later, start), rtol=1e-12)
    assert np.array_equal(second, second.transpose(0, 2, 1))
    assert np.array_equal(second[:, 2, 3], first[:, 2, 3])
    unseen = similarity.heading_grams(first, noise(6, seed=3), start, range(6), (0, 1, 4, 5))
    assert np.array_equal(unseen[:, 2, 3], first[:, 2, 3])
    assert similarity.heading_grams(first, later, start, range(6), ()) is first


def test_moved_touches_only_pairs_that_were_compared() -> None:
    start, after, nothing = noise(6, 5), noise(6), np.zeros((6, 6))
    rows = [0, 2, 3]
    now = mixing_twin.similarity(after.replace(after.values_KP[rows]), start.replace(start.values_KP[rows]))
    first = similarity.moved(nothing, now, rows, rows, memory=0.5)
    assert np.array_equal(np.argwhere(first.any(axis=1))[:, 0], rows)
    # a new pair is taken as seen, not shrunk towards an unseen past
    assert np.allclose(first[np.ix_(rows, rows)], now)
    assert not nothing.any()
    whole = mixing_twin.similarity(noise(6, seed=9), start)
    second = similarity.moved(first, whole, range(6), (0, 1, 4), memory=0.5)
    assert second[0, 2] == pytest.approx(0.5 * first[0, 2] + 0.5 * whole[0, 2])
    assert second[1, 4] == pytest.approx(whole[1, 4])
    # neither of the two returned
    assert second[2, 3] == first[2, 3]
    # nor here, but when both had, there were too few to compare
    assert second[3, 5] == whole[3, 5]
    assert np.allclose(similarity.moved(first, whole, range(6), range(6), memory=0.0), whole)
    assert similarity.moved(first, now[:2, :2], (0, 1), (0, 1), memory=0.5) is first
    assert similarity.moved(first, whole, range(6), (), memory=0.5) is first


def test_graph_recovers_families_of_unequal_size() -> None:
    arena, labels = families((5, 3, 4))
    cosine = alike(arena)
    graph = neighbour_graph(cosine, GraphConfig())
    assert weight_inside(graph, labels) > 0.95
    assert (graph.adjacency_KK.sum(axis=1) > 0).all()
    assert graph.provenance["neighbours"] == 5
