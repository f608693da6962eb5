"""The Hugging Face folder of the embedded base model: its tokenizer, how it is written, how it is scored.

Knows nothing about the training loop. Importable by tests, which score the shipped folder with the same code.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from base_text import Corpus, puzzle

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{- bos_token }}{%- for message in messages %}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{- raise_exception('roles: system, user, assistant; got ' + message['role']) }}{%- endif %}"
    "{{- '<|' + message['role'] + '|>' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{% generation %}{{- message['content'] + eos_token }}{% endgeneration %}"
    "{%- else %}{{- message['content'] }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)
EVALUATED_CHARACTERS = 700
EVALUATED_TOKENS = 512


def train_tokenizer(corpus: Corpus, vocabulary: list[str], vocab_size: int, seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE on the training split and some puzzles; digits stand alone, text starts with <bos>."""
    random = Random(f"{seed}/tokenizer")
    texts = sorted({example.instruction for example in corpus.train})
    texts += [f"{example.input}\n{example.output}" for example in corpus.train]
    texts += [f"{e.instruction}\n{e.input}\n{e.output}" for e in (puzzle(random, vocabulary) for _ in range(3000))]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [PAD, BOS, EOS, *ROLES]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def held_out_texts(corpus: Corpus, limit: int | None = None) -> list[str]:
    """Input and answer of each held-out record, clipped; instructions are left out because training saw them."""
    texts = [f"{e.input}\n{e.output}".strip()[:EVALUATED_CHARACTERS] for e in corpus.held_out]
    texts = [text for text in texts if len(text) >= 20]
    return texts if limit is None else texts[:: max(1, len(texts) // limit)]


def clip_to_context(texts: list[str], tokenizers: list[PreTrainedTokenizerBase]) -> list[str]:
    """Shorten each text until every tokenizer fits it into 512 tokens, so that all models score the same characters."""
    clipped = []
    for original in texts:
        text = original
        while (longest := max(len(t(text)["input_ids"]) for t in tokenizers)) > EVALUATED_TOKENS:
            text = text[: min(len(text) - 1, len(text) * EVALUATED_TOKENS // longest)]
        clipped.append(text)
    return clipped


@torch.inference_mode()
def score(folder: Path, texts: list[str]) -> dict[str, float]:
    """Nats per character and perplexity per token of the model in `folder`; every token after <bos> counts."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    nats, tokens, characters = 0.0, 0, 0
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        if ids[0, 0] != tokenizer.bos_token_id:
            ids = torch.cat([torch.tensor([[tokenizer.bos_token_id]]), ids], dim=1)
        logits = model(ids).logits[0, :-1]
        nats += F.cross_entropy(logits.float(), ids[0, 1:], reduction="sum").item()
        tokens += ids.shape[1] - 1
        characters += len(text)
    return {
        "nats_per_character": nats / characters,
        "perplexity_per_token": math.exp(nats / tokens),
        "characters": characters,
        "tokens": tokens,
        "texts": len(texts),
    }


def export(folder: Path, weights: dict[str, torch.Tensor], config: LlamaConfig, tokenizer: Any) -> None:
    """Write the Hugging Face folder; weights are rounded to bfloat16 on disk and load as float32."""
    folder.mkdir(parents=True, exist_ok=True)
    rounded = {name: value.detach().cpu().to(torch.bfloat16).contiguous() for name, value in weights.items()}
    save_file(rounded, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # The class name that every transformers release with fast tokenizers knows.
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings = {k: v for k, v in settings.items() if k not in ("backend", "is_local", "local_files_only")}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
