"""Mixing of products against dense matrices; what the rotation does and leaves alone; least squares."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.federation.builders import initial, layout, same_bytes
from tests.reference import products_twin

from fedmira.federation import products
from fedmira.federation.products import by_least_squares, energy_rank, in_products, spectrum, squared_norms
from fedmira.federation.similarity import low_rank_pairs
from fedmira.types import Arena


def random_arena(num_clients: int = 3, rank: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64) -> Arena:
    of = layout(rank=rank, features=((7, 9), (8, 6)))
    draw = torch.Generator().manual_seed(seed)
    return Arena(of, torch.randn(num_clients, of.num_parameters, generator=draw, dtype=torch.float64).to(dtype))


def distance(one: Arena, other: Arena) -> float:
    return float((one.values_KP - other.values_KP).norm())


def assert_products(arena: Arena, row: int, expected: dict[str, torch.Tensor], tolerance: float = 1e-12) -> None:
    for layer, product in products_twin.dense(arena, row).items():
        torch.testing.assert_close(product, expected[layer], rtol=0, atol=tolerance)


@given(seed=st.integers(0, 1000), num_clients=st.integers(1, 4), rank=st.integers(1, 3), align=st.booleans())
def test_each_result_is_the_nearest_product_of_its_rank(seed: int, num_clients: int, rank: int, align: bool) -> None:
    arena = random_arena(num_clients, rank, seed)
    draw = np.random.default_rng(seed)
    matrix = draw.dirichlet(np.ones(num_clients), size=num_clients)
    mixed = in_products(matrix, align)(arena)
    for row, weights in enumerate(matrix):
        wanted = products_twin.mixed(arena, weights.tolist())
        nearest = {layer: products_twin.nearest_of_rank(value, rank) for layer, value in wanted.items()}
        assert_products(mixed, row, nearest, 1e-10)


def test_two_clients_of_rank_one_by_hand() -> None:
    # dW_0 = e1 f1^T, dW_1 = 4 e1 f2^T, half of each: e1 (f1 / 2 + 2 f2)^T has rank 1, so nothing is lost
    of = layout(rank=1, features=((2, 2),))
    arena = Arena(of, torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 2.0, 2.0, 0.0]], dtype=torch.float64))
    mixed = in_products(np.full((2, 2), 0.5), align=False)(arena)
    assert_products(mixed, 0, {"layer0": torch.tensor([[0.5, 2.0], [0.0, 0.0]], dtype=torch.float64)})
    # the singular value is split evenly: |A| = |B|
    a, b = (mixed.view(spec)[0] for spec in of.specs)
    assert float(a.norm()) == pytest.approx(float(b.norm()))
    # the mean of the factors would be (e1 * 1.5) (f1 / 2 + f2)^T
    assert not torch.allclose(b @ a, torch.tensor([[0.75, 1.5], [0.0, 0.0]], dtype=torch.float64))


@pytest.mark.parametrize("seed", range(3))
def test_without_alignment_the_largest_entry_of_each_component_of_b_is_positive(seed: int) -> None:
    mixed = in_products(np.full((4, 4), 0.25), align=False)(random_arena(4, seed=seed))
    for _, spec_b in low_rank_pairs(mixed.layout):
        b_OR = mixed.view(spec_b)[0]
        assert (b_OR.gather(0, b_OR.abs().argmax(dim=0, keepdim=True)) > 0).all()


def test_alignment_keeps_the_product_and_moves_the_factors_less() -> None:
    start = random_arena(1).values_KP
    arena = random_arena(4).replace(start + 0.1 * random_arena(4, seed=1).values_KP)
    matrix = np.full((4, 4), 0.25)
    plain, turned = in_products(matrix, align=False)(arena), in_products(matrix, align=True)(arena)
    for row in range(4):
        assert_products(turned, row, products_twin.dense(plain, row))
    assert distance(turned, arena) < 0.5 * distance(plain, arena)
    # no other rotation comes nearer
    spec_a, spec_b = (turned.layout.specs[i] for i in (0, 1))
    for angle in (-0.1, 0.01, 0.5, 2.0):
        cosine, sine = np.cos(angle), np.sin(angle)
        turn = torch.tensor([[cosine, -sine], [sine, cosine]], dtype=torch.float64)
        elsewhere = turned.replace(turned.values_KP.clone())
        elsewhere.view(spec_a)[0] = turn.T @ turned.view(spec_a)[0]
        elsewhere.view(spec_b)[0] = turned.view(spec_b)[0] @ turn
        assert distance(elsewhere, arena) > distance(turned, arena)


def test_rows_like_the_identity_keep_their_bytes() -> None:
    arena = random_arena(3, dtype=torch.float32)
    matrix = np.eye(3)
    matrix[1] = [0.5, 0.5, 0.0]
    for mixer in (in_products(matrix), by_least_squares(matrix)):
        mixed = mixer(arena)
        assert same_bytes(mixed.values_KP[[0, 2]], arena.values_KP[[0, 2]])
        assert not same_bytes(mixed.values_KP[1], arena.values_KP[1])


def test_before_anything_is_learned_nothing_changes() -> None:
    # B = 0: the product has no singular value, and the components keep A, ready to train
    arena = initial(3, torch.float64)
    mixed = in_products(np.full((3, 3), 1 / 3))(arena)
    torch.testing.assert_close(mixed.values_KP, arena.values_KP, rtol=0, atol=1e-12)


@pytest.mark.parametrize("align", [True, False])
def test_a_component_without_a_singular_value_can_still_train(align: bool) -> None:
    arena = initial(2, torch.float64)
    (spec_a, spec_b), *_ = [(a, b) for a, b in zip(arena.layout.specs, arena.layout.specs[1:], strict=False)]
    arena.view(spec_b)[:, :, 0] = 1.0
    mixed = in_products(np.full((2, 2), 0.5), align)(arena)
    assert_products(mixed, 0, products_twin.dense(arena, 0))
    assert int(torch.linalg.matrix_rank(mixed.view(spec_a)[0])) == 2
    # with alignment the old pair, whose product this is, comes back up to how the singular value is split
    assert int(torch.linalg.matrix_rank(mixed.view(spec_b)[0])) == 1


def test_smaller_ranks_take_the_largest_singular_values_and_leave_zeros() -> None:
    arena = random_arena(3, rank=3)
    matrix = np.full((3, 3), 1 / 3)
    mixed = in_products(matrix, align=True, ranks_K=(1, 3, 2))(arena)
    wanted = products_twin.mixed(arena, [1 / 3] * 3)
    for row, rank in enumerate((1, 3, 2)):
        nearest = {layer: products_twin.nearest_of_rank(value, rank) for layer, value in wanted.items()}
        assert_products(mixed, row, nearest, 1e-10)
        for spec in mixed.layout.specs:
            beyond = mixed.view(spec)[row][rank:] if spec.group == "lora_a" else mixed.view(spec)[row][:, rank:]
            assert not beyond.any()


def test_mixing_in_another_gauge_gives_the_same_products() -> None:
    arena = random_arena(3)
    turned = arena.replace(arena.values_KP.clone())
    gauge = torch.tensor([[2.0, 1.0], [0.5, -1.0]], dtype=torch.float64)
    for spec_a, spec_b in zip(arena.layout.specs[::2], arena.layout.specs[1::2], strict=True):
        turned.view(spec_a)[1] = torch.linalg.inv(gauge) @ arena.view(spec_a)[1]
        turned.view(spec_b)[1] = arena.view(spec_b)[1] @ gauge
    matrix = np.random.default_rng(0).dirichlet(np.ones(3), size=3)
    one, other = in_products(matrix)(arena), in_products(matrix)(turned)
    for row in range(3):
        assert_products(other, row, products_twin.dense(one, row))


def test_least_squares_keeps_a_and_finds_the_best_b() -> None:
    arena = random_arena(3)
    matrix = np.random.default_rng(1).dirichlet(np.ones(3), size=3)
    mixed = by_least_squares(matrix)(arena)
    for row, weights in enumerate(matrix):
        wanted = products_twin.mixed(arena, weights.tolist())
        for spec_a, spec_b in zip(arena.layout.specs[::2], arena.layout.specs[1::2], strict=True):
            assert same_bytes(mixed.view(spec_a), arena.view(spec_a))
            a_RI = arena.view(spec_a)[row]
            best = torch.linalg.lstsq(a_RI.T, wanted[spec_a.layer].T).solution.T
            torch.testing.assert_close(mixed.view(spec_b)[row], best, rtol=0, atol=1e-11)


def test_least_squares_of_a_few_clients_at_a_time_is_that_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    arena = random_arena(5)
    matrix = np.random.default_rng(1).dirichlet(np.ones(5), size=5)
    at_once = by_least_squares(matrix)(arena)
    # two results at a time: each takes the products of the two components of five clients with its own two
    monkeypatch.setattr(products, "_BLOCK_ELEMENTS", 2 * 5 * 2 * 2)
    torch.testing.assert_close(by_least_squares(matrix)(arena).values_KP, at_once.values_KP, rtol=0, atol=1e-12)


def test_least_squares_is_the_mean_of_b_where_a_is_shared() -> None:
    arena = initial(3, torch.float64)
    for spec in arena.layout.specs[1::2]:
        arena.view(spec)[:] = torch.randn(arena.view(spec).shape, generator=torch.Generator().manual_seed(0)).double()
    mixed = by_least_squares(np.full((3, 3), 1 / 3))(arena)
    torch.testing.assert_close(
        mixed.values_KP, arena.values_KP.mean(dim=0).expand_as(mixed.values_KP), rtol=0, atol=1e-12
    )


def test_the_spectrum_is_that_of_the_dense_product_even_when_the_stack_is_wider_than_the_layer() -> None:
    draw = torch.Generator().manual_seed(3)
    b_OQ, a_QI = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((4, 9), (9, 6)))
    whole = spectrum(b_OQ, a_QI)
    torch.testing.assert_close(whole.u_OQ @ torch.diag(whole.values_Q) @ whole.v_QI, b_OQ @ a_QI, rtol=0, atol=1e-12)
    torch.testing.assert_close(whole.values_Q, torch.linalg.svdvals(b_OQ @ a_QI), rtol=0, atol=1e-12)


@pytest.mark.parametrize("count", [2, 3])
def test_a_few_singular_values_are_as_exact_as_all(count: int) -> None:
    draw = torch.Generator().manual_seed(3)
    u_OQ, v_IQ, turn_QQ = (
        torch.linalg.qr(torch.randn(size, 8, generator=draw, dtype=torch.float64))[0] for size in (9, 10, 8)
    )
    values_Q = torch.logspace(0, -21, 8, dtype=torch.float64)
    few = spectrum(u_OQ @ turn_QQ, turn_QQ.T @ (values_Q[:, None] * v_IQ.T), count)
    torch.testing.assert_close(few.values_Q, values_Q[:count], rtol=1e-8, atol=0)
    torch.testing.assert_close(few.v_QI @ few.v_QI.T, torch.eye(count, dtype=torch.float64), rtol=0, atol=1e-8)


def test_energy_is_the_share_of_the_squares() -> None:
    values = torch.tensor([2.0, 1.0, 1.0, 0.0])
    assert [energy_rank(values, share) for share in (0.5, 0.66, 0.67, 0.84, 1.0)] == [1, 1, 2, 3, 3]
    assert energy_rank(torch.zeros(3), 0.9) == 0
    # that 0.1 * 3 is a little more than 0.3 takes no further one
    assert energy_rank(torch.ones(10, dtype=torch.float64), 0.1 * 3) == 3
    assert energy_rank(torch.empty(0), 1.0) == 0


def test_small_singular_values_are_there_all_the_same() -> None:
    values = torch.tensor([1.0, 1e-7, 1e-9, 1e-13], dtype=torch.float64)
    assert energy_rank(values, 1.0) == 3, "the last is rounding"
    assert energy_rank(values, 1 - 1e-6) == 1
    arena = initial(1, torch.float64)
    for spec_a, spec_b in low_rank_pairs(arena.layout):
        arena.view(spec_a)[:] = torch.eye(*spec_a.shape)
        arena.view(spec_b)[:] = torch.eye(*spec_b.shape)
        arena.view(spec_b)[:, 1, 1] = 1e-8
    twice = arena.replace(arena.values_KP.repeat(2, 1))
    for layer, product in products_twin.dense(in_products(np.full((2, 2), 0.5))(twice), 0).items():
        torch.testing.assert_close(product, products_twin.dense(arena, 0)[layer], rtol=0, atol=1e-14)


def test_norms_are_those_of_the_scaled_dense_products() -> None:
    arena = random_arena(3)
    for row, squared in enumerate(squared_norms(arena).tolist()):
        parts = products_twin.dense(arena, row).values()
        assert squared == pytest.approx(sum(float((2.0 * part).square().sum()) for part in parts))


def test_stacks_wider_than_the_layers_and_rows_with_few_neighbours() -> None:
    # eight clients of rank 3: 24 stacked components in layers of 7 by 9 and 8 by 6
    arena = random_arena(8, rank=3)
    matrix = np.eye(8)
    matrix[1] = [0.2, 0.5, 0, 0, 0, 0, 0, 0.3]
    matrix[4] = 1 / 8
    mixed = in_products(matrix)(arena)
    for row in (1, 4):
        wanted = products_twin.mixed(arena, matrix[row].tolist())
        nearest = {layer: products_twin.nearest_of_rank(value, 3) for layer, value in wanted.items()}
        assert_products(mixed, row, nearest, 1e-11)
    assert same_bytes(mixed.values_KP[[0, 2, 3, 5, 6, 7]], arena.values_KP[[0, 2, 3, 5, 6, 7]])


def test_nothing_to_mix_is_a_copy() -> None:
    arena = random_arena(2)
    for mixer in (in_products(np.eye(2)), by_least_squares(np.eye(2))):
        mixed = mixer(arena)
        assert same_bytes(mixed.values_KP, arena.values_KP)
        assert mixed.values_KP.data_ptr() != arena.values_KP.data_ptr()
