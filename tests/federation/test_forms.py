"""In which form adapters are mixed: what the forms have in common, what each is for, and blocks that fade."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.federation.builders import LOCAL, clients, initial, layout, mira_with, play, same_bytes, trained
from tests.reference import products_twin

from fedmira.config.run import RunConfig
from fedmira.federation.blocks import block_of, faded, from_blocks, to_blocks
from fedmira.federation.forms import form
from fedmira.federation.graph import Graph, validated
from fedmira.federation.known_graphs import labels
from fedmira.federation.mixing import implicit_matrix, laplacian_implicit, linear, matrix_of
from fedmira.federation.registry import build_method
from fedmira.types import Arena, Participants

MIXINGS = ("factors", "products", "least_squares", "shared_a")
ROUNDS = [(0, 1, 3), (1, 2, 4), (0, 2, 3, 5), (0, 1, 2, 3, 4, 5)]
SHARES = np.array([[0.75, 0.25], [0.5, 0.5]])


def random_arena(num_clients: int, seed: int = 0, one_a: bool = False) -> Arena:
    of = layout(rank=2, features=((7, 9), (8, 6)))
    draw = torch.Generator().manual_seed(seed)
    arena = Arena(of, torch.randn(num_clients, of.num_parameters, generator=draw, dtype=torch.float64))
    for spec in of.specs:
        if one_a and spec.group == "lora_a":
            arena.view(spec)[:] = arena.view(spec)[:1].clone()
    return arena


def assert_same_products(one: Arena, other: Arena, tolerance: float = 1e-12) -> None:
    for row in range(one.num_clients):
        expected = products_twin.dense(other, row)
        for layer, product in products_twin.dense(one, row).items():
            torch.testing.assert_close(product, expected[layer], rtol=0, atol=tolerance)


@pytest.mark.parametrize("mixing", MIXINGS)
@given(seed=st.integers(0, 1000))
def test_two_clients_with_one_a_become_the_same_products_in_every_form(mixing: str, seed: int) -> None:
    arena = random_arena(2, seed, one_a=True)
    assert_same_products(form(mixing).of(linear(SHARES))(arena), linear(SHARES)(arena))


@pytest.mark.parametrize(("mixing", "exact"), [("factors", False), ("products", True), ("least_squares", False)])
def test_where_rank_suffices_mixed_products_are_exactly_the_mixture_of_products(mixing: str, exact: bool) -> None:
    # one component each, of two: any mixture of the two clients' products has rank 2
    arena = random_arena(2)
    for spec in arena.layout.specs:
        part = arena.view(spec)
        (part[:, 1:] if spec.group == "lora_a" else part[:, :, 1:]).zero_()
    mixed = form(mixing).of(linear(SHARES))(arena)
    gap = 0.0
    for row, weights in enumerate(SHARES.tolist()):
        wanted = products_twin.mixed(arena, weights)
        gap = max(gap, *(float((products_twin.dense(mixed, row)[layer] - wanted[layer]).norm()) for layer in wanted))
    assert (gap < 1e-12) == exact


@pytest.mark.parametrize("mixing", ["products", "least_squares"])
def test_where_products_are_mixed_clients_are_as_far_apart_as_these_are(mixing: str) -> None:
    arena, pair_KK = random_arena(2), np.array([[0.0, 1.0], [1.0, 0.0]])
    one, other = (products_twin.dense(arena, row) for row in (0, 1))
    squares = {layer: float((2.0 * (one[layer] - other[layer])).square().sum()) for layer in one}
    assert form(mixing).distances(arena) == pytest.approx(sum(squares.values()) * pair_KK)
    graph = Graph(2 * pair_KK, "gram_layers", {}, {"layer0": pair_KK, "layer1": 3 * pair_KK})
    assert form(mixing).energy(graph, arena) == pytest.approx(squares["layer0"] + 3 * squares["layer1"])


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("settings", [{}, {"depth": 1.0, "robust": "geometric_median"}])
def test_without_strength_every_form_is_training_alone_bit_for_bit(mixing: str, settings: dict[str, object]) -> None:
    who = clients()
    method = build_method(mira_with(strength=0.0, mixing=mixing, **settings), who)
    alone = build_method(LOCAL, who)
    if mixing == "shared_a":
        plain = alone.plan
        # alone, but with A at rest
        alone = alone._replace(plan=lambda *round_: plain(*round_)._replace(trainable=frozenset({"lora_b"})))
    kept, expected = (play(one, one.init(initial(), who), who.names, ROUNDS) for one in (method, alone))
    assert same_bytes(kept.adapters.values_KP, expected.adapters.values_KP)


@pytest.mark.parametrize(("ranks", "mixing"), [(None, "factors"), ((2,) * 6, "factors"), ((1, 2) * 3, "products")])
def test_by_default_clients_of_unequal_rank_mix_products(ranks: tuple[int, ...] | None, mixing: str) -> None:
    who = clients()._replace(ranks_K=ranks)
    states = []
    for settings in ({}, {"mixing": mixing}):
        method = build_method(mira_with("labels", **settings), who)
        states.append(play(method, method.init(initial(), who), who.names, ROUNDS))
    assert same_bytes(states[0].adapters.values_KP, states[1].adapters.values_KP)


@pytest.mark.parametrize("kind", ["uniform", "labels"])
def test_a_shared_a_never_moves_by_a_bit_and_never_crosses(kind: str) -> None:
    who = clients()._replace(ranks_K=(1, 2, 1, 2, 2, 1))
    method = build_method(mira_with(kind, mixing="shared_a", strength=3.0), who)
    state = method.init(initial(), who)
    # by labels the second task is unknown at first and gets the mean of the first
    for round_, ids in enumerate([(0, 2, 4), *ROUNDS], start=1):
        job = method.plan(state, Participants(round_, ids))
        assert job.download == job.upload == job.trainable == {"lora_b"}
        state = play(method, state, who.names, [ids], first=round_)
        for spec in layout().specs:
            if spec.group == "lora_a":
                # clients of rank 1 have the first component of it
                kept, first = method.personalise(state).view(spec), initial().view(spec)
                assert same_bytes(kept[[1, 3, 4]], first[[1, 3, 4]])
                assert same_bytes(kept[[0, 2, 5], :1], first[[0, 2, 5], :1])


def test_mira_in_products_mixes_the_products_of_the_uploads() -> None:
    who = clients()
    method = build_method(mira_with("labels", mixing="products"), who)
    state, everybody = method.init(initial(dtype=torch.float64), who), Participants(1, tuple(range(6)))
    results = trained(method.plan(state, everybody), who.names)
    state, info = method.merge(state, everybody, results)
    uploads = Arena(layout(), results.values_SP)
    confidence_K = [n / np.mean(who.num_examples_K) for n in who.num_examples_K]
    matrix_KK = implicit_matrix(labels(who.tasks), 1.0, confidence_K)
    for row in range(6):
        wanted = products_twin.mixed(uploads, matrix_KK[row].tolist())
        for layer, product in products_twin.dense(state.adapters, row).items():
            torch.testing.assert_close(product, products_twin.nearest_of_rank(wanted[layer], 2), rtol=0, atol=1e-10)
    # disagreement is that of the dense products
    adjacency_KK, total = labels(who.tasks).adjacency_KK, 0.0
    for k in range(6):
        for other in range(6):
            pairs = zip(
                products_twin.dense(uploads, k).values(), products_twin.dense(uploads, other).values(), strict=True
            )
            apart = sum(float((one - two).square().sum()) for one, two in pairs)
            total += adjacency_KK[k, other] * apart * layout().scaling ** 2 / 2
    assert info.numbers["disagreement_before"] == pytest.approx(total)


@pytest.mark.parametrize("mixing", ["products", "least_squares"])
def test_a_graph_by_layer_gives_every_layer_its_own_mixture_of_products(mixing: str) -> None:
    arena = random_arena(3)
    adjacency = [
        np.array(rows, dtype=np.float64)
        for rows in ([[0, 1, 0], [1, 0, 0], [0, 0, 0]], [[0, 0, 2], [0, 0, 0], [2, 0, 0]])
    ]
    graph = Graph(sum(adjacency) / 2, "given", {}, dict(zip(("layer0", "layer1"), adjacency, strict=True)))
    mixed = form(mixing).of(laplacian_implicit(graph, 1.0, [1.0] * 3))(arena)
    for layer, own in graph.by_layer.items():
        alike = form(mixing).of(laplacian_implicit(validated(own, 3, "given"), 1.0, [1.0] * 3))(arena)
        for row in range(3):
            torch.testing.assert_close(products_twin.dense(mixed, row)[layer], products_twin.dense(alike, row)[layer])
    # client 2 has no neighbour in the first layer, client 1 none in the second
    first, second = (slice(s.offset, s.offset + s.size) for s in (arena.layout.specs[0], arena.layout.specs[2]))
    assert same_bytes(mixed.values_KP[2, first], arena.values_KP[2, first])
    assert same_bytes(mixed.values_KP[1, second], arena.values_KP[1, second])


@pytest.mark.parametrize("mixing", ["products", "least_squares"])
def test_a_client_never_seen_gets_the_best_pair_for_its_neighbours_products(mixing: str) -> None:
    arena = random_arena(3)
    step = laplacian_implicit(validated(np.ones((3, 3)), 3, "given"), 2.0, [1.0, 1.0, 0.0])
    mixed = form(mixing).of(step)(arena)
    wanted = products_twin.mixed(arena, [0.5, 0.5, 0.0])
    for layer, product in products_twin.dense(mixed, 2).items():
        best = products_twin.nearest_of_rank(wanted[layer], 2)
        if mixing == "least_squares":
            a_RI = arena.view(next(s for s in arena.layout.specs if (s.layer, s.group) == (layer, "lora_a")))[2]
            best = wanted[layer] @ torch.linalg.pinv(a_RI) @ a_RI
        torch.testing.assert_close(product, best, rtol=0, atol=1e-10)


# ---------------------------------------------------------------------------------------------------------------- depth

LAYERS = ("embed", "h.0.attn", "h.0.mlp", "h.1.attn", "h.2.attn", "head")


def test_strength_falls_evenly_from_the_first_block_to_the_last() -> None:
    graph = faded(labels(("a", "a", "b")), LAYERS, 0.8)
    assert [block_of(layer) for layer in LAYERS] == ["embed", "h.0", "h.0", "h.1", "h.2", "head"]
    for layer, left in zip(LAYERS, (1.0, 0.8, 0.8, 0.6, 0.4, 0.2), strict=True):
        assert graph.by_layer[layer][0, 1] == pytest.approx(left)
        mixer = laplacian_implicit(graph, 3.0, [1.0] * 3)
        weaker = implicit_matrix(labels(("a", "a", "b")), 3.0 * left, [1.0] * 3)
        np.testing.assert_allclose(matrix_of(mixer, 3, layer), weaker, atol=1e-15)
    assert graph.adjacency_KK[0, 1] == pytest.approx(np.mean([1.0, 0.8, 0.8, 0.6, 0.4, 0.2]))


def test_without_depth_and_with_one_block_the_graph_is_itself() -> None:
    graph = labels(("a", "a", "b"))
    assert faded(graph, LAYERS, 0.0) is graph
    assert faded(graph, ("h.3.attn", "h.3.mlp"), 0.5) is graph


def test_blocks_keep_what_a_graph_says_about_its_layers() -> None:
    plain, fading = labels(("a", "a", "b")), faded(labels(("a", "a", "b")), LAYERS, 0.8)
    for graph in (plain, fading):
        again = from_blocks(to_blocks(graph, LAYERS), LAYERS, graph.name)
        assert set(again.by_layer) == set(graph.by_layer)
        np.testing.assert_allclose(again.adjacency_KK, graph.adjacency_KK)
        for layer in again.by_layer:
            assert np.array_equal(again.by_layer[layer], graph.by_layer[layer])


def test_full_depth_leaves_the_last_block_alone() -> None:
    who = clients()
    method = build_method(mira_with("labels", depth=1.0), who)
    state, everybody = method.init(initial(), who), Participants(1, tuple(range(6)))
    results = trained(method.plan(state, everybody), who.names)
    after, info = method.merge(state, everybody, results)
    first = layout().specs[2].offset
    assert same_bytes(after.adapters.values_KP[:, first:], results.values_SP[:, first:])
    assert not torch.allclose(after.adapters.values_KP[:, :first], results.values_SP[:, :first])
    assert info.graph is not None
    assert info.graph.provenance["depth"] == 1.0


# --------------------------------------------------------------------------------------------------------------- config


def run_config(kind: str, **method: object) -> RunConfig:
    graph = {"kind": "uniform"}
    return RunConfig.model_validate(
        {"model": {"adapter": {"kind": kind}}, "method": {"name": "mira", "graph": graph, **method}}
    )


@pytest.mark.parametrize("kind", ["prompt", "p_tuning", "full"])
@pytest.mark.parametrize("mixing", ["products", "least_squares", "shared_a"])
def test_only_low_rank_adapters_have_products(kind: str, mixing: str) -> None:
    assert run_config(kind).method.name == "mira"
    with pytest.raises(
        ValueError, match=rf"mixing = {mixing} mixes low-rank products, .*kind = {kind} has none; use f"
    ):
        run_config(kind, mixing=mixing)


def test_a_soft_prompt_has_no_depth() -> None:
    run_config("full", depth=0.5)
    for kind in ("prompt", "p_tuning"):
        with pytest.raises(ValueError, match=r"depth has no effect with model\.adapter\.kind = p"):
            run_config(kind, depth=0.5)


def test_where_nobody_is_related_a_client_never_seen_gets_the_mean_in_its_form() -> None:
    who = clients()
    known = np.array(who.num_examples_K[:5], dtype=np.float64)
    for mixing in ("products", "least_squares"):
        method = build_method(mira_with("gram", mixing=mixing), who)
        state = method.init(initial(dtype=torch.float64), who)
        state = play(method, state, who.names, [(0, 1, 2, 3, 4)] * 2)
        a = next(spec for spec in state.adapters.layout.specs if spec.group == "lora_a")
        # the mean of the uploads, and not of the nearest pairs that the others got
        uploads = state.adapters.replace(state.memory["uploads"])
        products = products_twin.dense(state.adapters, 5)
        for layer, product in products.items():
            wanted = sum(share * products_twin.dense(uploads, k)[layer] for k, share in enumerate(known / known.sum()))
            assert isinstance(wanted, torch.Tensor)
            if mixing == "least_squares":
                a_RI = initial(1, torch.float64).view(
                    next(spec for spec in state.adapters.layout.specs if (spec.layer, spec.group) == (layer, "lora_a"))
                )[0]
                best = wanted @ torch.linalg.pinv(a_RI) @ a_RI
            else:
                best = products_twin.nearest_of_rank(wanted, 2)
            torch.testing.assert_close(product, best, rtol=0, atol=1e-9)
        if mixing == "least_squares":
            assert same_bytes(state.adapters.view(a)[5], initial(1, torch.float64).view(a)[0])
