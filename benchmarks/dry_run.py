"""Checks what `fedmira run --dry-run` predicts against what then happens: memory, time, and how long predicting took.

    python -m benchmarks.dry_run [--data DIR] [--clock cpu] [NAME ...]

Each run is predicted in one process and carried out in another. `--data` names a folder with the data sets `dolly`,
`flan`, `instruction_induction` and `natural_instructions`; without it only planted federations are checked. On a
machine that is shared, `--clock cpu` counts the processor's seconds instead of the clock's. Knows nothing about how
predictions are made.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer

import fedmira
from benchmarks.lengths import read_lengths
from benchmarks.models import SHAPES, Shape

MEMORY_BOUND, TIME_BOUND = 0.15, 0.30

PLANTED = {
    "planted": [],
    "planted-alone": ["training.cohort_size=1", "method.name=fedit", "federation.rounds=4"],
    "planted-cohort4": ["training.cohort_size=4", "evaluation.generation.enabled=false", "federation.rounds=6"],
    "planted-answers": [
        "federation.rounds=2", "evaluation.generation.max_new_tokens=48",
        "evaluation.generation.examples_per_client=null", "evaluation.every=2",
    ],
    "planted-gpt2": ["model.path={gpt2}", "federation.rounds=6", "training.batch_size=8"],
    "planted-llama": [
        "model.path={llama}", "federation.rounds=3", "training.local_epochs=2", "training.local_steps=null",
    ],
    "planted-rank64": ["model.adapter.rank=64", "federation.rounds=3", "data.clients_per_family=6"],
}  # fmt: skip
SHAPED = [
    "data.path={data}/dolly/dolly-mini-1600.jsonl", "data.partition.clients_per_task=1", "federation.rounds=2",
    "federation.participation=1.0", "training.local_steps=10",
]  # fmt: skip
"""Eight clients at batch 4 on shapes of the benchmark, with random weights."""
RECORDED = {
    "dolly": ["data.path={data}/dolly/databricks-dolly-15k.jsonl.gz", "federation.rounds=6"],
    "dolly-full": [
        "data.path={data}/dolly/dolly-mini-1600.jsonl", "data.partition.clients_per_task=2", "federation.rounds=4",
        "federation.participation=1.0", "evaluation.every=1", "training.batch_size=2", "data.max_length=512",
    ],
    "dolly-15m": ["model.path={llama-15m}", *SHAPED],
    "dolly-gpt2": ["model.path={gpt2-124m}", *SHAPED],
    "natural-15m": [
        "model.path={llama-15m}", "data.path={data}/natural_instructions/tasks",
        f"data.tasks=[{', '.join(read_lengths('natural_instructions'))}]", "data.template=alpaca",
        "data.max_length=512", "federation.rounds=2", "training.local_steps=10", "training.batch_size=8",
    ],
    "flan": ["data.path={data}/flan/*.train.jsonl", "data.partition.clients_per_task=2", "federation.rounds=6"],
    "instruction_induction": [
        "data.path={data}/instruction_induction/tasks", "data.partition.clients_per_task=2", "federation.rounds=6",
    ],
    "natural_instructions": [
        "data.path={data}/natural_instructions/tasks", "federation.participation=0.2", "federation.rounds=8",
    ],
}  # fmt: skip
RECIPES = {**dict.fromkeys(("dolly-full", "dolly-15m", "dolly-gpt2"), "dolly"), "natural-15m": "natural_instructions"}

SMALL = {
    "gpt2": Shape("GPT2Config", {"n_embd": 128, "n_layer": 3, "n_head": 4, "n_positions": 256}),
    "llama": Shape(
        "LlamaConfig",
        {
            "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "intermediate_size": 160, "max_position_embeddings": 256,
        },
    ),
}  # fmt: skip

PROCESSOR_CLOCK = "import time; time.perf_counter = time.process_time\n"
PROGRAM = "import sys; from fedmira.cli.main import main; sys.exit(main(sys.argv[1:]))"


def main() -> None:
    """Check the runs that the command line names, all by default, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    known = {**PLANTED, **(RECORDED if options.data else {})}
    unknown = sorted(set(options.names) - set(known))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; allowed: {', '.join(known)}")
    header = f"{'run':24}{'memory, MiB':>22}{'seconds':>20}{'stages: predicted/happened':>44}{'dry run':>10}"
    print(f"{header}   largest stage but forward and backward")
    held = True
    with tempfile.TemporaryDirectory() as folder:
        places = {"data": str((options.data or Path()).resolve())}
        for name in options.names or known:
            for model in {"gpt2", "llama", *SHAPES} - set(places):
                if any(f"{{{model}}}" in text for text in known[name]):
                    places[model] = make_model(model, Path(folder))
            overrides = [text.format(**places) if "=" in text else text for text in known[name]]
            for repeat in range(options.repeats):
                held &= check(name, overrides, Path(folder) / f"{name}-{repeat}", options.clock)
    sys.exit(0 if held else 1)


def check(name: str, overrides: list[str], folder: Path, clock: str) -> bool:
    """Predict a run and carry it out, print both; whether the prediction kept within its bounds."""
    folder.mkdir()
    family = "planted" if name in PLANTED else RECIPES.get(name, name)
    call(["init", family, str(folder / "c.yaml")], folder, clock)
    arguments = ["run", "c.yaml", *overrides, "--json", "--quiet"]
    predicted = call([*arguments, "--dry-run"], folder, clock)
    happened = call([*arguments, "--profile"], folder, clock)["profile"]
    seconds = happened["seconds"]
    stages = {
        "training": sum(seconds[stage] for stage in ("data", "forward", "backward", "optimizer", "other")),
        "mixing": seconds["mixing"],
        "evaluation": seconds["evaluation"],
        "disk": seconds["disk"],
    }
    beside = {stage: part for stage, part in seconds.items() if stage not in ("forward", "backward")}
    largest = max(beside, key=lambda stage: beside[stage])
    memory = predicted["memory_bytes"] / happened["peak_memory_bytes"] - 1
    time_ = predicted["seconds"] / happened["run_seconds"] - 1
    print(
        f"{name:24}{predicted['memory_bytes'] / 2**20:7.0f}{happened['peak_memory_bytes'] / 2**20:7.0f}{memory:+8.1%}"
        f"{predicted['seconds']:8.1f}{happened['run_seconds']:8.1f}{time_:+8.1%}   "
        + " ".join(f"{stage[:5]} {predicted[f'{stage}_seconds']:.1f}/{stages[stage]:.1f}" for stage in stages)
        + f"{predicted['dry_run_seconds']:8.1f}   {largest} {beside[largest] / happened['run_seconds']:.1%}",
        flush=True,
    )
    return bool(abs(memory) <= MEMORY_BOUND and abs(time_) <= TIME_BOUND)


def call(arguments: list[str], folder: Path, clock: str) -> dict[str, Any]:
    """Run the command line in a process of its own and return the JSON it prints, {} if it prints none."""
    program = (PROCESSOR_CLOCK if clock == "cpu" else "") + PROGRAM
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"fedmira {' '.join(arguments)} failed: {done.stderr.strip() or done.stdout.strip()}")
    facts: dict[str, Any] = json.loads(done.stdout) if "--json" in arguments else {}
    return facts


def make_model(name: str, folder: Path) -> str:
    """A folder with the model `name`, random weights, and the tokenizer of the embedded base."""
    tokenizer = AutoTokenizer.from_pretrained(fedmira.embedded_base_path())
    shape = SHAPES.get(name) or SMALL[name]._replace(settings={**SMALL[name].settings, "vocab_size": len(tokenizer)})
    special = {token: getattr(tokenizer, token) for token in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    config = getattr(transformers, shape.family)(**{**shape.settings, **special})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
    return str(folder / name)


if __name__ == "__main__":
    main()
