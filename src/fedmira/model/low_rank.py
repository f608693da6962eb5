"""Low-rank products of many clients on stacked layers: each client's rows meet only its own pair.

Works on plain matrices and writes gradients into views that the caller owns. Knows nothing about models, losses or
optimizers.

For the rows x of client k and a layer j whose outputs are the columns [start, stop):
y[:, start:stop] += scaling * B_kj (A_kj x). Layers that share an input lie in one branch: their A are one matrix.

There are three ways to the same numbers. `segments` multiplies one client after the other: best on a CPU, and the only
way on which a client that is not finite reaches nobody else and nothing is written for one without rows. `masked`
multiplies the rows of some clients with the pairs of all of them and masks what does not belong together: few calls,
for a GPU and few clients. `grouped` lets one kernel do it client by client: for a GPU and many clients, where the
kernel takes the sizes.

On the way of `segments` what has as few columns as an adapter has ranks is kept as rows: such matrices are multiplied
at two to four times the rate.

Axes: C clients, G clients that are masked together, N rows, n rows of one client, R rank (of all layers of a branch
together), r rank of one layer, I/O in and out features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch

Way = Literal["segments", "masked", "grouped"]

_MOST_MASKED_RANKS = 256
"""Ranks of clients together beyond which masking would multiply mostly zeros."""


class Segment(NamedTuple):
    """The consecutive rows that belong to one client."""

    client: int
    """Row of the arena."""
    start: int
    stop: int


class Rows(NamedTuple):
    """Which client each row belongs to; rows are sorted by client."""

    parts: tuple[Segment, ...]
    """One for each client that has rows."""
    owner_N: torch.Tensor
    """int64; row of the arena."""
    ends_C: torch.Tensor
    """int32; where the rows of each client end."""
    foreign: dict[tuple[int, int], torch.Tensor]
    """By how many clients are masked together and their ranks, where a row meets those of another client, (N, G * R);
    filled where rows are masked."""
    way: Way | None = None
    """How to multiply; None chooses by device and size."""


def segments(rows_per_client: Sequence[int]) -> tuple[Segment, ...]:
    """One segment per client that has rows, in order.

    >>> segments((2, 0, 3))
    (Segment(client=0, start=0, stop=2), Segment(client=2, start=2, stop=5))
    """
    parts = []
    start = 0
    for client, rows in enumerate(rows_per_client):
        if rows:
            parts.append(Segment(client, start, start + rows))
        start += rows
    return tuple(parts)


def assign_rows(rows_per_client: Sequence[int], device: torch.device, way: Way | None = None) -> Rows:
    """Who owns which row, from how many rows each client has, in order; 0 is allowed."""
    counts_C = torch.tensor(rows_per_client, dtype=torch.int64)
    owner_N = torch.arange(len(counts_C)).repeat_interleave(counts_C)
    return Rows(segments(rows_per_client), owner_N.to(device), counts_C.cumsum(0).to(device, torch.int32), {}, way)


class Target(NamedTuple):
    """One adapted layer of a branch."""

    columns: slice
    """Its outputs among those of the stacked layers."""
    ranks: slice
    """Its rows of the branch's A."""
    b_COr: torch.Tensor
    grad_b_COr: torch.Tensor | None


class Branch(NamedTuple):
    """The pairs of the adapted layers that share an input; the gradients are views, None where nothing is trained."""

    a_CRI: torch.Tensor
    grad_a_CRI: torch.Tensor | None
    targets: tuple[Target, ...]
    scaling: float


def add_low_rank_(branch: Branch, rows: Rows, x_NI: torch.Tensor, out_NO: torch.Tensor) -> torch.Tensor:
    """Add the low-rank products of `x_NI` to `out_NO` in place.

    Returns:
        What `low_rank_backward_` needs: the low-rank activations, (R, N), or (N, G * R) and (N, R) on the other ways.
    """
    way = _way(branch, rows, x_NI)
    if way == "masked":
        return _add_masked_(branch, rows, x_NI, out_NO)
    if way == "grouped":
        return _add_grouped_(branch, rows, x_NI, out_NO)
    low_RN = x_NI.new_empty((branch.a_CRI.shape[1], x_NI.shape[0]))
    a = branch.a_CRI.unbind()
    pairs = [(target, target.b_COr.unbind()) for target in branch.targets]
    for client, start, stop in rows.parts:
        low_Rn = low_RN[:, start:stop]
        torch.mm(a[client], x_NI[start:stop].T, out=low_Rn)
        for target, b in pairs:
            out_NO[start:stop, target.columns].addmm_(low_Rn[target.ranks].T, b[client].T, alpha=branch.scaling)
    return low_RN


def low_rank_backward_(
    branch: Branch,
    rows: Rows,
    x_NI: torch.Tensor,
    low: torch.Tensor,
    grad_NO: torch.Tensor,
    grad_x_NI: torch.Tensor | None,
) -> None:
    """Add the gradients of A and B to the branch's gradient views, and that of x to `grad_x_NI`, in place.

    Args:
        branch: as in the forward pass.
        rows: as in the forward pass.
        x_NI: as in the forward pass.
        low: what `add_low_rank_` returned.
        grad_NO: gradient of the stacked layers' outputs.
        grad_x_NI: gradient of x so far; None if x needs none.
    """
    way = _way(branch, rows, x_NI)
    if way == "masked":
        _masked_backward_(branch, rows, x_NI, low, grad_NO, grad_x_NI)
    elif way == "grouped":
        _grouped_backward_(branch, rows, x_NI, low, grad_NO, grad_x_NI)
    else:
        _segments_backward_(branch, rows, x_NI, low, grad_NO, grad_x_NI)


def _way(branch: Branch, rows: Rows, x_NI: torch.Tensor) -> Way:
    if rows.way is not None:
        return rows.way
    if x_NI.device.type == "cpu":
        return "segments"
    num_clients, ranks, _ = branch.a_CRI.shape
    if num_clients * ranks <= _MOST_MASKED_RANKS or not hasattr(torch.nn.functional, "grouped_mm"):
        return "masked"
    # the kernel's strides are multiples of 16 bytes
    sizes = [ranks, *branch.a_CRI.shape[2:], *(size for target in branch.targets for size in target.b_COr.shape[1:])]
    fits = x_NI.dtype == torch.bfloat16 and all(size % 8 == 0 for size in sizes)
    return "grouped" if fits else "masked"


# ------------------------------------------------------------------------------------------------------------- segments


def _segments_backward_(
    branch: Branch,
    rows: Rows,
    x_NI: torch.Tensor,
    low_RN: torch.Tensor,
    grad_NO: torch.Tensor,
    grad_x_NI: torch.Tensor | None,
) -> None:
    needs_low = branch.grad_a_CRI is not None or grad_x_NI is not None
    grad_low_RN = torch.empty_like(low_RN) if needs_low else None
    for target in branch.targets:
        if target.grad_b_COr is not None:
            grad_b = target.grad_b_COr.unbind()
            for client, start, stop in rows.parts:
                product_rO = low_RN[target.ranks, start:stop] @ grad_NO[start:stop, target.columns]
                grad_b[client].add_(product_rO.T, alpha=branch.scaling)
        if grad_low_RN is not None:
            b = target.b_COr.unbind()
            for client, start, stop in rows.parts:
                grad_nO = grad_NO[start:stop, target.columns]
                torch.mm(b[client].T, grad_nO.T, out=grad_low_RN[target.ranks, start:stop])
    if grad_low_RN is None:
        return
    a = branch.a_CRI.unbind()
    grad_a = None if branch.grad_a_CRI is None else branch.grad_a_CRI.unbind()
    for client, start, stop in rows.parts:
        grad_low_Rn = grad_low_RN[:, start:stop]
        if grad_a is not None:
            _add_product_(grad_a[client], grad_low_Rn, x_NI[start:stop], branch.scaling)
        if grad_x_NI is not None:
            grad_x_NI[start:stop].addmm_(grad_low_Rn.T, a[client], alpha=branch.scaling)


def _add_product_(sum_: torch.Tensor, left: torch.Tensor, right: torch.Tensor, factor: float) -> None:
    """sum_ += factor * left @ right, in place; the sum may be kept in a wider type than the product."""
    if sum_.dtype == left.dtype:
        sum_.addmm_(left, right, alpha=factor)
    else:
        sum_.add_(left @ right, alpha=factor)


# --------------------------------------------------------------------------------------------------------------- masked


def _masked_together(branch: Branch) -> int:
    """G: work and memory grow with the clients of a group times their ranks."""
    num_clients, ranks, _ = branch.a_CRI.shape
    return max(1, min(num_clients, _MOST_MASKED_RANKS // ranks))


def _groups(branch: Branch, rows: Rows) -> Iterator[tuple[slice, slice, slice]]:
    """Clients that are masked together, their rows, and their columns of the low-rank activations."""
    (num_clients, ranks, _), together = branch.a_CRI.shape, _masked_together(branch)
    for first in range(0, num_clients, together):
        last = min(first + together, num_clients)
        members = [part for part in rows.parts if first <= part.client < last]
        if members:
            yield slice(first, last), slice(members[0].start, members[-1].stop), slice(0, (last - first) * ranks)


def _foreign(rows: Rows, branch: Branch) -> torch.Tensor:
    """Where a row meets ranks of another client of its group, for columns that are client after client; made once for
    all layers."""
    together, ranks = _masked_together(branch), branch.a_CRI.shape[1]
    if (together, ranks) not in rows.foreign:
        owner_R = torch.arange(together, device=rows.owner_N.device).repeat_interleave(ranks)
        rows.foreign[together, ranks] = (rows.owner_N % together)[:, None] != owner_R
    return rows.foreign[together, ranks]


def _by_client(low: torch.Tensor, branch: Branch) -> torch.Tensor:
    """(n, G * R) -> (n, G, R)."""
    return low.view(len(low), -1, branch.a_CRI.shape[1])


def _add_masked_(branch: Branch, rows: Rows, x_NI: torch.Tensor, out_NO: torch.Tensor) -> torch.Tensor:
    low = x_NI.new_empty((len(x_NI), _masked_together(branch) * branch.a_CRI.shape[1]))
    foreign = _foreign(rows, branch)
    for clients, own, columns in _groups(branch, rows):
        part = low[own, columns]
        torch.mm(x_NI[own], branch.a_CRI[clients].flatten(0, 1).T, out=part)
        part.masked_fill_(foreign[own, columns], 0.0)
        for target in branch.targets:
            b_OR = target.b_COr[clients].transpose(0, 1).flatten(1)
            low_of_target = _by_client(part, branch)[:, :, target.ranks].flatten(1)
            out_NO[own, target.columns].addmm_(low_of_target, b_OR.T, alpha=branch.scaling)
    return low


def _masked_backward_(
    branch: Branch,
    rows: Rows,
    x_NI: torch.Tensor,
    low: torch.Tensor,
    grad_NO: torch.Tensor,
    grad_x_NI: torch.Tensor | None,
) -> None:
    foreign = _foreign(rows, branch)
    for clients, own, columns in _groups(branch, rows):
        a_CRI, part = branch.a_CRI[clients], low[own, columns]
        grad_low = torch.empty_like(part, memory_format=torch.contiguous_format)
        for target in branch.targets:
            grad_target_nO = grad_NO[own, target.columns]
            if target.grad_b_COr is not None:
                grad_b_OR = grad_target_nO.T @ _by_client(part, branch)[:, :, target.ranks].flatten(1)
                grad_b_OCr = grad_b_OR.view(len(grad_b_OR), len(a_CRI), -1)
                target.grad_b_COr[clients].add_(grad_b_OCr.transpose(0, 1), alpha=branch.scaling)
            b_OR = target.b_COr[clients].transpose(0, 1).flatten(1)
            grad_of_target = (grad_target_nO @ b_OR).view(len(part), len(a_CRI), -1)
            _by_client(grad_low, branch)[:, :, target.ranks] = grad_of_target
        grad_low.masked_fill_(foreign[own, columns], 0.0)
        if branch.grad_a_CRI is not None:
            branch.grad_a_CRI[clients].add_((grad_low.T @ x_NI[own]).view(a_CRI.shape), alpha=branch.scaling)
        if grad_x_NI is not None:
            grad_x_NI[own].addmm_(grad_low, a_CRI.flatten(0, 1), alpha=branch.scaling)


# -------------------------------------------------------------------------------------------------------------- grouped


def _grouped(left: torch.Tensor, right: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Each client's rows of `left` with its matrix of `right`; or, of two matrices, each client's own product."""
    return torch.nn.functional.grouped_mm(left, right, offs=rows.ends_C)


def _add_grouped_(branch: Branch, rows: Rows, x_NI: torch.Tensor, out_NO: torch.Tensor) -> torch.Tensor:
    low_NR = _grouped(x_NI, branch.a_CRI.contiguous().transpose(1, 2), rows)
    for target in branch.targets:
        b_CrO = target.b_COr.contiguous().transpose(1, 2)
        out_NO[:, target.columns].add_(
            _grouped(low_NR[:, target.ranks].contiguous(), b_CrO, rows), alpha=branch.scaling
        )
    return low_NR


def _grouped_backward_(
    branch: Branch,
    rows: Rows,
    x_NI: torch.Tensor,
    low_NR: torch.Tensor,
    grad_NO: torch.Tensor,
    grad_x_NI: torch.Tensor | None,
) -> None:
    grad_low_NR = torch.empty_like(low_NR)
    for target in branch.targets:
        grad_target_NO = grad_NO[:, target.columns].contiguous()
        if target.grad_b_COr is not None:
            grad_b_COr = _grouped(grad_target_NO.T, low_NR[:, target.ranks].contiguous(), rows)
            target.grad_b_COr.add_(grad_b_COr, alpha=branch.scaling)
        grad_low_NR[:, target.ranks] = _grouped(grad_target_NO, target.b_COr.contiguous(), rows)
    if branch.grad_a_CRI is not None:
        branch.grad_a_CRI.add_(_grouped(grad_low_NR.T, x_NI, rows), alpha=branch.scaling)
    if grad_x_NI is not None:
        grad_x_NI.add_(_grouped(grad_low_NR, branch.a_CRI.contiguous(), rows), alpha=branch.scaling)
