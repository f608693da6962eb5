"""Stock PEFT, one client after another: what a user of transformers and peft would write.

One model in memory; each client's weights are set into its one adapter. Own-batch right padding, full logits, the
model's own loss, torch's AdamW and clipping.

Axes: S participants, P parameters of one adapter.
"""

from __future__ import annotations

import torch

from benchmarks.padding import right_padded
from benchmarks.peers.peft_model import (
    FIRST,
    adapter_parameters,
    clip,
    load_row,
    make_optimizer,
    make_peft_model,
    read_row,
)
from benchmarks.workloads import Task


class PeftSequential:
    """Trains clients one by one."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._model = make_peft_model(task)
        self._parameters = adapter_parameters(self._model, task, FIRST)
        self._steps = task.steps_of_clients

    def round(self) -> torch.Tensor:
        """Train every client from its starting adapter; the trained rows (S, P)."""
        return torch.stack([self.train_client(client, start_P) for client, start_P in enumerate(self._task.start_SP)])

    def train_client(self, client: int, start_P: torch.Tensor) -> torch.Tensor:
        """Train one client from `start_P`; its trained row (P,)."""
        load_row(self._parameters, start_P)
        self._model.train()
        optimizer = make_optimizer(self._parameters, self._task)
        for examples in self._steps[client]:
            batch = right_padded(examples, start_P.device)
            loss = self._model(**batch._asdict(), use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            clip(self._parameters, self._task)
            optimizer.step()
        return read_row(self._parameters)

    def close(self) -> None:
        """Nothing is held."""
