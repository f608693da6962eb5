"""What local training minimises: cross entropy on supervised rows, and the pull towards a target.

Knows nothing about optimizers, rounds or where adapters come from.

The sum over clients of each client's mean loss has, for each client, exactly the gradient of training it alone.

Axes: C clients, M supervised rows, m of a block, V vocabulary, P parameters of one adapter, d hidden features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from fedmira.model.base import BaseModel

_BLOCK_BYTES = {"cpu": 30 * 2**20, "cuda": 2**28}
"""Logits that exist at once; more would leave the cache, fewer would read the head's weights too often. From 32 MiB on
glibc takes new pages from the system for every block."""


def rows_at_once(base: BaseModel) -> int:
    """How many supervised rows have their logits in memory at a time where the head is frozen."""
    device, widest = base.device.type, max(4, base.dtype.itemsize)
    vocabulary = int(base.model.config.get_text_config().vocab_size)
    return max(1, _BLOCK_BYTES.get(device, _BLOCK_BYTES["cuda"]) // (vocabulary * widest))


def token_losses(base: BaseModel, hidden_Md: torch.Tensor, labels_M: torch.Tensor) -> torch.Tensor:
    """Cross entropy of every supervised row in nats, (M,), in at least float32.

    The logits of all rows never exist at once: the gradient of the hidden states is computed along with the losses, a
    block of rows at a time. Where the head is trained too (all weights are), autograd sees the logits of all rows.

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
        vocabulary, block_rows = int(base.model.config.get_text_config().vocab_size), rows_at_once(base)
        # a soft cap needs the logits beside what becomes of them
        room = None if base.softcap is not None else hidden_Md.new_empty(min(len(hidden_Md), block_rows) * vocabulary)
        for hidden_md, labels_m in zip(
            torch.split(hidden_Md, block_rows), torch.split(labels_M, block_rows), strict=True
        ):
            logits_mV = base.logits(hidden_md, room)
            wide = torch.promote_types(logits_mV.dtype, torch.float32)
            shares_mV = logits_mV.to(wide, copy=base.softcap is not None)
            own_m1 = shares_mV.gather(1, labels_m[:, None])
            largest_m1 = shares_mV.amax(1, keepdim=True)
            # in place and not yet divided by their sums: passes over the logits cost as much as a product
            shares_mV = shares_mV.sub_(largest_m1).exp_()
            sum_m1 = shares_mV.sum(1, keepdim=True)
            losses.append((largest_m1 + sum_m1.log() - own_m1).squeeze(1))
            if ctx.needs_input_grad[0]:
                shares_mV.scatter_add_(1, labels_m[:, None], -sum_m1)
                grad_md = base.logits_backward(shares_mV.to(logits_mV.dtype), logits_mV)
                gradients.append(grad_md.div_(sum_m1.to(grad_md.dtype)))
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (unit_Md,) = ctx.saved_tensors
        return unit_Md * gradients[0][:, None].to(unit_Md.dtype), None, None


def sum_of_client_means(losses_M: torch.Tensor, supervised_per_client: Sequence[int]) -> torch.Tensor:
    """sum_k (1 / n_k) sum_(m of k) loss_m, where n_k is the number of supervised tokens of client k's batch.

    A weighted sum over rows: a non-finite loss of one client leaves the gradients of the others untouched.
    """
    weights = torch.tensor([1.0 / count if count else 0.0 for count in supervised_per_client], dtype=losses_M.dtype)
    weights_M = weights.repeat_interleave(torch.tensor(supervised_per_client)).to(losses_M.device)
    return (losses_M * weights_M).sum()


def sums_of_parts(losses_M: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Sum of the losses of each part, of a client or an example, float64 where the device has it.

    Each sum sees only its own values.
    """
    dtype = torch.float32 if losses_M.device.type == "mps" else torch.float64
    return torch.stack([part.sum(dtype=dtype) for part in torch.split(losses_M.detach(), list(lengths))])


def pull_gradient(
    values_P: torch.Tensor, target_P: torch.Tensor, strength: float, trainable_P: torch.Tensor | None
) -> torch.Tensor:
    """The gradient of strength / 2 * ||theta - target||^2, (P,); zero in columns that are not trainable."""
    gradient_P = strength * (values_P - target_P)
    return gradient_P if trainable_P is None else gradient_P * trainable_P
