"""Causal attention over packed sequences: every sequence of a batch sees itself only, and no row is padding outside.

Registered once with transformers under `PACKED`; a model whose config selects it is called with token ids (1, N) and a
`packing` made by `plan_packing`. Knows nothing about clients, adapters or losses.

Sequences of similar length share one call of the attention kernel: they are laid out right-padded in a bucket, and
because attention is causal no real row can see the padding behind it. Padding repeats a row of the same sequence. A
prefix that sequences share fills its slots in each of them.

On a CPU, where calls are cheap and copies are not, a caller may have sequences stand alone: they are read where they
lie, without padding, and a shared prefix only answers in them and asks nothing again. Short ones behind one prefix
share a call, in which no finite sequence sees another.

A non-finite sequence reaches those behind the same prefix at most, never one of another client.

Axes: N packed rows, n rows of the sequences in buckets, B sequences of a bucket, T positions (of the longest sequence
of a bucket), Q positions that ask, K positions that answer (the last Q of them ask), H heads, G key-value heads,
D features of a head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PACKED = "fedmira_packed"

_SHORTEST_SHARE = {"cpu": 0.85, "cuda": 0.5}
"""A bucket takes sequences down to this share of its longest, by kind of device: one more call is dear on a GPU, and
padding on a CPU."""
_SHORTEST_SLACK = 16
"""Positions that a sequence may always be shorter than the longest of its bucket, so that short ones share a call."""
_LEAST_ALONE = 2048
"""A sequence stands alone if each head and thread has more weights than these to compute for it; behind a prefix within
reach, always."""
MOST_TOGETHER = 100
"""Rows of sequences that share a call, their prefix left out: what they compute of one another is in vain."""


class Bucket(NamedTuple):
    """Sequences that share one call of the attention kernel."""

    num_sequences: int
    length: int
    """T, the length of its longest sequence."""
    rows: torch.Tensor | None
    """(B * T,): the packed row in each slot, one sequence after the other; None if they are all rows in order."""


class Alone(NamedTuple):
    """A sequence with a call of its own, or a few that follow one another behind one prefix."""

    rows: slice
    """The rows that they add."""
    prefix: slice
    """Rows of an earlier sequence that they begin with; empty if nothing is shared."""
    asking: slice
    """The last rows, those that ask; the others only answer."""
    lengths: tuple[int, ...]
    """The rows that each adds."""

    @property
    def length(self) -> int:
        """Positions of the longest, prefix included."""
        return int(self.prefix.stop - self.prefix.start) + max(self.lengths)

    def with_next(self, other: Alone) -> Alone | None:
        """Both in one call, if they begin with the same and are short enough."""
        rows = slice(self.rows.start, other.rows.stop)
        if self.prefix != other.prefix or rows.stop - rows.start > MOST_TOGETHER:
            return None
        return Alone(rows, self.prefix, rows, self.lengths + other.lengths)


class Packing(NamedTuple):
    """How the rows of one packed batch fall into sequences."""

    buckets: tuple[Bucket, ...]
    slots_n: torch.Tensor | None
    """For each row of the sequences in buckets, in packed order, the slot that computes it, counted through all
    buckets; None if slots and rows agree."""
    repeated_rows: torch.Tensor | None = None
    """Rows of shared prefixes, once for every further slot that they fill; None if nothing is shared."""
    repeated_slots: torch.Tensor | None = None
    """Those slots."""
    alone: tuple[Alone, ...] = ()
    """The sequences in no bucket."""
    rows_n: torch.Tensor | None = None
    """The rows of the sequences in buckets; None if they are all rows or none."""

    @property
    def longest(self) -> int:
        """Length of the longest sequence, its prefix included."""
        return max([*(bucket.length for bucket in self.buckets), *(one.length for one in self.alone)])


def plan_packing(
    sequence_lengths: Sequence[int],
    device: torch.device,
    prefixes: Sequence[tuple[int, int]] = (),
    stand_alone: bool = False,
    reach: float = math.inf,
) -> Packing:
    """Group sequences into buckets of similar length.

    Args:
        sequence_lengths: rows that each sequence adds, in packed order, each >= 1.
        device: where the plan is used.
        prefixes: for each sequence the first row and the length of what it shares with an earlier one; empty if
            nothing is shared.
        stand_alone: whether long sequences, and all behind a prefix, stand alone on a CPU.
        reach: positions that one call can look back over without a window; what a prefix and `MOST_TOGETHER` rows
            exceed shares no call.

    >>> plan = plan_packing((3, 20, 4), torch.device("cpu"))
    >>> [(bucket.num_sequences, bucket.length) for bucket in plan.buckets]
    [(2, 20), (1, 3)]
    """
    prefixes = prefixes or [(0, 0)] * len(sequence_lengths)
    ends = np.cumsum(sequence_lengths)
    totals = [own + length for own, (_, length) in zip(sequence_lengths, prefixes, strict=True)]
    least = _LEAST_ALONE * torch.get_num_threads()
    alone: list[Alone] = []
    together = []
    for i, (own, (prefix_start, prefix_length)) in enumerate(zip(sequence_lengths, prefixes, strict=True)):
        behind = prefix_length > 0 and prefix_length + MOST_TOGETHER <= reach
        if not (stand_alone and device.type == "cpu" and (behind or own * totals[i] > least)):
            together.append(i)
            continue
        rows = slice(int(ends[i]) - own, int(ends[i]))
        one = Alone(rows, slice(prefix_start, prefix_start + prefix_length), rows, (own,))
        both = alone[-1].with_next(one) if alone and behind else None
        alone[len(alone) - (both is not None) :] = [both or one]
    if not together:
        return Packing((), None, alone=tuple(alone))
    shared = any(prefixes[i][1] for i in together)
    if len({totals[i] for i in together}) == 1 and not shared and not alone:
        return Packing((Bucket(len(together), totals[0], None),), None)
    buckets: list[tuple[int, int, np.ndarray]] = []
    slots_N = np.full(ends[-1], -1, dtype=np.int64)
    repeated_rows, repeated_slots = [], []
    first_slot = 0
    share = _SHORTEST_SHARE.get(device.type, _SHORTEST_SHARE["cuda"])
    for places in _group_by_length([totals[i] for i in together], share):
        group = [together[place] for place in places]
        longest = totals[group[0]]
        rows_BT = np.empty((len(group), longest), dtype=np.int64)
        for row_T, i in zip(rows_BT, sorted(group), strict=True):
            (prefix_start, prefix_length), own_start = prefixes[i], ends[i] - sequence_lengths[i]
            row_T[:prefix_length] = np.arange(prefix_start, prefix_start + prefix_length)
            row_T[prefix_length : totals[i]] = np.arange(own_start, ends[i])
            row_T[totals[i] :] = own_start
            slots_N[own_start : ends[i]] = first_slot + np.arange(prefix_length, totals[i])
            if prefix_length:
                repeated_rows.append(row_T[:prefix_length])
                repeated_slots.append(first_slot + np.arange(prefix_length))
            first_slot += longest
        buckets.append((len(group), longest, rows_BT.reshape(-1)))

    def on_device(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    rows_n = np.flatnonzero(slots_N >= 0)
    return Packing(
        tuple(Bucket(count, length, on_device(rows)) for count, length, rows in buckets),
        on_device(slots_N[rows_n]),
        on_device(np.concatenate(repeated_rows)) if shared else None,
        on_device(np.concatenate(repeated_slots)) if shared else None,
        tuple(alone),
        on_device(rows_n) if alone else None,
    )


def asking_for(packing: Packing, wanted_M: torch.Tensor) -> Packing:
    """The same packing where only the rows from the first wanted one on ask, at least one of each sequence.

    Of sequences that stand alone only; those in buckets ask with all positions.

    Args:
        packing: from `plan_packing`.
        wanted_M: ascending indices of the rows that are looked at afterwards.
    """
    if not packing.alone:
        return packing
    wanted = wanted_M.numpy()
    starts = np.searchsorted(wanted, [one.rows.start for one in packing.alone])
    firsts = np.append(wanted, np.iinfo(wanted.dtype).max)[starts]
    return packing._replace(
        alone=tuple(
            one._replace(asking=slice(min(int(first), one.rows.stop - 1), one.rows.stop))
            for one, first in zip(packing.alone, firsts, strict=True)
        )
    )


def _group_by_length(lengths: Sequence[int], share: float) -> list[list[int]]:
    """Indices of sequences that share a bucket, the longest first in each."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        longest = lengths[groups[-1][0]] if groups else 0
        if groups and lengths[index] >= min(share * longest, longest - _SHORTEST_SLACK):
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


@contextmanager
def attention_of(config: Any, name: str) -> Iterator[None]:
    """Let a model with this transformers config use the attention registered as `name` inside the `with` block."""
    before = config._attn_implementation
    config._attn_implementation = name
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
    fedmira_packing: Packing,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_unused: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each sequence. Returns (1, N, H, D), as transformers expects, and no weights.

    Transformers hands on what it does not know, so what is ours bears our name: it took `cache` for itself in 5.24.
    """
    if sliding_window is None and (at := getattr(module, "layer_idx", None)) is not None:
        _refuse_window_in_the_mask(module, int(at))
    settings = Settings(scaling, sliding_window, softcap)
    assert not fedmira_packing.alone, "sequences stand alone in the body written out only"
    if fedmira_packing.slots_n is None and fedmira_packing.buckets[0].num_sequences == 1:
        return attend(query_1HND, key_1GND, value_1GND, settings).transpose(1, 2), None
    states = [states_1HND.squeeze(0).transpose(0, 1) for states_1HND in (query_1HND, key_1GND, value_1GND)]
    outputs = []
    for bucket in fedmira_packing.buckets:
        query_BHTD, key_BGTD, value_BGTD = (_to_bucket(states_NHD, bucket) for states_NHD in states)
        outputs.append(attend(query_BHTD, key_BGTD, value_BGTD, settings).transpose(1, 2).flatten(0, 1))
    output_NHD = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    if fedmira_packing.slots_n is not None:
        output_NHD = output_NHD.index_select(0, fedmira_packing.slots_n)
    return output_NHD[None], None


def _refuse_window_in_the_mask(module: torch.nn.Module, layer: int) -> None:
    """Refuse a layer that should see a window and says so by a mask alone, which packed rows have none of."""
    config = getattr(module, "config", None)
    kinds, window = getattr(config, "layer_types", None) or (), getattr(config, "sliding_window", None)
    if window is not None and layer < len(kinds) and kinds[layer] == "sliding_attention":
        raise RuntimeError("its sliding window is in the mask alone; fedmira would not see it")


ALL_ATTENTION_FUNCTIONS.register(PACKED, _packed_attention_forward)


class Settings(NamedTuple):
    """How an attention module looks back."""

    scaling: float | None
    sliding_window: int | None
    softcap: float | None


def _to_bucket(states_NHD: torch.Tensor, bucket: Bucket) -> torch.Tensor:
    """(N, H, D) -> (B, H, T, D)."""
    if bucket.rows is not None:
        states_NHD = states_NHD.index_select(0, bucket.rows)
    return states_NHD.reshape(bucket.num_sequences, bucket.length, *states_NHD.shape[1:]).transpose(1, 2)


def attend(
    query_BHQD: torch.Tensor, key_BGKD: torch.Tensor, value_BGKD: torch.Tensor, settings: Settings
) -> torch.Tensor:
    """Causal attention of right-padded sequences whose last Q positions ask, (B, H, Q, D). The same operations as
    transformers' own, in the same order: a single sequence that asks with all positions gets the same bits as from the
    stock model."""
    num_queries, length = query_BHQD.shape[2], key_BGKD.shape[2]
    window = settings.sliding_window
    allowed_QK = None
    if settings.softcap is not None or (window is not None and length > window) or 1 < num_queries < length:
        position_K = torch.arange(length, device=query_BHQD.device)
        position_Q = position_K[length - num_queries :]
        allowed_QK = position_K[None, :] <= position_Q[:, None]
        if window is not None:
            allowed_QK &= position_K[None, :] > position_Q[:, None] - window
    repeats = query_BHQD.shape[1] // key_BGKD.shape[1]
    # on a GPU only the kernel for 16 bits knows groups; the one that would be taken instead keeps (T, T) weights
    knows_groups = query_BHQD.device.type == "cpu" or query_BHQD.dtype.itemsize == 2
    native_groups = knows_groups and allowed_QK is None and query_BHQD.shape[-1] <= 256
    if repeats > 1 and not native_groups:
        key_BGKD = key_BGKD.repeat_interleave(repeats, dim=1)
        value_BGKD = value_BGKD.repeat_interleave(repeats, dim=1)
    if settings.softcap is not None and allowed_QK is not None:
        return _attend_with_softcap(query_BHQD, key_BGKD, value_BGKD, allowed_QK, settings)
    return F.scaled_dot_product_attention(
        query_BHQD,
        key_BGKD,
        value_BGKD,
        attn_mask=allowed_QK,
        is_causal=allowed_QK is None and num_queries > 1,
        scale=settings.scaling,
        enable_gqa=repeats > 1 and native_groups,
    )


def _attend_with_softcap(
    query_BHQD: torch.Tensor,
    key_BHKD: torch.Tensor,
    value_BHKD: torch.Tensor,
    allowed_QK: torch.Tensor,
    settings: Settings,
) -> torch.Tensor:
    """softmax(cap * tanh(q k^T * scaling / cap)) v, which the fused kernels do not offer (Gemma 2).

    The softmax is in float32 for every dtype, as in the stock model."""
    scaling = settings.scaling if settings.scaling is not None else query_BHQD.shape[-1] ** -0.5
    assert settings.softcap is not None
    scores_BHQK = torch.matmul(query_BHQD, key_BHKD.transpose(2, 3)) * scaling
    scores_BHQK = torch.tanh(scores_BHQK / settings.softcap) * settings.softcap
    scores_BHQK = scores_BHQK.masked_fill(~allowed_QK, torch.finfo(scores_BHQK.dtype).min)
    weights_BHQK = F.softmax(scores_BHQK, dim=-1, dtype=torch.float32).to(query_BHQD.dtype)
    return torch.matmul(weights_BHQK, value_BHKD)
