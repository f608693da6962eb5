"""Whether a run goes on over the base, in the dtype and with the versions that it was begun with.

Compares the manifest of a run with a base that is loaded now; `joining` asks the same of the data.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedmira import __version__
from fedmira.errors import IntegrityError
from fedmira.model.base import BaseModel


def refuse_other_base(run: Path, recorded: Mapping[str, Any], base: BaseModel) -> None:
    """Refuse adapters that were trained over another model than `base`: they would be silently wrong.

    Args:
        run: the run directory, for the message.
        recorded: what the manifest of the run says about its model.
        base: what the config of the run loads now.

    Raises:
        IntegrityError: the weights differ, or what the model's config says about the computation.
    """
    now = base.facts()
    # a hub id's commit changes with every file beside the weights; weights that the hub converted have no file there
    changed = ["weights_sha256"] if recorded.get("weights_sha256") not in (None, {}, now["weights_sha256"]) else []
    if None not in (recorded.get("config_sha256"), now["config_sha256"]):
        changed += ["config_sha256"] if recorded["config_sha256"] != now["config_sha256"] else []
    if changed:
        commit, restore = recorded.get("commit"), "Restore its files"
        if commit not in (None, now["commit"]):
            restore = f"Make commit {commit} of it available again (it is at {now['commit']} now)"
        raise IntegrityError(
            f"the base model {base.name} is not the one that {run} was trained over ({' and '.join(changed)} differ); "
            f"adapters fit only the model they were trained over. {restore}, or remove the run to start it again"
        )


def recorded_commit(manifest: Mapping[str, Any]) -> str | None:
    """The commit of a Hugging Face id that a run was trained over; None for others, or where nothing is recorded."""
    model = manifest.get("model", {})
    # without weights of its own a commit may have been loaded from those that the hub converted
    commit: str | None = model.get("commit") if model.get("weights_sha256") else None
    return commit


def refuse_other_dtype(run: Path, recorded: Mapping[str, Any], base: BaseModel) -> None:
    """Refuse to go on with a base in another dtype than before: `auto` depends on the device.

    Takes what `refuse_other_base` does.

    Raises:
        IntegrityError: the dtype differs.
    """
    before, now = recorded.get("dtype"), str(base.dtype).removeprefix("torch.")
    if before not in (None, now):
        raise IntegrityError(
            f"{run} was trained in {before} on {recorded.get('device')}, but its model.dtype gives {now} on "
            f"{base.device.type} and the run could not go on as it began. Resume it where model.dtype gives {before} "
            f"(to leave out a GPU, set CUDA_VISIBLE_DEVICES to nothing), or start a new run with model.dtype: "
            f"{before}, which is the same everywhere"
        )


def moved(manifest: Mapping[str, Any], base: BaseModel) -> tuple[str, dict[str, Any]]:
    """Return in a line what of device and versions differs from the last time, and `manifest` with what is now.

    The line is empty if nothing does. What there was before is kept, the oldest first, in `versions_before`.
    """
    model, before = manifest["model"], manifest.get("versions", {})
    was = {"fedmira": manifest.get("fedmira"), "device": model.get("device"), **before}
    now = {"fedmira": __version__, "device": base.device.type, **versions()}
    changed = [f"{key} {now[key]} (was {was[key]})" for key in now if was.get(key) not in (None, now[key])]
    if not changed:
        return "", dict(manifest)
    line = f"it goes on with {', '.join(changed)}: what follows may not be bit for bit what it would have been"
    return line, {
        **manifest,
        "fedmira": __version__,
        "versions": versions(),
        "model": {**model, "device": base.device.type},
        "versions_before": [*manifest.get("versions_before", []), was],
    }


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    import safetensors
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "safetensors": safetensors.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": str(torch.get_num_threads()),
    }
