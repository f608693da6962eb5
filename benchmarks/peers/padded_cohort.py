"""A naive cohort: all clients padded to one length, low-rank products as batched matrix products.

What one would write first to batch clients; it shows why packing comes before cohorts. Full logits, torch's autograd
and AdamW over one stacked tensor per layer and factor.

Axes: S participants, P parameters of one adapter, n positions of one client, R rank, I/O in and out features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.padding import right_padded, sum_of_client_means
from benchmarks.peers.peft_model import make_optimizer
from benchmarks.workloads import Task
from fedmira.types import Arena


class PaddedCohort:
    """Trains all clients in one padded batch."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._steps = task.steps_of_clients

    def round(self) -> torch.Tensor:
        """Train every client from its starting adapter; the trained rows (S, P)."""
        task = self._task
        start = Arena(task.layout, task.start_SP)
        stacks = {spec.name: start.view(spec).clone().requires_grad_(True) for spec in task.layout.specs}
        optimizer = make_optimizer(list(stacks.values()), task)
        handles = self._attach(stacks)
        try:
            for step in zip(*self._steps, strict=True):
                sizes = [len(examples) for examples in step]
                batch = right_padded([example for examples in step for example in examples], task.base.device)
                logits_BTV = task.base.model(
                    input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
                ).logits
                loss = sum_of_client_means(logits_BTV, batch.labels, sizes)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                self._clip(stacks)
                optimizer.step()
        finally:
            for handle in handles:
                handle.remove()
        return torch.cat([stacks[spec.name].detach().flatten(1) for spec in task.layout.specs], dim=1)

    def close(self) -> None:
        """Nothing is held."""

    def _attach(self, stacks: dict[str, torch.Tensor]) -> list[Any]:
        layout = self._task.layout
        handles = []
        for layer in {spec.layer for spec in layout.specs}:
            a_SRI, b_SOR = (stacks[f"{layer}.{group}"] for group in ("lora_a", "lora_b"))
            module = self._task.base.model.get_submodule(layer)
            handles.append(module.register_forward_hook(_hook(a_SRI, b_SOR, layout.scaling)))
        return handles

    def _clip(self, stacks: dict[str, torch.Tensor]) -> None:
        limit = self._task.training.clip_norm
        gradients = [stack.grad.flatten(1) for stack in stacks.values() if stack.grad is not None]
        if limit is None:
            return
        norms_S = torch.cat(gradients, dim=1).norm(dim=1)
        factors_S = (limit / (norms_S + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(factors_S[:, None])


def _hook(
    a_SRI: torch.Tensor, b_SOR: torch.Tensor, scaling: float
) -> Callable[[torch.nn.Module, tuple[Any, ...], torch.Tensor], torch.Tensor]:
    def add_low_rank(_module: torch.nn.Module, inputs: tuple[Any, ...], result: torch.Tensor) -> torch.Tensor:
        x_SnI = inputs[0].reshape(len(a_SRI), -1, a_SRI.shape[2]).to(a_SRI.dtype)
        delta_SnO = torch.bmm(torch.bmm(x_SnI, a_SRI.transpose(1, 2)), b_SOR.transpose(1, 2)) * scaling
        return result + delta_SnO.view_as(result).to(result.dtype)

    return add_low_rank
