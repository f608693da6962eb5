"""Writes a base model, with the weights it has now, as a Hugging Face folder that transformers loads.

Knows nothing about runs, clients or whose weights they are; `clients` does.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

from fedmira.export.peft import write_files

if TYPE_CHECKING:
    from fedmira.model.base import BaseModel


def write_model(folder: Path, base: BaseModel, card: str) -> None:
    """Write config, weights (safetensors), tokenizer and model card into `folder`, which holds none of them.

    Tied weights are written once; transformers ties them again.

    Args:
        folder: Exists and is empty.
        base: Weights, config and tokenizer are taken from it.
        card: README.md.
    """
    from safetensors.torch import save

    model = base.model
    config = copy.deepcopy(model.config)
    # stated by transformers only where it saved the model itself
    config.architectures = [type(model).__name__]
    parameters = dict(model.named_parameters())
    doubles = {name for name, _ in model.named_parameters(remove_duplicate=False)} - set(parameters)
    # stacked layers share their memory: each is written as a tensor of its own
    tensors = {
        name: tensor.detach().cpu().clone().contiguous()
        for name, tensor in sorted(model.state_dict().items())
        if name not in doubles
    }
    if base.tokenizer is not None:
        base.tokenizer.save_pretrained(str(folder))
    files = {
        "config.json": config.to_json_string().encode(),
        "model.safetensors": save(tensors, metadata={"format": "pt"}),
        "README.md": card.encode(),
    }
    if model.generation_config is not None:
        files["generation_config.json"] = model.generation_config.to_json_string().encode()
    write_files(folder, files)
