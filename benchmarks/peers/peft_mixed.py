"""PEFT with one adapter per client and mixed batches: the strongest that comes off the shelf.

PEFT refuses `adapter_names` in training mode; in eval mode, with gradients switched on again, it trains correctly. A
batch of several clients is padded to its longest example; the clients' mean losses are summed. How many clients a batch
should hold depends on the machine: more padding against fewer calls.

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
    """Trains `clients_per_batch` clients in one batch, one such group after another; None takes all at once."""

    def __init__(self, task: Task, clients_per_batch: int | None = None) -> None:
        self._task = task
        self._clients_per_batch = clients_per_batch or len(task.clients)
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
        for parameters, start_P in zip(self._parameters, self._task.start_SP, strict=True):
            load_row(parameters, start_P)
        for first in range(0, len(self._names), self._clients_per_batch):
            self._train_together(slice(first, first + self._clients_per_batch))
        return torch.stack([read_row(parameters) for parameters in self._parameters])

    def _train_together(self, group: slice) -> None:
        task, names, parameters = self._task, self._names[group], self._parameters[group]
        optimizer = make_optimizer([one for of_client in parameters for one in of_client], task)
        for step in zip(*self._steps[group], strict=True):
            sizes = [len(examples) for examples in step]
            batch = right_padded([example for examples in step for example in examples], task.base.device)
            owners = [name for name, size in zip(names, sizes, strict=True) for _ in range(size)]
            logits_BTV = self._model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, adapter_names=owners, use_cache=False
            ).logits
            loss = sum_of_client_means(logits_BTV, batch.labels, sizes)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            for of_client in parameters:
                clip(of_client, task)
            optimizer.step()

    def close(self) -> None:
        """Nothing is held."""
