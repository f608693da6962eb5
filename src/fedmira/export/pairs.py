"""Low-rank pairs as other tools know them: one for each layer, B1 A1 + B2 A2 = [B1 | B2] [A1; A2], of the least rank.

Knows nothing about files or runs. Axes: P parameters of one adapter, W elements of all adapted layers, R rank, I/O in
and out features.
"""

from __future__ import annotations

import torch

from fedmira.types import PAIRS, Arena, Layout


def num_pairs(layout: Layout) -> int:
    """Return how many low-rank pairs a layer has; 0 for other kinds of adapters."""
    return sum(1 for pair in PAIRS if set(pair) <= set(layout.groups))


def joined_pairs(layout: Layout, row_P: torch.Tensor) -> tuple[Layout, torch.Tensor]:
    """Return the adapter with one pair per layer whose product is the sum of the products, and its row.

    The rank of a layer is the sum of the ranks of its pairs; the scaling stays.
    """
    first_a, first_b = PAIRS[0]
    by_place = {(spec.layer, spec.group): spec for spec in layout.specs}
    tensors: list[tuple[str, str, str, tuple[int, ...]]] = []
    columns: list[torch.Tensor] = []
    for layer in layout.layers:
        for factor, (group, axis) in enumerate(((first_a, 0), (first_b, 1))):
            parts = [by_place[layer, pair[factor]] for pair in PAIRS if (layer, pair[factor]) in by_place]
            values = torch.cat([row_P[spec.columns].reshape(spec.shape) for spec in parts], dim=axis)
            tensors.append((f"{layer}.{group}", group, layer, tuple(values.shape)))
            columns.append(values.reshape(-1))
    return Layout.of(tensors, layout.scaling), torch.cat(columns)


def fitted(layout: Layout, row_P: torch.Tensor, shift_W: torch.Tensor | None = None) -> tuple[Layout, torch.Tensor]:
    """Return the same adapter with one pair per layer of no more than the rank it needs, and its layout.

    Components that are 0 in both factors are beyond the client's rank and left out; the others keep their bytes. With a
    shift each layer's pair becomes the factors U S^1/2 and S^1/2 V^T of B A + shift / scaling, which is exact: its rank
    is that of the sum, at most min(I, O). A layer that does nothing keeps one component of zeros.

    Args:
        layout: one pair, `lora_a` and `lora_b`, per layer.
        row_P: (P,), any floating dtype; the result has the same.
        shift_W: (O, I) of each layer, flat, in the order of `layout.layers`.
    """
    one = Arena(layout, row_P[None])
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    start = 0
    for spec_a, spec_b in layout.pairs:
        layer, a_RI, b_OR = spec_a.layer, one.view(spec_a)[0], one.view(spec_b)[0]
        there_R = (a_RI != 0).any(dim=1) | (b_OR != 0).any(dim=0)
        there_R[0] |= not there_R.any()
        pairs[layer] = (a_RI[there_R], b_OR[:, there_R])
        if shift_W is not None:
            size = b_OR.shape[0] * a_RI.shape[1]
            pairs[layer] = _whole(*pairs[layer], shift_W[start : start + size], layout.scaling)
            start += size
    factors = [pairs[spec.layer][spec.group == "lora_b"] for spec in layout.specs]
    tensors = ((s.name, s.group, s.layer, tuple(f.shape)) for s, f in zip(layout.specs, factors, strict=True))
    return Layout.of(tensors, layout.scaling), torch.cat([factor.flatten() for factor in factors])


def _whole(
    a_RI: torch.Tensor, b_OR: torch.Tensor, shift_W: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors A and B with B A = b a + shift / scaling, of the rank that is more than the shift's rounding."""
    shift_OI = shift_W.view(b_OR.shape[0], a_RI.shape[1])
    u, values, v = torch.linalg.svd(b_OR.double() @ a_RI.double() + shift_OI.double() / scaling, full_matrices=False)
    rounding = max(shift_OI.shape) * torch.finfo(shift_W.dtype).eps * float(values[0])
    rank = max(1, int((values > rounding).sum()))
    root = values[:rank].sqrt()
    return (root[:, None] * v[:rank]).to(a_RI), (u[:, :rank] * root).to(b_OR)
