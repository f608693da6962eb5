"""Where the keys and values of growing sequences lie: as packed rows after reading, in buckets from then on.

Sequences of similar length share a bucket. In it all end at the same column: what a call adds is one column, what a
sliding window sees is a range of columns, and only the columns before the start of a shorter sequence are masked.
Padding is zeros, never another sequence's values, so a non-finite sequence cannot reach its neighbours. Knows nothing
about models, clients or how a token is chosen.

Axes: b sequences of a bucket, N packed rows, S columns of a bucket, H heads, G key-value heads, h heads that share
keys, x = b * G, D features of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch

from fedmira.data.packing import PackedBatch
from fedmira.model.attention import Settings


class Growing(NamedTuple):
    """A sequence that is being written."""

    name: int
    """Unique among the sequences of a cache."""
    length: int
    """Tokens held, >= 1."""
    room: int
    """How many tokens it may still grow by."""


class Pair(NamedTuple):
    """What one attention module keeps."""

    keys: torch.Tensor
    values: torch.Tensor


Move = Callable[[torch.Tensor, torch.Tensor], None]
"""Copies from the keys (or values) of one place to those of a bucket."""


class PackedRows:
    """Prompts as they were read, a pair (1, G, N, D) per attention module."""

    def __init__(self, members: Sequence[Growing], batch: PackedBatch) -> None:
        """The sequences `members` of a batch, in its order."""
        self.members = tuple(members)
        ends = accumulate(batch.sequence_lengths)
        self._rows = [
            torch.cat([torch.arange(shared.start, shared.start + shared.length), torch.arange(end - own, end)])
            for shared, own, end in zip(batch.prefixes, batch.sequence_lengths, ends, strict=True)
        ]
        self.pairs: dict[Hashable, Pair] = {}

    def move(self, bucket: CacheBucket, places: Sequence[tuple[int, int]]) -> Move:
        """What brings members to a bucket; `places` are (index here, index there)."""
        device = bucket.device
        lengths = [len(self._rows[here]) for here, _ in places]
        row_N = torch.cat([self._rows[here] for here, _ in places]).to(device)
        member_N = torch.cat([torch.full((n,), there) for n, (_, there) in zip(lengths, places, strict=True)]).to(
            device
        )
        column_N = torch.cat([torch.arange(bucket.filled - n, bucket.filled) for n in lengths]).to(device)

        def move(from_1GND: torch.Tensor, to_bGSD: torch.Tensor) -> None:
            to_bGSD[member_N, :, column_N] = from_1GND[0].transpose(0, 1)[row_N]

        return move


class CacheBucket:
    """Sequences that end at the same column, a pair (b, G, S, D) per attention module."""

    def __init__(self, members: Sequence[Growing], device: torch.device) -> None:
        self._first = tuple(members)
        self._first_filled = max(member.length for member in members)
        self.filled = self._first_filled
        """Columns in use."""
        self.num_columns = self.filled + max(member.room for member in members)
        self.device = device
        self.pairs: dict[Hashable, Pair] = {}
        self._start_b = torch.tensor([self.filled - member.length for member in members], device=device)
        self._masks: dict[tuple[int, torch.dtype], torch.Tensor] = {}

    @property
    def size(self) -> int:
        """How many sequences it holds."""
        return len(self._first)

    @property
    def members(self) -> tuple[Growing, ...]:
        """The sequences as they are now."""
        grown = self.filled - self._first_filled
        return tuple(Growing(m.name, m.length + grown, m.room - grown) for m in self._first)

    def allocate(self, module: Hashable, like: Pair) -> Pair:
        """Zeros for `module`, of the heads, features, dtype and device of `like`, (x, G, x, D) each."""
        # a masked column takes part in a product with a weight of 0: what is there must be finite
        keys, values = (
            states.new_zeros(len(self._first), states.shape[1], self.num_columns, states.shape[3]) for states in like
        )
        self.pairs[module] = Pair(keys, values)
        return self.pairs[module]

    def move(self, bucket: CacheBucket, places: Sequence[tuple[int, int]]) -> Move:
        """What brings members to another bucket; `places` are (index here, index there)."""
        members = self.members
        longest = max(members[here].length for here, _ in places)
        from_columns = slice(self.filled - longest, self.filled)
        to_columns = slice(bucket.filled - longest, bucket.filled)
        here_b, there_b = torch.tensor(places, device=self.device).unbind(1)

        def move(from_bGSD: torch.Tensor, to_bGSD: torch.Tensor) -> None:
            to_bGSD[there_b, :, to_columns] = from_bGSD[here_b, :, from_columns]

        return move

    def attend(
        self,
        module: Hashable,
        query_bHD: torch.Tensor,
        key_bGD: torch.Tensor,
        value_bGD: torch.Tensor,
        settings: Settings,
    ) -> torch.Tensor:
        """Write one more column and look back from it, (b, H, D)."""
        keys_bGSD, values_bGSD = self.pairs[module]
        keys_bGSD[:, :, self.filled] = key_bGD
        values_bGSD[:, :, self.filled] = value_bGD
        stop = self.filled + 1
        seen = slice(0 if settings.sliding_window is None else max(0, stop - settings.sliding_window), stop)
        num_heads, num_features = key_bGD.shape[1:]
        # heads that share keys are rows of one matrix, so that keys are read once
        query_xhD = query_bHD.reshape(len(query_bHD) * num_heads, -1, num_features)
        keys_xDS = keys_bGSD[:, :, seen].flatten(0, 1).transpose(1, 2)
        mask_x1S = self._mask(num_heads, query_bHD.dtype)[:, :, seen]
        scaling = num_features**-0.5 if settings.scaling is None else settings.scaling
        if settings.softcap is None:
            weights_xhS = torch.softmax(torch.baddbmm(mask_x1S, query_xhD, keys_xDS, alpha=scaling), dim=-1)
        else:
            scores_xhS = torch.tanh(torch.bmm(query_xhD, keys_xDS) * scaling / settings.softcap) * settings.softcap
            # in float32 for every dtype, as in the stock model
            weights_xhS = torch.softmax(scores_xhS + mask_x1S, dim=-1, dtype=torch.float32).to(query_bHD.dtype)
        output_xhD = torch.bmm(weights_xhS, values_bGSD[:, :, seen].flatten(0, 1))
        # values may have a size of their own
        return output_xhD.view(*query_bHD.shape[:2], value_bGD.shape[2])

    def _mask(self, num_heads: int, dtype: torch.dtype) -> torch.Tensor:
        """0 where a sequence may look and -inf before its start, (b * G, 1, S)."""
        key = (num_heads, dtype)
        if key not in self._masks:
            column_S = torch.arange(self.num_columns, device=self._start_b.device)
            before_bS = column_S[None] < self._start_b[:, None]
            mask_bS = torch.zeros(before_bS.shape, dtype=dtype, device=before_bS.device)
            mask_bS.masked_fill_(before_bS, -torch.inf)
            self._masks[key] = mask_bS.repeat_interleave(num_heads, dim=0)[:, None]
        return self._masks[key]


def group_by_length(lengths: Sequence[int], bucket_tokens: float) -> list[list[int]]:
    """Indices of sequences that share a bucket, the longest first, so that the fewest columns are read.

    Args:
        lengths: tokens of each sequence.
        bucket_tokens: how many columns of one sequence could be read in the time that one more bucket costs.

    >>> group_by_length([9, 100, 10, 98], bucket_tokens=30)
    [[1, 3], [2, 0]]
    >>> group_by_length([9, 100, 10, 98], bucket_tokens=1000)
    [[1, 3, 2, 0]]
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    # cheapest[stop]: the least cost of order[:stop], and where its last bucket starts
    cheapest: list[tuple[float, int]] = [(0.0, 0)]
    for stop in range(1, len(order) + 1):
        cheapest.append(
            min(
                (cheapest[start][0] + (stop - start) * lengths[order[start]] + bucket_tokens, start)
                for start in range(stop)
            )
        )
    groups = []
    stop = len(order)
    while stop:
        start = cheapest[stop][1]
        groups.append(order[start:stop])
        stop = start
    return groups[::-1]
