"""Writes a base model, with the weights it has now, as a Hugging Face folder that transformers loads; and gives it the
weights that it has with a low-rank adapter for a while.

Knows nothing about runs, clients or whose weights they are; `clients` does.

Axes: K clients, P parameters of one adapter, W elements of all adapted layers.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fedmira.export.card import card_bytes
from fedmira.export.pairs import joined_pairs
from fedmira.export.peft import write_files
from fedmira.runs.atomic import write_new_file
from fedmira.types import Arena

if TYPE_CHECKING:
    from fedmira.model.base import BaseModel


@contextmanager
def merged(base: BaseModel, adapters: Arena, row: int) -> Iterator[None]:
    """Inside the `with` block the adapted layers of `base` have the weights W + shift + scaling * B A of one client.

    The products of several pairs of a layer add up.

    Args:
        base: Its weights are its own bytes again behind the block.
        adapters: (K, P) of low-rank pairs; the shift is theirs, if any.
        row: Whose adapter it is.
    """
    import torch

    from fedmira.model.shift import shifted

    layout, row_P = joined_pairs(adapters.layout, adapters.values_KP[row])
    one = Arena(layout, row_P[None])
    products = (one.view(spec_b)[0] @ one.view(spec_a)[0] for spec_a, spec_b in layout.pairs)
    products_W = torch.cat([(layout.scaling * product_OI).flatten() for product_OI in products])
    if adapters.shift_W is not None:
        products_W += adapters.shift_W
    with shifted(base, layout, products_W):
        yield


def write_model(folder: Path, base: BaseModel, card: str) -> None:
    """Write config, weights (safetensors), tokenizer and model card into `folder`, which holds none of them.

    Tied weights are written once; transformers ties them again. Tensors have the names and shapes that the family is
    published with, which its modules may lack: other tools know no others.

    Args:
        folder: Exists and is empty.
        base: Weights, config and tokenizer are taken from it.
        card: README.md.
    """
    from safetensors.torch import save
    from transformers.core_model_loading import revert_weight_conversion

    model = base.model
    config = copy.deepcopy(model.config)
    # stated by transformers only where it saved the model itself
    config.architectures = [type(model).__name__]
    parameters = dict(model.named_parameters())
    doubles = {name for name, _ in model.named_parameters(remove_duplicate=False)} - set(parameters)
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items() if name not in doubles}
    published = revert_weight_conversion(model, state)
    # stacked layers share their memory: each is written as a tensor of its own
    tensors = {name: published[name].clone().contiguous() for name in sorted(published)}
    if base.tokenizer is not None:
        # tokenizers write to no path whose bytes are not UTF-8
        with tempfile.TemporaryDirectory() as elsewhere:
            base.tokenizer.save_pretrained(elsewhere)
            for path in sorted(Path(elsewhere).rglob("*")):
                target = folder / path.relative_to(elsewhere)
                if path.is_dir():
                    target.mkdir()
                else:
                    write_new_file(target, [path.read_bytes()])
    files = {
        "config.json": config.to_json_string().encode(),
        "model.safetensors": save(tensors, metadata={"format": "pt"}),
        "README.md": card_bytes(card),
    }
    if model.generation_config is not None:
        files["generation_config.json"] = model.generation_config.to_json_string().encode()
    write_files(folder, files)
