"""Products with small matrices: sparse, dense and in threads, against NumPy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pytest
import scipy.sparse.csgraph
import torch

from fedmira.federation import multiply as module
from fedmira.federation.multiply import components, multiply, multiply_into, multiply_sparse, over_tiles, sparse, times
from fedmira.side_by_side import side_by_side


def numbers(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.Generator(np.random.Philox(seed)).standard_normal((rows, columns))


def some_entries(rows: int, columns: int, per_row: int) -> np.ndarray:
    draw = np.random.Generator(np.random.Philox(1))
    matrix = np.zeros((rows, columns))
    for row in range(rows - 1):  # the last row stays empty
        matrix[row, draw.choice(columns, per_row, replace=False)] = draw.standard_normal(per_row)
    return matrix


@pytest.mark.parametrize(("rows", "columns", "per_row"), [(90, 80, 3), (80, 80, 60), (1, 5, 0), (3, 200, 2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_product_is_numpys(rows: int, columns: int, per_row: int, dtype: torch.dtype) -> None:
    matrix, values = some_entries(rows, columns, per_row), torch.from_numpy(numbers(columns, 5000)).to(dtype)
    product = multiply(matrix, values)
    assert product.dtype == dtype
    # one rounding of the result, and sums of at most 60 terms in float32
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2.0**-8}[dtype]
    assert np.allclose(product.double().numpy(), matrix @ values.double().numpy(), rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_that_share_no_column_are_a_product_each(
    in_order: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the middle rows are read by nobody and read nothing
    matrix = np.zeros((30, 24))
    matrix[:8, :6], matrix[9:20, 7:15], matrix[20:, 15:] = numbers(8, 6), numbers(11, 8), numbers(10, 9)
    order = np.random.Generator(np.random.Philox(2))
    matrix = matrix if in_order else matrix[order.permutation(30)][:, order.permutation(24)]
    assert sorted((len(rows), len(columns)) for rows, columns in components(matrix)) == [(8, 6), (10, 9), (11, 8)]
    values = torch.from_numpy(numbers(24, 6001)).to(dtype)
    values[np.flatnonzero(~matrix.any(axis=0))[0]] = torch.nan
    results = []
    for elements, threads in ((1 << 20, 1), (1 << 12, 1), (1 << 12, 2)):
        for name in ("_PACKED_ELEMENTS", "_ORDERED_ELEMENTS"):
            monkeypatch.setattr(module, name, elements)
        torch.set_num_threads(threads)
        results.append(multiply(matrix, values))
    assert torch.equal(results[1], results[2])
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2.0**-8}[dtype]
    expected = matrix @ values.nan_to_num().double().numpy()
    for result in results:
        assert np.allclose(result.double().numpy(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("seed", range(5))
def test_components_are_scipys(seed: int) -> None:
    draw = np.random.Generator(np.random.Philox(seed))
    matrix = (draw.random((40, 50)) < 0.02).astype(float)
    bipartite = np.block([[np.zeros((40, 40)), matrix], [matrix.T, np.zeros((50, 50))]])
    count, labels = scipy.sparse.csgraph.connected_components(bipartite)
    expected = {frozenset(np.flatnonzero(labels == label)) for label in range(count)}
    found = components(matrix)
    assert {frozenset([*rows, *(columns + 40)]) for rows, columns in found} == {one for one in expected if len(one) > 1}
    assert [columns[0] for _, columns in found] == sorted(columns[0] for _, columns in found)


def test_a_chain_of_a_thousand_is_one_component() -> None:
    chain = np.eye(1000) + np.eye(1000, k=1)
    assert [(len(rows), len(columns)) for rows, columns in components(chain)] == [(1000, 1000)]


def test_what_is_sparse_is_gathered_and_the_rest_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("not this way")

    monkeypatch.setattr(module, "multiply_sparse", refuse)
    tasks = np.kron(np.eye(10), np.ones((10, 10)))
    multiply(np.ones((100, 100)), torch.zeros(100, 3))
    multiply(tasks, torch.zeros(100, 10_000))
    with pytest.raises(AssertionError, match="not this way"):
        multiply(np.eye(100) + np.eye(100, k=1), torch.zeros(100, 10_000))
    # so narrow that calls take longer than what is computed
    with pytest.raises(AssertionError, match="not this way"):
        multiply(tasks, torch.zeros(100, 1000))


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("of", [1, 2, 3])
def test_every_thread_has_a_product(of: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []

    def watched(calls: Sequence[Callable[[], object]], at_once: int) -> list[object]:
        seen.append((len(calls), at_once))
        return side_by_side(calls, at_once)

    monkeypatch.setattr(module, "side_by_side", watched)
    matrix, values = np.kron(np.eye(of), numbers(4, 4)), torch.from_numpy(numbers(4 * of, 30_000))
    assert np.allclose(multiply(matrix, values).numpy(), matrix @ values.numpy())
    assert seen == [(max(2, of), 2)]


@pytest.mark.parametrize(("rows", "columns"), [([0, 1, 2], [0, 2, 3]), ([0, 2, 3], [0, 1, 2])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_or_columns_alone_may_lie_in_order(rows: list[int], columns: list[int], dtype: torch.dtype) -> None:
    matrix, values = np.zeros((4, 4)), torch.from_numpy(numbers(4, 50)).float()
    matrix[np.ix_(rows, columns)] = numbers(3, 3)
    out = torch.empty(4, 50, dtype=dtype)
    multiply_into(matrix, values, out)
    tolerance = 1e-6 if dtype == torch.float32 else 2.0**-7
    assert np.allclose(out.double().numpy(), matrix @ values.double().numpy(), rtol=tolerance, atol=tolerance)


def test_nothing_is_differentiated() -> None:
    values = torch.ones(3, 5, requires_grad=True)
    assert not multiply(np.ones((3, 3)), values).requires_grad


@pytest.mark.parametrize("per_row", [3, 60])
def test_tiles_are_multiplied_either_way(per_row: int) -> None:
    matrix, tile = some_entries(90, 80, per_row), torch.from_numpy(numbers(80, 50))
    assert np.allclose(times(matrix, tile.device)(tile).numpy(), matrix @ tile.numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("entries", [2, 90])
def test_a_row_without_weight_is_not_read(entries: int) -> None:
    matrix = some_entries(100, 100, entries)
    matrix[:, 7] = 0
    values = torch.ones(100, 10)
    values[7] = torch.nan
    assert torch.isfinite(multiply(matrix, values)).all()


@pytest.mark.usefixtures("two_threads")
def test_tiles_and_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, values = sparse(some_entries(90, 80, 3)), torch.from_numpy(numbers(80, 3001)).float()
    results = []
    for elements, threads in ((1 << 30, 1), (80 * 64, 1), (80 * 112, 2)):
        monkeypatch.setattr(module, "_TILE_ELEMENTS", elements)
        torch.set_num_threads(threads)
        out = torch.full((90, 3001), torch.nan)
        multiply_sparse(matrix, values, out)
        results.append(out)
        assert torch.get_num_threads() == threads
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.usefixtures("two_threads")
def test_tiles_come_back_in_order_and_cover_every_column() -> None:
    tiles = over_tiles(lambda columns: (columns.start, columns.stop), torch.zeros(1000, 10_000))
    assert len(tiles) > 10
    assert [start for start, _ in tiles] == [0, *(stop for _, stop in tiles[:-1])]
    assert tiles[-1][1] == 10_000


@pytest.mark.usefixtures("two_threads")
def test_threads_are_given_back_after_a_failure() -> None:
    def fail(columns: slice) -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        over_tiles(fail, torch.zeros(1000, 10_000))
    assert torch.get_num_threads() == 2


def test_shapes_that_do_not_fit_are_refused() -> None:
    for call in (
        lambda *both: multiply_sparse(sparse(np.ones((3, 4))), *both),
        partial(multiply_into, np.ones((3, 4))),
    ):
        with pytest.raises(ValueError, match=r"the values must be \(4, 7\) and the result \(3, 7\)"):
            call(torch.zeros(5, 7), torch.zeros(3, 7))


def test_results_may_be_rounded_on_the_way_out() -> None:
    matrix, values = some_entries(90, 80, 3), torch.from_numpy(numbers(80, 300)).float()
    out = torch.empty(90, 300, dtype=torch.bfloat16)
    multiply_sparse(sparse(matrix), values, out)
    assert torch.equal(out, multiply(matrix, values).bfloat16())
