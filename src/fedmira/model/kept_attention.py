"""Causal attention of short sequences on a CPU by plain matrix products that keep the weights for the backward pass.

The fused kernel computes the weights again and splits them into small blocks; where all weights of a sequence are small
enough to keep, a few large products take little more than half the time. Everything else goes to `attention.attend`,
its slow twin. Knows nothing about packing or models.

Queries go in blocks: what lies behind a block's last position is not computed, and its weights stay in a core's cache
from one pass over them to the next.

Axes: B sequences, K positions, Q positions that ask (the last ones), q of one block, k positions up to its last, H
heads, G key-value heads, h heads that share keys, D features of a head.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch

from fedmira.model.attention import MOST_TOGETHER, Settings, attend

_MOST_WEIGHTS = 2**19
"""Q * K of the longest sequence whose weights are kept: 724 positions that all ask, half of it for each head."""
MOST_KEPT = math.isqrt(_MOST_WEIGHTS)
"""Positions of that sequence."""
_MOST_QUERIES = MOST_TOGETHER
"""Of one block."""
MOST_BEHIND = _MOST_WEIGHTS // MOST_TOGETHER
"""Positions that sequences which share a call may look back over."""


class SlowCall(NamedTuple):
    """A call of the slow twin, differentiated by autograd."""

    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    output_BHQD: torch.Tensor


Look = tuple[torch.Tensor, ...] | SlowCall
"""What the backward pass needs: queries, keys, values and the weights of each block, (B * G, h * q, k), or the slow
call."""


def look_back_(
    query_BQHD: torch.Tensor,
    key_BKGD: torch.Tensor,
    value_BKGD: torch.Tensor,
    settings: Settings,
    keep: bool,
    out_BQHD: torch.Tensor,
    lengths: tuple[int, ...] = (),
) -> Look:
    """Write to `out_BQHD` what the last Q positions of right-padded sequences see.

    Args:
        query_BQHD: queries of the positions that ask.
        key_BKGD: keys of all positions.
        value_BKGD: their values.
        settings: how they look back.
        keep: whether `look_back_backward_` will be called.
        out_BQHD: written to.
        lengths: of the sequences that share the last of the K positions, behind what all of them begin with; empty
            where there is one. Several are at most `MOST_TOGETHER` in all, K at most `MOST_BEHIND`, without a window.

    Returns:
        What `look_back_backward_` needs; nothing if not `keep`.
    """
    if not _keeps(query_BQHD, key_BKGD, settings):
        assert len(lengths) < 2, "sequences that share a call keep their weights"
        query, key, value = (
            states.transpose(1, 2).detach().requires_grad_(keep) for states in (query_BQHD, key_BKGD, value_BKGD)
        )
        with torch.set_grad_enabled(keep):
            output_BHQD = attend(query, key, value, settings)
        out_BQHD.copy_(output_BHQD.detach().transpose(1, 2))
        return SlowCall((query, key, value), output_BHQD) if keep else ()
    scaling = query_BQHD.shape[-1] ** -0.5 if settings.scaling is None else settings.scaling
    num_key_heads = key_BKGD.shape[2]
    key, value = _joined(key_BKGD, num_key_heads), _joined(value_BKGD, num_key_heads)
    look = [query_BQHD, key_BKGD, value_BKGD]
    for first, last, seen in _blocks(query_BQHD.shape[1], key_BKGD.shape[1]):
        query = _joined(query_BQHD[:, first:last], num_key_heads)
        weights = query.new_empty((len(query), query.shape[1], seen))
        weights.baddbmm_(query, key[:, :seen].transpose(1, 2), beta=0, alpha=scaling)
        unseen = _unseen(query.dtype, last - first, lengths)
        # heads that share keys are rows of one matrix
        weights.view(len(query), -1, last - first, seen)[..., seen - unseen.shape[1] :].add_(unseen)
        torch.softmax(weights, dim=-1, out=weights)
        _put(torch.bmm(weights, value[:, :seen]), out_BQHD[:, first:last])
        if keep:
            look.append(weights)
    return tuple(look) if keep else ()


def look_back_backward_(
    grad_BQHD: torch.Tensor, settings: Settings, look: Look, grad_query_BQHD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write the gradient of the queries to `grad_query_BQHD` and return those of keys and values, (B, K, G, D)."""
    if isinstance(look, SlowCall):
        grad_query, grad_key, grad_value = torch.autograd.grad(look.output_BHQD, look.inputs, grad_BQHD.transpose(1, 2))
        grad_query_BQHD.copy_(grad_query.transpose(1, 2))
        return grad_key.transpose(1, 2), grad_value.transpose(1, 2)
    query_BQHD, key_BKGD, value_BKGD, *kept = look
    scaling = query_BQHD.shape[-1] ** -0.5 if settings.scaling is None else settings.scaling
    num_sequences, length, num_key_heads, _ = key_BKGD.shape
    key, value = _joined(key_BKGD, num_key_heads), _joined(value_BKGD, num_key_heads)
    sums: list[torch.Tensor] = []
    # the last block sees all positions
    for (first, last, seen), weights in reversed(
        list(zip(_blocks(query_BQHD.shape[1], length), kept, strict=True)),
    ):
        query = _joined(query_BQHD[:, first:last], num_key_heads)
        grad = _joined(grad_BQHD[:, first:last], num_key_heads)
        grad_value = torch.bmm(weights.transpose(1, 2), grad)
        grad_weights = torch.bmm(grad, value[:, :seen].transpose(1, 2))
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        _put(torch.bmm(grad_scores, key[:, :seen]).mul_(scaling), grad_query_BQHD[:, first:last])
        grad_key = torch.bmm(grad_scores.transpose(1, 2), query)
        if not sums:
            sums = [grad_key, grad_value]
            continue
        for sum_, part in zip(sums, (grad_key, grad_value), strict=True):
            sum_[:, :seen].add_(part)
    grad_key, grad_value = (states.view(num_sequences, num_key_heads, length, -1).transpose(1, 2) for states in sums)
    return grad_key.mul_(scaling), grad_value


def _keeps(query_BQHD: torch.Tensor, key_BKGD: torch.Tensor, settings: Settings) -> bool:
    length, window = key_BKGD.shape[1], settings.sliding_window
    plain = settings.softcap is None and (window is None or length <= window)
    wide = query_BQHD.device.type == "cpu" and query_BQHD.dtype in (torch.float32, torch.float64)
    return plain and wide and length > 1 and query_BQHD.shape[1] * length <= _MOST_WEIGHTS


def _blocks(num_queries: int, length: int) -> list[tuple[int, int, int]]:
    """The first query of each block, the one behind its last, and how many positions that one's block sees.

    >>> _blocks(150, 190)
    [(0, 75, 115), (75, 150, 190)]
    """
    count = -(-num_queries // _MOST_QUERIES)
    ends = [num_queries * index // count for index in range(count + 1)]
    return [(first, last, length - num_queries + last) for first, last in pairwise(ends)]


def _unseen(dtype: torch.dtype, num_queries: int, lengths: tuple[int, ...]) -> torch.Tensor:
    """What is added to the scores of the last positions, (q, those of all that share a call)."""
    if len(lengths) < 2:
        return _future(dtype)[:num_queries, :num_queries]
    return _others(dtype, lengths)[-num_queries:]


@lru_cache
def _future(dtype: torch.dtype) -> torch.Tensor:
    """-inf for what is later, (q, q)."""
    return torch.full((_MOST_QUERIES, _MOST_QUERIES), -torch.inf, dtype=dtype).triu(1)


@lru_cache(512)  # of 40 kB each at most in float32
def _others(dtype: torch.dtype, lengths: tuple[int, ...]) -> torch.Tensor:
    """-inf for what is later or another sequence's."""
    unseen = torch.full((sum(lengths), sum(lengths)), -torch.inf, dtype=dtype)
    for own in torch.split(torch.arange(len(unseen)), list(lengths)):
        unseen[own[0] : own[-1] + 1, own[0] : own[-1] + 1].triu_(1)
    return unseen


def _joined(states_BTHD: torch.Tensor, num_key_heads: int) -> torch.Tensor:
    """(B, T, H, D) -> (B * G, h * T, D); a view where nobody shares keys and B is 1."""
    num_sequences, features = len(states_BTHD), states_BTHD.shape[3]
    return states_BTHD.transpose(1, 2).reshape(num_sequences * num_key_heads, -1, features)


def _put(states: torch.Tensor, out_BTHD: torch.Tensor) -> None:
    """(B * G, h * T, D) -> (B, T, H, D)."""
    num_sequences, length, heads, features = out_BTHD.shape
    out_BTHD.copy_(states.view(num_sequences, heads, length, features).transpose(1, 2))
