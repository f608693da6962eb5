"""Writes one adapter as a folder in PEFT's format, by hand: the same bytes from run to run.

PEFT itself writes `target_modules` in the order of a set and the weights readable by their owner only. Knows nothing
about runs, clients or how an adapter was trained; `clients` does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fedmira.errors import UsageError
from fedmira.runs.atomic import disk_errors_named, make_folder, nonce, remove_tree, sync_folder, write_new_file

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from fedmira.types import Layout

EMBEDDED_NAME = "fedmira-embedded-base"
"""What an exported folder names as its base where that is the embedded model and no copy lies beside it."""

PEFT_SUFFIX = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}


class Settings(NamedTuple):
    """What a PEFT folder states besides its tensors."""

    rank: int
    """Of every pair of factors; vLLM compares it with its `--max-lora-rank`."""
    alpha: float
    """The product is scaled by alpha / rank."""
    dropout: float
    """Used while training; stated only."""
    base_path: str
    """What the folder names as its base model: an id or a path."""
    revision: str | None = None
    """Branch, tag or commit of the base model."""
    fan_in_fan_out: bool = False
    """True if the base layers are `Conv1D` (GPT-2), which store their weight transposed."""


def adapter_files(layout: Layout, row_P: torch.Tensor, settings: Settings, card: str = "") -> dict[str, bytes]:
    """Return the files of a PEFT folder for one adapter, name to content: config, weights and model card.

    There are no `modules_to_save`, no DoRA and no biases, which vLLM refuses.

    Args:
        layout: The tensors of the adapter, named by the paths of the base model's modules.
        row_P: One row of an arena (P,), any floating dtype; stored as it is.
        settings: What else the folder states.
        card: README.md; a short one by default.

    Raises:
        UsageError: the layout holds something other than pairs of LoRA factors, or `row_P` does not fit it.
    """
    from safetensors.torch import save

    tensors = _peft_tensors(layout, row_P)
    config = _peft_config(settings, sorted({spec.layer for spec in layout.specs}))
    return {
        "adapter_config.json": (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
        "adapter_model.safetensors": save(tensors, metadata={"format": "pt"}),
        "README.md": (card or model_card(settings.base_path)).encode(),
    }


def _peft_tensors(layout: Layout, row_P: torch.Tensor) -> dict[str, torch.Tensor]:
    if row_P.shape != (layout.num_parameters,):
        raise UsageError(
            f"the adapter has shape {tuple(row_P.shape)}; its layout has {layout.num_parameters} parameters"
        )
    tensors = {}
    for spec in layout.specs:
        if spec.group not in PEFT_SUFFIX:
            raise UsageError(f"{spec.name} is of group {spec.group!r}; only LoRA factors can be exported to PEFT")
        values = row_P[spec.offset : spec.offset + spec.size].reshape(spec.shape)
        tensors[f"base_model.model.{spec.layer}.{PEFT_SUFFIX[spec.group]}"] = values.detach().cpu().contiguous()
    return dict(sorted(tensors.items()))


def _peft_config(settings: Settings, target_modules: Sequence[str]) -> dict[str, object]:
    """The fields of `LoraConfig` that matter. Modules are named in full, so that none is matched by accident."""
    alpha = settings.alpha
    return {
        "alpha_pattern": {},
        "base_model_name_or_path": settings.base_path,
        "bias": "none",
        "fan_in_fan_out": settings.fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": settings.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": settings.rank,
        "rank_pattern": {},
        "revision": settings.revision,
        "target_modules": list(target_modules),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def model_card(base_path: str, facts: Mapping[str, object] | None = None) -> str:
    """Return README.md of an exported folder: what it is, its `facts` as a list, and how to load it."""
    header = ["---", f"base_model: {json.dumps(base_path)}", "library_name: peft", "pipeline_tag: text-generation"]
    header += ["tags:", "- lora", "- fedmira", "---", ""]
    body = ["# LoRA adapter of one client", "", "Made by fedmira: federated multi-task fine-tuning (MIRA).", ""]
    body += [f"- {name}: {value}" for name, value in (facts or {}).items()]
    usage = [
        "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        "base = AutoModelForCausalLM.from_pretrained(BASE)  # see below",
        "model = PeftModel.from_pretrained(base, FOLDER)",
        "```",
        "",
        "FOLDER is the folder of this file. BASE is " + _where_base_is(base_path),
        "",
    ]
    return "\n".join(header + body + usage)


def _where_base_is(base_path: str) -> str:
    if base_path == EMBEDDED_NAME:
        return "the small model that ships with fedmira: `fedmira.embedded_base_path()`."
    if base_path in ("base", "../base"):
        return f"the folder `{base_path}` beside this file, a copy of the small model that ships with fedmira."
    return f"`{base_path}`."


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write `files` (name to content) into `folder`, durably, with the modes the umask allows; none may exist."""
    for name, content in files.items():
        write_new_file(folder / name, [content])
    sync_folder(folder)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `out` that becomes `out` at the end, or vanishes if anything fails.

    Raises:
        UsageError: `out` exists and is not an empty folder.
        IntegrityError: the disk refuses; the message names the reason.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()) or (out.is_dir() and any(out.iterdir())):
        raise UsageError(f"{out} exists and is not an empty folder; give a new folder, or remove this one")
    make_folder(out.parent)
    temporary = out.with_name(f".{out.name}.tmp-{nonce()}")
    try:
        with disk_errors_named(out, "write"):
            temporary.mkdir()
            yield temporary
            temporary.rename(out)
            sync_folder(out.parent)
    finally:
        if temporary.exists():
            remove_tree(temporary)
