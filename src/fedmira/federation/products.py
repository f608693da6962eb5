"""Mixing what adapters do instead of how they are written: combinations of the products B A, never forming one.

sum_k w_k B_k A_k = [w_1 B_1 .. w_K B_K] [A_1; ..; A_K] is a product of two thin matrices. A QR factorisation of each
and the singular values of a small core give the pair of a given rank that comes nearest (FLoRIST, FlexLoRA); a rotation
brings that pair as close as possible to the one it replaces. Float64 inside. `tests/reference/products_twin.py` is the
slow way. Knows nothing about rounds or who takes part.

Axes: K clients (rows of the arena), M results, R rank, Q stacked ranks, I and O in and out features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from fedmira.federation.graph import Matrix
from fedmira.federation.mixing import Mixer
from fedmira.federation.similarity import low_rank_pairs
from fedmira.types import Arena

_NEGLIGIBLE = 1e-12
"""A singular value below this share of the largest is rounding."""
_SQUARABLE = 1e-4
"""Singular values above this share of the largest keep 8 digits when squared."""
_BLOCK_ELEMENTS = 1 << 24


class Spectrum(NamedTuple):
    """Singular value decomposition U diag(S) V^T of a product, float64."""

    u_OQ: torch.Tensor
    values_Q: torch.Tensor
    """Descending."""
    v_QI: torch.Tensor


def spectrum(b_OQ: torch.Tensor, a_QI: torch.Tensor, count: int | None = None) -> Spectrum:
    """Return the decomposition of B A in O((I + O) Q^2 + Q^3) through the QR factors of both (FLoRIST).

    With `count` only that many of the largest singular values, if there are as many.
    """
    (q_b, r_b), (q_a, r_a) = _tall(b_OQ.double()), _tall(a_QI.double().T)
    u, values, v = _decomposed(r_b @ r_a.T, count)
    return Spectrum(u if q_b is None else q_b @ u, values, v if q_a is None else v @ q_a.T)


def _decomposed(core: torch.Tensor, count: int | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U, S, V^T of the `count` largest singular values; None means all.

    A few of many come from the eigenvectors U of M M^T, half the work, and V = U^T M / S: U S V is a projection of M,
    so what squaring costs is second order. Where the last of them is too small for that, all are computed.
    """
    if count is not None and 2 * count < min(core.shape):
        if core.shape[0] > core.shape[1]:
            v, values, u = _decomposed(core.T, count)
            return u.T, values, v.T
        squares, vectors = torch.linalg.eigh(core @ core.T)
        values, u = squares[-count:].clamp(min=0).sqrt().flip(0), vectors[:, -count:].flip(1)
        if values[-1] > _SQUARABLE * values[0]:
            return u, values, (u.T @ core) / values[:, None]
    u, values, v = torch.linalg.svd(core, full_matrices=False)
    return u[:, :count], values[:count], v[:count]


def _tall(matrix_NQ: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Return the QR factors of a matrix that has more rows than columns; one that has not is small as it is."""
    if matrix_NQ.shape[0] <= matrix_NQ.shape[1]:
        return None, matrix_NQ
    q, r = torch.linalg.qr(matrix_NQ)
    return q, r


def energy_rank(values_Q: torch.Tensor, share: float) -> int:
    """Return the fewest singular values whose squares make up `share` of all, those of rounding left out; 1: all.

    >>> energy_rank(torch.tensor([3.0, 1.0, 1e-20]), 0.9), energy_rank(torch.tensor([3.0, 1.0, 1e-20]), 1.0)
    (1, 2)
    """
    there = int((values_Q > _NEGLIGIBLE * values_Q[:1]).sum()) if len(values_Q) else 0
    if share == 1 or not there:
        return there
    energy_Q = values_Q[:there].double().square().cumsum(0)
    return min(there, int((energy_Q < share * energy_Q[-1] * (1 - 1e-12)).sum()) + 1)


def stacked(b_KOR: torch.Tensor, a_KRI: torch.Tensor, weights: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return [w_1 B_1 .. w_K B_K] (O, Q) and [A_1; ..; A_K] (Q, I) in float64 over the clients with a weight."""
    rows = [k for k, weight in enumerate(weights) if weight]
    chosen_K = torch.tensor([weights[k] for k in rows], dtype=torch.float64, device=b_KOR.device)
    weighted_KOR = b_KOR[rows].double() * chosen_K[:, None, None]
    return weighted_KOR.transpose(0, 1).flatten(1), a_KRI[rows].double().flatten(0, 1)


def _spectra(b_KOR: torch.Tensor, a_KRI: torch.Tensor, combinations: Sequence[Sequence[float]]) -> Iterator[Spectrum]:
    """The decomposition of each combination to the rank of the layer; the tall factors of many are brought to a common
    small basis once."""
    num_clients, rank = a_KRI.shape[:2]
    if len(combinations) == 1:
        yield spectrum(*stacked(b_KOR, a_KRI, combinations[0]), rank)
        return
    q_b, r_b = _tall(b_KOR.double().transpose(0, 1).flatten(1))
    q_a, r_a = _tall(a_KRI.double().flatten(0, 1).T)
    small_b, small_a = (r.reshape(len(r), num_clients, rank).transpose(0, 1) for r in (r_b, r_a))
    for weights in combinations:
        small = spectrum(*stacked(small_b, small_a.transpose(1, 2), weights), rank)
        u_OQ = small.u_OQ if q_b is None else q_b @ small.u_OQ
        yield Spectrum(u_OQ, small.values_Q, small.v_QI if q_a is None else small.v_QI @ q_a.T)


def in_products(
    matrix_MK: Matrix, align: bool = True, ranks_K: Sequence[int] | None = None, reference: Arena | None = None
) -> Mixer:
    """Return the mixer B_k A_k <- sum_l P_kl B_l A_l, each to the nearest pair of its rank; exact if that is enough.

    Rows like the identity's keep their bytes.

    Args:
        matrix_MK: P, (M, K); a row of weights for each result.
        align: turn each pair by the rotation that brings it nearest to its reference; False leaves U S^1/2, S^1/2 V^T.
        ranks_K: largest rank of each result; None means that of the layer.
        reference: (M, P), what each result replaces; None means the arena itself.
    """

    def mix(arena: Arena) -> Arena:
        before = arena if reference is None else reference
        mixed = before.replace(before.values_KP.clone())
        pairs = low_rank_pairs(arena.layout)
        moving = [
            (rows, weights)
            for rows, weights in _alike(matrix_MK)
            if reference is not None or len(rows) > 1 or weights != np.eye(1, len(weights), rows[0])[0].tolist()
        ]
        for spec_a, spec_b in pairs if moving else ():
            a_MRI, b_MOR = mixed.view(spec_a), mixed.view(spec_b)
            spectra = _spectra(arena.view(spec_b), arena.view(spec_a), [weights for _, weights in moving])
            for whole, (rows, _) in zip(spectra, moving, strict=True):
                for row in rows:
                    rank = spec_a.shape[0] if ranks_K is None else min(ranks_K[row], spec_a.shape[0])
                    pair = nearest_pair(whole, b_MOR[row, :, :rank], a_MRI[row, :rank], align)
                    b_MOR[row, :, :rank], a_MRI[row, :rank] = pair
                    b_MOR[row, :, rank:], a_MRI[row, rank:] = 0.0, 0.0
        return mixed

    return mix


def _alike(matrix_MK: Matrix) -> list[tuple[list[int], list[float]]]:
    """The rows that have the same weights, with these."""
    groups: dict[bytes, list[int]] = {}
    for row, weights in enumerate(np.asarray(matrix_MK, dtype=np.float64)):
        groups.setdefault(weights.tobytes(), []).append(row)
    return [(rows, np.asarray(matrix_MK)[rows[0]].tolist()) for rows in groups.values()]


def nearest_pair(
    whole: Spectrum, like_b_OR: torch.Tensor, like_a_RI: torch.Tensor, align: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the (B, A) of the rank of the reference whose product is nearest to `whole`, float64.

    B = U S^1/2 and A = S^1/2 V^T (FlexLoRA), the largest entry of each column of U positive. A component without a
    singular value would be 0 in both factors and never train again: it gets B = 0 and the largest part of the
    reference's A that the others do not hold, which leaves the product as it is. With `align` then B R and R^T A, R the
    rotation that minimises |B R - B'|^2 + |R^T A - A'|^2: it is U V^T of the decomposition of B^T B' + A A'^T
    (orthogonal Procrustes).
    """
    like_b, like_a = like_b_OR.double(), like_a_RI.double()
    rank = len(like_a)
    there = min(rank, energy_rank(whole.values_Q, 1.0))
    root = whole.values_Q[:there].sqrt()
    b_OR, a_RI = torch.zeros_like(like_b), torch.zeros_like(like_a)
    u_OQ, v_QI = whole.u_OQ[:, :there], whole.v_QI[:there]
    # settles the signs, so that the order of the clients does not matter
    sign = torch.where(u_OQ.gather(0, u_OQ.abs().argmax(dim=0, keepdim=True)) < 0, -1.0, 1.0).to(u_OQ)[0]
    u_OQ, v_QI = u_OQ * sign, v_QI * sign[:, None]
    b_OR[:, :there] = u_OQ * root
    a_RI[:there] = root[:, None] * v_QI
    if there < rank:
        _, values, rest = torch.linalg.svd(like_a - (like_a @ v_QI.T) @ v_QI, full_matrices=False)
        spare = (values[:, None] * rest)[: rank - there]
        a_RI[there : there + len(spare)] = spare
    if align:
        u, _, v = torch.linalg.svd(b_OR.T @ like_b + a_RI @ like_a.T)
        rotation_RR = u @ v
        b_OR, a_RI = b_OR @ rotation_RR, rotation_RR.T @ a_RI
    return b_OR, a_RI


def by_least_squares(matrix_KK: Matrix) -> Mixer:
    """Return the mixer that keeps each A_k and takes the B that brings B A_k nearest to sum_l P_kl B_l A_l.

    B = (sum_l P_kl B_l (A_l A_k^T)) (A_k A_k^T)^+ : the projection on the rows of A_k (LoRA-FAIR's objective without
    its penalty). No decomposition, O(K R^2 (I + O)) for each client; exact where all clients share A.
    """
    moving = np.flatnonzero((matrix_KK != np.eye(len(matrix_KK))).any(axis=1))

    def mix(arena: Arena) -> Arena:
        mixed = arena.replace(arena.values_KP.clone())
        if not len(moving):
            return mixed
        weights_MK = torch.from_numpy(np.asarray(matrix_KK[moving], dtype=np.float64)).to(arena.values_KP.device)
        for spec_a, spec_b in low_rank_pairs(arena.layout):
            a_KRI, b_KOR = arena.view(spec_a).double(), arena.view(spec_b).double()
            num_clients, rank = a_KRI.shape[:2]
            stacked_a, stacked_b = a_KRI.flatten(0, 1), b_KOR.transpose(0, 1).flatten(1)
            step = max(1, _BLOCK_ELEMENTS // (num_clients * rank * rank))
            for start in range(0, len(moving), step):
                rows, weights = moving[start : start + step], weights_MK[start : start + step]
                own_MRI = a_KRI[rows]
                across = (stacked_a @ own_MRI.flatten(0, 1).T).view(num_clients, rank, len(rows), rank)
                weighted = (across * weights.T[:, None, :, None]).flatten(2).flatten(0, 1)
                wanted_MOR = (stacked_b @ weighted).view(-1, len(rows), rank).transpose(0, 1)
                inverse_MRR = torch.linalg.pinv(own_MRI @ own_MRI.transpose(1, 2), hermitian=True)
                mixed.view(spec_b)[rows] = (wanted_MOR @ inverse_MRR).to(arena.values_KP)
        return mixed

    return mix


def squared_norms(arena: Arena) -> torch.Tensor:
    """Return |dW_k|_F^2 over all layers, (K,) float64: s^2 tr((B^T B)(A A^T)), without forming the products."""
    total_K = torch.zeros(arena.num_clients, dtype=torch.float64, device=arena.values_KP.device)
    for spec_a, spec_b in low_rank_pairs(arena.layout):
        a_KRI, b_KOR = arena.view(spec_a).double(), arena.view(spec_b).double()
        total_K += ((b_KOR.transpose(1, 2) @ b_KOR) * (a_KRI @ a_KRI.transpose(1, 2))).sum(dim=(1, 2))
    return arena.layout.scaling**2 * total_K
