"""The model card of the embedded base model, written from the record of its training.

    python tools/base_card.py --record build/base/training.json --manifest manifest.json --out build/base/model

`manifest.json` lists the corpus: task, license, source and instances of each part. Knows nothing about tensors.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

CURVE_ROWS = 14


def curve_table(curve: list[dict[str, float]]) -> str:
    """About a dozen evenly spaced points of the loss curve as a Markdown table; losses in nats."""
    places = sorted({round(i * (len(curve) - 1) / (CURVE_ROWS - 1)) for i in range(CURVE_ROWS)})
    lines = [
        "| minutes | steps | tokens (millions) | training loss (nats per token) | held-out (nats per character) |",
        "|---:|---:|---:|---:|---:|",
    ]
    for place in places:
        point = curve[place]
        # Snapshots are rarer than lines of the curve: show the latest one up to this row that no row has shown.
        earlier = max((other for other in places if other < place), default=-1)
        scored = [p["held_out_nats_per_character"] for p in curve[earlier + 1 : place + 1] if _is_scored(p)]
        held_out = f"{scored[-1]:.3f}" if scored else ""
        lines.append(
            f"| {point['minutes']:.0f} | {point['step']:,.0f} | {point['tokens'] / 1e6:.1f} "
            f"| {point['train_loss']:.3f} | {held_out} |"
        )
    return "\n".join(lines)


def _is_scored(point: dict[str, float]) -> bool:
    return "held_out_nats_per_character" in point


def licence_table(manifest: list[dict[str, Any]]) -> str:
    """Records and source data sets by licence, as a Markdown table."""
    instances: dict[str, int] = {}
    sources: dict[str, set[str]] = {}
    for part in manifest:
        licence = part["license"]
        instances[licence] = instances.get(licence, 0) + int(part["instances"])
        sources.setdefault(licence, set()).update(source.strip(" ,") for source in part["source"])
    lines = ["| licence as stated | records | source data sets |", "|---|---:|---|"]
    lines += [
        f"| {licence} | {instances[licence]:,} | {', '.join(sorted(sources[licence]))} |"
        for licence in sorted(instances, key=lambda name: -instances[name])
    ]
    return "\n".join(lines)


def model_card(record: dict[str, Any], manifest: list[dict[str, Any]], vocab_size: int) -> str:
    """The card as Markdown."""
    ours, compared = record["held_out"], record["held_out_compared"]
    progress, options = record["progress"], record["options"]
    comparison = (
        f"stories260K (260,032 parameters) needs {compared['nats_per_character']:.3f} nats per character on the same "
        "characters."
        if compared
        else ""
    )
    earlier = progress["minutes"] - options["minutes"]
    resumed = f" (the last {options['minutes']:g} in a call with --resume)" if earlier > 1 else ""
    return f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# The embedded base model of fedmira

A Llama of {record["parameters"]:,} parameters: 6 layers, width 192, 4 query and 2 key/value heads of width 48, gated
feed-forward of width 512, rotary positions, tied embeddings, vocabulary {vocab_size:,}. Weights are stored as bfloat16
and load as float32. The tokenizer is a byte-level BPE of its own: any text comes back unchanged, every digit is
one token, texts start with `<bos>`, answers end with `<eos>`.

## Data

{len(manifest)} tasks of Super-NaturalInstructions with permissive licences, {_total(manifest):,} records of
instruction, input and answer (19 MB of English), plus puzzles of made-up words that `tools/base_text.py` generates:
looking words up, substituting, copying, reordering, continuing patterns. None of the tasks fedmira is measured on is
among them. Records are rendered in the three templates of fedmira (alpaca 45 %, plain 35 %, chat 20 %). The texts
are not part of the package.

{licence_table(manifest)}

## Training

    python tools/train_base_model.py --corpus corpus.jsonl.gz --out build/base

On one CPU core: {progress["step"]:,} steps and {progress["tokens"]:,} tokens (prompt and answer alike) in
{progress["minutes"]:.0f} minutes{resumed}, {options["batch_tokens"]:,} tokens a step in windows of
{options["window"]}, later {options["long_window"]}; seed {record["seed"]}. Muon for the matrices (learning rate
{options["muon_lr"]:g}), AdamW for embedding and norms ({options["lr"]:g}); warm-up, constant, decay over the last
{(1 - options["decay_start"]) * options["minutes"]:.0f} minutes. Held-out values along the way are those of a running
average of the weights on a sixth of the held-out texts.

{curve_table(record["curve"])}

## Held-out

One record in fifty was kept back, by content: no sentence of 40 characters or more is on both sides of the split,
except boilerplate that occurs in more than 60 records. On the {ours["texts"]} held-out texts (input and answer
without the instruction, clipped at 700 characters), after rounding to bfloat16:
**{ours["nats_per_character"]:.3f} nats per character, perplexity {ours["perplexity_per_token"]:.1f} per token**.
{comparison}

## Intended use

Demonstrations and tests of federated fine-tuning on two cores, offline. It continues a simple rule shown in a few
pairs, copies words of its context once they have begun, ends its answers, and is a start for low-rank adapters that
train in seconds.

## Limits

It knows little of the world, cannot reason or calculate, and writes confident nonsense. Asked for one entry of a list
in its context it mostly names a wrong one: in-context lookup has not emerged. English only. It has seen
512 tokens at a time; longer contexts load but were never trained. It repeats the biases of its sources. Not for any use
in which its statements are believed.
"""


def _total(manifest: list[dict[str, Any]]) -> int:
    return sum(int(part["instances"]) for part in manifest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, required=True, help="training.json")
    parser.add_argument("--manifest", type=Path, required=True, help="manifest.json of the corpus")
    parser.add_argument("--out", type=Path, required=True, help="the model's folder")
    options = parser.parse_args()
    config = json.loads((options.out / "config.json").read_text(encoding="utf-8"))
    card = model_card(
        json.loads(options.record.read_text(encoding="utf-8")),
        json.loads(options.manifest.read_text(encoding="utf-8")),
        config["vocab_size"],
    )
    (options.out / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
