"""Right-padded batches and their losses, as peers without packing use them.

Axes: B examples of a batch, T tokens of the longest, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from fedmira.data.tokenization import TokenizedExample

IGNORED = -100


class PaddedBatch(NamedTuple):
    """What a Hugging Face model is called with."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    """The tokens where they are supervised, else `IGNORED`."""


def right_padded(examples: Sequence[TokenizedExample], device: torch.device) -> PaddedBatch:
    """One batch, padded to its longest example."""
    longest = max(len(example.tokens) for example in examples)
    input_ids = torch.zeros(len(examples), longest, dtype=torch.long)
    attention_mask = torch.zeros(len(examples), longest, dtype=torch.long)
    labels = torch.full((len(examples), longest), IGNORED)
    for row, example in enumerate(examples):
        length = len(example.tokens)
        input_ids[row, :length] = torch.from_numpy(example.tokens).long()
        attention_mask[row, :length] = 1
        labels[row, example.prompt_length : length] = input_ids[row, example.prompt_length : length]
    return PaddedBatch(input_ids.to(device), attention_mask.to(device), labels.to(device))


def sum_of_client_means(logits_BTV: torch.Tensor, labels_BT: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """Sum over clients of the mean cross entropy of their consecutive `sizes` examples.

    As transformers computes it, over all positions; in float32, but not lower than the logits.
    """
    logits_BTV = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))
    next_BT = F.pad(labels_BT, (0, 1), value=IGNORED)[:, 1:]
    parts = zip(torch.split(logits_BTV, list(sizes)), torch.split(next_BT, list(sizes)), strict=True)
    means = [
        F.cross_entropy(logits_bTV.flatten(0, 1), next_bT.flatten(), ignore_index=IGNORED)
        for logits_bTV, next_bT in parts
    ]
    return torch.stack(means).sum()


def padding_factor(batches: Sequence[Sequence[TokenizedExample]]) -> float:
    """Positions over tokens when every batch is padded to its longest example."""
    positions = sum(len(batch) * max(len(example.tokens) for example in batch) for batch in batches)
    return positions / sum(len(example.tokens) for batch in batches for example in batch)
