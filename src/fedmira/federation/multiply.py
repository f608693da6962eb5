"""A small matrix times a tall and wide one: mix (K, P) rows by an (M, K) matrix in one pass over memory.

Few non-zero weights per row are gathered over tiles of columns that stay in the cache; many are a matrix product, one
for each component: rows that share no column with the others. `torch.get_num_threads()` threads take tiles or
components in turn. Either way a row whose weights are all 0 is never read, and each number is computed in float32 at
least. `numpy.matmul` is the slow twin. Knows nothing about clients, graphs or rounds.

Axes: M rows of the matrix and of the result, K rows of the values, P columns, E non-zero entries of the matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from fedmira.side_by_side import side_by_side

Result = TypeVar("Result")
Rows: TypeAlias = slice | torch.Tensor

_TILE_ELEMENTS = 1 << 17
"""Elements gathered from at a time: 512 KiB in float32, half of a usual second-level cache."""
_DEVICE_ELEMENTS = 1 << 26
"""Elements of either on a GPU, which would starve on small tiles: 256 MiB."""
_PACKED_ELEMENTS, _ORDERED_ELEMENTS = 1 << 20, 1 << 22
"""Elements of a component multiplied at a time where its rows must be packed (4 MiB), and where they lie in order."""
_CALL = 1 << 21
"""Multiplications in the time that it takes to call for one more component."""
_LEAST_TILE, _COLUMN_STEP = 64, 16


class SparseMatrix(NamedTuple):
    """An (M, K) matrix by its non-zero entries, row after row."""

    starts: torch.Tensor
    """(M + 1,) int32: row m has the entries starts[m] to starts[m + 1]."""
    columns_E: torch.Tensor
    """int32, below `num_columns`; gathering by int64 takes half as long again."""
    weights_E: torch.Tensor
    """float64."""
    num_columns: int
    """K."""

    @property
    def num_rows(self) -> int:
        """M."""
        return len(self.starts) - 1

    def to(self, device: torch.device, dtype: torch.dtype = torch.float64) -> SparseMatrix:
        """The same on `device`, its weights in `dtype`."""
        starts, columns_E = self.starts.to(device), self.columns_E.to(device)
        return SparseMatrix(starts, columns_E, self.weights_E.to(device, dtype), self.num_columns)


def sparse(matrix_MK: npt.NDArray[np.float64]) -> SparseMatrix:
    """Return the non-zero entries of a dense matrix.

    >>> sparse(np.array([[0.0, 2.0], [3.0, 4.0]])).starts.tolist()
    [0, 1, 3]
    """
    rows, columns = np.nonzero(matrix_MK)
    starts = np.searchsorted(rows, np.arange(len(matrix_MK) + 1)).astype(np.int32)
    weights_E = torch.from_numpy(np.asarray(matrix_MK[rows, columns], dtype=np.float64))
    return SparseMatrix(
        torch.from_numpy(starts), torch.from_numpy(columns.astype(np.int32)), weights_E, matrix_MK.shape[1]
    )


class Component(NamedTuple):
    """Rows and columns of a matrix, ascending, with non-zero entries of theirs only where they meet."""

    rows: npt.NDArray[np.intp]
    columns: npt.NDArray[np.intp]


def components(matrix_MK: npt.NDArray[np.float64]) -> list[Component]:
    """Return the smallest components that hold all non-zero entries, ordered by their first column.

    >>> [(rows.tolist(), columns.tolist()) for rows, columns in components(np.eye(3)[[1, 0, 1]])]
    [([1], [0]), ([0, 2], [1])]
    """
    entries_MK = matrix_MK != 0
    entries_KM = np.ascontiguousarray(entries_MK.T)
    num_rows, num_columns = entries_MK.shape
    left_K = entries_MK.any(axis=0)
    found = []
    for first in np.flatnonzero(left_K):
        if not left_K[first]:
            continue
        rows_M, columns_K = np.zeros(num_rows, dtype=bool), np.zeros(num_columns, dtype=bool)
        columns = np.array([first])
        while len(columns):
            columns_K[columns] = True
            rows = np.flatnonzero(entries_KM[columns].any(axis=0) & ~rows_M)
            rows_M[rows] = True
            columns = np.flatnonzero(entries_MK[rows].any(axis=0) & ~columns_K)
        left_K &= ~columns_K
        found.append(Component(np.flatnonzero(rows_M), np.flatnonzero(columns_K)))
    return found


def multiply(matrix_MK: npt.NDArray[np.float64], values_KP: torch.Tensor) -> torch.Tensor:
    """Return matrix @ values, (M, P), in new memory, in the dtype and on the device of `values`."""
    out_MP = values_KP.new_empty(len(matrix_MK), values_KP.shape[1])
    multiply_into(matrix_MK, values_KP, out_MP)
    return out_MP


def multiply_into(matrix_MK: npt.NDArray[np.float64], values_KP: torch.Tensor, out_MP: torch.Tensor) -> None:
    """Write matrix @ values into `out_MP`, which shares no memory with `values_KP` and may have another dtype.

    Raises:
        ValueError: the shapes do not fit.
    """
    _refuse_shapes(matrix_MK.shape, values_KP, out_MP)
    parts = components(matrix_MK)
    products = sum(len(rows) * len(columns) for rows, columns in parts)
    calls = (len(parts) - 1) * _CALL / max(1, values_KP.shape[1])
    if _few(matrix_MK, products + calls):
        multiply_sparse(sparse(matrix_MK), values_KP, out_MP)
    else:
        _multiply_components(matrix_MK, parts, values_KP, out_MP)


def times(matrix_MK: npt.NDArray[np.float64], device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the function that multiplies tiles of float64 on `device` by the matrix, (K, C) to (M, C)."""
    if _few(matrix_MK, matrix_MK.size):
        return partial(gather, sparse(matrix_MK).to(device))
    return partial(torch.matmul, torch.from_numpy(matrix_MK).to(device))


def _few(matrix_MK: npt.NDArray[np.float64], products: float) -> bool:
    """Whether gathering is less work than this many multiplications per column.

    Per element of the result a gathered entry costs about two of a product, and a tile's way in and out about 32 more.
    """
    return 2 * int(np.count_nonzero(matrix_MK)) + 32 * len(matrix_MK) < products


def multiply_sparse(matrix: SparseMatrix, values_KP: torch.Tensor, out_MP: torch.Tensor) -> None:
    """Write matrix @ values into `out_MP`, which shares no memory with `values_KP` and may have another dtype.

    Each column depends on that column alone, so neither tiles nor the number of threads change a bit.

    Raises:
        ValueError: the shapes do not fit.
    """
    _refuse_shapes((matrix.num_rows, matrix.num_columns), values_KP, out_MP)
    # weights rounded to 8 bits would no longer sum to 1
    dtype = torch.promote_types(values_KP.dtype, torch.float32)
    on_device = matrix.to(values_KP.device, dtype)

    def one_tile(columns: slice) -> None:
        # packed, as rows that lie a power of two apart would push each other out of the cache; packing and rounding at
        # once take longer than one after the other
        tile = values_KP[:, columns].contiguous().to(dtype)
        out_MP[:, columns] = gather(on_device, tile).to(out_MP.dtype)

    over_tiles(one_tile, values_KP)


def gather(matrix: SparseMatrix, tile_KC: torch.Tensor) -> torch.Tensor:
    """Return matrix @ tile, (M, columns of the tile); both in one dtype, float32 or float64, on one device."""
    return functional.embedding_bag(
        matrix.columns_E,
        tile_KC,
        matrix.starts,
        mode="sum",
        per_sample_weights=matrix.weights_E,
        include_last_offset=True,
    )


def over_tiles(work: Callable[[slice], Result], values_KP: torch.Tensor) -> list[Result]:
    """Return what `work` returns for each range of columns of `values_KP`, in their order.

    The ranges are so narrow that (K, range) stays in a core's cache; `torch.get_num_threads()` of them run at once,
    each in one thread.
    """
    num_clients, num_columns = values_KP.shape
    on_cpu = values_KP.device.type == "cpu"
    elements = _TILE_ELEMENTS if on_cpu else _DEVICE_ELEMENTS
    width = max(_LEAST_TILE, elements // max(1, num_clients) // _COLUMN_STEP * _COLUMN_STEP)
    tiles = [slice(start, min(start + width, num_columns)) for start in range(0, num_columns, width)]
    return side_by_side([partial(work, tile) for tile in tiles], torch.get_num_threads() if on_cpu else 1)


def _refuse_shapes(shape: tuple[int, ...], values_KP: torch.Tensor, out_MP: torch.Tensor) -> None:
    num_rows, num_columns = shape
    expected = ((num_columns, values_KP.shape[1]), (num_rows, values_KP.shape[1]))
    if (values_KP.shape, out_MP.shape) != expected:
        raise ValueError(
            f"a ({num_rows}, {num_columns}) matrix cannot map {tuple(values_KP.shape)} to "
            f"{tuple(out_MP.shape)}; the values must be {expected[0]} and the result {expected[1]}"
        )


def _multiply_components(
    matrix_MK: npt.NDArray[np.float64], parts: Sequence[Component], values_KP: torch.Tensor, out_MP: torch.Tensor
) -> None:
    device, dtype = values_KP.device, torch.promote_types(values_KP.dtype, torch.float32)
    on_cpu = device.type == "cpu"
    at_once = torch.get_num_threads() if on_cpu else 1

    def one_product(weights: torch.Tensor, to_rows: Rows, from_rows: Rows, there: slice) -> None:
        with torch.inference_mode():
            values_KC, out_MC = values_KP[:, there], out_MP[:, there]
            packed = values_KC[from_rows] if isinstance(from_rows, slice) else values_KC.index_select(0, from_rows)
            if not isinstance(to_rows, slice):
                out_MC.index_copy_(0, to_rows, (weights @ packed.to(dtype)).to(out_MC.dtype))
            elif out_MC.dtype == dtype:
                torch.mm(weights, packed.to(dtype), out=out_MC[to_rows])
            else:
                out_MC[to_rows] = weights @ packed.to(dtype)

    calls: list[Callable[[], None]] = []
    for rows, columns in parts:
        weights = torch.from_numpy(matrix_MK[np.ix_(rows, columns)]).to(device, dtype)
        places = _places(rows, device), _places(columns, device)
        in_order = all(isinstance(ids, slice) for ids in places) and values_KP.dtype == out_MP.dtype == dtype
        elements = (_ORDERED_ELEMENTS if in_order else _PACKED_ELEMENTS) if on_cpu else _DEVICE_ELEMENTS
        # at least as many calls as threads
        share = math.ceil(values_KP.shape[1] / math.ceil(at_once / len(parts)))
        width = min(elements // max(len(rows), len(columns)), share)
        width = max(1, math.ceil(width / _COLUMN_STEP)) * _COLUMN_STEP
        starts = range(0, values_KP.shape[1], width)
        calls += [partial(one_product, weights, *places, slice(start, start + width)) for start in starts]
    side_by_side(calls, at_once)
    for row in np.flatnonzero(~matrix_MK.any(axis=1)):
        out_MP[row] = 0


def _places(ids: npt.NDArray[np.intp], device: torch.device) -> Rows:
    """The ids, as a range if they are one: what lies in order is multiplied where it lies."""
    if ids[-1] - ids[0] == len(ids) - 1:
        return slice(int(ids[0]), int(ids[-1]) + 1)
    return torch.from_numpy(ids).to(device)
