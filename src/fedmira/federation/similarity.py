"""Which clients are alike, seen from their adapters: gauge-free Gram matrices of low-rank products.

(B M, M^-1 A) is the same update as (B, A), so factors must not be compared with each other; products can be, formed or
not, whichever is less work. Adapters look alike wherever they were mixed, right or wrong; a wrong edge would confirm
itself, so what is compared is where each client was heading. Knows nothing about how the adapters were trained. The
Gram matrices are linear algebra over an arena; `tests/reference/mixing_twin.py` is the slow way.

Axes: K clients, C those compared, L layers, R rank, I and O in and out features, P parameters of one adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from fedmira.errors import ConfigError
from fedmira.federation.graph import Matrix
from fedmira.federation.multiply import over_tiles
from fedmira.types import Arena, Layout, TensorSpec

MINIMUM_CLIENTS = 3
"""Two centred vectors always have cosine -1: fewer than three say nothing."""
_NEGLIGIBLE = 1e-12
"""A squared norm below this share of what it is measured by is rounding."""
_ALIKE = 1e-9
"""Clients whose cosines are closer to 1 than this on average differ by rounding."""
_MANY_CLIENTS = 10
"""From so many on, taking the mean away tells kin from strangers better (docs/log.md)."""
_LOWER_SIXTH = 0.1587
"""Share of a normal distribution below its middle by more than one standard deviation."""
_SPREADS = 2.0
"""So many standard deviations above their middle lie 2 of 100 strangers, if they are normal (docs/log.md)."""
_SMALLEST_GROUP = 4
"""So many clients of like rank have a mean of their own that is not mostly one of them."""
_BLOCK_ELEMENTS = 1 << 21
"""16 MiB in float64: what is formed stays in a shared cache until it is multiplied."""


def low_rank_pairs(layout: Layout) -> tuple[tuple[TensorSpec, TensorSpec], ...]:
    """Return the (lora_a, lora_b) specs of every layer that has both.

    Raises:
        ConfigError: the adapter has no low-rank pair, so comparing products means nothing for it.
    """
    pairs = tuple(pair for pair in layout.pairs if pair[0].group == "lora_a")
    if not pairs:
        raise ConfigError(
            f"this method.graph.kind compares low-rank products, but the adapter has the groups {list(layout.groups)}"
            "; use kind: trust, probe, embeddings, labels, given, uniform or random"
        )
    return pairs


def heading(after: Arena, before: Arena, spec_a: TensorSpec, spec_b: TensorSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where each client was heading in one layer, 2 B A - B0 A0, as a pair of twice the rank.

    Mixing has moved a client from its own optimum towards its neighbours' before it trains; one local update beyond
    what it sent undoes about as much. 2 B A - B0 A0 = [2 B, -B0] [A; A0]; both arenas have the same layout.
    """
    a_CRI = torch.cat([after.view(spec_a), before.view(spec_a)], dim=1)
    return a_CRI, torch.cat([2 * after.view(spec_b), -before.view(spec_b)], dim=2)


def layer_grams(arena: Arena, before: Arena | None = None, first: int | None = None) -> tuple[Matrix, ...]:
    """Return per layer G_kl = <dW_k, dW_l> = s^2 tr((B_k^T B_l)(A_l A_k^T)), (C, C) in float64.

    Equals the inner products of the dense updates dW = s B A and does not change when a client's factors are turned by
    any invertible M. Costs about C^2 R^2 (I + O) without forming a product, C^2 I O + 2 C R I O by forming each, some
    rows at a time; whichever is less. Each pair is computed once.

    Args:
        arena: the C clients to compare, with lora_a of shape (R, I) and lora_b of shape (O, R) per layer.
        before: what they started from; then dW is where they were heading, see `heading`.
        first: only pairs with one of so many first clients are computed, the others are 0; None: all pairs.
    """
    grams = []
    for spec_a, spec_b in low_rank_pairs(arena.layout):
        a_CRI, b_COR = arena.view(spec_a), arena.view(spec_b)
        if before is not None:
            a_CRI, b_COR = heading(arena, before, spec_a, spec_b)
        (num_clients, rank, num_in), num_out = a_CRI.shape, b_COR.shape[1]
        wanted = num_clients if first is None else first
        formed = num_in * num_out * (wanted + 2 * rank) < wanted * rank**2 * (num_in + num_out)
        gram_of = _gram_of_products if formed else _gram_of_factors
        upper_CC = gram_of(a_CRI, b_COR, wanted).triu_().cpu().numpy() * arena.layout.scaling**2
        grams.append(np.asarray(upper_CC + np.triu(upper_CC, 1).T))
    return tuple(grams)


def _gram_of_factors(a_CRI: torch.Tensor, b_COR: torch.Tensor, first: int) -> torch.Tensor:
    """Return <B_k A_k, B_l A_l> for k <= l, k < first, (C, C) in float64, from the inner products of factors' rows."""
    num_clients, rank = a_CRI.shape[:2]
    stacked_a = a_CRI.double().flatten(0, 1)
    stacked_b = b_COR.double().transpose(1, 2).flatten(0, 1)
    gram_CC = stacked_a.new_zeros(num_clients, num_clients)
    step = max(1, min(_strip(num_clients), _BLOCK_ELEMENTS // max(1, num_clients * rank * rank)))
    for start in range(0, first, step):
        stop = min(start + step, first)
        some, later = slice(start * rank, stop * rank), slice(start * rank, None)
        paired = (stacked_b[some] @ stacked_b[later].T) * (stacked_a[some] @ stacked_a[later].T)
        gram_CC[start:stop, start:] = paired.view(stop - start, rank, num_clients - start, rank).sum((1, 3))
    return gram_CC


def _gram_of_products(a_CRI: torch.Tensor, b_COR: torch.Tensor, first: int) -> torch.Tensor:
    """Return <B_k A_k, B_l A_l> for k <= l, k < first, (C, C) in float64, from the products, some rows at a time."""
    num_clients, _, num_in = a_CRI.shape
    gram_CC = torch.zeros(num_clients, num_clients, dtype=torch.float64, device=a_CRI.device)
    a_CRI = a_CRI.double()
    rows = max(1, _BLOCK_ELEMENTS // max(1, num_clients * num_in))
    step = _strip(num_clients)
    for b_CoR in torch.split(b_COR, rows, dim=1):
        products_CP = (b_CoR.double() @ a_CRI).flatten(1)
        for start in range(0, first, step):
            stop = min(start + step, first)
            gram_CC[start:stop, start:] += products_CP[start:stop] @ products_CP[start:].T
    return gram_CC


def _strip(num_clients: int) -> int:
    """Rows of a strip: with four of them, 5/8 of a symmetric matrix are computed."""
    return -(-num_clients // 4)


def row_distances(values_CP: torch.Tensor) -> Matrix:
    """Return |theta_k - theta_l|^2 between rows, (C, C) in float64; O(C^2 P) in tiles."""

    def gram_of(columns: slice) -> torch.Tensor:
        tile = values_CP[:, columns].double()
        # distances ignore what all rows share; without it small differences of large numbers keep their digits
        tile = tile - tile.mean(dim=0)
        return tile @ tile.T

    return squared_distances(torch.stack(over_tiles(gram_of, values_CP)).sum(dim=0).cpu().numpy())


def squared_distances(gram_CC: Matrix) -> Matrix:
    """Return |x_k - x_l|^2 = G_kk + G_ll - 2 G_kl of vectors with these inner products, see `symmetric_distances`."""
    squares_C = np.diagonal(gram_CC)
    return symmetric_distances(np.maximum(squares_C[:, None] + squares_C[None, :] - 2.0 * gram_CC, 0.0))


def symmetric_distances(distance_CC: Matrix) -> Matrix:
    """Return the distances exactly symmetric and with a zero diagonal, as they are but for rounding."""
    symmetric_CC = (distance_CC + distance_CC.T) / 2
    np.fill_diagonal(symmetric_CC, 0.0)
    return np.asarray(symmetric_CC)


def centred_cosine(gram_CC: Matrix) -> Matrix:
    """Return the cosines of the updates after removing their mean: H G H, H = I - 1 1^T / C, scaled to unit diagonal.

    Rows of clients that equal the mean are 0, and so is everything when fewer than three clients are compared. Never
    NaN.
    """
    if len(gram_CC) < MINIMUM_CLIENTS:
        return np.zeros_like(gram_CC)
    centred_CC = gram_CC - gram_CC.mean(axis=0)
    centred_CC = centred_CC - centred_CC.mean(axis=1, keepdims=True)
    return _scaled(centred_CC, float(np.diagonal(gram_CC).max()))


def rank_groups(ranks_C: Sequence[int]) -> tuple[int, ...]:
    """Return the number of each client's group, (C,): those of one rank, or of the next ones where that is too few.

    >>> rank_groups([8, 2, 2, 8, 2, 8, 2, 8])
    (1, 0, 0, 1, 0, 1, 0, 1)
    >>> rank_groups([2, 2, 2, 2, 4, 8])
    (0, 0, 0, 0, 0, 0)
    """
    group_of: dict[int, int] = {}
    group, members, left = 0, 0, len(ranks_C)
    for rank in sorted(set(ranks_C)):
        if members >= _SMALLEST_GROUP and left >= _SMALLEST_GROUP:
            group, members = group + 1, 0
        group_of[rank] = group
        members += ranks_C.count(rank)
        left -= ranks_C.count(rank)
    return tuple(group_of[rank] for rank in ranks_C)


def cosines(gram_CC: Matrix) -> Matrix:
    """Return the cosines of vectors with these inner products after removing what they have in common, (C, C).

    `centred_cosine` takes a C-th of each vector away from itself too, so C unrelated ones have cosines of -1 / (C - 1):
    where clients are many that is a threshold which keeps strangers apart, where they are few it keeps kin apart. Among
    fewer than ten, what they have in common is therefore what the cosines of different clients are on average:
    (c_kl - m) / (1 - m).
    """
    if MINIMUM_CLIENTS <= len(gram_CC) < _MANY_CLIENTS:
        return _above_the_mean(gram_CC)
    return centred_cosine(gram_CC)


def update_cosines(gram_CC: Matrix, groups_C: Sequence[int] | None = None) -> Matrix:
    """Return the cosines of updates with these inner products without what all clients learn alike, (C, C).

    That (the format of the answers, say) would make everyone similar. How much of an update it is depends on how far a
    client has come, so each loses its own projection on the mean direction, not the same mean as all: else graphs join
    clients that took as many steps (docs/log.md). Among fewer than ten, cosines count above their mean m over different
    clients, (c_kl - m) / (1 - m), for the reason that `cosines` gives.

    Args:
        gram_CC: inner products; only directions count.
        groups_C: of clients that are alike for another reason than their tasks, see `rank_groups`: each group has a
            mean direction of its own. None: all clients have one.
    """
    if len(gram_CC) < MINIMUM_CLIENTS:
        return np.zeros_like(gram_CC)
    group_C = np.unique(groups_C or np.zeros(len(gram_CC)), return_inverse=True)[1]
    left_CC = _without_the_common(_scaled(gram_CC, _usual_square(gram_CC)), group_C)
    return _above_the_mean(left_CC) if len(gram_CC) < _MANY_CLIENTS else left_CC


def _without_the_common(cosine_CC: Matrix, group_C: np.ndarray[Any, np.dtype[np.int64]]) -> Matrix:
    """Return the cosines of u_k - (u_k m / m m) m, m the mean of the unit vectors u of the group that k is in."""
    share_CG = np.equal.outer(group_C, np.arange(group_C.max() + 1)) / np.bincount(group_C)
    with_CG = cosine_CC @ share_CG
    among_GG = share_CG.T @ with_CG
    square_C, along_C = np.diagonal(among_GG)[group_C], np.take_along_axis(with_CG, group_C[:, None], axis=1)[:, 0]
    # a group whose members cancel out has nothing in common
    there_C = square_C > _NEGLIGIBLE
    part_C = np.where(there_C, along_C / np.where(there_C, square_C, 1.0), 0.0)
    taken_CC = part_C[:, None] * with_CG.T[group_C]
    left_CC = cosine_CC - taken_CC - taken_CC.T + np.outer(part_C, part_C) * among_GG[np.ix_(group_C, group_C)]
    return _scaled(left_CC, 1.0)


def _above_the_mean(gram_CC: Matrix) -> Matrix:
    """Return (c_kl - m) / (1 - m), m the mean of the cosines c of different clients, in -1 .. 1."""
    cosine_CC = _scaled(gram_CC, float(np.diagonal(gram_CC).max()))
    there_C = np.diagonal(cosine_CC) > 0
    pairs_CC = there_C[:, None] & there_C & ~np.eye(len(gram_CC), dtype=bool)
    common = float(np.mean(cosine_CC[pairs_CC])) if pairs_CC.any() else 0.0
    if 1 - common <= _ALIKE:
        return np.zeros_like(gram_CC)
    above_CC = np.where(pairs_CC, np.clip((cosine_CC - common) / (1 - common), -1.0, 1.0), 0.0)
    return above_CC + np.diag(np.diagonal(cosine_CC))


def _usual_square(gram_CC: Matrix) -> float:
    """Return the median square of those that moved: beside the largest, one upload could make nothing of all others."""
    squares_C = np.diagonal(gram_CC)
    return float(np.median(squares_C[squares_C > 0])) if (squares_C > 0).any() else 0.0


def _scaled(gram_CC: Matrix, measure: float) -> Matrix:
    """Return the matrix scaled to unit diagonal, in -1 .. 1; rows whose square is nothing beside `measure` are 0."""
    squares_C = np.diagonal(gram_CC)
    there_C = squares_C > _NEGLIGIBLE * max(measure, np.finfo(np.float64).tiny)
    inverse_C = np.where(there_C, 1.0 / np.sqrt(np.where(there_C, squares_C, 1.0)), 0.0)
    cosine_CC = np.clip(gram_CC * inverse_C[:, None] * inverse_C[None, :], -1.0, 1.0)
    return np.asarray((cosine_CC + cosine_CC.T) / 2)


def heading_grams(
    previous_LKK: Matrix, after: Arena, before: Arena, seen: Sequence[int], returned: Sequence[int]
) -> Matrix:
    """Return per layer the inner products of where clients were heading, (L, K, K); 0 with one that was never seen.

    Only pairs with a client that returned are computed: nobody else has moved.

    Args:
        previous_LKK: what was returned after the round before; zeros before round 1.
        after: (K, P), the last upload of every client.
        before: (K, P), what each client started from when it made that upload.
        seen: the clients that ever returned.
        returned: those of them that returned this round.
    """
    if not returned:
        return previous_LKK
    order = [*returned, *sorted(set(seen) - set(returned))]
    now = layer_grams(after.rows(order), before.rows(order), len(returned))
    new_C = np.arange(len(order)) < len(returned)
    grams_LKK, block = previous_LKK.copy(), np.ix_(order, order)
    for gram_KK, now_CC in zip(grams_LKK, now, strict=True):
        gram_KK[block] = np.where(new_C[:, None] | new_C, now_CC, gram_KK[block])
    return grams_LKK


def similarity(grams: Iterable[Matrix], groups_C: Sequence[int] | None = None) -> Matrix:
    """Return the mean over layers of `update_cosines`, (C, C): every layer counts the same, however far it moved."""
    return over_layers([update_cosines(gram_CC, groups_C) for gram_CC in grams])


def over_layers(cosines_LCC: Sequence[Matrix]) -> Matrix:
    """Return the mean of cosines over the layers in which both clients moved, (C, C); 0 where there is none.

    A client that did not move in a layer has cosines of 0 there, with itself as well: they say nothing.
    """
    moved_LC = np.stack([np.diagonal(cosine_CC) > 0 for cosine_CC in cosines_LCC]).astype(np.float64)
    return np.asarray(np.sum(cosines_LCC, axis=0) / np.maximum(moved_LC.T @ moved_LC, 1.0))


def moved(previous_KK: Matrix, now_CC: Matrix, rows: Sequence[int], returned: Sequence[int], memory: float) -> Matrix:
    """Return the moving average of similarities, (K, K), after a round; 0 means never compared.

    A pair with a client that returned moves to `memory * previous + (1 - memory) * now`; a pair that was never
    compared, as there were fewer than three to compare, takes what is seen now; all others stay as they were, and so
    do pairs of which 0 is seen now: one of the two did not move, or all uploads are the same.

    Args:
        previous_KK: the similarities before.
        now_CC: those seen now, among the clients `rows`.
        rows: the clients that ever returned.
        returned: those of them that returned this round.
        memory: weight of the past, 0 to 1.
    """
    if len(rows) < MINIMUM_CLIENTS or not returned:
        return previous_KK
    before_CC = previous_KK[np.ix_(rows, rows)]
    moved_CC = np.where(before_CC != 0, memory * before_CC + (1 - memory) * now_CC, now_CC)
    new_C = np.isin(rows, list(returned))
    updated_KK = previous_KK.copy()
    looked_at_CC = (new_C[:, None] | new_C[None, :] | (before_CC == 0)) & (now_CC != 0)
    updated_KK[np.ix_(rows, rows)] = np.where(looked_at_CC, moved_CC, before_CC)
    return np.asarray(updated_KK)


def strangers(similarity_CC: Matrix) -> float:
    """Return the similarity up to which two clients are strangers; 0 at most.

    Centred cosines of unrelated clients are not 0 but about -1 / (C - 1), and where much of an update is noise, with
    large learning rates say, those of kin are a few hundredths above: less than nothing, but far beyond what strangers
    scatter by. So strangers end two standard deviations above their middle. The deviation is that from the middle down
    to the lower sixth, where no kin are. Where so many are kin that the middle is one of them it is large, and 0 stays.

    Args:
        similarity_CC: cosines of C clients without what all have in common; pairs of exactly 0 were never compared.
    """
    off_N = similarity_CC[np.triu_indices(len(similarity_CC), 1)]
    off_N = off_N[off_N != 0]
    if not len(off_N):
        return 0.0
    middle = float(np.median(off_N))
    spread = middle - float(np.quantile(off_N, _LOWER_SIXTH))
    return min(0.0, middle + max(_SPREADS * spread, _ALIKE))


def mutual_neighbours(similarity_KK: Matrix, neighbours: int, power: float) -> Matrix:
    """Return a_kl = (s_kl / sqrt(t_k t_l))^power between clients among each other's nearest `neighbours`, s_kl > 0.

    t_k is the similarity of client k to its nearest client (local scaling, Zelnik-Manor and Perona 2004): cosines of
    updates are small where much of an update is noise, and strength should not depend on that. Clients tied with the
    last neighbour count as well, so that the result does not depend on their order.
    """
    positive_KK = np.maximum(similarity_KK, 0.0)
    np.fill_diagonal(positive_KK, 0.0)
    nearest_K = positive_KK.max(axis=1, initial=0.0)
    scale_K = np.sqrt(np.where(nearest_K > 0, nearest_K, 1.0))
    count = min(neighbours, max(len(positive_KK) - 1, 1))
    least_K = np.partition(positive_KK, -count, axis=1)[:, -count]
    near_KK = (positive_KK > 0) & (positive_KK >= least_K[:, None])
    return np.where(near_KK & near_KK.T, (positive_KK / scale_K[:, None] / scale_K[None, :]) ** power, 0.0)
