"""The slow twin of the engine: one client after another, stock PEFT, padded batches, torch.optim, one plain loop.

Where every weight is tuned there is no PEFT: the model itself is trained, as in traditional fine-tuning.

The loss is computed here in float64 and not by transformers, which lowers logits to float32 first; so are RMS norms
where the engine has a fused body, because transformers' rounding to float32 would hide every error below 1e-7.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from peft import LoraConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from tests.reference.tiny_models import TARGETS

from fedmira.config.training import TrainingConfig
from fedmira.data.packing import batches_in_round
from fedmira.data.tokenization import TokenizedClient, TokenizedExample
from fedmira.model.base import BaseModel
from fedmira.training.zeroth_order import direction, direction_number
from fedmira.types import Job, Layout


def peft_model(base: BaseModel, layout: Layout, row_P: torch.Tensor) -> Any:
    """A copy of the base with PEFT's layers or virtual tokens that hold the adapter `row_P`."""
    stock = copy.deepcopy(base.model)
    if layout.groups == ("full",):
        row_P = row_P + frozen_row(base, layout)
        model = stock
    else:
        if base.body is not None:
            exact_norms(stock)
        model = get_peft_model(stock, _peft_config(base, layout), autocast_adapter_dtype=False)
    model.to(base.dtype).eval()
    with torch.no_grad():
        for spec, parameter in zip(layout.specs, peft_parameters(model, layout), strict=True):
            parameter.copy_(row_P[spec.offset : spec.offset + spec.size].view(spec.shape))
    return model


def _peft_config(base: BaseModel, layout: Layout) -> Any:
    if layout.num_virtual_tokens:
        tokens = {"task_type": "CAUSAL_LM", "num_virtual_tokens": layout.num_virtual_tokens}
        if "encoder" in layout.groups:
            return PromptEncoderConfig(**tokens, encoder_hidden_size=layout.specs[1].shape[0])
        return PromptTuningConfig(**tokens)
    rank = layout.specs[0].shape[0]
    return LoraConfig(
        r=rank,
        lora_alpha=layout.scaling * rank,
        target_modules=sorted({spec.layer for spec in layout.specs}),
        fan_in_fan_out=base.model.config.model_type in TARGETS,
        lora_dropout=0.0,
    )


def frozen_row(base: BaseModel, layout: Layout) -> torch.Tensor:
    """The base's own weights as a row (P,) of a layout of all weights."""
    return torch.cat([base.model.get_parameter(spec.name).detach().flatten() for spec in layout.specs])


def exact_norms(model: torch.nn.Module) -> None:
    """Make every RMS norm of a transformers model compute in the dtype of its input."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = functools.partial(_exact_rms_norm, module)  # type: ignore[method-assign]


def _exact_rms_norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    normalised: torch.Tensor = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)
    return module.weight * normalised


def peft_parameters(model: Any, layout: Layout) -> list[torch.nn.Parameter]:
    """The tuned weights in the order of the layout."""
    if layout.groups == ("full",):
        return [model.get_parameter(spec.name) for spec in layout.specs]
    if layout.num_virtual_tokens:
        # PEFT registers the prompt before the layers of its encoder
        return list(model.prompt_encoder.parameters())
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
    # virtual tokens have logits too
    logits_BTV = logits_BTV[:, -longest:]
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
        for batch in batches_in_round(client, training, seed, job.round):
            examples = [client.train[i] for i in batch]
            loss = mean_loss(model, examples)
            loss_sum += loss.item() * sum(len(e.tokens) - e.prompt_length for e in examples)
            if job.pull is not None:
                for spec, parameter in zip(layout.specs, parameters, strict=True):
                    target = job.pull.target_SP[index, spec.offset : spec.offset + spec.size].view(spec.shape)
                    loss = loss + job.pull.strength_S[index] / 2 * (parameter - target).square().sum()
            optimizer.zero_grad()
            loss.backward()
            if training.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(trained, training.clip_norm)
            optimizer.step()
        row_P = torch.cat([parameter.detach().flatten() for parameter in parameters])
        rows.append(row_P - frozen_row(base, layout) if layout.groups == ("full",) else row_P)
        loss_sums.append(loss_sum)
    return torch.stack(rows), loss_sums


def move_along_seeds(
    base: BaseModel,
    layout: Layout,
    job: Job,
    clients: tuple[TokenizedClient, ...],
    training: TrainingConfig,
    seed: int,
) -> tuple[torch.Tensor, list[list[tuple[int, float]]]]:
    """Train every participant alone by FedKSeed; trained rows (S, P), and what each one uploads: (j, rate * slope)."""
    assert job.seeds is not None
    rows, uploads = [], []
    for index, id_ in enumerate(job.ids):
        client, row_P, pairs = clients[id_], job.start_SP[index], []
        for step, batch in enumerate(batches_in_round(client, training, seed, job.round)):
            examples = [client.train[i] for i in batch]
            number = direction_number(job.seeds, seed, client.name, job.round, step)
            away_P = job.seeds.epsilon * direction(seed, number, layout.num_parameters).to(row_P)
            with torch.no_grad():
                above, below = (
                    mean_loss(peft_model(base, layout, moved_P), examples).item()
                    for moved_P in (row_P + away_P, row_P - away_P)
                )
            pairs.append((number, training.learning_rate * (above - below) / (2 * job.seeds.epsilon)))
            row_P = row_P - pairs[-1][1] * direction(seed, number, layout.num_parameters).to(row_P)
        rows.append(row_P)
        uploads.append(pairs)
    return torch.stack(rows), uploads
