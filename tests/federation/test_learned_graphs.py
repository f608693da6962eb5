"""Every kind of learned graph finds known groups, follows its clients, survives degenerate input; its mathematics."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.cluster import hierarchy
from scipy.optimize import minimize
from scipy.spatial.distance import squareform
from tests.federation.builders import clients, graph_section, initial, judged, layout, mira, one_round, play
from tests.reference import linkage_twin, mixing_twin

from fedmira.config.graph import GraphConfig
from fedmira.config.mira import ChoiceConfig, MiraConfig
from fedmira.errors import ConfigError, DataError
from fedmira.federation import drawing
from fedmira.federation.asked_graphs import similarity_of_regrets
from fedmira.federation.blocks import block_of
from fedmira.federation.clustering import clusters, partitions, silhouette
from fedmira.federation.graph import PRIVACY, Graph, parts, subgraph, validated, weight_inside
from fedmira.federation.known_graphs import embeddings
from fedmira.federation.learned_graphs import _neighbours, learner
from fedmira.federation.learning import Learner, Seen, compared, settled_share
from fedmira.federation.mixing import (
    by_layer,
    energy,
    implicit_matrix,
    laplacian_explicit,
    laplacian_implicit,
    linear,
    step_numbers,
)
from fedmira.federation.ranks import trimmed
from fedmira.federation.registry import build_method
from fedmira.federation.similarity import over_layers
from fedmira.federation.simplex import collaboration
from fedmira.randomness import torch_generator
from fedmira.types import Arena, Clients, Layout, Losses, Participants, Results

FROM_ADAPTERS = ("gram", "gram_layers", "pfedgraph", "kalofolias", "mtrl", "clusters")
ASKED = ("trust", "probe")
SIZES = (5, 3, 4)


def families(
    sizes: Sequence[int] = SIZES, own: float = 0.3, common: float = 3.0, seed: int = 1, larger: int = 1
) -> tuple[Arena, list[str]]:
    """Adapters that share a common part, a part of their family, and a part of their own."""
    of = layout(features=((12 * larger, 10 * larger), (9 * larger, 14 * larger)))
    labels = [str(family) for family, size in enumerate(sizes) for _ in range(size)]
    shape = (len(labels) + len(sizes) + 1, of.num_parameters)
    parts_P = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows = [common * parts_P[0] + parts_P[1 + int(label)] + own * parts_P[-1 - k] for k, label in enumerate(labels)]
    return Arena(of, torch.stack(rows)), labels


def answers(rows_SP: torch.Tensor, candidates: Sequence[torch.Tensor]) -> Losses:
    """A quadratic loss around each client's own row, plus what makes a client's data hard; agreement by the same."""
    size = len(rows_SP)
    mean_SQ = torch.stack([(one - rows_SP).square().mean(dim=1) for one in candidates], 1) if candidates else None
    mean_SQ = torch.zeros(size, 0) if mean_SQ is None else mean_SQ + torch.arange(size)[:, None]
    apart_SS = (rows_SP[:, None] - rows_SP[None]).square().mean(dim=2)
    return Losses(mean_SQ.double(), (3,) * size, 0, 0, torch.exp(-0.1 * apart_SS))


def learned(kind: str, uploads: Arena, who: Clients | None = None, rounds: int = 1, **settings: object) -> Graph:
    """The graph after `rounds` rounds in which everybody returned the same upload, from adapters with B = 0."""
    num_clients = uploads.num_clients
    who = who or clients(num_clients)
    learns = learner(graph_section(kind, **settings), who)
    start = initial(num_clients, torch.float64, of=uploads.layout)
    everybody = tuple(range(num_clients))
    memory = learns.init(start)
    # what is asked after one round serves the next
    for round_ in range(1, rounds + 1 + (learns.ask is not None)):
        seen = Seen(uploads, start, (round_,) * num_clients, everybody, round_)
        memory, graph = learns.learn(memory, seen)
        memory |= heard(learns, memory, uploads, round_)
    return graph


def heard(learns: Learner, memory: dict[str, torch.Tensor], uploads: Arena, round_: int) -> dict[str, torch.Tensor]:
    if learns.ask is None or learns.hear is None:
        return {}
    everybody = tuple(range(uploads.num_clients))
    results = Results(everybody, uploads.values_KP, (), 0, 0, 0.0, 0)
    trial = learns.ask(Participants(round_, everybody), results)
    if trial is None:
        return {}
    candidates = [trial.candidate(number) for number in range(trial.num_candidates)]
    return learns.hear(memory, round_, trial, answers(uploads.values_KP, candidates))


# ------------------------------------------------------------------------------------------------------- every kind


@pytest.mark.parametrize("kind", [*FROM_ADAPTERS, *ASKED])
def test_every_kind_recovers_known_families(kind: str) -> None:
    uploads, labels = families()
    settings = {"trust": {"judged": 11}, "kalofolias": {"neighbours": 3}}.get(kind, {})
    graph = learned(kind, uploads, rounds=2, **settings)
    assert weight_inside(graph, labels) > 0.95
    assert (graph.adjacency_KK.sum(axis=1) > 0).all()
    # about as strong as each other, so that one strength serves all kinds
    assert 0.5 < graph.adjacency_KK.max(axis=1).mean() < 2
    assert graph.name == kind
    assert graph.provenance["privacy"] == PRIVACY[kind]
    assert graph.provenance["agreement"] > (0.99 if kind in FROM_ADAPTERS else 0.9)
    assert json.loads(json.dumps(dict(graph.provenance))) == dict(graph.provenance)


@pytest.mark.parametrize("kind", [*FROM_ADAPTERS, *ASKED])
def test_the_graph_follows_its_clients(kind: str) -> None:
    uploads, _ = families((3, 3), own=0.8)
    order = [4, 0, 5, 2, 1, 3]
    who = clients(6)
    shuffled = who._replace(num_examples_K=tuple(who.num_examples_K[k] for k in order))
    plain = learned(kind, uploads, who).adjacency_KK
    moved = learned(kind, uploads.replace(uploads.values_KP[order]), shuffled).adjacency_KK
    assert plain.any()
    # clients 0 and 3 are as hard as their place says: trust must not see that either
    assert np.allclose(moved, plain[np.ix_(order, order)], rtol=0, atol=1e-7)


@pytest.mark.parametrize("length", [3.0, 30.0, 300.0])
@pytest.mark.parametrize("kind", FROM_ADAPTERS)
def test_one_upload_far_from_all_others_does_not_make_them_look_alike(kind: str, length: float) -> None:
    uploads, labels = families((4, 4, 4, 4), own=1.0)
    noise = torch.randn(uploads.values_KP[0].shape, generator=torch_generator(9, "hostile"), dtype=torch.float64)
    # both factors grow, so the update is `length` times as long as those of the others
    values_KP = uploads.values_KP.clone()
    values_KP[0] = noise * (length * values_KP[1].square().mean() / noise.square().mean()).sqrt()
    settings = {"kalofolias": {"neighbours": 3}}.get(kind, {})
    honest = range(1, 16)
    graph, without = (
        subgraph(learned(kind, uploads.replace(values), rounds=2, **settings), honest)
        for values in (values_KP, uploads.values_KP)
    )
    share, expected = (weight_inside(one, labels[1:]) for one in (graph, without))
    assert share > expected - 0.1
    assert share > 0.8


@pytest.mark.parametrize("rows", ["zero", "equal", "equal but for rounding", "one different", "random"])
@pytest.mark.parametrize("num_clients", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", [*FROM_ADAPTERS, *ASKED])
def test_degenerate_adapters_give_a_usable_graph(kind: str, num_clients: int, rows: str) -> None:
    uploads, _ = families((num_clients,))
    values = uploads.values_KP
    if rows != "random":
        values = torch.zeros_like(values) if rows == "zero" else values[:1].expand_as(values).clone()
    if rows == "equal but for rounding":
        values = values * (1 + 1e-12 * uploads.values_KP)
    if rows == "one different":
        values[-1] += 1.0
    graph = learned(kind, uploads.replace(values), rounds=2)
    assert np.isfinite(graph.adjacency_KK).all()
    if num_clients < 3:
        assert not graph.num_edges
    matrix = implicit_matrix(graph, 1.0, [1.0] * num_clients)
    assert np.allclose(matrix.sum(axis=1), 1)


@pytest.mark.parametrize("kind", [*FROM_ADAPTERS, *ASKED])
def test_before_anything_agrees_everyone_is_joined_or_nobody(kind: str) -> None:
    uploads, _ = families((3, 3))
    for warmup, edges in (("none", 0), ("uniform", 15)):
        # everybody returns the same upload each round, so what is learned in the second round is that of the first
        first, second = (learned(kind, uploads, rounds=rounds, settled=0.8, warmup=warmup) for rounds in (1, 2))
        assert first.num_edges == edges
        assert first.provenance["learned_share"] == 0.0
        assert first.provenance["warmup"] == warmup
        assert 0 < second.num_edges < 15
        assert second.provenance["agreement"] > 0.99
        assert second.provenance["learned_share"] == 1.0
        assert "warmup" not in second.provenance


@pytest.mark.parametrize("kind", ["gram", "gram_layers"])
@pytest.mark.parametrize("warmup", ["uniform", "none"])
def test_a_graph_counts_for_as_much_as_it_agrees_with_the_one_before(kind: str, warmup: str) -> None:
    num_clients, everybody = 12, tuple(range(12))
    noise, start = torch_generator(5, "chance"), initial(12, torch.float64)
    halfway, alone = (
        learner(graph_section(kind, settled=settled, warmup=warmup), clients(num_clients)) for settled in (0.8, 0.0)
    )
    memory, bare, weights = halfway.init(start), alone.init(start), []
    for round_ in range(1, 5):
        drawn_KP = torch.randn(start.values_KP.shape, generator=noise, dtype=torch.float64)
        seen = Seen(start.replace(start.values_KP + drawn_KP), start, (round_,) * num_clients, everybody, round_)
        (memory, graph), (bare, found) = halfway.learn(memory, seen), alone.learn(bare, seen)
        weights.append(found.adjacency_KK)
        share = 0.0
        if round_ > 1:
            before_KK, now_KK = weights[-2:]
            cosine = (before_KK * now_KK).sum() / np.sqrt((before_KK**2).sum() * (now_KK**2).sum())
            assert graph.provenance["agreement"] == pytest.approx(cosine)
            share = cosine / 0.8
            assert 0 < share < 1
        assert graph.provenance["learned_share"] == pytest.approx(share)
        off = ~np.eye(num_clients, dtype=bool)
        if round_ == 1:
            # one graph for all layers, since nothing says how they differ
            assert [layers for _, layers in parts(graph)] == [()]
            assert np.array_equal(graph.adjacency_KK, off * float(warmup == "uniform"))
            continue
        for mixed, of in zip(parts(graph), parts(found), strict=True):
            rest = 2 / 11 * off * (warmup == "uniform")
            expected_KK = share * of[0].adjacency_KK + (1 - share) * rest
            assert np.allclose(mixed[0].adjacency_KK, expected_KK, rtol=0, atol=1e-12)


@pytest.mark.parametrize("returning", [2, 5, 20])
def test_few_at_a_time_a_graph_of_chance_counts_for_little_and_a_true_one_in_full(returning: int) -> None:
    true_KP, _ = families((5, 5, 5, 5))
    for chance in (True, False):
        who, noise, draw = clients(20), torch_generator(5, "chance"), np.random.default_rng(3)
        start = initial(20, torch.float64, of=true_KP.layout)
        learns, shares = learner(graph_section("gram", settled=0.8), who), []
        memory, uploads, last_K = learns.init(start), start.replace(start.values_KP.clone()), [0] * 20
        for round_ in range(1, 400 // returning):
            ids = tuple(sorted(draw.choice(20, returning, replace=False).tolist()))
            for k in ids:
                drawn_P = torch.randn(start.values_KP.shape[1], generator=noise, dtype=torch.float64)
                uploads.values_KP[k] = start.values_KP[k] + drawn_P if chance else true_KP.values_KP[k]
                last_K[k] = round_
            memory, graph = learns.learn(memory, Seen(uploads, start, tuple(last_K), ids, round_))
            shares.append(graph.provenance["learned_share"])
        late = shares[len(shares) // 2 :]
        assert (max(late) < 0.5) if chance else (min(late) > 0.9)


def test_with_fewer_pairs_looked_at_again_than_clients_a_graph_counts_for_as_much_less() -> None:
    def share(settled: float, *evidence: float) -> tuple[float, dict[str, float]]:
        # two of ten clients are in no pair
        known_KK = np.pad(1 - np.eye(8), ((0, 2), (0, 2)))
        memory = {"evidence": torch.tensor(evidence, dtype=torch.float64), "pairs_known": torch.from_numpy(known_KK)}
        return settled_share(memory, settled)

    assert share(0.8, 1.0, 1.0, 1.0, 2.0) == (0.25, {"agreement": 1.0})
    assert share(0.8, 4.0, 4.0, 4.0, 8.0) == (1.0, {"agreement": 1.0})
    assert share(0.8, 1.0, 4.0, 4.0, 9.0) == (0.3125, {"agreement": 0.25})
    assert share(0.8, 0.0, 0.0, 0.0, 8.0) == (0.0, {})
    assert share(0.0, 0.0, 0.0, 0.0, 0.0) == (1.0, {})
    assert share(0.0, 1.0, 1.0, 1.0, 1.0) == (1.0, {"agreement": 1.0})


def test_only_pairs_that_were_looked_at_again_say_whether_graphs_agree() -> None:
    before_KK = np.ones((5, 5)) - np.eye(5)
    # client 0 was not there before; of clients 1 to 4 only the first returns
    known_KK = before_KK.copy()
    known_KK[0] = known_KK[:, 0] = 0.0
    looked_at_KK = np.zeros((5, 5), dtype=bool)
    looked_at_KK[1] = looked_at_KK[:, 1] = True
    looked_at_KK[1, 1] = False
    now_KK = 7 * before_KK
    now_KK[1, 2] = now_KK[2, 1] = 0.0
    now_KK[1, 3] = now_KK[3, 1] = 3.0
    memory = {
        "last_weights": torch.from_numpy(before_KK),
        "pairs_known": torch.from_numpy(known_KK),
        "evidence": torch.full((4,), 10.0, dtype=torch.float64),
    }
    after = compared(memory, now_KK, looked_at_KK)
    # pairs 1-2, 1-3 and 1-4; of the seven known now four were looked at
    faded = 10 * (1 - 4 / 7)
    assert after["evidence"].tolist() == pytest.approx([10 + faded, 3 + faded, 9 + 49 + faded, 3 + faded])
    assert after["last_weights"][1].tolist() == [7, 0, 0, 3, 7]
    assert after["last_weights"][2].tolist() == [1, 0, 0, 1, 1]
    assert after["pairs_known"].sum() == 14


def test_two_clients_are_too_few_to_be_looked_at() -> None:
    uploads, _ = families((3, 3))
    learns, start = learner(graph_section("gram"), clients()), initial(of=uploads.layout)
    memory, _ = learns.learn(learns.init(start), Seen(uploads, start, (1, 1, 0, 0, 0, 0), (0, 1), 1))
    assert not memory["pairs_known"].any()
    memory, _ = learns.learn(memory, Seen(uploads, start, (2,) * 6, tuple(range(6)), 2))
    assert memory["pairs_known"].sum() == 30
    assert not memory["evidence"].any()


@pytest.mark.parametrize("kind", ["gram", "trust", "probe"])
@pytest.mark.parametrize("returning", [5, 10])
def test_where_the_published_method_asks_few_a_true_graph_settles_and_one_of_chance_does_not(
    kind: str, returning: int
) -> None:
    """It relates only those that take part, and what is asked serves the next round: neither is a disagreement."""
    true_KP, _ = families((5, 5, 5, 5))
    who, draw = clients(20), np.random.default_rng(3)
    start = initial(20, torch.float64, of=true_KP.layout)
    for chance in (True, False):
        noise, shares = torch_generator(5, "chance"), []
        learns = learner(graph_section(kind, settled=0.8), who)
        memory = learns.init(start)
        for round_ in range(1, 60):
            ids = tuple(sorted(draw.choice(20, returning, replace=False).tolist()))
            uploads = start.replace(true_KP.values_KP.clone())
            if chance:
                drawn_KP = torch.randn(start.values_KP.shape, generator=noise, dtype=torch.float64)
                uploads = start.replace(start.values_KP + drawn_KP)
            now_K = tuple(round_ if k in ids else 0 for k in range(20))
            memory, graph = learns.learn(memory, Seen(uploads, start, now_K, ids, round_))
            shares.append(graph.provenance["learned_share"])
            if learns.ask is not None and learns.hear is not None:
                rows_SP = uploads.values_KP[list(ids)]
                trial = learns.ask(Participants(round_, ids), Results(ids, rows_SP, (), 0, 0, 0.0, 0))
                assert trial is not None
                candidates = [trial.candidate(number) for number in range(trial.num_candidates)]
                memory |= learns.hear(memory, round_, trial, answers(rows_SP, candidates))
        late = shares[30:]
        assert (np.mean(late) < 0.55) if chance else (np.mean(late) > 0.9)


@pytest.mark.parametrize("kind", ["gram", "mtrl", "trust", "probe"])
@pytest.mark.parametrize("num_clients", [5, 12, 16, 24])
def test_clients_that_nobody_resembles_are_not_drawn_into_one(kind: str, num_clients: int) -> None:
    who, start = clients(num_clients), initial(num_clients, torch.float64)
    learns, noise = learner(graph_section(kind, settled=0.8), who), torch_generator(5, "strangers")
    strangers_KP = torch.randn(start.values_KP.shape, generator=noise, dtype=torch.float64)
    memory, everybody = learns.init(start), tuple(range(num_clients))
    for round_ in range(1, 9):
        drawn_KP = torch.randn(start.values_KP.shape, generator=noise, dtype=torch.float64)
        uploads = start.replace(start.values_KP + strangers_KP + 0.5 * drawn_KP)
        memory, graph = learns.learn(memory, Seen(uploads, start, (round_,) * num_clients, everybody, round_))
        memory |= heard(learns, memory, uploads, round_)
        degree_K = graph.adjacency_KK.sum(axis=1)
        if round_ <= 1 + (kind in ASKED):
            assert np.allclose(degree_K, num_clients - 1)
        elif round_ > 2 + (kind in ASKED):
            assert degree_K.mean() < 4


def test_before_graphs_agree_only_clients_that_were_seen_are_joined() -> None:
    who, start, ids = clients(20), initial(20, torch.float64), (1, 4, 6, 7)
    learns = learner(graph_section("gram", settled=0.8), who)
    noise, memory = torch_generator(5, "chance"), learns.init(start)
    last_K = tuple(int(k in ids) for k in range(20))
    for round_ in (1, 2):
        drawn_KP = torch.randn(start.values_KP.shape, generator=noise, dtype=torch.float64)
        memory, graph = learns.learn(memory, Seen(start.replace(drawn_KP), start, last_K, ids, round_))
        assert {k for k in range(20) if graph.adjacency_KK[k].any()} == set(ids)
        share, degree = graph.provenance["learned_share"], (3.0, 2.0)[round_ - 1]
        if round_ == 1:
            assert share == 0
            bare_KK = np.zeros((20, 20))
        else:
            bare_KK = memory["last_weights"].numpy()
            assert 0 < share < 1
        rest_KK = graph.adjacency_KK - share * bare_KK
        assert np.allclose(rest_KK.sum(axis=1)[list(ids)], (1 - share) * degree)


def test_a_graph_without_edges_says_nothing() -> None:
    who, start = clients(6), initial(6, torch.float64)
    learns, uploads = learner(graph_section("gram", settled=0.8), who), start.replace(torch.ones_like(start.values_KP))
    memory = learns.init(start)
    for round_ in (1, 2, 3):
        memory, graph = learns.learn(memory, Seen(uploads, start, (round_,) * 6, tuple(range(6)), round_))
        assert graph.provenance["learned_share"] == 0
        assert np.allclose(graph.adjacency_KK.sum(axis=1), 5 if round_ == 1 else 2)


def test_starts_are_compared_as_clients_of_a_smaller_rank_got_them() -> None:
    who = clients()._replace(ranks_K=(1, 2, 2, 1, 2, 2))
    noise = torch_generator(6, "starts")
    starts, uploads = (
        initial(6, torch.float64).replace(torch.randn(initial(6).values_KP.shape, generator=noise, dtype=torch.float64))
        for _ in range(2)
    )
    uploads = uploads.replace(trimmed(uploads.layout, uploads.values_KP, who.ranks_K or ()))
    cut = starts.replace(trimmed(starts.layout, starts.values_KP, who.ranks_K or ()))
    learns, plain = (learner(graph_section("gram"), of) for of in (who, clients()))
    found, expected, wrong = (
        one.learn(one.init(starts), Seen(uploads, began, (1,) * 6, tuple(range(6)), 1))[0]["similarity"]
        for one, began in ((learns, starts), (plain, cut), (plain, starts))
    )
    assert torch.equal(found, expected)
    assert not torch.allclose(found, wrong)


@pytest.mark.parametrize("kind", ["gram", "gram_layers", "clusters"])
def test_what_clients_of_like_rank_have_in_common_is_taken_away(kind: str) -> None:
    # the first one missing leaves ranks in turn, one missing among them does not
    seen, ranks = [k for k in range(12) if k != 5], (1, 2) * 6
    who = Clients(tuple(f"client-{k}" for k in range(12)), (5,) * 12, ("one",) * 12, 0, ranks_K=ranks)
    noise = torch_generator(7, "uploads")
    starts, uploads = (
        initial(12, torch.float64).replace(torch.randn(initial(12).values_KP.shape, generator=noise).double())
        for _ in range(2)
    )
    starts, uploads = (arena.replace(trimmed(arena.layout, arena.values_KP, ranks)) for arena in (starts, uploads))
    learns = learner(graph_section(kind), who)
    memory, _ = learns.learn(
        learns.init(starts), Seen(uploads, starts, tuple(int(k in seen) for k in range(12)), tuple(seen), 1)
    )
    groups = [ranks[k] for k in seen]
    expected = np.mean(
        [
            mixing_twin.cosines_beside_the_common(updates, groups)
            for updates in mixing_twin.headings(uploads.rows(seen), starts.rows(seen))
        ],
        axis=0,
    )
    found = memory["similarity"].numpy()
    # with `gram_layers` one matrix for each block of the layers, which are of one mean
    found = found.mean(axis=0) if found.ndim == 3 else found
    assert np.allclose(found[np.ix_(seen, seen)], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("labels", {"neighbours": 3}, "neighbours has no effect with kind = labels"),
        ("clusters", {"power": 2.0}, "power has no effect with kind = clusters; it goes with gram"),
        ("uniform", {"memory": 0.1}, "memory has no effect"),
        ("embeddings", {"settled": 0.5}, "settled has no effect"),
        ("gram", {"pooling": 0.1}, "pooling has no effect with kind = gram; it goes with gram_layers"),
        ("gram", {"spread": 0.1}, "spread has no effect"),
        ("probe", {"judged": 3}, "judged has no effect"),
        ("trust", {"probe_path": "x"}, "probe_path has no effect"),
        ("trust", {"probe_examples": 3}, "probe_examples has no effect"),
        ("gram", {"path": "x"}, "path has no effect with kind = gram"),
        ("given", {}, "kind: given needs path"),
    ],
)
def test_keys_of_other_kinds_are_refused(kind: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GraphConfig.model_validate({"kind": kind, **settings})


def test_a_resolved_config_is_accepted_again() -> None:
    for kind in PRIVACY:
        config = GraphConfig.model_validate({"kind": kind, **({"path": "x"} if kind == "given" else {})})
        assert GraphConfig.model_validate(config.model_dump()) == config


# --------------------------------------------------------------------------------------------------- their mathematics


@given(st.integers(1, 12), st.integers(0, 200), st.integers(1, 5))
def test_average_linkage_equals_its_twin_with_ties(size: int, seed: int, values: int) -> None:
    drawn = np.random.default_rng(seed).integers(0, values, size=(size, size)).astype(float)
    distance = np.triu(drawn, 1) + np.triu(drawn, 1).T
    assert [labels.tolist() for labels in partitions(distance)] == linkage_twin.partitions(distance)


@pytest.mark.parametrize("size", range(3, 20))
def test_equal_distances_make_no_clusters(size: int) -> None:
    assert clusters(0.7 * (np.ones((size, size)) - np.eye(size))) is None


@given(st.integers(2, 9), st.integers(0, 50))
def test_average_linkage_equals_scipy(size: int, seed: int) -> None:
    points = np.random.Generator(np.random.Philox(seed)).normal(size=(size, 3))
    distance = np.linalg.norm(points[:, None] - points[None], axis=2)
    tree = hierarchy.average(squareform(distance, checks=False))
    for count, labels in enumerate(partitions(distance), start=1):
        assert len(set(labels.tolist())) == count
        theirs = hierarchy.fcluster(tree, count, "maxclust")
        assert np.array_equal(labels[:, None] == labels[None], theirs[:, None] == theirs[None])


@given(st.integers(3, 12), st.integers(0, 50))
def test_silhouettes_of_nested_partitions_are_those_of_each(size: int, seed: int) -> None:
    points = np.random.default_rng(seed).integers(0, 4, size=(size, 2)).astype(float)
    distance = np.abs(points[:, None] - points[None]).sum(axis=2)
    nested = partitions(distance)[1:-1]
    scores = [silhouette(distance, labels) for labels in nested]
    best = clusters(distance)
    if best is None:
        assert max(scores, default=0.0) <= 1e-12
    else:
        assert silhouette(distance, best) == pytest.approx(max(scores), abs=1e-12)


def test_silhouette_by_hand() -> None:
    distance = np.array([[0.0, 1.0, 4.0], [1.0, 0.0, 2.0], [4.0, 2.0, 0.0]])
    # a = 1 and b = 4 for the first, a = 1 and b = 2 for the second, the third is alone
    assert silhouette(distance, np.array([0, 0, 2])) == pytest.approx((3 / 4 + 1 / 2 + 0) / 3)
    assert silhouette(distance, np.array([0, 0, 0])) == 0
    assert clusters(np.ones((4, 4)) - np.eye(4)) is None


def test_clusters_are_the_families() -> None:
    uploads, labels = families()
    graph = learned("clusters", uploads)
    same = np.array([[float(one == other) for other in labels] for one in labels]) - np.eye(12)
    assert np.array_equal(graph.adjacency_KK, same)
    assert graph.provenance["clusters"] == len(set(labels))


@pytest.mark.parametrize("kind", FROM_ADAPTERS)
def test_a_client_that_did_not_move_is_nobodys_kin_and_changes_nobodys(kind: str) -> None:
    # much of an update is noise, so clusters are not clear and kin lie below 0
    uploads, _ = families((4, 4, 4, 4), own=2.5, larger=12)
    lazy = uploads.replace(uploads.values_KP.clone())
    for part in uploads.layout.slices("lora_b"):
        lazy.values_KP[15, part] = 0.0
    graph = learned(kind, lazy, rounds=2)
    without = learned(kind, uploads.replace(uploads.values_KP[:15]), rounds=2)
    if kind.startswith("gram"):
        assert np.max(graph.provenance["strangers"]) < 0
    assert not graph.adjacency_KK[15].any()
    assert np.allclose(graph.adjacency_KK[:15, :15], without.adjacency_KK, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["gram", "gram_layers"])
def test_a_client_that_stops_moving_stays_what_it_was_to_the_others(kind: str) -> None:
    uploads, labels = families((4, 4, 4, 4), own=2.5, larger=12)
    start, everybody = initial(16, torch.float64, of=uploads.layout), tuple(range(16))
    learns = learner(graph_section(kind), clients(16))
    memory, first = learns.learn(learns.init(start), Seen(uploads, start, (1,) * 16, everybody, 1))
    # half of the B it received: 2 B A - B0 A0 = 0
    starts, still = (uploads.replace(values.clone()) for values in (start.values_KP, uploads.values_KP))
    starts.values_KP[15] = uploads.values_KP[15]
    for part in uploads.layout.slices("lora_b"):
        still.values_KP[15, part] /= 2
    for round_ in range(2, 6):
        memory, graph = learns.learn(memory, Seen(still, starts, (round_,) * 16, everybody, round_))
    assert np.max(graph.provenance["strangers"]) < 0
    assert weight_inside(graph, labels) > 0.95
    assert graph.adjacency_KK[15] == pytest.approx(first.adjacency_KK[15], abs=0.2)


@pytest.mark.parametrize("kind", ["gram", "gram_layers"])
def test_a_client_that_stopped_moving_is_no_kin_of_one_that_comes_later(kind: str) -> None:
    uploads, _ = families((4, 4, 4, 4), own=2.5, larger=12)
    start, everybody = initial(16, torch.float64, of=uploads.layout), tuple(range(16))
    learns = learner(graph_section(kind), clients(16))
    early = everybody[1:]
    memory, _ = learns.learn(learns.init(start), Seen(uploads, start, (0,) + (1,) * 15, early, 1))
    starts, still = (uploads.replace(values.clone()) for values in (start.values_KP, uploads.values_KP))
    starts.values_KP[15] = uploads.values_KP[15]
    for part in uploads.layout.slices("lora_b"):
        still.values_KP[15, part] /= 2
    for round_ in (2, 3):
        memory, graph = learns.learn(memory, Seen(still, starts, (round_,) * 16, everybody, round_))
    assert np.max(graph.provenance["strangers"]) < 0
    assert graph.adjacency_KK[0, 15] == 0
    assert graph.adjacency_KK[0, :15].any()


def test_layers_in_which_a_client_did_not_move_do_not_speak_for_it() -> None:
    one, other = np.full((3, 3), -0.5), np.full((3, 3), -0.1)
    for cosine in (one, other):
        np.fill_diagonal(cosine, 1.0)
    other[2] = other[:, 2] = 0.0
    mean = over_layers([one, other])
    assert mean.tolist() == [[1.0, -0.3, -0.5], [-0.3, 1.0, -0.5], [-0.5, -0.5, 1.0]]


@pytest.mark.parametrize("kind", ["gram", "gram_layers"])
def test_neighbours_beyond_a_small_family_do_not_count(kind: str) -> None:
    uploads, labels = families((2, 3, 2, 3, 2), own=1.0)
    sharp, blurred = (learned(kind, uploads, within_clusters=within, neighbours=5) for within in (True, False))
    assert weight_inside(sharp, labels) == pytest.approx(1.0)
    assert weight_inside(blurred, labels) < 0.95
    # those that count weigh what they did
    kept = sharp.adjacency_KK > 0
    assert np.array_equal(sharp.adjacency_KK[kept], blurred.adjacency_KK[kept])
    found = sharp.provenance["clusters"]
    assert set(found if isinstance(found, list) else [found]) == {5}
    assert "clusters" not in blurred.provenance


@pytest.mark.parametrize(
    ("inside", "beyond", "clear"), [(0.2, 0.2, False), (0.3, 0.1, False), (0.25, 0.0, False), (0.6, 0.1, True)]
)
def test_where_clusters_are_not_clear_all_neighbours_count(inside: float, beyond: float, clear: bool) -> None:
    # the silhouette of two pairs is 1 - (1 - inside) / (1 - beyond): 0, 0.22, 0.25 and 0.56
    pairs = np.kron(np.eye(2), np.ones((2, 2)))
    similarity = np.where(pairs > 0, inside, beyond)
    np.fill_diagonal(similarity, 1.0)
    weights = np.ones((4, 4)) - np.eye(4)
    expected = weights * pairs if clear else weights
    found = drawing.inside_clusters(similarity, drawing.SUBSTANTIAL)
    assert np.array_equal(drawing.kept_within(found, weights), expected)
    assert found.facts == {"clusters": 2 if clear else None}
    assert drawing.inside_clusters(similarity).weights_CC.any() == (inside > beyond)


@pytest.mark.parametrize("within", [True, False])
@pytest.mark.parametrize(("inside", "lowered"), [(0.5, False), (-0.01, True)])
def test_the_zero_is_lowered_only_where_clusters_are_not_clear(inside: float, lowered: bool, within: bool) -> None:
    scatter = np.random.default_rng(0).normal(size=(16, 16)) * 0.02
    kin = np.kron(np.eye(4), np.ones((4, 4))) > 0
    similarity = np.where(kin, inside, -0.08) + (scatter + scatter.T) / 2**0.5
    np.fill_diagonal(similarity, 1.0)
    drawn = _neighbours(similarity, list(range(16)), GraphConfig(within_clusters=within), clients(16))
    assert (drawn.facts["strangers"] < 0) == lowered
    assert (drawn.weights_CC[kin] > 0).sum() >= 36
    assert drawn.facts.get("clusters") == (4 if within and not lowered else None)


@given(st.integers(2, 7), st.integers(1, 6), st.integers(0, 30))
def test_smooth_weights_satisfy_the_conditions_of_their_optimum(size: int, neighbours: int, seed: int) -> None:
    points = np.random.Generator(np.random.Philox(seed)).normal(size=(size, 4))
    distance = ((points[:, None] - points[None]) ** 2).sum(axis=2)
    weights = drawing.smooth_weights(distance, neighbours)
    cost = distance * drawing._theta(distance, neighbours)
    inverse = 1 / weights.sum(axis=1)
    slope = 2 * cost + 2 * weights - inverse[:, None] - inverse[None, :]
    off = ~np.eye(size, dtype=bool)
    assert np.allclose(slope[off & (weights > 0)], 0, atol=1e-6 * (1 + inverse.max()))
    assert (slope[off & (weights == 0)] >= -1e-6 * (1 + inverse.max())).all()
    assert np.array_equal(weights, weights.T)


def test_smooth_weights_minimise_the_objective_of_kalofolias() -> None:
    points = np.random.Generator(np.random.Philox(3)).normal(size=(5, 4))
    distance = ((points[:, None] - points[None]) ** 2).sum(axis=2)
    cost = distance * drawing._theta(distance, 2)
    edges = np.triu_indices(5, 1)

    def objective(flat: np.ndarray) -> float:
        weights = np.zeros((5, 5))
        weights[edges] = flat
        weights += weights.T
        return float((weights * cost).sum() - np.log(weights.sum(axis=1)).sum() + (weights**2).sum() / 2)

    found = minimize(objective, np.full(10, 0.3), bounds=[(1e-9, None)] * 10, options={"maxiter": 5000, "ftol": 1e-14})
    assert objective(drawing.smooth_weights(distance, 2)[edges]) <= found.fun + 1e-8
    assert np.allclose(drawing.smooth_weights(distance, 2)[edges], found.x, atol=1e-3)


def test_the_parameter_of_the_smooth_graph_sets_the_number_of_edges() -> None:
    points = np.random.Generator(np.random.Philox(5)).normal(size=(60, 3))
    distance = ((points[:, None] - points[None]) ** 2).sum(axis=2)
    for neighbours in (3, 6, 12):
        edges = (drawing.smooth_weights(distance, neighbours) > 0).sum(axis=1).mean()
        assert neighbours * 0.7 < edges < neighbours * 1.6


def test_task_correlation_is_that_of_the_closed_form() -> None:
    # two tasks with cosine c have the root [[a, b], [b, a]] with a, b = (sqrt(1 + c) +- sqrt(1 - c)) / 2
    found = drawing.task_correlation(np.array([[1.0, 0.6], [0.6, 1.0]]))
    more, less = 1.6**0.5, 0.4**0.5
    assert np.allclose(found, [[1, (more - less) / (more + less)], [(more - less) / (more + less), 1]])


def test_rows_of_pfedgraph_minimise_its_quadratic_programme() -> None:
    uploads, _ = families((2, 2), own=1.0)
    cosine = mixing_twin.similarity(uploads, initial(4, torch.float64, of=uploads.layout))
    np.fill_diagonal(cosine, 1.0)
    sizes = [3, 5, 7, 9]
    share = np.array(sizes) / 24
    for row, weights in zip(cosine, collaboration(cosine, sizes, 0.8), strict=True):
        best = minimize(
            lambda w, row=row: -row @ w + 0.8 * ((w - share) ** 2).sum(),
            np.full(4, 0.25),
            bounds=[(0, 1)] * 4,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
            tol=1e-12,
        )
        assert np.allclose(weights, best.x, atol=1e-4)


def test_what_is_drawn_has_heaviest_edges_of_one_on_average() -> None:
    drawn = drawing.symmetric(np.array([[0.5, 0.5, 0.0], [0.3, 0.5, 0.2], [0.0, 0.0, 1.0]]))
    # (0, 1) has 0.4 and (1, 2) 0.1; the clients' heaviest are 0.4, 0.4 and 0.1
    assert np.allclose(drawn, np.array([[0, 0.4, 0], [0.4, 0, 0.1], [0, 0.1, 0]]) / 0.3)
    assert not drawing.symmetric(np.eye(3)).any()


# ------------------------------------------------------------------------------------------------------ asked graphs


def test_regrets_are_centred_as_squared_distances() -> None:
    points = np.random.Generator(np.random.Philox(1)).normal(size=(5, 3))
    distance = ((points[:, None] - points[None]) ** 2).sum(axis=2)
    heard_KK = ~np.eye(5, dtype=bool)
    centred = points - points.mean(axis=0)
    cosine = centred @ centred.T / np.outer(np.linalg.norm(centred, axis=1), np.linalg.norm(centred, axis=1))
    assert np.allclose(similarity_of_regrets(distance, heard_KK)[heard_KK], cosine[heard_KK])
    # the mean of both directions counts, or the one that was heard
    lopsided = distance + np.triu(np.ones((5, 5)), 1) - np.tril(np.ones((5, 5)), -1)
    assert np.allclose(similarity_of_regrets(lopsided, heard_KK), similarity_of_regrets(distance, heard_KK))
    assert np.allclose(
        similarity_of_regrets(distance, np.triu(heard_KK)), similarity_of_regrets(distance, heard_KK), atol=1e-12
    )
    few = heard_KK.copy()
    few[0, 4] = few[4, 0] = False
    assert similarity_of_regrets(distance, few)[0, 4] == 0
    # in the centring the pair counts as the mean of what is known of both
    filled = distance.copy()
    filled[0, 4] = filled[4, 0] = (distance[0, 1:4].mean() + distance[4, 1:4].mean()) / 2
    assert np.allclose(similarity_of_regrets(distance, few)[few], similarity_of_regrets(filled, heard_KK)[few])


def test_each_client_judges_all_others_in_turn() -> None:
    uploads, _ = families((3, 3))
    learns = learner(graph_section("trust", judged=2), clients(6))
    memory = learns.init(uploads)
    counts = []
    for round_ in (1, 2, 3):
        memory |= heard(learns, memory, uploads, round_)
        counts.append(int(memory["heard"].sum()))
    assert counts == [12, 24, 30]
    trial = learns.ask(Participants(1, (0, 1)), Results((0, 1), uploads.values_KP[:2], (), 0, 0, 0.0, 0))  # type: ignore[misc]
    assert trial is not None
    assert (trial.num_candidates, trial.sent) == (2, 1)
    assert torch.equal(trial.candidate(1), uploads.values_KP[[1, 0]])


def test_regrets_are_a_moving_average_that_begins_with_the_first() -> None:
    uploads, _ = families((3,))
    learns = learner(graph_section("trust", judged=2, memory=0.75), clients(3))
    assert learns.ask is not None
    assert learns.hear is not None
    everybody = Results((0, 1, 2), uploads.values_KP, (), 0, 0, 0.0, 0)
    memory = learns.init(uploads)
    # with its own, that of the next client and that of the one after
    told = (
        [[1.0, 3.0, 2.0], [4.0, 2.0, 7.0], [5.0, 5.5, torch.nan]],
        [[1.0, 2.0, 2.0], [4.0, 4.0, 5.0], [5.0, 5.5, 6.0]],
    )
    for round_, rows in enumerate(told, start=1):
        trial = learns.ask(Participants(round_, everybody.ids), everybody)
        assert trial is not None
        memory |= learns.hear(memory, round_, trial, Losses(torch.tensor(rows, dtype=torch.float64), (3,) * 3, 0, 0))
        if round_ == 1:
            assert memory["regret"].tolist() == [[0.0, 2.0, 1.0], [5.0, 0.0, 0.0], [0.5, 0.0, 0.0]]
            assert memory["heard"].tolist() == [[0.0, 1.0, 1.0], [1.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    assert memory["regret"].tolist() == [[0.0, 1.75, 1.0], [4.0, 0.0, 0.0], [0.5, 1.0, 0.0]]


@pytest.mark.parametrize("kind", ASKED)
def test_what_three_clients_said_is_looked_at_once(kind: str) -> None:
    uploads, _ = families((3,))
    learns = learner(graph_section(kind), clients(3))
    memory = learns.init(uploads)
    memory |= heard(learns, memory, uploads, 1)
    for round_ in (2, 3):
        memory, _ = learns.learn(memory, Seen(uploads, uploads, (1,) * 3, (), round_))
        assert memory["pairs_known"].sum() == 6
        assert not memory["evidence"].any()


def test_clients_without_validation_examples_are_not_heard() -> None:
    uploads, _ = families((2, 2))
    learns = learner(graph_section("trust"), clients(4))
    assert learns.ask is not None
    assert learns.hear is not None
    trial = learns.ask(Participants(1, (0, 1, 2, 3)), Results((0, 1, 2, 3), uploads.values_KP, (), 0, 0, 0.0, 0))
    assert trial is not None
    losses = answers(uploads.values_KP, [trial.candidate(number) for number in range(4)])
    losses.mean_SQ[2] = torch.nan
    memory = learns.hear(learns.init(uploads), 1, trial, losses)
    assert memory["heard"].sum(dim=1).tolist() == [3, 3, 0, 3]
    assert torch.isfinite(memory["regret"]).all()


def test_an_adapter_that_predicts_nothing_finite_is_left_out_alone() -> None:
    uploads, _ = families((2, 3))
    others = [0, 1, 3, 4]
    everybody = Results((0, 1, 2, 3, 4), uploads.values_KP, (), 0, 0, 0.0, 0)
    for kind in ASKED:
        learns = learner(graph_section(kind), clients(5))
        assert learns.ask is not None
        assert learns.hear is not None
        trial = learns.ask(Participants(1, everybody.ids), everybody)
        assert trial is not None
        candidates = [trial.candidate(number) for number in range(trial.num_candidates)]
        losses = answers(uploads.values_KP, candidates)
        assert losses.agreement_SS is not None
        losses.agreement_SS[2] = losses.agreement_SS[:, 2] = torch.nan
        for number, rows_SP in enumerate(candidates):
            losses.mean_SQ[(rows_SP == uploads.values_KP[2]).all(dim=1), number] = torch.inf
        memory = learns.init(uploads) | learns.hear(learns.init(uploads), 1, trial, losses)
        _, graph = learns.learn(memory, Seen(uploads, uploads, (1,) * 5, everybody.ids, 2))
        assert graph.adjacency_KK[np.ix_(others, others)].any()
        if kind == "probe":
            assert not graph.adjacency_KK[2].any()
        else:
            assert memory["heard"][:, 2].sum() == 0
            assert memory["heard"][others].sum() == 12


def test_a_graph_and_its_method_ask_together_and_hear_their_own_answers() -> None:
    who = clients()
    both = MiraConfig(graph=graph_section("trust"), choice=ChoiceConfig(grid=(0.0, 1.0)))
    only = mira("trust")
    states = {}
    for name, config in (("both", both), ("trust", only)):
        method = build_method(config, who)
        state = method.init(initial(dtype=torch.float64), who)
        state, _ = one_round(method, state, who.names, Participants(1, (0, 1, 2, 4)))
        states[name] = state
    assert torch.equal(states["both"].memory["regret"], states["trust"].memory["regret"])
    assert states["both"].memory["regret"].any()
    assert set(states["both"].memory["alpha"][[0, 1, 2, 4]].tolist()) <= {0.0, 1.0}
    method = build_method(both, who)
    state = method.init(initial(dtype=torch.float64), who)
    results = Results((0, 1, 2), state.adapters.values_KP[:3] + torch.arange(3.0)[:, None], (), 0, 0, 0.0, 0)
    merged, _ = method.merge(state, Participants(1, (0, 1, 2)), results)
    assert method.trial is not None
    trial = method.trial(merged, Participants(1, (0, 1, 2)), results)
    assert trial is not None
    # own, two foreign uploads, and two shares of what will be another mixture when it takes part again
    assert (trial.num_candidates, trial.sent) == (3 + 2, 2 + 1)
    assert judged(trial, who.names).mean_SQ.shape == (3, 5)
    # the graph is for the next round
    trial = method.trial(merged, Participants(1, (0, 1, 2), last=True), results)
    assert trial is not None
    assert (trial.num_candidates, trial.sent) == (2, 0)
    decided, _ = method.decide(merged, trial, judged(trial, who.names)) if method.decide else (None, None)
    assert decided is not None
    assert torch.equal(decided.memory["regret"], merged.memory["regret"])


def test_embeddings_join_like_prompts_whatever_the_template() -> None:
    stream = np.random.Generator(np.random.Philox(0))
    families_Kd = np.repeat(stream.normal(size=(3, 8)), 4, axis=0) + 0.2 * stream.normal(size=(12, 8))
    labels = [str(k // 4) for k in range(12)]
    names = clients(12).names
    plain = embeddings(families_Kd @ families_Kd.T, names, 3, 1.0)
    assert weight_inside(plain, labels) > 0.95
    templated = families_Kd + 50 * stream.normal(size=8)
    alike = embeddings(templated @ templated.T, names, 3, 1.0)
    assert np.allclose(alike.adjacency_KK, plain.adjacency_KK, atol=1e-6)
    assert embeddings(np.zeros((2, 2)), names[:2], 3, 1.0).num_edges == 0


def test_embeddings_that_are_not_finite_are_refused_with_whose_they_are_and_what_to_set() -> None:
    states_Kd = np.ones((5, 2))
    states_Kd[1], states_Kd[3] = np.inf, np.nan
    with np.errstate(invalid="ignore"):
        gram_KK = states_Kd @ states_Kd.T
    names = ("anna", "ben", "cleo", "dora", "emil")
    with pytest.raises(DataError, match=r"not finite at ben, dora; set model\.dtype: float32"):
        embeddings(gram_KK, names, 3, 1.0)
    with pytest.raises(DataError, match=r"shape \(5, 5\) for 4 clients"):
        embeddings(gram_KK, names[:4], 3, 1.0)


# ------------------------------------------------------------------------------------------------------ graph by layer


def two_layers(num_clients: int = 4) -> tuple[Graph, Arena]:
    """Clients 0 and 1 are alike in the first layer, 2 and 3 in the second."""
    matrices = np.zeros((2, num_clients, num_clients))
    matrices[0, 0, 1] = matrices[0, 1, 0] = matrices[1, 2, 3] = matrices[1, 3, 2] = 1.0
    graph = validated(matrices.mean(axis=0), num_clients, "gram_layers")
    layered = Graph(graph.adjacency_KK, graph.name, {}, {"layer0": matrices[0], "layer1": matrices[1]})
    shape = (num_clients, layout().num_parameters)
    return layered, Arena(layout(), torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64))


def test_each_layer_is_mixed_on_its_own_graph() -> None:
    graph, arena = two_layers()
    mixed = laplacian_implicit(graph, 1.0, [1.0] * 4)(arena).values_KP
    for (part, _), layer in zip(parts(graph), ("layer0", "layer1"), strict=True):
        columns = [c for s in arena.layout.specs if s.layer == layer for c in range(s.offset, s.offset + s.size)]
        expected = implicit_matrix(part, 1.0, [1.0] * 4) @ arena.values_KP[:, columns].numpy()
        assert np.allclose(mixed[:, columns], expected, rtol=0, atol=1e-14)
    first = sum(s.size for s in arena.layout.specs if s.layer == "layer0")
    assert torch.equal(mixed[2:, :first], arena.values_KP[2:, :first])
    assert torch.equal(mixed[:2, first:], arena.values_KP[:2, first:])


def test_layers_that_share_a_graph_are_mixed_as_one() -> None:
    graph, arena = two_layers()
    shared = Graph(graph.adjacency_KK, graph.name, {}, dict.fromkeys(("layer0", "layer1"), graph.adjacency_KK))
    plain = Graph(graph.adjacency_KK, graph.name)
    assert len(parts(shared)) == 1
    for mixer in (laplacian_explicit, lambda g, tau: laplacian_implicit(g, tau, [1.0] * 4)):
        assert torch.allclose(mixer(shared, 0.4)(arena).values_KP, mixer(plain, 0.4)(arena).values_KP, atol=1e-14)
    mixer = laplacian_explicit(shared, 0.4)
    numbers = step_numbers(shared, mixer, arena, mixer(arena))
    assert numbers == pytest.approx(step_numbers(plain, laplacian_explicit(plain, 0.4), arena, mixer(arena)))


def test_energy_and_stability_look_at_every_layer() -> None:
    graph, arena = two_layers()
    first = sum(s.size for s in arena.layout.specs if s.layer == "layer0")
    values = arena.values_KP
    expected = (values[0, :first] - values[1, :first]).square().sum() + (
        values[2, first:] - values[3, first:]
    ).square().sum()
    assert energy(graph, arena) == pytest.approx(float(expected))
    # the mean over layers would allow a step of 2, the layers themselves allow 1
    laplacian_explicit(graph, 1.0)
    with pytest.raises(ConfigError, match="diverge"):
        laplacian_explicit(graph, 1.1)
    among = subgraph(graph, (1, 2, 3))
    assert [part.adjacency_KK.sum() for part, _ in parts(among)] == [0.0, 2.0]


def test_a_layer_without_a_mixer_is_refused() -> None:
    _, arena = two_layers()
    with pytest.raises(ConfigError, match="the adapter has 'layer1'; did you mean 'layer0'"):
        by_layer({"layer0": linear(np.eye(4))})(arena)


def test_the_graph_by_layer_sees_what_holds_in_one_block_only() -> None:
    uploads, labels = families((3, 3))
    others, _ = families((3, 3), seed=9)
    first = sum(s.size for s in uploads.layout.specs if s.layer == "layer0")
    # in the second layer, client k is of the family of k + 1
    turned = torch.cat([uploads.values_KP[:, :first], others.values_KP.roll(1, 0)[:, first:]], dim=1)
    graph = learned("gram_layers", uploads.replace(turned), pooling=0.0)
    layer_of = {layer: part for part, layers in parts(graph) for layer in layers}
    assert weight_inside(layer_of["layer0"], labels) > 0.95
    assert weight_inside(layer_of["layer1"], [*labels[-1:], *labels[:-1]]) > 0.95
    assert np.allclose(graph.adjacency_KK, np.mean([g.adjacency_KK for g in layer_of.values()], axis=0))


def test_the_graph_of_all_layers_is_their_mean_however_many_are_in_a_block() -> None:
    names = {"layer0": "h.0.attn", "layer1": "h.0.mlp", "layer2": "h.1.attn"}
    plain = layout(features=((12, 10), (9, 14), (8, 11)))
    of = Layout.of(((s.name, s.group, names[s.layer], s.shape) for s in plain.specs), plain.scaling)
    noise_KP = torch.randn(6, of.num_parameters, generator=torch_generator(8, "uploads"), dtype=torch.float64)
    graph = learned("gram_layers", Arena(of, noise_KP), pooling=0.0)
    assert len(parts(graph)) == 2
    of_layers = [graph.by_layer[layer] for layer in of.layers]
    assert np.allclose(graph.adjacency_KK, np.mean(of_layers, axis=0), rtol=0, atol=1e-15)


def test_where_a_block_says_nothing_of_a_client_all_layers_speak_for_it() -> None:
    uploads, _ = families((3, 3))
    for spec in uploads.layout.specs:
        if (spec.layer, spec.group) == ("layer1", "lora_b"):
            uploads.view(spec)[2] = 0.0
    learns, start = learner(graph_section("gram_layers", pooling=0.0), clients()), initial(of=uploads.layout)
    memory, _ = learns.learn(learns.init(start), Seen(uploads, start, (1,) * 6, tuple(range(6)), 1))
    first_KK, second_KK = memory["similarity"]
    assert first_KK[2].all()
    assert torch.equal(second_KK[2], first_KK[2])
    assert not torch.allclose(second_KK[0, 1], first_KK[0, 1])


def test_full_pooling_of_layers_is_the_gram_graph() -> None:
    uploads, _ = families()
    pooled, gram = learned("gram_layers", uploads, pooling=1.0), learned("gram", uploads)
    assert np.allclose(pooled.adjacency_KK, gram.adjacency_KK, atol=1e-12)
    who = clients()
    runs = []
    for config in (mira("gram_layers", pooling=1.0), mira("gram")):
        method = build_method(config, who)
        state = method.init(initial(dtype=torch.float64), who)
        runs.append(play(method, state, who.names, [(0, 1, 3), (1, 2, 4), (0, 1, 2, 3, 4, 5)]))
    assert torch.allclose(runs[0].adapters.values_KP, runs[1].adapters.values_KP, atol=1e-12)


def test_blocks_are_named_by_their_first_number() -> None:
    layers = ("transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_proj", "transformer.h.11.attn.c_attn", "head")
    assert [block_of(layer) for layer in layers] == ["transformer.h.0", "transformer.h.0", "transformer.h.11", "head"]
