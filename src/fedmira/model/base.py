"""The frozen base model: loads any Hugging Face causal language model and runs it over packed rows.

Knows nothing about clients, adapters, losses or data; the tokenizer is only carried along.

Axes: N packed rows, M selected rows, d hidden features, V vocabulary.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from fedmira.config import ModelConfig
from fedmira.errors import DataError, SetupError
from fedmira.model.attention import packed_attention, plan_packing
from fedmira.model.source import (
    locate,
    no_progress_bars,
    refuse_unusable,
    resolve_device,
    resolve_dtype,
    translated_errors,
)
from fedmira.randomness import torch_generator

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

    source, revision = locate(config)
    refuse_unusable(source, revision, config.path)
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    with translated_errors(config.path), no_progress_bars():
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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
