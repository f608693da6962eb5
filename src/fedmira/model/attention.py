"""Causal attention over packed sequences: every sequence of a batch sees itself only, and no row is padding outside.

Registered once with transformers under `PACKED`; a model whose config selects it is called with token ids (1, N) and a
`packing` made by `plan_packing`. Knows nothing about clients, adapters or losses.

Sequences of similar length share one call of the attention kernel: they are laid out right-padded in a bucket, and
because attention is causal no real row can see the padding behind it. Padding is zeros, never another sequence's
values, so a non-finite sequence cannot reach its neighbours.

Axes: N packed rows, B sequences of a bucket, T positions (of the longest sequence of a bucket), H heads,
G key-value heads, D features of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PACKED = "fedmira_packed"

_SHORTEST_SHARE = 0.6
"""A bucket takes sequences down to this share of its longest: at most 40 % of a bucket is padding."""
_SHORTEST_SLACK = 8
"""Positions that a sequence may always be shorter than the longest of its bucket, so that short ones share a call."""


class Bucket(NamedTuple):
    """Sequences that share one call of the attention kernel."""

    num_sequences: int
    length: int
    """T, the length of its longest sequence."""
    rows_N: torch.Tensor | None
    """The packed rows of its sequences, one sequence after the other; None if they are all rows in order."""
    slots_N: torch.Tensor | None
    """Where each of these rows lies among the B * T padded ones; None if nothing is padded."""


class Packing(NamedTuple):
    """How the rows of one packed batch fall into sequences."""

    buckets: tuple[Bucket, ...]
    restore_N: torch.Tensor | None
    """Brings rows that were read bucket after bucket back into packed order; None if they are in order."""


def plan_packing(sequence_lengths: Sequence[int], device: torch.device) -> Packing:
    """Group sequences of lengths `sequence_lengths` (in packed order, each >= 1) into buckets.

    >>> plan = plan_packing((3, 20, 4), torch.device("cpu"))
    >>> [(bucket.num_sequences, bucket.length) for bucket in plan.buckets]
    [(1, 20), (2, 4)]
    """
    if len(set(sequence_lengths)) == 1:
        return Packing((Bucket(len(sequence_lengths), sequence_lengths[0], None, None),), None)
    starts = [0]
    for length in sequence_lengths:
        starts.append(starts[-1] + length)
    order = sorted(range(len(sequence_lengths)), key=lambda index: (-sequence_lengths[index], index))
    groups: list[list[int]] = []
    for index in order:
        longest = sequence_lengths[groups[-1][0]] if groups else 0
        if groups and sequence_lengths[index] >= min(_SHORTEST_SHARE * longest, longest - _SHORTEST_SLACK):
            groups[-1].append(index)
        else:
            groups.append([index])
    buckets = []
    for group in groups:
        longest = sequence_lengths[group[0]]
        members = sorted(group)
        rows = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in members])
        slots = torch.cat([torch.arange(sequence_lengths[i]) + b * longest for b, i in enumerate(members)])
        padded = len(rows) < len(members) * longest
        buckets.append(Bucket(len(members), longest, rows, slots if padded else None))
    read = torch.cat([bucket.rows_N for bucket in buckets if bucket.rows_N is not None])
    restore = torch.empty_like(read)
    restore[read] = torch.arange(len(read))
    in_order = bool((read == torch.arange(len(read))).all())
    on_device = tuple(
        bucket._replace(
            rows_N=None if bucket.rows_N is None or (in_order and len(buckets) == 1) else bucket.rows_N.to(device),
            slots_N=None if bucket.slots_N is None else bucket.slots_N.to(device),
        )
        for bucket in buckets
    )
    return Packing(on_device, None if in_order else restore.to(device))


@contextmanager
def packed_attention(config: Any) -> Iterator[None]:
    """Let a model with this transformers config use packed attention inside the `with` block."""
    before = config._attn_implementation
    config._attn_implementation = PACKED
    try:
        yield
    finally:
        config._attn_implementation = before


def _packed_attention_forward(
    module: torch.nn.Module,
    query_1HND: torch.Tensor,
    key_1GND: torch.Tensor,
    value_1GND: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packing: Packing,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_unused: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each sequence. Returns (1, N, H, D), as transformers expects, and no weights."""
    settings = _Settings(scaling, sliding_window, softcap)
    if len(packing.buckets) == 1 and packing.buckets[0].num_sequences == 1:
        return _attend(query_1HND, key_1GND, value_1GND, settings).transpose(1, 2), None
    outputs = [
        _from_bucket(
            _attend(
                _to_bucket(query_1HND, bucket), _to_bucket(key_1GND, bucket), _to_bucket(value_1GND, bucket), settings
            ),
            bucket,
        )
        for bucket in packing.buckets
    ]
    output_NHD = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    if packing.restore_N is not None:
        output_NHD = output_NHD.index_select(0, packing.restore_N)
    return output_NHD[None], None


ALL_ATTENTION_FUNCTIONS.register(PACKED, _packed_attention_forward)


class _Settings(NamedTuple):
    scaling: float | None
    sliding_window: int | None
    softcap: float | None


def _to_bucket(states_1HND: torch.Tensor, bucket: Bucket) -> torch.Tensor:
    """(1, H, N, D) -> (B, H, T, D), zeros where a sequence is shorter than T."""
    states_NHD = states_1HND[0].transpose(0, 1)
    if bucket.rows_N is not None:
        states_NHD = states_NHD.index_select(0, bucket.rows_N)
    if bucket.slots_N is not None:
        padded = states_NHD.new_zeros((bucket.num_sequences * bucket.length, *states_NHD.shape[1:]))
        states_NHD = padded.index_copy(0, bucket.slots_N, states_NHD)
    return states_NHD.reshape(bucket.num_sequences, bucket.length, *states_NHD.shape[1:]).transpose(1, 2)


def _from_bucket(states_BHTD: torch.Tensor, bucket: Bucket) -> torch.Tensor:
    """(B, H, T, D) -> (n, H, D), the real rows of the bucket, one sequence after the other."""
    states_NHD = states_BHTD.transpose(1, 2).flatten(0, 1)
    return states_NHD if bucket.slots_N is None else states_NHD.index_select(0, bucket.slots_N)


def _attend(
    query_BHTD: torch.Tensor, key_BGTD: torch.Tensor, value_BGTD: torch.Tensor, settings: _Settings
) -> torch.Tensor:
    """Causal attention of right-padded sequences, (B, H, T, D). The same operations as transformers' own, in the same
    order: a single sequence gets the same bits as from the stock model."""
    length = query_BHTD.shape[2]
    window = settings.sliding_window
    allowed_TT = None
    if settings.softcap is not None or (window is not None and length > window):
        position_T = torch.arange(length, device=query_BHTD.device)
        allowed_TT = position_T[None, :] <= position_T[:, None]
        if window is not None:
            allowed_TT &= position_T[None, :] > position_T[:, None] - window
    repeats = query_BHTD.shape[1] // key_BGTD.shape[1]
    native_groups = allowed_TT is None and query_BHTD.shape[-1] <= 256
    if repeats > 1 and not native_groups:
        key_BGTD = key_BGTD.repeat_interleave(repeats, dim=1)
        value_BGTD = value_BGTD.repeat_interleave(repeats, dim=1)
    if settings.softcap is not None and allowed_TT is not None:
        return _attend_with_softcap(query_BHTD, key_BGTD, value_BGTD, allowed_TT, settings)
    return F.scaled_dot_product_attention(
        query_BHTD,
        key_BGTD,
        value_BGTD,
        attn_mask=allowed_TT,
        is_causal=allowed_TT is None and length > 1,
        scale=settings.scaling,
        enable_gqa=repeats > 1 and native_groups,
    )


def _attend_with_softcap(
    query_BHTD: torch.Tensor,
    key_BHTD: torch.Tensor,
    value_BHTD: torch.Tensor,
    allowed_TT: torch.Tensor,
    settings: _Settings,
) -> torch.Tensor:
    """softmax(cap * tanh(q k^T * scaling / cap)) v, which the fused kernels do not offer (Gemma 2).

    The softmax is in float32 for every dtype, as in the stock model."""
    scaling = settings.scaling if settings.scaling is not None else query_BHTD.shape[-1] ** -0.5
    assert settings.softcap is not None
    scores_BHTT = torch.matmul(query_BHTD, key_BHTD.transpose(2, 3)) * scaling
    scores_BHTT = torch.tanh(scores_BHTT / settings.softcap) * settings.softcap
    scores_BHTT = scores_BHTT.masked_fill(~allowed_TT, torch.finfo(scores_BHTT.dtype).min)
    weights_BHTT = F.softmax(scores_BHTT, dim=-1, dtype=torch.float32).to(query_BHTD.dtype)
    return torch.matmul(weights_BHTT, value_BHTD)
