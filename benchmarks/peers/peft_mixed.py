"""PEFT with one adapter per client and mixed batches: the strongest that comes off the shelf.

PEFT refuses `adapter_names` in training mode; in eval mode, with gradients switched on again, it trains correctly. One
batch of all clients is padded to its longest example; the clients' mean losses are summed.

Axes: S participants, P parameters of one adapter.
"""

from __future__ import annotations

import torch

from benchmarks.padding import right_padded, sum_of_client_means
from benchmarks.peers.peft_model import (
    FIRST,
    adapter_parameters,
    clip,
    load_row,
    lora_config,
    make_optimizer,
    make_peft_model,
    read_row,
)
from benchmarks.workloads import Task


class PeftMixed:
    """Trains all clients in one batch."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._names = [FIRST, *(f"client-{index}" for index in range(1, len(task.clients)))]
        self._model = make_peft_model(task)
        for name in self._names[1:]:
            self._model.add_adapter(name, lora_config(task))
        self._model.eval()
        self._parameters = [adapter_parameters(self._model, task, name) for name in self._names]
        for parameters in self._parameters:
            for parameter in parameters:
                parameter.requires_grad_(True)
        self._steps = task.steps_of_clients

    def round(self) -> torch.Tensor:
        """Train every client from its starting adapter; the trained rows (S, P)."""
        task = self._task
        for parameters, start_P in zip(self._parameters, task.start_SP, strict=True):
            load_row(parameters, start_P)
        optimizer = make_optimizer([one for parameters in self._parameters for one in parameters], task)
        for step in zip(*self._steps, strict=True):
            sizes = [len(examples) for examples in step]
            batch = right_padded([example for examples in step for example in examples], task.base.device)
            owners = [name for name, size in zip(self._names, sizes, strict=True) for _ in range(size)]
            logits_BTV = self._model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, adapter_names=owners, use_cache=False
            ).logits
            loss = sum_of_client_means(logits_BTV, batch.labels, sizes)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            for parameters in self._parameters:
                clip(parameters, task)
            optimizer.step()
        return torch.stack([read_row(parameters) for parameters in self._parameters])

    def close(self) -> None:
        """Nothing is held."""
