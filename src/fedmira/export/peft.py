"""Writes one adapter as a folder in PEFT's format, by hand: the same bytes from run to run.

PEFT itself writes `target_modules` in the order of a set and the weights readable by their owner only. Knows nothing
about runs, clients or how an adapter was trained; `clients` does.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fedmira.errors import UsageError
from fedmira.export.pairs import fitted, joined_pairs, num_pairs
from fedmira.runs.atomic import disk_errors_named, make_folder, nonce, remove_tree, sync_folder, write_new_file

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from fedmira.types import Layout

PEFT_SUFFIX = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}


class Settings(NamedTuple):
    """What a PEFT folder states besides its tensors."""

    rank: int
    """Of every pair of factors; vLLM compares it with its `--max-lora-rank`. Not looked at for soft prompts."""
    alpha: float
    """The product is scaled by alpha / rank. Not looked at for soft prompts."""
    dropout: float
    """Used while training; stated only. Not looked at for soft prompts."""
    base_path: str
    """What the folder names as its base model: an id or a path."""
    revision: str | None = None
    """Branch, tag or commit of the base model."""
    fan_in_fan_out: bool = False
    """True if the base layers are `Conv1D` (GPT-2), which store their weight transposed."""


def adapter_files(
    layout: Layout, row_P: torch.Tensor, settings: Settings, shift_W: torch.Tensor | None = None
) -> dict[str, bytes]:
    """Return the files of a PEFT folder for one adapter, name to content: config and weights.

    There are no `modules_to_save`, no DoRA and no biases, which vLLM refuses. Several pairs of a layer become one of
    their ranks together. Of a soft prompt the embeddings of its virtual tokens are stored, computed by its encoder if
    it has one: so does PEFT, and it loads nothing else.

    Args:
        layout: Pairs of LoRA factors or a soft prompt, named by the paths of the base model's modules.
        row_P: One row of an arena (P,), any floating dtype; stored as it is.
        settings: What else the folder states.
        shift_W: What was added to the weights of the adapted layers, see `Arena.shift_W`; it becomes part of the pairs.
    """
    from safetensors.torch import save

    if (number := num_pairs(layout)) > 1:
        layout, row_P = joined_pairs(layout, row_P)
        settings = settings._replace(rank=number * settings.rank, alpha=number * settings.alpha)
    if layout.num_virtual_tokens:
        tensors, config = _prompt_tensors(layout, row_P), _prompt_config(settings, layout)
    else:
        layout, row_P = fitted(layout, row_P, shift_W)
        tensors, config = _peft_tensors(layout, row_P), _peft_config(settings, layout)
    return {
        "adapter_config.json": (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
        "adapter_model.safetensors": save(tensors, metadata={"format": "pt"}),
    }


def _peft_tensors(layout: Layout, row_P: torch.Tensor) -> dict[str, torch.Tensor]:
    tensors = {}
    for spec in layout.specs:
        values = row_P[spec.columns].reshape(spec.shape)
        tensors[f"base_model.model.{spec.layer}.{PEFT_SUFFIX[spec.group]}"] = values.detach().cpu().contiguous()
    return dict(sorted(tensors.items()))


def _prompt_tensors(layout: Layout, row_P: torch.Tensor) -> dict[str, torch.Tensor]:
    from fedmira.model.soft_prompt import prompts_of

    return {"prompt_embeddings": prompts_of(layout, row_P.detach()[None])[0].cpu().contiguous()}


def _prompt_config(settings: Settings, layout: Layout) -> dict[str, object]:
    """The fields of `PromptTuningConfig` or `PromptEncoderConfig` that matter; PEFT takes the rest from the base."""
    prompt, *encoder = layout.specs
    config: dict[str, object] = {
        "base_model_name_or_path": settings.base_path,
        "inference_mode": True,
        "modules_to_save": None,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": prompt.shape[0],
        "peft_type": "P_TUNING" if encoder else "PROMPT_TUNING",
        "revision": settings.revision,
        "task_type": "CAUSAL_LM",
        "token_dim": prompt.shape[1],
    }
    if encoder:
        return {**config, "encoder_reparameterization_type": "MLP", "encoder_hidden_size": encoder[0].shape[0]}
    return {**config, "prompt_tuning_init": "RANDOM"}


def _peft_config(settings: Settings, layout: Layout) -> dict[str, object]:
    """The fields of `LoraConfig` that matter. Modules are named in full, so that none is matched by accident.

    The scaling alpha / rank is the same for all; what has another rank than the largest stands in the patterns.
    """
    ranks = {spec_a.layer: spec_a.shape[0] for spec_a, _ in layout.pairs}
    rank = max(ranks.values())
    scaling = settings.alpha / settings.rank
    alphas = {its: settings.alpha if its == settings.rank else scaling * its for its in ranks.values()}
    alpha = alphas[rank]
    smaller = {layer: its for layer, its in sorted(ranks.items()) if its != rank}
    return {
        "alpha_pattern": {layer: alphas[its] for layer, its in smaller.items()},
        "base_model_name_or_path": settings.base_path,
        "bias": "none",
        "fan_in_fan_out": settings.fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": settings.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": smaller,
        "revision": settings.revision,
        "target_modules": sorted(ranks),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write `files` (name to content) into `folder`, durably, with the modes the umask allows; none may exist."""
    for name, content in files.items():
        write_new_file(folder / name, [content])
    sync_folder(folder)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `out` at the end, or vanishes if anything fails.

    It lies beside `out`, or inside if that is there already: whoever stands in it, as with ".", must not lose it.
    What a process that was killed left of `out` is removed.

    Raises:
        UsageError: `out` exists and is not an empty folder.
        SetupError, IntegrityError: the disk refuses; the message names the reason.
    """
    with disk_errors_named(out, "write"):
        try:
            there = stat.S_ISDIR(os.lstat(out).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            there = False
        else:
            if not there or not all(map(_left_behind, os.listdir(out))):
                raise UsageError(f"{out} exists and is not an empty folder; give a new folder, or remove this one")
    # a link on the way there is followed, and "." has a name
    out = Path(os.path.realpath(out))
    make_folder(out.parent)
    place = out if there else out.parent
    # short, whatever the name of `out` is
    prefix = f".export-{hashlib.sha256(os.fsencode(out.name)).hexdigest()[:8]}-"
    temporary = place / f"{prefix}{nonce()}"
    try:
        with disk_errors_named(out, "write"):
            temporary.mkdir()
            # a folder that may be written in need not be one that may be listed
            with suppress(PermissionError):
                for name in os.listdir(place):
                    if _left_behind(name) and (there or name.startswith(prefix)):
                        remove_tree(place / name)
            yield temporary
            if there:
                for part in sorted(temporary.iterdir()):
                    part.rename(out / part.name)
                sync_folder(out)
            else:
                temporary.rename(out)
                sync_folder(out.parent)
    finally:
        if os.path.lexists(temporary):
            remove_tree(temporary)


_TEMPORARY = re.compile(r"\.export-[0-9a-f]{8}-(\d{1,9})-[0-9a-f]{8}")


def _left_behind(name: str) -> bool:
    """Whether this is the name of a temporary folder whose process is gone."""
    match = _TEMPORARY.fullmatch(name)
    if match is None:
        return False
    try:
        os.kill(int(match[1]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        # it runs for somebody else
        pass
    return False
