"""How `lengths.json` was made: token lengths of real examples, without their text.

    python -m benchmarks.measure_lengths FOLDER

FOLDER holds `dolly/databricks-dolly-15k.jsonl.gz` and `natural_instructions/tasks/*.json`. Examples are written in the
project's Alpaca template and measured in characters; 4.4 characters count as one token. An example of more than 1,024
tokens is left out. Knows nothing about models or tokenizers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.lengths import LENGTHS_FILE
from fedmira.config.data import DollyConfig, NaturalInstructionsConfig
from fedmira.data.prompts import render
from fedmira.data.sources import dolly, natural_instructions
from fedmira.randomness import generator
from fedmira.types import Example

CHARACTERS_PER_TOKEN = 4.4
LONGEST = 1024
EXAMPLES_PER_GROUP = 40
NUM_GROUPS = 8


def main(folder: Path) -> None:
    """Write `lengths.json` from the data in `folder`."""
    dolly_file = folder / "dolly" / "databricks-dolly-15k.jsonl.gz"
    tasks_folder = folder / "natural_instructions" / "tasks"
    dolly_source = dolly.load(DollyConfig(source="dolly", path=str(dolly_file)), seed=0)
    tasks_source = natural_instructions.load(
        NaturalInstructionsConfig(source="natural_instructions", path=str(tasks_folder)), seed=0
    )
    content = {
        "characters_per_token": CHARACTERS_PER_TOKEN,
        "dolly": measure("dolly", dolly_source.examples),
        "natural_instructions": measure("natural_instructions", tasks_source.examples),
    }
    lines = json.dumps(content, indent=1).replace("\n   ", " ").replace("\n  ]", " ]")
    LENGTHS_FILE.write_text(lines + "\n", encoding="ascii")


def measure(name: str, examples: tuple[Example, ...]) -> dict[str, list[tuple[int, int, int]]]:
    """Task -> (shared, own, answer) tokens of some of its examples.

    The shared part is the beginning that all prompts of the task have in common: the template's first words and, in
    Natural Instructions, the definition. The answer includes its end token.
    """
    by_task: dict[str, list[Example]] = {}
    for example in examples:
        by_task.setdefault(example.task, []).append(example)
    rng = generator(0, "lengths", name)
    chosen = rng.permutation(sorted(task for task in by_task if len(by_task[task]) >= 2 * EXAMPLES_PER_GROUP))
    lengths: dict[str, list[tuple[int, int, int]]] = {}
    for task in sorted(chosen[:NUM_GROUPS].tolist()):
        rendered = [render(example, "alpaca") for example in by_task[task]]
        shared = common_length([text.prompt for text in rendered])
        measured = [
            (tokens(shared), max(1, tokens(len(text.prompt) - shared)), max(1, tokens(len(text.answer))) + 1)
            for text in rendered
        ]
        fitting = [parts for parts in measured if sum(parts) <= LONGEST]
        order = rng.permutation(len(fitting))[:EXAMPLES_PER_GROUP]
        lengths[task] = [fitting[index] for index in order]
    return lengths


def common_length(texts: list[str]) -> int:
    """Characters that all texts begin with."""
    first, last = min(texts), max(texts)
    return next((index for index, pair in enumerate(zip(first, last, strict=False)) if len(set(pair)) > 1), len(first))


def tokens(characters: int) -> int:
    return round(characters / CHARACTERS_PER_TOKEN)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
