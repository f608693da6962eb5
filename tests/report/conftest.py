"""Run and study directories made up from numbers, in the form that runs and comparisons write."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

METHODS = ("local_only", "fedit", "mira_published", "mira")
FLOORS = {"local_only": 2.62, "fedit": 2.71, "mira_published": 2.60, "mira": 2.28}
"""Test loss that each method tends to."""


def family_matrix(families: Sequence[str], weight: Callable[[bool], float]) -> list[list[float]]:
    """A symmetric matrix with zero diagonal whose entries depend on whether two clients share a family."""
    size = len(families)
    matrix = [[0.0] * size for _ in range(size)]
    for one in range(size):
        for other in range(one):
            matrix[one][other] = matrix[other][one] = round(max(0.0, weight(families[one] == families[other])), 4)
    return matrix


def write_run(
    path: Path,
    *,
    method: str = "mira",
    seed: int = 0,
    families: int = 4,
    clients_per_family: int = 4,
    rounds: int = 8,
    every: int = 1,
    finished: bool = True,
    true_graph: bool = True,
    name_of: Callable[[int, int], str] = lambda family, k: f"family{family}-client{k}",
    task_of: Callable[[int], str] = lambda family: f"family{family}",
    final_losses: dict[str, float] | None = None,
) -> Path:
    """Write the run directory of one method; losses fall from 3.6 towards the method's floor with noise by seed."""
    stream = random.Random(ascii(method) + str(seed))
    shared = random.Random(seed)
    path.mkdir(parents=True)
    labels = [family for family in range(families) for _ in range(clients_per_family)]
    names = [name_of(family, k % clients_per_family) for k, family in enumerate(labels)]
    hardness = [shared.gauss(0, 0.25) + 0.12 * family for family in labels]
    floors = [FLOORS.get(method, 2.4) + hard + stream.gauss(0, 0.09) for hard in hardness]
    sends = method != "local_only"
    config: dict[str, Any] = {
        "name": "planted",
        "seed": seed,
        "method": {"name": method if method in METHODS else "mira"},
        "data": {"source": "planted", "families": families, "clients_per_family": clients_per_family},
        "training": {"learning_rate": 0.002, "local_steps": 10, "batch_size": 4},
        "federation": {"rounds": rounds, "participation": 1.0},
        "evaluation": {"generation": {"enabled": True, "max_new_tokens": 32, "examples_per_client": 8}},
    }
    (path / "config.resolved.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    manifest = {
        "fedmira": "0.1.0",
        "versions": {"python": "3.11.9", "torch": "2.13.0", "transformers": "5.23.0", "platform": "Linux x86_64"},
        "created": "2026-11-22T10:30:00+00:00",
        "seed": seed,
        "data": {"source": "planted"},
        "clients": [
            {"name": n, "task": task_of(f), "category": "", "train": 24, "validation": 6, "test": 10}
            for n, f in zip(names, labels, strict=True)
        ],
        "model": {"path": "embedded", "parameters": 7_340_032, "dtype": "float32"},
        "adapter": {"parameters": 196_608, "bytes": 786_432},
        "memory": {"model_bytes": 29_360_128, "adapter_bytes": 786_432, "optimizer_bytes": 1_572_864},
        "cohort_size": 16,
    }
    (path / "manifest.json").write_text(json.dumps(manifest))
    events: list[dict[str, Any]] = []
    disagreement = 0.0
    for round_ in range(1, rounds + 1):
        numbers = {}
        if method.startswith("mira"):
            disagreement = 0.35 * disagreement + 40 * math.exp(-round_ / 6) + stream.random()
            factor = 0.3 if method == "mira" else 0.995
            numbers = {"disagreement_before": disagreement, "disagreement_after": disagreement * factor}
        events.append(
            {
                "event": "round",
                "round": round_,
                "participants": names,
                "failures": [],
                "train_loss_sum": 5000.0 * math.exp(-round_ / 5),
                "train_tokens": 2400,
                "tokens": 9000,
                "upload_bytes": 786_432 * len(names) if sends else 0,
                "download_bytes": 786_432 * len(names) if sends else 0,
                "numbers": numbers,
                "timing": {
                    "train_seconds": 2.1 + 0.3 * stream.random(),
                    "merge_seconds": 0.02 if sends else 0.001,
                    "peak_memory_bytes": 512 * 2**20,
                },
            }
        )
        if round_ % every == 0 or round_ == rounds:
            losses = {
                name: floor + (3.6 - floor) * math.exp(-round_ / 2.2) + stream.gauss(0, 0.02)
                for name, floor in zip(names, floors, strict=True)
            }
            events.append(
                {
                    "event": "evaluation",
                    "round": round_,
                    "split": "validation",
                    "clients": {name: {"loss_sum": loss * 40, "tokens": 40} for name, loss in losses.items()},
                    "timing": {"evaluate_seconds": 0.4},
                }
            )
    if finished:
        clients = {}
        for name, family, floor in zip(names, labels, floors, strict=True):
            loss = (final_losses or {}).get(name, floor + (3.6 - floor) * math.exp(-rounds / 2.2))
            clients[name] = {
                "task": task_of(family),
                "category": "",
                "loss_sum": loss * 60,
                "tokens": 60,
                "rouge_l_sum": 8 * max(0.0, min(1.0, 1.1 - loss / 4 + stream.gauss(0, 0.03))),
                "exact_match_sum": float(stream.randrange(0, 4)),
                "generated": 8,
            }
        timing = {"evaluate_seconds": 1.5}
        events.append({"event": "final", "round": rounds, "split": "test", "clients": clients, "timing": timing})
    (path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    if method.startswith("mira"):
        true = family_matrix([str(label) for label in labels], float)
        learned = family_matrix(
            [str(label) for label in labels],
            (lambda same: stream.gauss(0.75, 0.12) if same else stream.gauss(-0.05, 0.12))
            if method != "mira_published"
            else (lambda same: value if (value := stream.random()) >= 0.25 else 0.0),
        )
        graph = {
            "names": names,
            "adjacency": learned,
            "name": "gram" if method != "mira_published" else "random",
            "round": rounds,
            "provenance": {"neighbours": 5},
            "true_adjacency": true if true_graph else None,
        }
        (path / "graph.json").write_text(json.dumps(graph))
    return path


def write_study(
    path: Path, *, methods: Sequence[str] = METHODS, seeds: Sequence[int] = (0, 1, 2), tuned: bool = True, **run: Any
) -> Path:
    """Write a study directory with one run per method and seed; `run` is passed on to `write_run`."""
    path.mkdir(parents=True)
    entries = []
    for seed in seeds:
        for position, method in enumerate(methods):
            relative = f"runs/{position}-seed{seed}"
            write_run(path / relative, method=method, seed=seed, **run)
            entries.append({"method": method, "seed": seed, "path": relative, "learning_rate": 2e-3})
    study = {
        "name": "quickstart",
        "created": "2026-11-22T10:30:00+00:00",
        "methods": list(methods),
        "seeds": list(seeds),
        "runs": entries,
        "tuning": [
            {"method": method, "learning_rate": rate, "validation_loss": 2.4 + 30 * abs(rate - 2e-3)}
            for method in (methods if tuned else ())
            for rate in (1e-3, 2e-3, 5e-3)
        ],
    }
    (path / "study.json").write_text(json.dumps(study))
    return path


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """`make_run(**settings)` writes a run directory below the test's folder."""
    return lambda **settings: write_run(tmp_path / f"run-{len(list(tmp_path.iterdir()))}", **settings)


@pytest.fixture
def make_study(tmp_path: Path) -> Callable[..., Path]:
    """`make_study(**settings)` writes a study directory below the test's folder."""
    return lambda **settings: write_study(tmp_path / f"study-{len(list(tmp_path.iterdir()))}", **settings)
