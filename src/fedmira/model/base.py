"""The frozen base model: loads any Hugging Face causal language model and runs it over packed rows.

Knows nothing about clients, adapters, losses or data; the tokenizer is only carried along.

Axes: N packed rows, M selected rows, d hidden features, V vocabulary.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from fedmira.config import ModelConfig
from fedmira.errors import DataError, SetupError
from fedmira.model.attention import packed_attention, plan_packing
from fedmira.randomness import torch_generator

EMBEDDED = "embedded"
_UNLIMITED = 1_000_000_000


class PackedTokens(Protocol):
    """What `BaseModel.hidden` needs of a batch; `fedmira.data.packing.PackedBatch` is one."""

    @property
    def tokens_N(self) -> torch.Tensor: ...
    @property
    def positions_N(self) -> torch.Tensor: ...
    @property
    def sequence_lengths(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A frozen causal language model with its tokenizer."""

    model: Any
    """The transformers model, in eval mode, without gradients. Its modules and state dict are never changed."""
    tokenizer: Any
    """The transformers tokenizer; None where a test needs none."""
    name: str
    """What the config called it: `embedded`, a folder or a Hugging Face id."""
    source: str = ""
    """The folder or Hugging Face id it was loaded from; empty if it was made in memory."""

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def adapter_dtype(self) -> torch.dtype:
        """What adapters are kept and trained in: float64 beside a float64 base, else float32."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def num_parameters(self) -> int:
        """Of the base alone; tied weights count once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def max_length(self) -> int:
        """The longest sequence the base was made for, in tokens; huge if its config does not say."""
        value = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return _UNLIMITED if value is None else int(value)

    def facts(self) -> dict[str, Any]:
        """What identifies the base in a manifest; JSON-able. Reads the weights' files of a local folder once."""
        folder = Path(self.source)
        weights = sorted(folder.glob("*.safetensors")) if self.source and folder.is_dir() else []
        return {
            "path": self.name,
            "family": self.model.config.model_type,
            "parameters": self.num_parameters,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
            "commit": getattr(self.model.config, "_commit_hash", None),
            "weights_sha256": {path.name: _sha256(path) for path in weights},
        }

    def hidden(self, batch: PackedTokens) -> torch.Tensor:
        """Run the body over packed rows and return the final hidden states, (N, d).

        No row sees a row of another sequence. Gradients flow to whatever hooks added; the base itself has none.

        Raises:
            DataError: a sequence is longer than the base's context.
        """
        longest = max(batch.sequence_lengths)
        if longest > self.max_length:
            raise DataError(
                f"a sequence of {longest} tokens was given, but the base model {self.name} reads at most "
                f"{self.max_length}; set data.max_length to {self.max_length} or less"
            )
        device = self.device
        with packed_attention(self.model.config):
            output = self.model.base_model(
                input_ids=batch.tokens_N.to(device)[None],
                position_ids=batch.positions_N.to(device)[None],
                packing=plan_packing(batch.sequence_lengths, device),
                use_cache=False,
            )
        hidden_ND: torch.Tensor = output.last_hidden_state[0]
        return hidden_ND

    def logits(self, hidden_MD: torch.Tensor) -> torch.Tensor:
        """Apply the output embedding to hidden states (M, d) and return logits (M, V)."""
        logits_MV: torch.Tensor = self.model.get_output_embeddings()(hidden_MD)
        softcap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
        if softcap is not None:
            logits_MV = torch.tanh(logits_MV / softcap) * softcap
        return logits_MV


def load_base(config: ModelConfig) -> BaseModel:
    """Load the base model that a config names, frozen and in eval mode.

    Raises:
        SetupError: the folder, the Hugging Face id, the architecture, the device or the weights cannot be used.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, revision = _locate(config)
    _refuse_unusable(source, revision, config.path)
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    with _translated_errors(config.path), _no_progress_bars():
        model, loading = AutoModelForCausalLM.from_pretrained(
            source,
            revision=revision,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    missing = sorted(loading["missing_keys"])
    if missing:
        raise SetupError(
            f"the weights of {config.path} lack {len(missing)} tensors of its architecture, such as {missing[0]}; "
            "the download is incomplete or the folder is not a causal language model"
        )
    return freeze(model.to(device), tokenizer, config.path, source)


def freeze(model: Any, tokenizer: Any, name: str, source: str = "") -> BaseModel:
    """Freeze a transformers model and check that the packed forward agrees with its own.

    Raises:
        SetupError: the packed forward or the output head of this family is not understood.
    """
    model.requires_grad_(False)
    model.eval()
    base = BaseModel(model, tokenizer, name, source)
    _self_check(base)
    return base


def resolve_device(name: str) -> torch.device:
    """Turn `auto`, `cpu`, `cuda`, `cuda:1` or `mps` into a device that is there.

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
            f"model.device = {name} cannot be used here ({reason}); allowed: auto, cpu, cuda, cuda:N, mps. "
            "Use auto to take a GPU where there is one"
        ) from error
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Turn a config's dtype into torch's; `auto` is bfloat16 on a GPU that supports it and float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _locate(config: ModelConfig) -> tuple[str, str | None]:
    """The folder or Hugging Face id to load from, and the revision of the latter."""
    if config.path == EMBEDDED:
        folder = Path(__file__).resolve().parent.parent / "assets" / "base"
        if not (folder / "config.json").is_file():
            raise SetupError(
                "the embedded base model is missing from this installation of fedmira; reinstall the package, "
                "or set model.path to a folder or Hugging Face id of a causal language model"
            )
        return str(folder), None
    folder = Path(config.path).expanduser()
    if folder.is_dir():
        return str(folder), None
    looks_local = config.path.startswith((".", "/", "~")) or config.path.count("/") > 1 or "\\" in config.path
    if looks_local or folder.exists():
        raise SetupError(
            f"model.path = {config.path} is not a folder; give `embedded`, a folder with config.json, "
            "*.safetensors and a tokenizer, or a Hugging Face id such as openai-community/gpt2"
        )
    return config.path, config.revision


def _refuse_unusable(source: str, revision: str | None, name: str) -> None:
    """Refuse what must not or cannot be loaded, before any weight is read."""
    from transformers import PreTrainedConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

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
    with _translated_errors(name):
        raw, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
    if "auto_map" in raw:
        raise SetupError(
            f"the config of {name} asks for code of its own (auto_map), which fedmira never runs; if transformers "
            f"knows the architecture ({raw.get('model_type')}), remove auto_map from config.json in a local copy"
        )
    if any(key.startswith("_attn_implementation") for key in raw):
        raise SetupError(
            f"the config of {name} selects an attention implementation of its own, which fedmira never loads; "
            "remove the key that starts with _attn_implementation from config.json in a local copy"
        )
    model_type = raw.get("model_type")
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise SetupError(
            f"the architecture of {name} (model_type {model_type!r}) is no causal language model that this version of "
            "transformers knows; use a GPT-2, Llama, Qwen, Mistral or Gemma model, or a newer transformers"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _translated_errors(name: str) -> Iterator[None]:
    """Turn what transformers, huggingface_hub and safetensors raise into one message that says what to do."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise SetupError(f"the weights of {name} are damaged ({error}); download or save them again") from error
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        raise SetupError(
            f"the base model {name} cannot be loaded ({reason}). A Hugging Face id needs a network connection or a "
            "filled cache (HF_HOME; HF_HUB_OFFLINE=1 forbids the network) and, if it is gated, HF_TOKEN; "
            "a local folder needs config.json, *.safetensors and a tokenizer"
        ) from error


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keep transformers' own progress bars off the terminal while loading."""
    from transformers.utils import logging

    were_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_on:
            logging.enable_progress_bar()


@dataclass(frozen=True, slots=True)
class _Probe:
    tokens_N: torch.Tensor
    positions_N: torch.Tensor
    sequence_lengths: tuple[int, ...]


def _self_check(base: BaseModel) -> None:
    """Compare head(body(packed rows)) with the stock model's logits on two short random sequences.

    Families that scale logits in a way of their own, that do not pass the packing on to their attention or that mix
    rows outside of attention are found here instead of being trained wrongly."""
    config = base.model.config.get_text_config()
    lengths = (3, 4)
    tokens_N = torch.randint(int(config.vocab_size), (sum(lengths),), generator=torch_generator(0, "self-check"))
    positions_N = torch.cat([torch.arange(length) for length in lengths])
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-3}.get(base.dtype, 5e-2)
    reason = ""
    try:
        with torch.no_grad():
            packed_NV = base.logits(base.hidden(_Probe(tokens_N, positions_N, lengths)))
            stock_NV = torch.cat(
                [
                    base.model(input_ids=part[None].to(base.device), use_cache=False).logits[0]
                    for part in torch.split(tokens_N, list(lengths))
                ]
            )
        difference = float((packed_NV - stock_NV).abs().max())
        if not difference <= tolerance * max(1.0, float(stock_NV.abs().max())):
            reason = f"its logits differ by {difference:.2g}"
    except (TypeError, AttributeError, RuntimeError, KeyError) as error:
        reason = f"{type(error).__name__}: {error}"
    if reason:
        raise SetupError(
            f"fedmira cannot run the family {config.model_type!r} of the base model {base.name} on packed rows "
            f"({reason}); use a GPT-2, Llama, Qwen, Mistral or Gemma model"
        )
