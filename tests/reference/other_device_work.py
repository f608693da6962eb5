"""Training, judging, answering and whole runs on the CPU and on the other device; `python -m` it with cases.

Prints what the two differ by, as one JSON object by case.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tests.reference import other_device
from tests.reference.tiny_models import layout_of_kind, ragged_clients, random_arena, tiny_layout, tiny_model
from transformers import AutoModelForCausalLM

from fedmira import assembly, experiment
from fedmira.config.run import RunConfig
from fedmira.config.training import TrainingConfig
from fedmira.evaluation import generation
from fedmira.evaluation.loss import example_losses
from fedmira.evaluation.predictions import agreement
from fedmira.model import base as base_module
from fedmira.model.base import freeze
from fedmira.runs.store import RunStore
from fedmira.training import memory
from fedmira.training.cohort import StopRequested, train
from fedmira.training.continuity import Continuity
from fedmira.types import Arena, Job, Pull, SeedPool

_BYTES = 4 * 10**9
_PARTICIPANTS = (0, 1, 2, 4)


class _Words:
    """Stands in for a tokenizer."""

    eos_token_id = bos_token_id = None

    def decode(self, tokens: Any, **_settings: Any) -> str:
        return " ".join(map(str, tokens))


def engine(case: str, elsewhere: bool) -> dict[str, Any]:
    """A stopped and continued round of ragged clients that are pulled, one of a single group, losses and answers."""
    family, kind = case.split("-")
    of_seeds = kind == "seeds"
    model = tiny_model(family, torch.float64)
    if elsewhere:
        other_device.move(model)
    base = freeze(model, tokenizer=_Words(), name="tiny")
    assert base.device.type == (other_device.NAME if elsewhere else "cpu")
    layout = tiny_layout(base, family) if kind in ("lora", "seeds") else layout_of_kind(base, kind)
    if kind in ("lora", "seeds"):
        start_SP = random_arena(layout, len(_PARTICIPANTS), dtype=torch.float64).values_KP
    else:
        draw = torch.Generator().manual_seed(1)
        shape = (len(_PARTICIPANTS), layout.num_parameters)
        start_SP = 0.05 * torch.randn(shape, generator=draw, dtype=torch.float64)
    start_SP = start_SP.to(base.device)
    training = TrainingConfig(
        local_epochs=2, batch_size=3, optimizer="adamw", learning_rate=1e-2, clip_norm=0.5, keep_moments=not of_seeds
    )
    groups, clients = frozenset(layout.groups), ragged_clients()
    pull = None if of_seeds else Pull(start_SP.flip(0).contiguous(), (0.3, 0.0, 0.2, 0.1))
    job = Job(2, _PARTICIPANTS, start_SP, groups, groups, groups, pull, seeds=SeedPool(64, 1e-3) if of_seeds else None)
    settings: dict[str, Any] = {
        "total_rounds": 3,
        "seed": 5,
        "cohort_size": 1 if kind == "full" else 3,
        "dropout": 0.0,
        "continuity": Continuity(layout, 5, training),
    }
    asked = iter([False, False, True])
    try:
        train(base, layout, job, clients, training, should_stop=lambda: next(asked), **settings)
    except StopRequested as stopped:
        rows_SP, _ = train(base, layout, job, clients, training, progress=stopped.progress, **settings)
    if kind == "lora":
        one = job._replace(round=3, trainable=frozenset({"lora_b"}))
        rows_SP, _ = train(base, layout, one._replace(start_SP=rows_SP), clients, training, **settings)
    arena = Arena(layout, rows_SP)
    examples = [clients[id_].train for id_ in _PARTICIPANTS]
    losses_SN = example_losses(base, arena, examples, 30)
    prompts = [[example.tokens[: example.prompt_length] for example in of_client] for of_client in examples]
    return {
        "rows": rows_SP.to("cpu"),
        "losses": torch.tensor([loss for losses_N in losses_SN for loss in losses_N], dtype=torch.float64),
        "agreement": agreement(base, arena, clients[2].train[:2], 30).cpu(),
        "answers": generation.generate(base, arena, prompts, 12),
        "cohort": memory.choose_cohort_size(base, layout, clients, training, 10**9, 0.0),
    }


def whole_run(case: str, elsewhere: bool) -> dict[str, Any]:
    """Two rounds of a method on tiny planted clients, from the config to what is recorded and kept."""
    method, *rest = case.split("-")
    config = RunConfig.model_validate(
        {
            "data": {"source": "planted", "families": 2, "clients_per_family": 2, "examples": 12},
            "model": {"adapter": {"rank": 2, "targets": ["q_proj", "down_proj"]}, "dtype": "float64", "device": "cpu"},
            "training": {"local_steps": 2, "batch_size": 2, "learning_rate": 0.01},
            "federation": {"rounds": 2},
            "method": {"name": method, **({"graph": {"kind": rest[0]}} if rest else {})},
            "evaluation": {"generation": {"max_new_tokens": 3, "examples_per_client": 2}},
            "exchange": {"compression": "int8"} if method == "fedit" else {},
        }
    )
    # the base of a run before lies elsewhere
    assembly._BASES.clear()
    with tempfile.TemporaryDirectory() as folder:
        path = experiment.run(config, directory=Path(folder))
        events = [{**event, "timing": None} for event in RunStore.open(path).events()]
        state = load_file(path / "checkpoints" / "round-00002" / "state.safetensors")
    final = next(event for event in events if event["event"] == "final")
    return {
        "rows": state["state.adapters"],
        "losses": torch.tensor([client["loss_sum"] for client in final["clients"].values()], dtype=torch.float64),
        "bytes": [(event["upload_bytes"], event["download_bytes"]) for event in events if event["event"] == "round"],
    }


def _differences(work: Callable[[str, bool], dict[str, Any]], case: str) -> dict[str, Any]:
    here = work(case, False)
    with other_device.working():
        there = work(case, True)
    assert here.keys() == there.keys()
    return {
        name: float((value - there[name]).abs().max()) if isinstance(value, torch.Tensor) else value == there[name]
        for name, value in here.items()
    }


def _move_bases() -> None:
    """Let every base that is loaded lie there while the device works."""
    freeze_, read = base_module.freeze, AutoModelForCausalLM.from_pretrained

    def freeze_there(model: Any, *arguments: Any, **settings: Any) -> Any:
        base = freeze_(other_device.move(model) if other_device.works() else model, *arguments, **settings)
        assert (base.device.type == other_device.NAME) == other_device.works()
        return base

    def read_here(*arguments: Any, **settings: Any) -> Any:
        with other_device.absent():
            return read(*arguments, **settings)

    base_module.freeze = freeze_there
    AutoModelForCausalLM.from_pretrained = read_here


def main() -> None:
    kind, *cases = sys.argv[1:]
    other_device.take_place()
    for module in (memory, generation, assembly):
        module.available_bytes = lambda device: _BYTES  # type: ignore[attr-defined]
    if kind == "run":
        _move_bases()
    work = whole_run if kind == "run" else engine
    print(json.dumps({case: _differences(work, case) for case in cases}))


if __name__ == "__main__":
    main()
