"""Adds the low-rank products of many clients to one frozen base model, each client's rows meeting only its own pair.

Works through forward hooks that live inside a `with` block: the module tree and the state dict of the base stay as
they are. Gradients are written straight into a gradient arena. Knows nothing about losses, optimizers or rounds.

For the rows x of client k:  y = W x + scaling * B_k (A_k dropout(x)),  in PEFT's order of operations, so that one
sequence of one client gets the same bits as from PEFT.

Axes: C clients (rows of the arena), N rows of activations, n rows of one client, P parameters of one adapter, R rank,
I/O in and out features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from fedmira.model.base import BaseModel
from fedmira.model.low_rank import Segment, segments
from fedmira.types import PAIRS, Arena, TensorSpec

ALL_GROUPS = frozenset(group for pair in PAIRS for group in pair)


@dataclass(frozen=True, slots=True)
class Dropout:
    """Inverted dropout on the input of the low-rank branch."""

    rate: float
    generator: Callable[[int, str], torch.Generator]
    """(row of the arena, name of a pair) -> a fresh CPU generator. What it draws must depend on the client, not on its
    row, so that a client's mask never depends on who trains beside it."""


class _Site(NamedTuple):
    """One target layer with the views of the arena, and of the gradient arena where one is filled."""

    layer: str
    name: str
    """Of the stream of its masks; a second pair of the layer has one of its own."""
    a_CRI: torch.Tensor
    b_COR: torch.Tensor
    grad_a_CRI: torch.Tensor | None
    grad_b_COR: torch.Tensor | None
    scaling: float


@contextmanager
def attached(
    base: BaseModel,
    arena: Arena,
    rows_per_client: Sequence[int],
    *,
    gradient_CP: torch.Tensor | None = None,
    trainable: frozenset[str] = ALL_GROUPS,
    dropout: Dropout | None = None,
) -> Iterator[None]:
    """Inside the `with` block the base computes with the adapters of `arena`.

    Args:
        base: the frozen model.
        arena: (C, P), on the device of the base. Its values must stay as they are until backward is done.
        rows_per_client: how many rows of activations each row of the arena has in a batch, in order; 0 is allowed.
        gradient_CP: where backward adds the gradients; None computes none.
        trainable: groups that get a gradient; the others' columns of `gradient_CP` are left alone.
        dropout: None trains and judges without.
    """
    num_rows = sum(rows_per_client)
    parts = segments(rows_per_client)
    anchor = torch.zeros((), device=arena.values_KP.device, requires_grad=True) if gradient_CP is not None else None
    handles = []
    try:
        for site in _sites(arena, gradient_CP, trainable):
            hook = _make_hook(site, parts, num_rows, anchor, dropout)
            handles.append(base.model.get_submodule(site.layer).register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _sites(arena: Arena, gradient_CP: torch.Tensor | None, trainable: frozenset[str]) -> list[_Site]:
    gradients = None if gradient_CP is None else arena.replace(gradient_CP)

    def gradient_view(spec: TensorSpec) -> torch.Tensor | None:
        return gradients.view(spec) if gradients is not None and spec.group in trainable else None

    return [
        _Site(
            a.layer,
            a.layer if a.group == PAIRS[0][0] else a.name,
            arena.view(a),
            arena.view(b),
            gradient_view(a),
            gradient_view(b),
            arena.layout.scaling,
        )
        for a, b in arena.layout.pairs
    ]


def _make_hook(
    site: _Site,
    parts: tuple[Segment, ...],
    num_rows: int,
    anchor: torch.Tensor | None,
    dropout: Dropout | None,
) -> Callable[[torch.nn.Module, tuple[Any, ...], torch.Tensor], torch.Tensor]:
    def hook(_module: torch.nn.Module, inputs: tuple[Any, ...], result: torch.Tensor) -> torch.Tensor:
        x_NI = inputs[0].reshape(-1, inputs[0].shape[-1])
        if len(x_NI) != num_rows:
            raise RuntimeError(f"{len(x_NI)} rows reached {site.layer}, but the batch has {num_rows}")
        masks = None if dropout is None else _masks(dropout, site, parts, x_NI)
        # nobody else holds what a layer just returned: adding in place spares a matrix of the layer's size. Views
        # (Conv1D returns one) are copied, because autograd would copy them anyway
        result = result.clone() if result._is_view() else result
        if anchor is None:
            _add_low_rank_(site, parts, x_NI, result, masks)
            return result
        adapted: torch.Tensor = _LowRank.apply(anchor, x_NI, result, site, parts, masks)  # type: ignore[no-untyped-call]
        return adapted

    return hook


def _masks(dropout: Dropout, site: _Site, parts: tuple[Segment, ...], x_NI: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What each client's rows are multiplied with: 0 with probability `rate`, else 1 / (1 - rate)."""
    kept = 1.0 - dropout.rate
    return tuple(
        torch.empty(s.stop - s.start, x_NI.shape[1])
        .bernoulli_(kept, generator=dropout.generator(s.client, site.name))
        .div_(kept)
        .to(device=x_NI.device, dtype=site.a_CRI.dtype)
        for s in parts
    )


def _add_low_rank_(
    site: _Site,
    parts: tuple[Segment, ...],
    x_NI: torch.Tensor,
    result: torch.Tensor,
    masks: tuple[torch.Tensor, ...] | None,
) -> list[torch.Tensor]:
    """Add the low-rank branch to `result` (..., O) in place; the low-rank activations (n, R) of each segment."""
    result_NO = result.view(-1, result.shape[-1])
    dtype = site.a_CRI.dtype
    low_rank = []
    for index, (client, start, stop) in enumerate(parts):
        x_nI = x_NI[start:stop].to(dtype)
        if masks is not None:
            x_nI = x_nI * masks[index]
        h_nR = F.linear(x_nI, site.a_CRI[client])
        delta_nO = F.linear(h_nR, site.b_COR[client]).mul_(site.scaling)
        if dtype == result.dtype:
            result_NO[start:stop].add_(delta_nO)
        else:
            result_NO[start:stop] = result_NO[start:stop] + delta_nO
        low_rank.append(h_nR)
    return low_rank


class _LowRank(torch.autograd.Function):
    """Adds the low-rank branch; backward adds the gradients of A and B to the gradient arena.

    The pairs are not inputs of the function: slicing one big leaf inside autograd would materialise a zero matrix of
    the arena's size per slice. `anchor` stands in for them, so that backward runs even where x needs no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        _anchor: torch.Tensor,
        x_NI: torch.Tensor,
        result: torch.Tensor,
        site: _Site,
        parts: tuple[Segment, ...],
        masks: tuple[torch.Tensor, ...] | None,
    ) -> torch.Tensor:
        low_rank = _add_low_rank_(site, parts, x_NI, result, masks)
        ctx.mark_dirty(result)
        ctx.save_for_backward(x_NI, *low_rank)
        ctx.site, ctx.parts, ctx.masks = site, parts, masks
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (grad,) = gradients
        grad_NO = grad.reshape(-1, grad.shape[-1])
        x_NI, *low_rank = ctx.saved_tensors
        site: _Site = ctx.site
        dtype = site.a_CRI.dtype
        grad_x_NI = torch.empty_like(x_NI) if ctx.needs_input_grad[1] else None
        for index, (client, start, stop) in enumerate(ctx.parts):
            grad_nO = grad_NO[start:stop].to(dtype)
            if site.grad_b_COR is not None:
                site.grad_b_COR[client].addmm_(grad_nO.T, low_rank[index], alpha=site.scaling)
            if site.grad_a_CRI is None and grad_x_NI is None:
                continue
            grad_h_nR = (grad_nO @ site.b_COR[client]).mul_(site.scaling)
            mask_nI = None if ctx.masks is None else ctx.masks[index]
            if site.grad_a_CRI is not None:
                x_nI = x_NI[start:stop].to(dtype)
                site.grad_a_CRI[client].addmm_(grad_h_nR.T, x_nI if mask_nI is None else x_nI * mask_nI)
            if grad_x_NI is None:
                continue
            if mask_nI is None and dtype == grad_x_NI.dtype:
                torch.mm(grad_h_nR, site.a_CRI[client], out=grad_x_NI[start:stop])
            else:
                grad_x_nI = grad_h_nR @ site.a_CRI[client]
                grad_x_NI[start:stop] = grad_x_nI if mask_nI is None else grad_x_nI.mul_(mask_nI)
        return None, grad_x_NI, grad if ctx.needs_input_grad[2] else None, None, None, None
