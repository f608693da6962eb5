"""The body of a known family without a backward pass, where the caller keeps what rows look back at.

Computes what `fused.hidden` computes. Knows nothing about sequences or how keys and values are kept.

Axes: C adapters, N packed rows, n rows of one adapter, M rows asked for, d hidden features, F features of the
feed-forward layer, I/O in and out features, R rank of a stack, H heads, G key-value heads, D features of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from fedmira.model.activation import activate
from fedmira.model.attention import Settings
from fedmira.model.body import Body, Soften
from fedmira.model.fused import Adapters, rotate_
from fedmira.model.low_rank import Rows, add_low_rank_

LookBack = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, Settings], torch.Tensor]
"""(block, queries (N, H, D), keys (N, G, D), values (N, G, D), settings) to what the rows see, (N, H, D)."""


LowRank = Callable[[int, str, torch.Tensor, torch.Tensor], None]
"""Adds to the outputs (N, O) of a block's stack the low-rank products of its inputs (N, I), in place."""


class Wanted(NamedTuple):
    """The rows whose final hidden state is asked for."""

    rows_M: torch.Tensor
    add_low_rank_: LowRank
    """Of these rows."""


def hidden(
    body: Body,
    tokens_N: torch.Tensor,
    positions_N: torch.Tensor,
    longest: int,
    add_low_rank_: LowRank,
    look_back: LookBack,
    wanted: Wanted | None = None,
    soften: Soften | None = None,
) -> torch.Tensor:
    """Final hidden states of the wanted rows, (M, d); of all rows if none are named.

    Args:
        body: the frozen body.
        tokens_N: tokens, on the device of the body.
        positions_N: their positions in their sequences.
        longest: more than any position.
        add_low_rank_: the adapters; called once for each stack of each block.
        look_back: attention; called once for each block, in order.
        wanted: rows that go on behind the last attention.
        soften: puts soft prompts among the embeddings.
    """
    rotation = None
    if body.rotate is not None:
        cosine, sine = body.rotate(longest)
        rotation = (cosine[positions_N], sine[positions_N])
    heads = [body.num_heads, body.num_key_heads, body.num_key_heads]
    last = len(body.blocks) - 1
    x_Nd = body.embed(tokens_N, positions_N, soften)
    for index, block in enumerate(body.blocks):
        h_Nd, _ = block.attention_norm(x_Nd)
        projected_NO = block.attention_in(h_Nd)
        add_low_rank_(index, "attention_in", h_Nd, projected_NO)
        states_NXD = projected_NO.view(len(projected_NO), sum(heads), -1)
        if rotation is not None:
            rotate_(states_NXD[:, : heads[0] + heads[1]], rotation)
        query_NHD, key_NGD, value_NGD = torch.split(states_NXD, heads, dim=1)
        seen_NO = look_back(index, query_NHD, key_NGD, value_NGD, block.look_back).flatten(1)
        if index == last and wanted is not None:
            x_Nd, seen_NO, add_low_rank_ = x_Nd[wanted.rows_M], seen_NO[wanted.rows_M], wanted.add_low_rank_
        x_Nd = block.attention_out.onto(x_Nd, seen_NO)
        add_low_rank_(index, "attention_out", seen_NO, x_Nd)
        h_Nd, _ = block.feed_norm(x_Nd)
        inner_NO = block.feed_in(h_Nd)
        add_low_rank_(index, "feed_in", h_Nd, inner_NO)
        active_NF = activate(inner_NO, body.gated)
        x_Nd = block.feed_out.onto(x_Nd, active_NF)
        add_low_rank_(index, "feed_out", active_NF, x_Nd)
    return body.final_norm(x_Nd)[0]


def of_rows(adapters: Adapters, rows: Rows) -> LowRank:
    """The low-rank products of rows that are few adapters' or many of each; `rows` says whose they are."""

    def add_(block: int, stack: str, x_NI: torch.Tensor, out_NO: torch.Tensor) -> None:
        for branch in adapters.branches[block][stack]:
            add_low_rank_(branch, rows, x_NI, out_NO)

    return add_


def of_equal_groups(body: Body, adapters: Adapters) -> LowRank:
    """The low-rank products of rows that come in groups of one size, one group for each adapter, in order.

    The adapters of a stack become one batched pair of matrices, B with a block for each of its layers and zeros
    elsewhere: two calls for all layers and clients. Copies the values of the adapters.
    """
    pairs: list[dict[str, tuple[torch.Tensor, torch.Tensor]]] = []
    for block, branches_of in zip(body.blocks, adapters.branches, strict=True):
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

    def add_(block: int, stack: str, x_NI: torch.Tensor, out_NO: torch.Tensor) -> None:
        if stack in pairs[block]:
            a_CIR, b_CRO = pairs[block][stack]
            low_CnR = torch.bmm(x_NI.view(len(a_CIR), -1, x_NI.shape[1]), a_CIR)
            out_NO.view(len(a_CIR), -1, out_NO.shape[1]).baddbmm_(low_CnR, b_CRO)

    return add_
