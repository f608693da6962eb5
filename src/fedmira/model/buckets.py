"""Where the keys and values of growing sequences lie: as packed rows after reading, in buckets from then on.

Sequences of similar length share a bucket. In it all end at the same column: what a call adds is one column. Columns
before the start of a shorter sequence, outside of a sliding window and not yet written are masked. Padding is zeros,
never another sequence's values, so a non-finite sequence cannot reach its neighbours. Knows nothing about models,
clients or how a token is chosen.

Axes: B rows of a call, n of them with a sequence, b sequences of a bucket, N packed rows, S columns of a bucket,
H heads, G key-value heads, h heads that share keys, x = b * G, D features of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch

from fedmira.data.packing import PackedBatch
from fedmira.model.attention import Settings

_STEP_COLUMNS = 16
"""Columns looked at are a multiple of these, so that views of them serve as many calls: a view costs a call, too."""


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


class _Look(NamedTuple):
    """What one module looks back at."""

    columns: tuple[int, int]
    """First and stop."""
    mask_x1S: torch.Tensor
    keys_xDS: torch.Tensor
    values_xSD: torch.Tensor


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

    def free(self, module: Hashable) -> None:
        """Let go of what `module` keeps."""
        del self.pairs[module]


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
        self._masks: dict[tuple[int, torch.dtype, int | None], torch.Tensor] = {}
        self._looks: dict[Hashable, _Look] = {}

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

    def free(self, module: Hashable) -> None:
        """Let go of what `module` keeps."""
        del self.pairs[module]
        self._looks.pop(module, None)

    def grow(self) -> None:
        """Let every sequence end one column later."""
        self.filled += 1
        for (_, _, window), mask_x1S in self._masks.items():
            mask_x1S[:, :, self.filled : self.filled + 1] = 0.0
            if window is not None and self.filled >= window:
                mask_x1S[:, :, self.filled - window] = -torch.inf

    def attend(
        self,
        module: Hashable,
        query_xhD: torch.Tensor,
        key_bGD: torch.Tensor,
        value_bGD: torch.Tensor,
        settings: Settings,
        out_xhD: torch.Tensor,
    ) -> None:
        """Write one more column and look back from it; heads that share keys are rows of one matrix, so that keys are
        read once. Values, and with them the output, may have a size of their own."""
        keys_bGSD, values_bGSD = self.pairs[module]
        keys_bGSD[:, :, self.filled] = key_bGD
        values_bGSD[:, :, self.filled] = value_bGD
        look = self._look(module, settings.sliding_window, query_xhD.dtype)
        scaling = query_xhD.shape[2] ** -0.5 if settings.scaling is None else settings.scaling
        if settings.softcap is None:
            scores_xhS = torch.baddbmm(look.mask_x1S, query_xhD, look.keys_xDS, alpha=scaling)
            weights_xhS = torch.softmax(scores_xhS, dim=-1)
        else:
            capped_xhS = torch.tanh(torch.bmm(query_xhD, look.keys_xDS) * scaling / settings.softcap)
            # in float32 for every dtype, as in the stock model
            weights_xhS = torch.softmax(capped_xhS * settings.softcap + look.mask_x1S, dim=-1, dtype=torch.float32)
            weights_xhS = weights_xhS.to(query_xhD.dtype)
        torch.bmm(weights_xhS, look.values_xSD, out=out_xhD)

    def _look(self, module: Hashable, window: int | None, dtype: torch.dtype) -> _Look:
        """The columns that the newest one sees, and a few more, which are masked."""
        first = 0 if window is None else max(0, self.filled + 1 - window) // _STEP_COLUMNS * _STEP_COLUMNS
        stop = min(self.num_columns, (self.filled // _STEP_COLUMNS + 1) * _STEP_COLUMNS)
        look = self._looks.get(module)
        if look is None or look.columns != (first, stop):
            keys_bGSD, values_bGSD = self.pairs[module]
            mask_x1S = self._mask(keys_bGSD.shape[1], dtype, window)
            keys_xSD, values_xSD = (states.flatten(0, 1)[:, first:stop] for states in (keys_bGSD, values_bGSD))
            look = _Look((first, stop), mask_x1S[:, :, first:stop], keys_xSD.transpose(1, 2), values_xSD)
            self._looks[module] = look
        return look

    def _mask(self, num_heads: int, dtype: torch.dtype, window: int | None) -> torch.Tensor:
        """0 where the newest column may look and -inf elsewhere, (b * G, 1, S); `grow` moves it on."""
        key = (num_heads, dtype, window)
        if key not in self._masks:
            column_S = torch.arange(self.num_columns, device=self._start_b.device)
            unseen_bS = (column_S < self._start_b[:, None]) | (column_S > self.filled)
            if window is not None:
                unseen_bS |= column_S <= self.filled - window
            mask_bS = torch.zeros(unseen_bS.shape, dtype=dtype, device=unseen_bS.device)
            mask_bS.masked_fill_(unseen_bS, -torch.inf)
            self._masks[key] = mask_bS.repeat_interleave(num_heads, dim=0)[:, None]
        return self._masks[key]


class Newest:
    """What the newest rows ask with and are asked for, in the order of buckets: memory that serves call after call."""

    def __init__(self, buckets: Sequence[CacheBucket], rows_n: torch.Tensor, like: Sequence[torch.Tensor]) -> None:
        """Memory for rows of one arrangement.

        Args:
            buckets: the sequences.
            rows_n: their rows in a call, bucket after bucket.
            like: queries (B, H, D), keys and values (B, G, D) of a call.
        """
        query_BHD, key_BGD, value_BGD = like
        (num_rows, num_heads), num_keys = query_BHD.shape[:2], key_BGD.shape[1]
        self._rows_n = rows_n
        self._taken = [states.new_empty(len(rows_n), *states.shape[1:]) for states in like]
        # behind them what is seen by a row that looks at nothing
        self._seen = query_BHD.new_zeros(len(rows_n) + 1, num_heads, value_BGD.shape[2])
        self._places_B = torch.full((num_rows,), len(rows_n), device=rows_n.device)
        self._places_B[rows_n] = torch.arange(len(rows_n), device=rows_n.device)
        sizes = [bucket.size for bucket in buckets]
        query_nHD, *others = self._taken
        asking = (
            torch.split(
                states_nHD.view(-1, num_heads // num_keys, states_nHD.shape[2]), [size * num_keys for size in sizes]
            )
            for states_nHD in (query_nHD, self._seen[:-1])
        )
        answering = (torch.split(states_nGD, sizes) for states_nGD in others)
        self._parts = list(zip(buckets, *asking, *answering, strict=True))

    def look_back(self, module: Hashable, states: Sequence[torch.Tensor], settings: Settings) -> torch.Tensor:
        """Attention of queries, keys and values like those it was made for, (B, H, D)."""
        for all_rows, taken in zip(states, self._taken, strict=True):
            torch.index_select(all_rows, 0, self._rows_n, out=taken)
        for bucket, query_xhD, seen_xhD, key_bGD, value_bGD in self._parts:
            bucket.attend(module, query_xhD, key_bGD, value_bGD, settings, seen_xhD)
        return self._seen.index_select(0, self._places_B)


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
