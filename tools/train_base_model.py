"""Train the small language model that ships with fedmira: tokenizer, weights, record of how it was made.

    python tools/train_base_model.py --corpus corpus.jsonl.gz --out build/base --minutes 90 --device cpu --threads 1

Writes a Hugging Face folder (Llama, safetensors, own tokenizer) to --out/model, a copy of the running average
of the weights to --out/snapshot every few minutes, and a checkpoint without pickle to --out/checkpoint from which
--resume continues. Learning-rate schedule: warm-up, constant, and a decay over the last part of the time budget,
so that every budget ends well. `base_text` makes the text, `base_network` the network, `base_folder` the folder.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerBase

from base_folder import clip_to_context, export, held_out_texts, score, train_tokenizer
from base_network import initial_parameters, llama_config, next_token_loss
from base_text import common_words, read_corpus, shard_documents
from fedmira.types import Example

SHARE_WITHOUT_BOS = 0.1


@dataclass(frozen=True)
class Stream:
    """Shards of text as token windows; everything is a function of the seed and the shard number."""

    train: tuple[Example, ...]
    vocabulary: list[str]
    tokenizer: PreTrainedTokenizerBase
    seed: int

    def windows(self, shard: int, window: int) -> np.ndarray:
        """`(n, window + 1)` token ids: the shard's documents end to end, cut, in random order."""
        documents = list(shard_documents(self.train, self.vocabulary, self.tokenizer, self.seed, shard))
        # Prompt and answer are encoded apart because fine-tuning encodes them so.
        prompts = self.tokenizer([d.prompt for d in documents], add_special_tokens=False, verbose=False)["input_ids"]
        answers = self.tokenizer([d.answer for d in documents], add_special_tokens=False, verbose=False)["input_ids"]
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        random = Random(f"{self.seed}/windows/{shard}")
        ids: list[int] = []
        for prompt, answer in zip(prompts, answers, strict=True):
            body = prompt[1:] if prompt and prompt[0] == bos else prompt
            ids += body if random.random() < SHARE_WITHOUT_BOS else [bos, *body]
            ids += [*answer, eos]
        count = (len(ids) - 1) // window
        flat = np.asarray(ids[: count * window + 1], dtype=np.int64)
        rows = np.stack([flat[i * window : (i + 1) * window + 1] for i in range(count)])
        order = list(range(count))
        random.shuffle(order)
        return rows[order]


def save_checkpoint(folder: Path, state: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Weights, optimizer moments and counters; written beside the old one and renamed over it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value.detach().cpu().contiguous() for name, value in tensors.items()},
        folder / "tensors.safetensors.new",
        metadata={"state": json.dumps(state)},
    )
    os.replace(folder / "tensors.safetensors.new", folder / "tensors.safetensors")


def learning_rate_factor(step: int, progress: float, decay_start: float) -> float:
    """Warm-up over 150 steps, constant, then 1 - sqrt decay; `progress` is the spent share of the time budget."""
    warm = min(1.0, (step + 1) / 150)
    if progress <= decay_start:
        return warm
    return warm * max(0.0, 1.0 - math.sqrt((progress - decay_start) / (1.0 - decay_start)))


def make_optimizers(
    parameters: dict[str, torch.Tensor], options: argparse.Namespace
) -> dict[str, torch.optim.Optimizer]:
    """Muon for the matrices inside the layers (unless switched off), AdamW for embedding and norms."""
    inner = [v for n, v in parameters.items() if v.dim() == 2 and "embed" not in n]
    outer = [parameters["model.embed_tokens.weight"]]
    norms = [v for v in parameters.values() if v.dim() == 1]
    groups: list[dict[str, Any]] = [{"params": outer, "lr": options.lr}]
    groups.append({"params": norms, "lr": options.lr, "weight_decay": 0.0})
    optimizers: dict[str, torch.optim.Optimizer] = {}
    if options.optimizer == "muon":
        optimizers["muon"] = torch.optim.Muon(
            inner, lr=options.muon_lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw", ns_steps=5
        )
    else:
        groups.append({"params": inner, "lr": options.lr})
    optimizers["adamw"] = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


@dataclass
class Progress:
    """Where the training stands; all of it is saved and restored."""

    step: int = 0
    tokens: int = 0
    shard: int = 0
    minutes: float = 0.0


class Trainer:
    """Holds weights, their running average and the optimizers; `run` spends the time budget."""

    def __init__(self, options: argparse.Namespace, config: LlamaConfig, stream: Stream) -> None:
        self.options, self.config, self.stream = options, config, stream
        self.parameters = initial_parameters(config, options.seed, options.device)
        self.average = {name: value.detach().clone() for name, value in self.parameters.items()}
        self.optimizers = make_optimizers(self.parameters, options)
        self.progress = Progress()
        self.curve: list[dict[str, float]] = []
        self.loss: Callable[..., torch.Tensor] = torch.compile(next_token_loss) if options.compile else next_token_loss

    def batches(self, started: float) -> Iterator[torch.Tensor]:
        """Batches until the budget is spent, one at least; windows grow in its last part, tokens of a batch stay."""
        options, before = self.options, self.progress.step
        while True:
            long = self.spent(started) >= options.long_from
            window = options.long_window if long else options.window
            batch = max(1, options.batch_tokens // window)
            rows = torch.from_numpy(self.stream.windows(self.progress.shard, window))
            for first in range(0, len(rows) - batch + 1, batch):
                if self.spent(started) >= 1.0 and self.progress.step > before:
                    return
                yield rows[first : first + batch].to(options.device)
            self.progress.shard += 1

    def spent(self, started: float) -> float:
        """Share of this call's time budget that is over, 1 at most."""
        return min(1.0, (time.monotonic() - started) / (60 * float(self.options.minutes)))

    def run(self, at_snapshot: Callable[[], None]) -> None:
        """Train until the budget is spent; snapshot and checkpoint at the set intervals."""
        started = time.monotonic()
        before = self.progress.minutes
        next_line, next_snapshot = 30.0, 60.0 * self.options.snapshot_minutes
        losses: list[torch.Tensor] = []
        for tokens_BT in self.batches(started):
            factor = learning_rate_factor(self.progress.step, self.spent(started), self.options.decay_start)
            losses.append(self.step(tokens_BT, factor))
            self.progress.tokens += tokens_BT.shape[0] * (tokens_BT.shape[1] - 1)
            elapsed = time.monotonic() - started
            self.progress.minutes = before + elapsed / 60
            if elapsed >= next_line:
                mean = torch.stack(losses).mean().item()
                if not math.isfinite(mean):
                    raise FloatingPointError(f"loss is {mean} at step {self.progress.step}; lower --lr or --muon-lr")
                self.curve.append({**vars(self.progress), "train_loss": mean, "lr_factor": factor})
                print(
                    f"{self.progress.minutes:6.1f} min  step {self.progress.step}  tokens {self.progress.tokens:,}  "
                    f"shard {self.progress.shard}  loss {mean:.4f}  lr x{factor:.3f}",
                    flush=True,
                )
                losses, next_line = [], elapsed + 30.0
            if elapsed >= next_snapshot:
                self.checkpoint()
                at_snapshot()
                next_snapshot = time.monotonic() - started + 60.0 * self.options.snapshot_minutes

    def step(self, tokens_BT: torch.Tensor, factor: float) -> torch.Tensor:
        """One update; returns the loss before it."""
        loss = self.loss(self.parameters, self.config, tokens_BT)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), 1.0)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
            optimizer.step()
            optimizer.zero_grad()
        self.progress.step += 1
        weight = min(0.997, 1 - 1 / (self.progress.step + 1))
        names = list(self.average)
        with torch.no_grad():
            torch._foreach_lerp_([self.average[n] for n in names], [self.parameters[n] for n in names], 1 - weight)
        return loss.detach()

    def checkpoint(self) -> None:
        """Everything a later call needs to go on."""
        tensors = {f"weight/{n}": v for n, v in self.parameters.items()}
        tensors |= {f"average/{n}": v for n, v in self.average.items()}
        for name, value in self.parameters.items():
            for kind, optimizer in self.optimizers.items():
                for field, moment in optimizer.state.get(value, {}).items():
                    tensors[f"{kind}/{field}/{name}"] = torch.as_tensor(moment)
        state = {"progress": vars(self.progress), "curve": self.curve}
        save_checkpoint(self.options.out / "checkpoint", state, tensors)

    def restore(self, folder: Path) -> None:
        """Continue from `folder/checkpoint` at the beginning of its shard."""
        path = folder / "checkpoint" / "tensors.safetensors"
        tensors = load_file(path, device=self.options.device)
        with safe_open(path, framework="pt") as file:
            state = json.loads(file.metadata()["state"])
        with torch.no_grad():
            for name, value in self.parameters.items():
                value.copy_(tensors[f"weight/{name}"])
                self.average[name].copy_(tensors[f"average/{name}"])
        for key, tensor in tensors.items():
            kind, _, rest = key.partition("/")
            if kind in self.optimizers:
                field, _, name = rest.partition("/")
                self.optimizers[kind].state[self.parameters[name]][field] = tensor
        self.progress = Progress(**state["progress"])
        self.curve = state["curve"]


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="gzipped JSON lines")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=90.0, help="time budget of this call")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", type=Path, help="an --out folder of an earlier call")
    parser.add_argument("--compare", type=Path, help="a model folder to score on the same texts")
    parser.add_argument("--seed", type=int, default=2410)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--batch-tokens", type=int, default=4096, help="tokens of one update; try 65536 on a GPU")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--long-window", type=int, default=512)
    parser.add_argument("--long-from", type=float, default=0.6, help="share of the budget after which windows are long")
    parser.add_argument("--decay-start", type=float, default=0.65, help="share of the budget after which lr decays")
    parser.add_argument("--optimizer", choices=["muon", "adamw"], default="muon")
    parser.add_argument("--lr", type=float, default=3e-3, help="AdamW")
    parser.add_argument("--muon-lr", type=float, default=4e-3)
    parser.add_argument("--snapshot-minutes", type=float, default=10.0)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="needs a C++ compiler")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    corpus = read_corpus(options.corpus)
    vocabulary = common_words(corpus.train)
    print(f"{len(corpus.train)} records to train on, {len(corpus.held_out)} held out", flush=True)
    if options.resume:
        # a short run may have ended before its first snapshot
        written = (options.resume / name for name in ("snapshot", "model"))
        tokenizer = AutoTokenizer.from_pretrained(next(folder for folder in written if folder.is_dir()))
    else:
        tokenizer = train_tokenizer(corpus, vocabulary, options.vocab_size, options.seed)
    config = llama_config(len(tokenizer), tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    trainer = Trainer(options, config, Stream(corpus.train, vocabulary, tokenizer, options.seed))
    if options.resume:
        trainer.restore(options.resume)
    count = sum(value.numel() for value in trainer.parameters.values())
    print(f"{count:,} parameters, vocabulary {len(tokenizer)}", flush=True)
    quick = clip_to_context(held_out_texts(corpus, limit=120), [tokenizer])

    def at_snapshot() -> None:
        export(options.out / "snapshot", trainer.average, config, tokenizer)
        result = score(options.out / "snapshot", quick)
        if trainer.curve:
            trainer.curve[-1]["held_out_nats_per_character"] = result["nats_per_character"]
        print(f"snapshot: held-out {result['nats_per_character']:.4f} nats per character", flush=True)

    trainer.run(at_snapshot)
    trainer.checkpoint()
    export(options.out / "model", trainer.parameters, config, tokenizer)
    tokenizers = [tokenizer] + ([AutoTokenizer.from_pretrained(options.compare)] if options.compare else [])
    texts = clip_to_context(held_out_texts(corpus), tokenizers)
    record = {
        "parameters": count,
        "seed": options.seed,
        "progress": vars(trainer.progress),
        "options": {k: v for k, v in vars(options).items() if not isinstance(v, Path)},
        "held_out": score(options.out / "model", texts),
        "held_out_compared": score(options.compare, texts) if options.compare else None,
        "curve": trainer.curve,
    }
    (options.out / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: record[k] for k in ("progress", "held_out", "held_out_compared")}), flush=True)


if __name__ == "__main__":
    main()
