"""What local training minimises: cross entropy on supervised rows, and the pull towards a target.

Knows nothing about optimizers, rounds or where adapters come from.

The sum over clients of each client's mean loss has, for each client, exactly the gradient of training it alone.

Axes: C clients, N packed rows, M supervised rows, V vocabulary, P parameters of one adapter, d hidden features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from fedmira.model.base import BaseModel


def token_losses(
    base: BaseModel, hidden_ND: torch.Tensor, rows_M: torch.Tensor, labels_M: torch.Tensor
) -> torch.Tensor:
    """Cross entropy of every supervised row in nats, (M,), in at least float32.

    Args:
        base: applies its output head to the supervised rows only.
        hidden_ND: final hidden states of all packed rows.
        rows_M: which rows have a supervised next token.
        labels_M: that next token.
    """
    device = hidden_ND.device
    logits_MV = base.logits(hidden_ND.index_select(0, rows_M.to(device)))
    if logits_MV.dtype in (torch.float16, torch.bfloat16):
        logits_MV = logits_MV.float()
    return F.cross_entropy(logits_MV, labels_M.to(device), reduction="none")


def sum_of_client_means(losses_M: torch.Tensor, supervised_per_client: Sequence[int]) -> torch.Tensor:
    """sum_k (1 / n_k) sum_(m of k) loss_m, where n_k is the number of supervised tokens of client k's batch.

    A weighted sum over rows: a non-finite loss of one client leaves the gradients of the others untouched.
    """
    weights = torch.tensor([1.0 / count if count else 0.0 for count in supervised_per_client], dtype=losses_M.dtype)
    weights_M = weights.repeat_interleave(torch.tensor(supervised_per_client)).to(losses_M.device)
    return (losses_M * weights_M).sum()


def sums_per_client(losses_M: torch.Tensor, supervised_per_client: Sequence[int]) -> torch.Tensor:
    """Sum of the losses of each client, (C,), float64 where the device has it. Each sum sees only its own values."""
    dtype = torch.float32 if losses_M.device.type == "mps" else torch.float64
    return torch.stack([part.sum(dtype=dtype) for part in torch.split(losses_M.detach(), list(supervised_per_client))])


def pull_gradient(
    values_CP: torch.Tensor, target_CP: torch.Tensor, strength: float, trainable_P: torch.Tensor | None
) -> torch.Tensor:
    """The gradient of strength / 2 * ||theta - target||^2, (C, P); zero in columns that are not trainable."""
    gradient_CP = strength * (values_CP - target_CP)
    return gradient_CP if trainable_P is None else gradient_CP * trainable_P
