"""The body of the Llama and GPT-2 families written out over packed rows, with its backward pass by hand.

Computes what the stock model with adapters computes (`BaseModel.hidden` inside `lora.attached`, its slow twin) in
fewer passes over memory: layers that share an input are one matrix product, what is cheap is computed again instead of
kept, and behind the last attention only the rows that are asked for go on. Weights are read where the stock model
keeps them. Knows nothing about losses, optimizers or rounds.

Axes: C clients, N packed rows, M rows asked for, d hidden features, F features of the feed-forward layer, O outputs of
stacked layers, R rank, B sequences of one call of attention, T positions, Q positions that ask, H heads, G key-value
heads, X = H + 2 G, D features of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, islice, pairwise
from typing import Any, NamedTuple

import torch

from fedmira.model.activation import activate, activate_backward
from fedmira.model.attention import Alone, Bucket, Packing, Settings, asking_for
from fedmira.model.body import STACKS, Block, Body, Norm, Rotation, Soften, Stack, in_cache
from fedmira.model.kept_attention import Look, SlowCall, look_back_, look_back_backward_
from fedmira.model.low_rank import (
    Branch,
    Rows,
    Target,
    Way,
    add_low_rank_,
    assign_rows,
    low_rank_backward_,
)
from fedmira.types import PAIRS, Arena, TensorSpec

Adapters = tuple[dict[str, tuple[Branch, ...]], ...]
"""The adapters of a cohort as branches of a body: per block, those of each of its stacks."""


def bind(body: Body, arena: Arena, gradient_CP: torch.Tensor | None, trainable: frozenset[str]) -> Adapters:
    """See the arena as branches; views only, so what is written to its values later is seen too.

    Args:
        body: whose stacks are adapted.
        arena: (C, P), in the dtype and on the device of the body.
        gradient_CP: where backward adds the gradients; None computes none.
        trainable: groups that get a gradient.
    """
    gradients = None if gradient_CP is None else arena.replace(gradient_CP)
    pairs = {(spec_a.layer, spec_a.group): (spec_a, spec_b) for spec_a, spec_b in arena.layout.pairs}

    def gradient(spec: TensorSpec) -> torch.Tensor | None:
        return gradients.view(spec) if gradients is not None and spec.group in trainable else None

    def branch(run: list[tuple[slice, TensorSpec, TensorSpec]]) -> Branch:
        first_a = run[0][1]
        ends = list(accumulate((spec_a.shape[0] for _, spec_a, _ in run), initial=0))
        whole = replace(first_a, shape=(ends[-1], first_a.shape[1]))
        return Branch(
            arena.view(whole),
            gradient(whole),
            tuple(
                Target(columns, slice(start, stop), arena.view(spec_b), gradient(spec_b))
                for (columns, _, spec_b), (start, stop) in zip(run, pairwise(ends), strict=True)
            ),
            arena.layout.scaling,
        )

    def branches(stack: Stack) -> tuple[Branch, ...]:
        runs: list[list[tuple[slice, TensorSpec, TensorSpec]]] = []
        for group_a, _ in PAIRS:
            for layer, columns in stack.columns.items():
                if (layer, group_a) not in pairs:
                    continue
                spec_a, spec_b = pairs[layer, group_a]
                last_a = runs[-1][-1][1] if runs else None
                if last_a is not None and last_a.group == group_a and last_a.columns.stop == spec_a.offset:
                    runs[-1].append((columns, spec_a, spec_b))
                else:
                    runs.append([(columns, spec_a, spec_b)])
        return tuple(branch(run) for run in runs)

    return tuple({name: branches(getattr(block, name)) for name in STACKS} for block in body.blocks)


def hidden(
    body: Body,
    adapters: Adapters,
    tokens_N: torch.Tensor,
    positions_N: torch.Tensor,
    packing: Packing,
    rows_per_client: Sequence[int],
    wanted_M: torch.Tensor,
    wanted_per_client: Sequence[int],
    way: Way | None = None,
    soften: Soften | None = None,
) -> torch.Tensor:
    """Final hidden states of the rows `wanted_M`, (M, d); backward adds to the gradients the adapters were bound with.

    Args:
        body: the frozen body.
        adapters: from `bind`; their values must stay as they are until backward is done.
        tokens_N: packed tokens, on the device of the body.
        positions_N: their positions in their sequences.
        packing: how rows fall into sequences.
        rows_per_client: how many packed rows each adapter has, in order; 0 is allowed.
        wanted_M: ascending indices of rows.
        wanted_per_client: how many of these each adapter has.
        way: how low-rank products are computed; None chooses.
        soften: puts soft prompts among the embeddings; what it returns may ask for a gradient.
    """
    rows = assign_rows(rows_per_client, tokens_N.device, way)
    wanted_rows = assign_rows(wanted_per_client, tokens_N.device, way)
    pass_ = _Pass(body, packing, body.rotation(positions_N, packing.longest), rows, wanted_rows, wanted_M)
    last_pass = pass_._replace(packing=asking_for(packing, wanted_M))
    x_Nd = body.embed(tokens_N, positions_N, soften)
    last = len(body.blocks) - 1
    lowest = next((index for index, branches in enumerate(adapters) if any(branches.values())), 0)
    needs_gradient = torch.is_grad_enabled()
    # a soft prompt is below all blocks
    ends_at = -1 if x_Nd.requires_grad else lowest
    for index, (block, branches) in enumerate(zip(body.blocks, adapters, strict=True)):
        # nothing below the lowest adapted block is trained
        with torch.set_grad_enabled(needs_gradient and index >= lowest):
            if needs_gradient and index == lowest:
                # stands in for the adapters, which are no inputs of the functions: slicing one big leaf inside autograd
                # would materialise a zero matrix of the arena's size per slice
                x_Nd.requires_grad_()
            own_pass = last_pass if index == last else pass_
            x_Nd = _Attention.apply(x_Nd, own_pass, block, branches, index == ends_at, index == last)  # type: ignore[no-untyped-call]
            x_Nd = _FeedForward.apply(x_Nd, pass_, block, branches, index == last)  # type: ignore[no-untyped-call]
    out: torch.Tensor = _FinalNorm.apply(x_Nd, body.final_norm)  # type: ignore[no-untyped-call]
    return out


class _Pass(NamedTuple):
    """What is the same for all blocks of one forward pass."""

    body: Body
    packing: Packing
    rotation: Rotation | None
    rows: Rows
    wanted_rows: Rows
    wanted_M: torch.Tensor


def _add_all_(
    branches: tuple[Branch, ...], rows: Rows, x_NI: torch.Tensor, out_NO: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    return tuple(add_low_rank_(branch, rows, x_NI, out_NO) for branch in branches)


def _backward_all_(
    branches: tuple[Branch, ...],
    rows: Rows,
    x_NI: torch.Tensor,
    low: Sequence[torch.Tensor],
    grad_NO: torch.Tensor,
    grad_x_NI: torch.Tensor | None,
) -> None:
    for branch, low_NR in zip(branches, low, strict=True):
        low_rank_backward_(branch, rows, x_NI, low_NR, grad_NO, grad_x_NI)


class _Attention(torch.autograd.Function):
    """x + W_o attention(W_qkv norm(x)), of the wanted rows only in the last block."""

    @staticmethod
    def forward(
        ctx: Any,
        x_Nd: torch.Tensor,
        pass_: _Pass,
        block: Block,
        branches: dict[str, tuple[Branch, ...]],
        is_lowest: bool,
        is_last: bool,
    ) -> torch.Tensor:
        h_Nd, statistics = block.attention_norm(x_Nd)
        projected_NO = block.attention_in(h_Nd)
        low_in = _add_all_(branches["attention_in"], pass_.rows, h_Nd, projected_NO)
        heads_NO, looks = _look_back_(projected_NO, pass_, block.look_back, ctx.needs_input_grad[0])
        kept = [states for look in looks if not isinstance(look, SlowCall) for states in look]
        residual, rows = x_Nd, pass_.rows
        if is_last:
            residual = x_Nd.index_select(0, pass_.wanted_M)
            heads_NO = heads_NO.index_select(0, pass_.wanted_M)
            rows = pass_.wanted_rows
        out = block.attention_out.onto(residual, heads_NO)
        low_out = _add_all_(branches["attention_out"], rows, heads_NO, out)
        ctx.save_for_backward(x_Nd, heads_NO, *statistics, *low_in, *low_out, *kept)
        ctx.counts = len(statistics), len(low_in), len(low_out)
        ctx.looks = [look if isinstance(look, SlowCall) else len(look) for look in looks]
        ctx.pass_, ctx.block, ctx.branches = pass_, block, branches
        ctx.is_lowest, ctx.is_last = is_lowest, is_last
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (grad,) = gradients
        grad = grad.contiguous()
        x_Nd, heads, *rest = ctx.saved_tensors
        left = iter(rest)
        statistics, low_in, low_out = (tuple(islice(left, count)) for count in ctx.counts)
        looks = [look if isinstance(look, SlowCall) else tuple(islice(left, look)) for look in ctx.looks]
        block: Block = ctx.block
        pass_: _Pass = ctx.pass_
        grad_heads = block.attention_out.backward(grad)
        out_rows = pass_.wanted_rows if ctx.is_last else pass_.rows
        _backward_all_(ctx.branches["attention_out"], out_rows, heads, low_out, grad, grad_heads)
        if ctx.is_last:
            # rows that nobody asked for still served others as keys and values
            grad_heads = _spread(grad_heads, pass_.wanted_M, len(x_Nd))
        grad_projected_NO = _look_back_backward(grad_heads, pass_, block.look_back, looks)
        ctx.looks = None
        h_Nd = block.attention_norm.again(x_Nd, statistics) if low_in else None
        # what reached the lowest block came from frozen weights
        grad_h_Nd = None if ctx.is_lowest else block.attention_in.backward(grad_projected_NO)
        if h_Nd is not None:
            _backward_all_(ctx.branches["attention_in"], pass_.rows, h_Nd, low_in, grad_projected_NO, grad_h_Nd)
        if grad_h_Nd is None:
            return None, None, None, None, None, None
        around = None if ctx.is_last else grad
        grad_x_Nd = block.attention_norm.backward(grad_h_Nd, x_Nd, statistics, around)
        if ctx.is_last:
            grad_x_Nd.index_add_(0, pass_.wanted_M, grad)
        return grad_x_Nd, None, None, None, None, None


class _FeedForward(torch.autograd.Function):
    """x + W_out act(W_in norm(x))."""

    @staticmethod
    def forward(
        ctx: Any,
        x_Nd: torch.Tensor,
        pass_: _Pass,
        block: Block,
        branches: dict[str, tuple[Branch, ...]],
        is_last: bool,
    ) -> torch.Tensor:
        rows = pass_.wanted_rows if is_last else pass_.rows
        h_Nd, statistics = block.feed_norm(x_Nd)
        inner_NO = block.feed_in(h_Nd)
        low_in = _add_all_(branches["feed_in"], rows, h_Nd, inner_NO)
        active_NF = activate(inner_NO, pass_.body.gated)
        out_Nd = block.feed_out.onto(x_Nd, active_NF)
        low_out = _add_all_(branches["feed_out"], rows, active_NF, out_Nd)
        ctx.save_for_backward(x_Nd, inner_NO, *statistics, *low_in, *low_out)
        ctx.counts = len(statistics), len(low_in)
        ctx.rows, ctx.block, ctx.branches, ctx.gated = rows, block, branches, pass_.body.gated
        return out_Nd

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (grad,) = gradients
        grad_Nd = grad.contiguous()
        x_Nd, inner_NO, *rest = ctx.saved_tensors
        num_statistics, num_low = ctx.counts
        statistics, low_in = tuple(rest[:num_statistics]), rest[num_statistics : num_statistics + num_low]
        low_out = rest[num_statistics + num_low :]
        block: Block = ctx.block
        grad_active_NF = block.feed_out.backward(grad_Nd)
        if low_out:
            active_NF = activate(inner_NO, ctx.gated)
            _backward_all_(ctx.branches["feed_out"], ctx.rows, active_NF, low_out, grad_Nd, grad_active_NF)
        grad_inner_NO = activate_backward(grad_active_NF, inner_NO, ctx.gated)
        grad_h_Nd = block.feed_in.backward(grad_inner_NO)
        if low_in:
            h_Nd = block.feed_norm.again(x_Nd, statistics)
            _backward_all_(ctx.branches["feed_in"], ctx.rows, h_Nd, low_in, grad_inner_NO, grad_h_Nd)
        grad_x_Nd = block.feed_norm.backward(grad_h_Nd, x_Nd, statistics, grad_Nd)
        return grad_x_Nd, None, None, None, None


class _FinalNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_Md: torch.Tensor, norm: Norm) -> torch.Tensor:
        h_Md, statistics = norm(x_Md)
        ctx.save_for_backward(x_Md, *statistics)
        ctx.norm = norm
        return h_Md

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x_Md, *statistics = ctx.saved_tensors
        return ctx.norm.backward(gradients[0].clone(), x_Md, tuple(statistics)), None


def _look_back_(
    projected_NO: torch.Tensor, pass_: _Pass, settings: Settings, keep: bool
) -> tuple[torch.Tensor, list[Look]]:
    """What every row sees of its own sequence, (N, H * D), and what the backward pass needs of each bucket and then of
    each sequence that stands alone; turns the queries and keys of `projected_NO` by their positions."""
    body, packing = pass_.body, pass_.packing
    states_NXD = projected_NO.view(len(projected_NO), body.num_heads + 2 * body.num_key_heads, -1)
    if pass_.rotation is not None:
        rotate_(states_NXD[:, : body.num_heads + body.num_key_heads], pass_.rotation)
    looks, outputs = [], []
    for bucket in packing.buckets:
        query, key, value = _of_bucket(states_NXD, bucket, body)
        outputs.append(torch.empty_like(query, memory_format=torch.contiguous_format))
        looks.append(look_back_(query, key, value, settings, keep, outputs[-1]))
    if outputs:
        output_NHD = torch.cat([output_BTHD.flatten(0, 1) for output_BTHD in outputs])
        if packing.slots_n is not None:
            output_NHD = output_NHD.index_select(0, packing.slots_n)
    if packing.alone:
        of_buckets = output_NHD if outputs else None
        output_NHD = states_NXD.new_empty((len(states_NXD), body.num_heads, states_NXD.shape[2]))
        if of_buckets is not None and packing.rows_n is not None:
            output_NHD.index_copy_(0, packing.rows_n, of_buckets)
        for one in packing.alone:
            query, key, value = _of_alone(states_NXD, one, body)
            output = output_NHD[None, one.asking]
            looks.append(look_back_(query, key, value, settings, keep, output, one.lengths))
    return output_NHD.flatten(1), looks


def _look_back_backward(grad_NO: torch.Tensor, pass_: _Pass, settings: Settings, looks: Sequence[Look]) -> torch.Tensor:
    """Gradient of the projected rows, (N, O), for that of what `_look_back_` returned; `looks` is what it returned."""
    body, packing = pass_.body, pass_.packing
    num_heads, turned = body.num_heads, body.num_heads + body.num_key_heads
    grad_NHD = grad_NO.view(len(grad_NO), num_heads, -1)
    if packing.buckets:
        grad_states_NXD = _buckets_backward(grad_NHD, pass_, settings, looks[: len(packing.buckets)])
    else:
        grad_states_NXD = grad_NHD.new_empty((len(grad_NHD), turned + body.num_key_heads, grad_NHD.shape[2]))
    for one, look in zip(packing.alone, looks[len(packing.buckets) :], strict=True):
        grad_query_QHD = grad_states_NXD[one.asking, :num_heads]
        grads = look_back_backward_(grad_NHD[None, one.asking], settings, look, grad_query_QHD[None])
        if one.asking.start > one.rows.start:
            grad_states_NXD[one.rows.start : one.asking.start, :num_heads] = 0.0
        num_shared = one.prefix.stop - one.prefix.start
        for first, grad_1KGD in zip((num_heads, turned), grads, strict=True):
            of_heads = slice(first, first + body.num_key_heads)
            own = grad_states_NXD[one.rows, of_heads]
            # others may have added to what they share with this one, where they lie in buckets
            (own.add_ if packing.buckets else own.copy_)(grad_1KGD[0, num_shared:])
            if num_shared:
                grad_states_NXD[one.prefix, of_heads].add_(grad_1KGD[0, :num_shared])
    if pass_.rotation is not None:
        cosine, sine = pass_.rotation
        rotate_(grad_states_NXD[:, :turned], (cosine, -sine))
    return grad_states_NXD.flatten(1)


def _buckets_backward(grad_NHD: torch.Tensor, pass_: _Pass, settings: Settings, looks: Sequence[Look]) -> torch.Tensor:
    """Gradient of queries, keys and values, (N, X, D), as far as it comes through buckets."""
    body, packing = pass_.body, pass_.packing
    num_rows, num_states = len(grad_NHD), body.num_heads + 2 * body.num_key_heads
    sizes = [bucket.num_sequences * bucket.length for bucket in packing.buckets]
    if packing.slots_n is not None:
        own = grad_NHD if packing.rows_n is None else grad_NHD.index_select(0, packing.rows_n)
        grad_NHD = _spread(own, packing.slots_n, sum(sizes))
    slots = []
    for bucket, look, grad in zip(packing.buckets, looks, torch.split(grad_NHD, sizes), strict=True):
        grad_BTXD = grad.new_empty((bucket.num_sequences, bucket.length, num_states, grad.shape[2]))
        query, key, value = _split(grad_BTXD, body)
        grads = look_back_backward_(grad.view(query.shape), settings, look, query)
        for into, of in zip((key, value), grads, strict=True):
            into.copy_(of)
        slots.append(grad_BTXD.flatten(0, 1))
    grad_slots = slots[0] if len(slots) == 1 else torch.cat(slots)
    if packing.slots_n is None:
        return grad_slots
    grad_states_NXD = grad_slots.index_select(0, packing.slots_n)
    if packing.rows_n is not None:
        grad_states_NXD = _spread(grad_states_NXD, packing.rows_n, num_rows)
    if packing.repeated_rows is not None and packing.repeated_slots is not None:
        grad_states_NXD.index_add_(0, packing.repeated_rows, grad_slots.index_select(0, packing.repeated_slots))
    return grad_states_NXD


_Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _split(states_BTXD: torch.Tensor, body: Body) -> _Parts:
    """Queries, keys and values."""
    query, key, value = torch.split(states_BTXD, [body.num_heads, body.num_key_heads, body.num_key_heads], dim=2)
    return query, key, value


def _of_bucket(states_NXD: torch.Tensor, bucket: Bucket, body: Body) -> _Parts:
    """Queries, keys and values of a bucket, (B, T, H or G, D)."""
    slots = states_NXD if bucket.rows is None else states_NXD.index_select(0, bucket.rows)
    return _split(slots.view(bucket.num_sequences, bucket.length, *states_NXD.shape[1:]), body)


def _of_alone(states_NXD: torch.Tensor, one: Alone, body: Body) -> _Parts:
    """Queries (1, Q, H, D), keys and values (1, K, G, D) of a sequence that stands alone."""
    query = states_NXD[None, one.asking, : body.num_heads]
    _, key, value = _split(states_NXD[None, one.rows], body)
    if one.prefix.stop > one.prefix.start:
        heads = slice(body.num_heads, None)
        both = torch.cat([states_NXD[one.prefix, heads], states_NXD[one.rows, heads]])[None]
        key, value = torch.split(both, [body.num_key_heads, body.num_key_heads], dim=2)
    return query, key, value


def rotate_(states_NXD: torch.Tensor, rotation: Rotation) -> None:
    """Rotate the two halves of each head's features by the angles of their positions, in place."""
    first_NXD, second_NXD = states_NXD.chunk(2, dim=-1)
    for first, second, cosine, sine in in_cache(first_NXD, second_NXD, *rotation):
        first_sine = first * sine
        first.mul_(cosine).addcmul_(second, sine, value=-1)
        torch.addcmul(first_sine, second, cosine, out=second)


def _spread(rows: torch.Tensor, places_M: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Zeros with the M `rows` at `places_M`."""
    return rows.new_zeros((num_rows, *rows.shape[1:])).index_copy_(0, places_M, rows)
