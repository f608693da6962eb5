"""The slow twin of the engine: one client after another, stock PEFT, padded batches, torch.optim, one plain loop.

The loss is computed here in float64 and not by transformers, which lowers logits to float32 first.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tests.reference.tiny_models import TARGETS

from fedmira.config import TrainingConfig
from fedmira.data.packing import local_batches
from fedmira.data.tokenization import TokenizedClient, TokenizedExample
from fedmira.model.base import BaseModel
from fedmira.types import Job, Layout


def peft_model(base: BaseModel, layout: Layout, row_P: torch.Tensor) -> Any:
    """A copy of the base with PEFT's LoRA layers that hold the adapter `row_P`."""
    family = base.model.config.model_type
    modules = sorted({spec.layer for spec in layout.specs})
    rank = layout.specs[0].shape[0]
    config = LoraConfig(
        r=rank,
        lora_alpha=layout.scaling * rank,
        target_modules=modules,
        fan_in_fan_out=family in TARGETS,
        lora_dropout=0.0,
    )
    model = get_peft_model(copy.deepcopy(base.model), config, autocast_adapter_dtype=False)
    model.to(base.dtype).eval()
    with torch.no_grad():
        for spec, parameter in zip(layout.specs, peft_parameters(model, layout), strict=True):
            parameter.copy_(row_P[spec.offset : spec.offset + spec.size].view(spec.shape))
    return model


def peft_parameters(model: Any, layout: Layout) -> list[torch.nn.Parameter]:
    """The LoRA weights of a PEFT model in the order of the layout."""
    names = {"lora_a": "lora_A", "lora_b": "lora_B"}
    return [
        model.base_model.model.get_submodule(f"{spec.layer}.{names[spec.group]}.default").weight
        for spec in layout.specs
    ]


def mean_loss(model: Any, examples: list[TokenizedExample]) -> torch.Tensor:
    """Mean cross entropy over the supervised tokens of a right-padded batch."""
    longest = max(len(example.tokens) for example in examples)
    tokens_BT = torch.zeros(len(examples), longest, dtype=torch.long)
    mask_BT = torch.zeros(len(examples), longest, dtype=torch.long)
    labels_BT = torch.full((len(examples), longest), -100)
    for row, example in enumerate(examples):
        length = len(example.tokens)
        tokens_BT[row, :length] = torch.from_numpy(example.tokens).long()
        mask_BT[row, :length] = 1
        labels_BT[row, example.prompt_length : length] = tokens_BT[row, example.prompt_length : length]
    logits_BTV = model(input_ids=tokens_BT, attention_mask=mask_BT, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten())


def make_optimizer(parameters: list[torch.nn.Parameter], training: TrainingConfig) -> torch.optim.Optimizer:
    if training.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=training.learning_rate, momentum=training.momentum, weight_decay=training.weight_decay
        )
    kind = torch.optim.AdamW if training.optimizer == "adamw" else torch.optim.Adam
    return kind(
        parameters,
        lr=training.learning_rate,
        betas=(training.beta1, training.beta2),
        eps=training.epsilon,
        weight_decay=training.weight_decay,
        foreach=False,
    )


def train_one_by_one(
    base: BaseModel,
    layout: Layout,
    job: Job,
    clients: tuple[TokenizedClient, ...],
    training: TrainingConfig,
    seed: int,
) -> tuple[torch.Tensor, list[float]]:
    """Train every participant alone with a constant learning rate; trained rows (S, P) and each one's sum of losses."""
    rows, loss_sums = [], []
    for index, id_ in enumerate(job.ids):
        client = clients[id_]
        model = peft_model(base, layout, job.start_SP[index])
        parameters = peft_parameters(model, layout)
        for spec, parameter in zip(layout.specs, parameters, strict=True):
            parameter.requires_grad_(spec.group in job.trainable)
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        optimizer = make_optimizer(trained, training)
        loss_sum = 0.0
        for batch in local_batches(
            len(client.train),
            training.batch_size,
            training.steps_or_default,
            training.local_epochs,
            seed,
            client.name,
            job.round,
        ):
            examples = [client.train[i] for i in batch]
            loss = mean_loss(model, examples)
            loss_sum += loss.item() * sum(len(e.tokens) - e.prompt_length for e in examples)
            if job.pull is not None:
                for spec, parameter in zip(layout.specs, parameters, strict=True):
                    target = job.pull.target_SP[index, spec.offset : spec.offset + spec.size].view(spec.shape)
                    loss = loss + job.pull.strength / 2 * (parameter - target).square().sum()
            optimizer.zero_grad()
            loss.backward()
            if training.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(trained, training.clip_norm)
            optimizer.step()
        rows.append(torch.cat([parameter.detach().flatten() for parameter in parameters]))
        loss_sums.append(loss_sum)
    return torch.stack(rows), loss_sums
