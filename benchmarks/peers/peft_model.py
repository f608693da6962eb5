"""A PEFT model over a copy of the base, and its adapter weights as rows of our layout.

Axes: P parameters of one adapter.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from benchmarks.workloads import Task

FIRST = "default"
_PEFT_NAMES = {"lora_a": "lora_A", "lora_b": "lora_B"}


def make_peft_model(task: Task, *, merges: bool = False) -> Any:
    """A PEFT model with one adapter, `FIRST`, on the layers of the task's layout; the task's base stays as it is.

    Args:
        task: whose frozen weights it shares: a user of PEFT has them once.
        merges: whether adapters will be merged into the weights, which then are a copy.
    """
    model = task.base.model
    frozen = {} if merges else {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return get_peft_model(copy.deepcopy(model, frozen), lora_config(task))


def lora_config(task: Task) -> LoraConfig:
    """PEFT's words for the task's layout."""
    return LoraConfig(
        r=task.rank,
        lora_alpha=task.layout.scaling * task.rank,
        target_modules=sorted({spec.layer for spec in task.layout.specs}),
        fan_in_fan_out=task.base.model.config.model_type == "gpt2",
        lora_dropout=0.0,
    )


def adapter_parameters(model: Any, task: Task, adapter: str) -> list[torch.nn.Parameter]:
    """The LoRA weights of `adapter` in the order of the layout, in the layout's dtype."""
    parameters = []
    for spec in task.layout.specs:
        module = model.base_model.model.get_submodule(f"{spec.layer}.{_PEFT_NAMES[spec.group]}.{adapter}")
        # PEFT lowers float64 to float32
        parameters.append(module.to(task.start_SP.dtype).weight)
    return parameters


@torch.no_grad()
def load_row(parameters: Iterable[torch.nn.Parameter], row_P: torch.Tensor) -> None:
    """Set the weights to one row of an arena."""
    offset = 0
    for parameter in parameters:
        parameter.copy_(row_P[offset : offset + parameter.numel()].view_as(parameter))
        offset += parameter.numel()


@torch.no_grad()
def read_row(parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    """The weights as one row (P,)."""
    return torch.cat([parameter.flatten() for parameter in parameters])


def make_optimizer(parameters: Sequence[torch.Tensor], task: Task) -> torch.optim.Optimizer:
    """torch's AdamW, or its SGD where the gate judges by that, with the task's settings."""
    training = task.training
    if training.optimizer == "sgd":
        return torch.optim.SGD(list(parameters), lr=training.learning_rate)
    return torch.optim.AdamW(
        list(parameters),
        lr=training.learning_rate,
        betas=(training.beta1, training.beta2),
        eps=training.epsilon,
        weight_decay=training.weight_decay,
    )


def clip(parameters: list[torch.nn.Parameter], task: Task) -> None:
    """torch's clipping at the task's norm."""
    if task.training.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(parameters, task.training.clip_norm)
