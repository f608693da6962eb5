"""What local training minimises: cross entropy on supervised rows, and the pull towards a target.

Knows nothing about optimizers, rounds or where adapters come from.

The sum over clients of each client's mean loss has, for each client, exactly the gradient of training it alone.

Axes: C clients, M supervised rows, m of a block, V tokens of the vocabulary or of a block of it, P parameters of one
adapter, d hidden features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from fedmira.model.base import BaseModel

_BLOCK_COLUMNS = {"cpu": 2**11}
"""Tokens of the vocabulary whose logits exist at once, by kind of device; all of them where none is named. 512 to 4,096
take about the same time, all of them a seventh more (docs/log.md)."""
_BLOCK_ELEMENTS = {"cpu": 2**21, "cuda": 2**26}
"""Logits that exist at once."""


def logits_at_once(base: BaseModel) -> tuple[int, int]:
    """Of how many supervised rows, and for how many tokens, logits are in memory at a time where the head is frozen."""
    device = base.device.type
    vocabulary = base.vocabulary
    columns = min(vocabulary, _BLOCK_COLUMNS.get(device, vocabulary))
    return max(1, _BLOCK_ELEMENTS.get(device, _BLOCK_ELEMENTS["cuda"]) // columns), columns


def token_losses(base: BaseModel, hidden_Md: torch.Tensor, labels_M: torch.Tensor) -> torch.Tensor:
    """Cross entropy of every supervised row in nats, (M,), in at least float32.

    The logits of all rows never exist at once: the gradient of the hidden states is computed along with the losses, a
    block of rows at a time, on a CPU for a block of tokens at a time. Where the head is trained too (all weights are),
    autograd sees the logits of all rows.

    Args:
        base: applies its output head.
        hidden_Md: final hidden states of the supervised rows.
        labels_M: their next tokens.
    """
    if base.model.get_output_embeddings().weight.requires_grad:
        logits_MV = base.logits(hidden_Md)
        wide = torch.promote_types(logits_MV.dtype, torch.float32)
        return F.cross_entropy(logits_MV.to(wide), labels_M.to(hidden_Md.device), reduction="none")
    losses_M: torch.Tensor = _CrossEntropy.apply(hidden_Md, base, labels_M.to(hidden_Md.device))  # type: ignore[no-untyped-call]
    return losses_M


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_Md: torch.Tensor, base: BaseModel, labels_M: torch.Tensor) -> torch.Tensor:
        losses, gradients = [], []
        rows, columns = logits_at_once(base)
        # a soft cap needs the logits beside what becomes of them; a GPU lends freed memory again at once
        is_free = base.softcap is None and hidden_Md.device.type == "cpu"
        room = hidden_Md.new_empty(min(len(hidden_Md), rows) * columns) if is_free else None
        for hidden_md, labels_m in zip(torch.split(hidden_Md, rows), torch.split(labels_M, rows), strict=True):
            losses_m, grad_md = _losses_of_rows(base, hidden_md, labels_m, columns, room, ctx.needs_input_grad[0])
            losses.append(losses_m)
            if grad_md is not None:
                gradients.append(grad_md)
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (unit_Md,) = ctx.saved_tensors
        return unit_Md * gradients[0][:, None].to(unit_Md.dtype), None, None


def _losses_of_rows(
    base: BaseModel,
    hidden_md: torch.Tensor,
    labels_m: torch.Tensor,
    columns: int,
    room: torch.Tensor | None,
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The losses (m,) and, if asked for, their gradient (m, d), from one pass over `columns` tokens at a time.

    What was summed so far is scaled down whenever a larger logit is met (Milakov and Gimelshein, Online normalizer
    calculation for softmax, 2018). The label stands apart, so that its share minus 1 is never a difference of two
    numbers that are nearly the same, nor rounded to 16 bits.
    """
    label_m1 = labels_m[:, None]
    wide = torch.promote_types(hidden_md.dtype, torch.float32)
    largest_m1 = torch.full(label_m1.shape, torch.finfo(wide).min, dtype=wide, device=hidden_md.device)
    own_m1, others_m1 = torch.zeros_like(largest_m1), torch.zeros_like(largest_m1)
    grad_md = torch.zeros_like(hidden_md, dtype=wide) if with_gradient else None
    for start in range(0, base.vocabulary, columns):
        tokens = slice(start, min(start + columns, base.vocabulary))
        logits_mV = base.logits(hidden_md, room, tokens)
        shares_mV = logits_mV.to(wide, copy=base.softcap is not None)
        is_here_m1 = (label_m1 >= start) & (label_m1 < tokens.stop)
        place_m1 = (label_m1 - start).clamp(0, shares_mV.shape[1] - 1)
        at_place_m1 = shares_mV.gather(1, place_m1)
        own_m1 = torch.where(is_here_m1, at_place_m1, own_m1)
        before_m1, largest_m1 = largest_m1, torch.maximum(largest_m1, shares_mV.amax(1, keepdim=True))
        # in place and not yet divided by their sums: passes over the logits cost as much as a product
        shares_mV = shares_mV.sub_(largest_m1).exp_()
        shares_mV.scatter_(1, place_m1, (at_place_m1 - largest_m1).exp_().masked_fill_(is_here_m1, 0.0))
        shrink_m1 = (before_m1 - largest_m1).exp_()
        others_m1.mul_(shrink_m1).add_(shares_mV.sum(1, keepdim=True))
        if grad_md is not None:
            grad_md.mul_(shrink_m1).add_(base.logits_backward(shares_mV.to(logits_mV.dtype), logits_mV, tokens))
    sum_m1 = others_m1 + (own_m1 - largest_m1).exp_()
    losses_m = (largest_m1 + sum_m1.log() - own_m1).squeeze(1)
    if grad_md is None:
        return losses_m, None
    of_label_m1 = others_m1 / sum_m1
    if base.softcap is not None:
        of_label_m1 *= 1.0 - (own_m1 / base.softcap).square()
    of_labels_md = base.head_rows(labels_m).to(wide)
    return losses_m, grad_md.div_(sum_m1).addcmul_(of_labels_md, of_label_m1, value=-1.0).to(hidden_md.dtype)


def sum_of_client_means(losses_M: torch.Tensor, supervised_per_client: Sequence[int]) -> torch.Tensor:
    """sum_k (1 / n_k) sum_(m of k) loss_m, where n_k is the number of supervised tokens of client k's batch.

    A weighted sum over rows: a non-finite loss of one client leaves the gradients of the others untouched.
    """
    weights = torch.tensor([1.0 / count if count else 0.0 for count in supervised_per_client], dtype=losses_M.dtype)
    weights_M = weights.repeat_interleave(torch.tensor(supervised_per_client)).to(losses_M.device)
    return (losses_M * weights_M).sum()


def sums_of_parts(losses_M: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Sum of the losses of each part, of a client or an example, in float64.

    Each sum sees only its own values.
    """
    return torch.stack([part.sum(dtype=torch.float64) for part in torch.split(losses_M.detach(), list(lengths))])


def pull_gradient(
    values_P: torch.Tensor, target_P: torch.Tensor, strength: float, trainable_P: torch.Tensor | None
) -> torch.Tensor:
    """The gradient of strength / 2 * ||theta - target||^2, (P,); zero in columns that are not trainable."""
    gradient_P = strength * (values_P - target_P)
    return gradient_P if trainable_P is None else gradient_P * trainable_P
