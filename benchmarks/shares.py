"""Shares of a round between two others that each stage takes, on the benchmark's workloads.

    python -m benchmarks.shares --data DIR [NAME ...]

Runs the command line in processes of its own, five rounds and two of each workload; the difference is three rounds
without a beginning or an end. Counts CPU seconds of one thread, so that other work does not count.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from benchmarks.dry_run import PLANTED, RECORDED, call, make_model

MANY, FEW = 5, 2

WORKLOADS = {
    "dolly-embedded": ("dolly", [*RECORDED["dolly-15m"], "model.path=embedded"]),
    "dolly-15m": ("dolly", RECORDED["dolly-15m"]),
    "dolly-15m-batch-1": ("dolly", [*RECORDED["dolly-15m"], "training.batch_size=1"]),
    "natural-15m": ("natural_instructions", RECORDED["natural-15m"]),
    "planted": ("planted", PLANTED["planted"]),
    "flan": ("flan", RECORDED["flan"]),
}
"""A recipe and what differs from it, the last of equal keys."""


def main() -> None:
    """Print a line for each workload that the command line names, all by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a further override")
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - set(WORKLOADS)):
        parser.error(f"unknown: {', '.join(unknown)}; allowed: {', '.join(WORKLOADS)}")
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        places = {"data": str(options.data.resolve())}
        for name in options.names or WORKLOADS:
            recipe, overrides = WORKLOADS[name]
            if "llama-15m" not in places and any("{llama-15m}" in text for text in overrides):
                places["llama-15m"] = make_model("llama-15m", Path(folder))
            filled = [text.format(**places) if "{" in text else text for text in overrides]
            seconds = middle_round(recipe, [*filled, *options.set], Path(folder) / name)
            shares = sorted(((part / sum(seconds.values()), stage) for stage, part in seconds.items()), reverse=True)
            print(f"{name:20}{sum(seconds.values()):8.2f} s   ", end="")
            print(", ".join(f"{stage} {share:.1%}" for share, stage in shares if share >= 0.005), flush=True)


def middle_round(recipe: str, overrides: list[str], folder: Path) -> dict[str, float]:
    """Seconds of each stage in a round that is neither the first nor the last."""
    seconds = []
    for rounds in (FEW, MANY):
        place = folder.with_name(f"{folder.name}-{rounds}")
        place.mkdir()
        call(["init", recipe, str(place / "c.yaml")], place, "cpu")
        ends = [f"federation.rounds={rounds}", f"evaluation.every={rounds}", "evaluation.test=false"]
        arguments = [*overrides, *ends, "evaluation.generation.enabled=false", "--json", "--quiet", "--profile"]
        seconds.append(call(["run", "c.yaml", *arguments], place, "cpu")["profile"]["seconds"])
    few, many = seconds
    return {stage: (many[stage] - few[stage]) / (MANY - FEW) for stage in many}


if __name__ == "__main__":
    main()
