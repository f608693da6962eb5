"""The frozen base model: loads any Hugging Face causal language model and runs it over packed rows.

Knows nothing about clients, their adapters, losses or where rows come from; the tokenizer is only carried along.

Axes: N packed rows, M selected rows, d hidden features, V vocabulary.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedmira.config.run import ModelConfig
from fedmira.data.packing import PackedBatch, pack
from fedmira.data.tokenization import TokenizedExample
from fedmira.errors import DataError, SetupError
from fedmira.model.attention import PACKED, Packing, attention_of, plan_packing
from fedmira.model.body import Body, Soften
from fedmira.model.families import fused_body
from fedmira.model.fused import bind, hidden
from fedmira.model.kept_attention import MOST_BEHIND
from fedmira.model.products import product
from fedmira.model.source import (
    commit_of,
    config_sha256,
    locate,
    no_progress_bars,
    refuse_unusable,
    resolve_device,
    resolve_dtype,
    snapshot,
    translated_errors,
    weights_sha256,
)
from fedmira.randomness import torch_generator
from fedmira.types import Arena, Layout

_UNLIMITED = 1_000_000_000


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A frozen causal language model with its tokenizer."""

    model: Any
    """The transformers model, in eval mode, without gradients. Its modules and values are never changed."""
    tokenizer: Any
    """The transformers tokenizer; None where a test needs none."""
    name: str
    """What the config called it: `embedded`, a folder or a Hugging Face id."""
    source: str = ""
    """The folder it was loaded from, in the cache for a Hugging Face id; empty if it was made in memory."""
    body: Body | None = None
    """The same model written out, for families that are known."""
    commit: str | None = None
    """Of a Hugging Face id; None for others."""

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
    def no_adapter(self) -> Arena:
        """One client, (1, 0), whose adapter has no tensors."""
        return Arena(Layout(()), torch.zeros(1, 0, dtype=self.adapter_dtype, device=self.device))

    @property
    def num_parameters(self) -> int:
        """Of the base alone; tied weights count once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def max_length(self) -> int:
        """The longest sequence the base was made for, in tokens; huge if its config does not say.

        With `longrope` positions turn otherwise as soon as any sequence of a batch is longer than the original context,
        so that context is the longest: a client must not depend on whom it is packed with.
        """
        config = self.model.config.get_text_config()
        value = getattr(config, "max_position_embeddings", None)
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type") == "longrope":
            value = rope.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", value
            )
        return _UNLIMITED if value is None else int(value)

    @property
    def language_path(self) -> str:
        """Where the language model lies in one that also sees or hears, with a dot behind it; else empty."""
        if self.model.config.get_text_config() is self.model.config:
            return ""
        paths = (path for path, _ in self.model.named_modules() if path.rpartition(".")[2] == "language_model")
        return next((f"{path}." for path in paths), "")

    def facts(self) -> dict[str, Any]:
        """What identifies the base in a manifest; JSON-able. Reads the weights' files of a local folder once."""
        folder = Path(self.source) if self.source else None
        return {
            "path": self.name,
            "family": self.model.config.model_type,
            "parameters": self.num_parameters,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
            "commit": self.commit,
            "config_sha256": None if folder is None else config_sha256(folder),
            "weights_sha256": {} if folder is None else weights_sha256(folder, hub=self.commit is not None),
        }

    def plan(self, batch: PackedBatch, stand_alone: bool = False) -> Packing:
        """How the rows of a batch fall into sequences; `stand_alone` if the body written out is to read them.

        Raises:
            DataError: a sequence is longer than the base's context.
        """
        reach = 0 if self.body is None else min(MOST_BEHIND, self.body.reach)
        packing = plan_packing(batch.sequence_lengths, self.device, batch.prefixes, stand_alone, reach)
        if packing.longest > self.max_length:
            raise DataError(
                f"a sequence of {packing.longest} tokens was given, but the base model {self.name} reads at most "
                f"{self.max_length}; set data.max_length to {self.max_length} or less"
            )
        return packing

    def hidden(self, batch: PackedBatch, soften: Soften | None = None) -> torch.Tensor:
        """Run the body over packed rows and return the final hidden states, (N, d).

        No row sees a row of another sequence. Gradients flow to whatever hooks and `soften` added; the base itself has
        none.

        Args:
            batch: the rows.
            soften: puts soft prompts among the embeddings.

        Raises:
            DataError: a sequence is longer than the base's context.
        """
        device, packing = self.device, self.plan(batch)
        with attention_of(self.model.config, PACKED):
            output = self.model.base_model(
                **self.inputs(batch.tokens_N.to(device), soften),
                position_ids=batch.positions_N.to(device)[None],
                fedmira_packing=packing,
                use_cache=False,
            )
        hidden_Nd: torch.Tensor = output.last_hidden_state.squeeze(0)
        return hidden_Nd

    def inputs(self, tokens_N: torch.Tensor, soften: Soften | None = None) -> dict[str, torch.Tensor]:
        """What the stock model is called with for packed tokens: ids, or embeddings where there are soft prompts."""
        if soften is None:
            return {"input_ids": tokens_N[None]}
        return {"inputs_embeds": soften(self.model.get_input_embeddings()(tokens_N))[None]}

    @property
    def softcap(self) -> float | None:
        """What final logits are squeezed below, as in Gemma; None if they are not."""
        return getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)

    @property
    def vocabulary(self) -> int:
        """V, the number of tokens that have a logit."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    def logits(
        self, hidden_Md: torch.Tensor, room: torch.Tensor | None = None, tokens: slice = slice(None)
    ) -> torch.Tensor:
        """Apply the output embedding to hidden states (M, d) and return logits (M, V).

        Args:
            hidden_Md: final hidden states.
            room: memory that the logits may lie in.
            tokens: whose logits are returned.
        """
        head = self.model.get_output_embeddings()
        if torch.is_grad_enabled() and hidden_Md.requires_grad:
            logits_MV: torch.Tensor = head(hidden_Md)[:, tokens]
        else:
            logits_MV = product(hidden_Md, head.weight[tokens], None if head.bias is None else head.bias[tokens], room)
        if self.softcap is not None:
            logits_MV = torch.tanh(logits_MV / self.softcap) * self.softcap
        return logits_MV

    def logits_backward(
        self, grad_MV: torch.Tensor, logits_MV: torch.Tensor, tokens: slice = slice(None)
    ) -> torch.Tensor:
        """Gradient of the hidden states (M, d) for a gradient of the logits of `tokens`; `grad_MV` is used up.

        Without a soft cap, the values of `logits_MV` are not looked at.
        """
        if self.softcap is not None:
            grad_MV.mul_(1.0 - (logits_MV / self.softcap).square())
        return product(grad_MV, self.model.get_output_embeddings().weight[tokens].T)

    def head_rows(self, tokens_M: torch.Tensor) -> torch.Tensor:
        """The output embeddings of tokens, (M, d): the gradients of their logits before a soft cap."""
        weight: torch.Tensor = self.model.get_output_embeddings().weight
        return weight.index_select(0, tokens_M)


def load_base(config: ModelConfig, commit: str | None = None) -> BaseModel:
    """Load the base model that a config names, frozen and in eval mode.

    Args:
        config: what to load.
        commit: of a Hugging Face id: loaded if it can be had, in place of what `config.revision` means today.

    Raises:
        SetupError: the folder, the Hugging Face id, the architecture, the device or the weights cannot be used.
    """
    source, revision = locate(config)
    if commit is not None and not Path(source).is_dir():
        # the cache may hold a part of it
        with contextlib.suppress(SetupError):
            return _load(config, source, commit)
    return _load(config, source, revision)


def _load(config: ModelConfig, source: str, revision: str | None) -> BaseModel:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hub = not Path(source).is_dir()
    with translated_errors(config.path):
        refuse_unusable(source, revision, config.path)
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    with translated_errors(config.path), no_progress_bars():
        folder = snapshot(source, revision)
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
    if not tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys():
        # what some versions of transformers make up where its files are missing
        raise SetupError(f"the tokenizer of {config.path} knows special tokens alone; its files are missing or empty")
    return freeze(model.to(device), tokenizer, config.path, str(folder), commit_of(folder) if hub else None)


def freeze(model: Any, tokenizer: Any, name: str, source: str = "", commit: str | None = None) -> BaseModel:
    """Freeze a transformers model and check that the packed forward agrees with its own.

    Raises:
        SetupError: the packed forward or the output head of this family is not understood.
    """
    model.requires_grad_(False)
    model.eval()
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None:
        # the fused attention that older transformers take for such a model leaves the soft cap out
        model.set_attn_implementation("eager")
    base = BaseModel(model, tokenizer, name, source, fused_body(model), commit)
    _self_check(base)
    return base


def _self_check(base: BaseModel) -> None:
    """Compare head(body(packed rows)) with the stock model's logits on two short random sequences.

    Families that scale logits in a way of their own, that do not pass the packing on to their attention or that mix
    rows outside of attention are found here instead of being trained wrongly."""
    config = base.model.config.get_text_config()
    tokens_N = torch.randint(int(config.vocab_size), (7,), generator=torch_generator(0, "self-check"))
    sequences = torch.split(tokens_N, [3, 4])
    # what follows a sequence is predicted only; every row is asked for
    batch = pack([[TokenizedExample(np.append(one.numpy(), 0), 1, "probe") for one in sequences]])
    reason = ""
    try:
        with torch.no_grad():
            stock_NV = torch.cat(
                [base.model(input_ids=part[None].to(base.device), use_cache=False).logits[0] for part in sequences]
            )
            ways = {"packed": base.hidden(batch)}
            if base.body is not None:
                ways["fused"] = _fused_hidden(base, base.body, batch)
            for way, hidden_Nd in ways.items():
                if apart := unlike(base, base.logits(hidden_Nd), stock_NV):
                    reason = f"its {way} logits {apart}"
    except MISUNDERSTANDINGS as error:
        reason = f"{type(error).__name__}: {error}"
    if reason:
        raise SetupError(
            f"fedmira cannot run the family {config.model_type!r} of the base model {base.name} on packed rows "
            f"({reason}); use a GPT-2, Llama, Qwen, Mistral or Gemma model"
        )


MISUNDERSTANDINGS = (TypeError, AttributeError, RuntimeError, KeyError)
"""What a stock model raises that is called otherwise than it expects."""


def unlike(base: BaseModel, logits_NV: torch.Tensor, stock_NV: torch.Tensor) -> str:
    """By how much logits differ from those of the stock model, beyond rounding; empty if they do not."""
    # transformers normalises in float32, whatever the dtype
    tolerance = {torch.float64: 1e-5, torch.float32: 1e-3}.get(base.dtype, 5e-2)
    difference = float((logits_NV - stock_NV).abs().max())
    alike = difference <= tolerance * max(1.0, float(stock_NV.abs().max()))
    return "" if alike else f"differ by {difference:.2g}"


def _fused_hidden(base: BaseModel, body: Body, batch: PackedBatch) -> torch.Tensor:
    """Final hidden states of the supervised rows of a batch, without adapters."""
    return hidden(
        body,
        bind(body, base.no_adapter, None, frozenset()),
        batch.tokens_N.to(base.device),
        batch.positions_N.to(base.device),
        base.plan(batch, stand_alone=True),
        batch.rows_per_client,
        batch.supervised_rows_M.to(base.device),
        batch.supervised_per_client,
    )
