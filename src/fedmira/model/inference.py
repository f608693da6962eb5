"""The body of a known family without a backward pass, where the caller keeps what rows look back at.

Computes what `fused.hidden` computes. Knows nothing about sequences or how keys and values are kept.

Rows lie one after the other, (N, ...), or in groups of one size, (C, n, ...), as the low-rank products take them.

Axes: C adapters, N rows, n rows of one adapter, M rows asked for, d hidden features, F features of the
feed-forward layer, I/O in and out features, R rank of a stack, H heads, G key-value heads, D features of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from fedmira.model.activation import activate
from fedmira.model.attention import Settings
from fedmira.model.body import Body, Norm, Rotation
from fedmira.model.fused import Adapters, rotate_
from fedmira.model.low_rank import Rows, add_low_rank_

LookBack = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, Settings], torch.Tensor]
"""(block, queries (N, H, D), keys (N, G, D), values (N, G, D), settings) to what the rows see, (N, H, D)."""


LowRank = Callable[[int, str, torch.Tensor, torch.Tensor], None]
"""Adds to the outputs (.., O) of a block's stack the low-rank products of its inputs (.., I), in place."""


class Wanted(NamedTuple):
    """The rows whose final hidden state is asked for."""

    rows_M: torch.Tensor
    add_low_rank_: LowRank
    """Of these rows."""


def hidden(
    body: Body,
    x: torch.Tensor,
    rotation: Rotation | None,
    add_low_rank_: LowRank,
    look_back: LookBack,
    wanted: Wanted | None = None,
) -> torch.Tensor:
    """Final hidden states of the wanted rows, (M, d); of all rows if none are named, shaped as they are.

    Args:
        body: the frozen body.
        x: the rows that enter the first block, (N, d) or (C, n, d).
        rotation: of the rows' positions, one after the other; None where positions are learned.
        add_low_rank_: the adapters; called once for each stack of each block.
        look_back: attention; called once for each block, in order.
        wanted: rows that go on behind the last attention, if they lie one after the other.
    """
    heads = [body.num_heads, body.num_key_heads, body.num_key_heads]
    rows, num_rows = x.shape[:-1], x.shape[:-1].numel()
    last = len(body.blocks) - 1
    for index, block in enumerate(body.blocks):
        h = normalised(block.attention_norm, x)
        projected = block.attention_in(h)
        add_low_rank_(index, "attention_in", h, projected)
        states_NXD = projected.view(num_rows, sum(heads), -1)
        if rotation is not None:
            rotate_(states_NXD[:, : heads[0] + heads[1]], rotation)
        query_NHD, key_NGD, value_NGD = torch.split(states_NXD, heads, dim=1)
        seen = look_back(index, query_NHD, key_NGD, value_NGD, block.look_back).reshape(*rows, -1)
        if index == last and wanted is not None:
            x, seen, add_low_rank_ = x[wanted.rows_M], seen[wanted.rows_M], wanted.add_low_rank_
        x = block.attention_out.onto(x, seen)
        add_low_rank_(index, "attention_out", seen, x)
        h = normalised(block.feed_norm, x)
        inner = block.feed_in(h)
        add_low_rank_(index, "feed_in", h, inner)
        active = activate(inner, body.gated)
        x = block.feed_out.onto(x, active)
        add_low_rank_(index, "feed_out", active, x)
    return normalised(body.final_norm, x)


def normalised(norm: Norm, x: torch.Tensor) -> torch.Tensor:
    """The rows behind a norm, as `norm` gives them but for rounding in 32 bits and more."""
    if norm.bias_d is None and x.dtype.itemsize >= 4:
        # one call instead of eight
        return torch.rms_norm(x, norm.weight_d.shape, norm.weight_d, norm.epsilon)
    return norm(x)[0]


def of_rows(adapters: Adapters, rows: Rows) -> LowRank:
    """The low-rank products of rows that are few adapters' or many of each; `rows` says whose they are."""

    def add_(block: int, stack: str, x_NI: torch.Tensor, out_NO: torch.Tensor) -> None:
        for branch in adapters[block][stack]:
            add_low_rank_(branch, rows, x_NI, out_NO)

    return add_


def of_equal_groups(body: Body, adapters: Adapters) -> LowRank:
    """The low-rank products of rows (C, n, ...), one group for each adapter, in order.

    The adapters of a stack become one batched pair of matrices, B with a block for each of its layers and zeros
    elsewhere: two calls for all layers and clients. Copies the values of the adapters.
    """
    pairs: list[dict[str, tuple[torch.Tensor, torch.Tensor]]] = []
    for block, branches_of in zip(body.blocks, adapters, strict=True):
        pairs.append({})
        for stack, branches in branches_of.items():
            if not branches:
                continue
            a_CRI = torch.cat([branch.a_CRI for branch in branches], dim=1)
            b_CRO = a_CRI.new_zeros((*a_CRI.shape[:2], len(getattr(block, stack).weight_OI)))
            start = 0
            for branch in branches:
                for target in branch.targets:
                    ranks = slice(start + target.ranks.start, start + target.ranks.stop)
                    torch.mul(target.b_COr.transpose(1, 2), branch.scaling, out=b_CRO[:, ranks, target.columns])
                start += branch.a_CRI.shape[1]
            pairs[-1][stack] = (a_CRI.transpose(1, 2), b_CRO)

    def add_(block: int, stack: str, x_CnI: torch.Tensor, out_CnO: torch.Tensor) -> None:
        if stack in pairs[block]:
            a_CIR, b_CRO = pairs[block][stack]
            out_CnO.baddbmm_(torch.bmm(x_CnI, a_CIR), b_CRO)

    return add_
