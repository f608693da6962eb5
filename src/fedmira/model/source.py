"""Where a base model comes from and what identifies it: folders, Hugging Face ids, devices and dtypes, and what is
refused before loading.

Knows nothing about what a loaded model computes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from fedmira.config.run import ModelConfig
from fedmira.errors import SetupError
from fedmira.paths import home_expanded, looks_local

EMBEDDED = "embedded"


def resolve_device(name: str) -> torch.device:
    """Turn `auto`, `cpu`, `cuda` or `cuda:1` into a device that is there.

    Raises:
        SetupError: the name is unknown or this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise SetupError(
            f"model.device = {name} cannot be used here ({reason}); allowed: auto, cpu, cuda, cuda:N. "
            "Use auto to take a GPU where there is one"
        ) from error
    return device


def is_absent_gpu(name: str) -> bool:
    """Whether `name` means a CUDA device that this machine lacks.

    >>> is_absent_gpu("cpu"), is_absent_gpu("cuda:99")
    (False, True)
    """
    if re.fullmatch(r"cuda(:\d{1,3})?", name) is None:
        return False
    try:
        resolve_device(name)
    except SetupError:
        return True
    return False


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Turn a config's dtype into torch's; `auto` is bfloat16 on a GPU that computes in it and float32 elsewhere."""
    if name == "auto":
        # torch.cuda.is_bf16_supported also counts GPUs that emulate it, and looks at the current one only
        at_once = device.type == "cuda" and (torch.version.hip or torch.cuda.get_device_capability(device) >= (8, 0))
        return torch.bfloat16 if at_once else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def locate(config: ModelConfig) -> tuple[str, str | None]:
    """The folder or Hugging Face id to load from, and the revision of the latter."""
    if config.path == EMBEDDED:
        folder = Path(__file__).resolve().parent.parent / "assets" / "base"
        if not (folder / "config.json").is_file():
            raise SetupError(
                "the embedded base model is missing from this installation of fedmira; reinstall the package, "
                "or set model.path to a folder or Hugging Face id of a causal language model"
            )
        return str(folder), None
    folder = home_expanded(config.path)
    if folder.is_dir():
        return str(folder), None
    if looks_local(config.path):
        raise SetupError(
            f"model.path = {config.path} is not a folder; give `embedded`, a folder with config.json, "
            "*.safetensors and a tokenizer, or a Hugging Face id such as openai-community/gpt2"
        )
    return config.path, config.revision


def refuse_idle_revision(config: ModelConfig) -> None:
    """Refuse `model.revision` beside something that has none; runs begun before this was refused go on.

    Raises:
        SetupError: the model is the embedded one or a folder.
    """
    if config.revision is not None and (config.path == EMBEDDED or home_expanded(config.path).is_dir()):
        kind = "the embedded model" if config.path == EMBEDDED else "a local folder"
        raise SetupError(
            f"model.revision = {config.revision} has no effect: model.path = {config.path} is {kind}, which has no "
            "revisions; remove model.revision, or give a Hugging Face id"
        )


def snapshot(source: str, revision: str | None) -> Path:
    """The folder that transformers reads `source` from: a folder itself, or an id's in the cache of the hub.

    Raises:
        OSError: there is no such id or revision, or it can neither be reached nor is it in the cache.
    """
    from transformers.utils import cached_file

    if Path(source).is_dir():
        return Path(source)
    return Path(cached_file(source, "config.json", revision=revision)).parent


def commit_of(folder: Path) -> str | None:
    """The commit whose files a folder in the cache of the hub holds; None for other folders."""
    return folder.name if folder.parent.name == "snapshots" else None


def weights_sha256(folder: Path, hub: bool) -> dict[str, str]:
    """Hash of each file of weights in a folder; in the cache of the hub, of each that is loaded.

    The cache may hold more or less than that, as downloads come and go. It names large files by their hash: those are
    not read.
    """
    if not hub:
        return {path.name: _sha256(path) for path in sorted(folder.glob("*.safetensors"))}
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if "model.safetensors" in names:
        names = ["model.safetensors"]
    elif index.is_file():
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    blobs = {name: (folder / name).resolve() for name in names}
    return {name: blob.name if _HASH.fullmatch(blob.name) else _sha256(blob) for name, blob in blobs.items()}


_HASH = re.compile("[0-9a-f]{64}")

_BESIDE_THE_COMPUTATION = frozenset(
    (
        "_name_or_path",
        "architectures",
        "dtype",
        "id2label",
        "label2id",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    )
)
"""Keys of a config that may differ between copies of one model."""


def config_sha256(folder: Path) -> str | None:
    """Hash of what a folder's config.json says about the computation; None where there is none."""

    def said(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: said(item) for key, item in value.items() if key not in _BESIDE_THE_COMPUTATION}

    path = folder / "config.json"
    if not path.is_file():
        return None
    text = json.dumps(said(json.loads(path.read_bytes())), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_unusable(source: str, revision: str | None, name: str) -> None:
    """Refuse what must not or cannot be loaded, before any weight is read; to be called within `translated_errors`."""
    from transformers import PreTrainedConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from transformers.utils.peft_utils import find_adapter_config_file

    folder = Path(source)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise SetupError(f"model.path = {name} has no config.json; give a folder saved by save_pretrained")
        if not any(folder.glob("*.safetensors")):
            found = "only .bin weights, which can run code when read" if any(folder.glob("*.bin")) else "no weights"
            raise SetupError(
                f"model.path = {name} has {found}; fedmira reads *.safetensors: "
                "load the model with transformers and save it again with save_pretrained"
            )
    # transformers would put it on the base, or take another base for its sake
    if find_adapter_config_file(source, revision=revision) is not None:
        raise SetupError(
            f"{name} is an adapter (adapter_config.json), not a base model; give the base model it was trained for, or "
            "merge the two and save the result"
        )
    raw, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
    if not isinstance(raw, dict):
        raise ValueError("its config.json holds no JSON object")
    if "auto_map" in raw:
        raise SetupError(
            f"the config of {name} asks for code of its own (auto_map), which fedmira never runs; if transformers "
            f"knows the architecture ({raw.get('model_type')}), remove auto_map from config.json in a local copy"
        )
    if chosen := _implementation_keys(raw):
        raise SetupError(
            f"the config of {name} selects an implementation of its own ({chosen[0]}), which fedmira never loads; "
            f"remove {', '.join(chosen)} from config.json in a local copy"
        )
    if strange := _strange_weights(source, revision, raw.get("transformers_weights")):
        raise SetupError(
            f"{name} names {strange!r} as a file of weights; fedmira reads *.safetensors beside config.json only, as "
            "other kinds can run code when read: load the model with transformers and save it again with "
            "save_pretrained"
        )
    model_type = raw.get("model_type")
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise SetupError(
            f"the architecture of {name} (model_type {model_type!r}) is no causal language model that this version of "
            "transformers knows; use a GPT-2, Llama, Qwen, Mistral or Gemma model, or a newer transformers"
        )


def _strange_weights(source: str, revision: str | None, chosen: str | None) -> str:
    """A file that transformers would read weights from and that is no *.safetensors beside the config; else empty.

    Args:
        source: the folder or id.
        revision: of an id.
        chosen: the file that the config names in place of the usual ones, if it does.
    """
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, cached_file

    named = SAFE_WEIGHTS_INDEX_NAME if chosen is None else chosen
    if not named.endswith(".safetensors.index.json") or Path(named).name != named:
        return "" if _lies_beside(named) else named
    index = cached_file(
        source,
        named,
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if index is None:
        return ""
    files = json.loads(Path(index).read_bytes())["weight_map"].values()
    return next((name for name in sorted(set(files)) if not _lies_beside(name)), "")


def _lies_beside(name: str) -> bool:
    """Whether transformers would read it as safetensors, and from the folder itself: any other ending is a pickle."""
    return name.endswith(".safetensors") and Path(name).name == name


def _implementation_keys(config: Mapping[str, Any], path: str = "") -> list[str]:
    """Keys, also of configs inside, by which transformers would load code for attention or experts."""
    found = []
    for key, value in config.items():
        if key.lstrip("_").startswith(("attn_implementation", "experts_implementation")):
            found.append(path + key)
        elif isinstance(value, Mapping):
            found += _implementation_keys(value, f"{path}{key}.")
    return found


@contextlib.contextmanager
def translated_errors(name: str) -> Iterator[None]:
    """Turn what transformers, huggingface_hub and safetensors raise into one message that says what to do."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise SetupError(f"the weights of {name} are damaged ({error}); download or save them again") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        raise SetupError(
            f"the base model {name} cannot be loaded ({reason}). A Hugging Face id needs a network connection or a "
            "filled cache (HF_HOME; HF_HUB_OFFLINE=1 forbids the network) and, if it is gated, HF_TOKEN; "
            "a local folder needs config.json, *.safetensors and a tokenizer"
        ) from error


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep transformers' own progress bars off the terminal while loading."""
    from transformers.utils import logging

    were_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_on:
            logging.enable_progress_bar()
