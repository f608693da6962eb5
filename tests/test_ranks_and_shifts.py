"""Whole runs whose clients have different ranks or whose base is shifted: judged, resumed and exported as trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

import fedmira
from fedmira.assembly import assemble
from fedmira.config.file import load_config
from fedmira.config.run import RunConfig
from fedmira.errors import ConfigError
from fedmira.evaluation.judge import validation_losses
from fedmira.experiment import run
from fedmira.export.clients import export_clients, load_trained
from fedmira.runs.store import RunStore
from fedmira.studies.compare import compare

RANKS = {"client_ranks": [1, 3]}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "flora": ("flora", RANKS),
    "florist": ("florist", {}),
    "fedex_lora": ("fedex_lora", {}),
    "flexlora": ("flexlora", RANKS),
    "hetlora": ("hetlora", RANKS),
    "fedit with ranks by layer": ("fedit", {"rank_pattern": {"v_proj": 4}}),
}


def config(method: str, adapter: dict[str, Any], rounds: int = 2) -> RunConfig:
    return RunConfig.model_validate(
        {
            "data": {"source": "planted", "families": 1, "clients_per_family": 3, "examples": 12},
            "model": {
                "adapter": {"rank": 2, "targets": ["q_proj", "v_proj"], **adapter},
                "dtype": "float32",
                "device": "cpu",
            },
            "training": {"local_steps": 2, "batch_size": 2, "learning_rate": 0.01},
            "federation": {"rounds": rounds},
            "method": {"name": method},
            "evaluation": {"test": False},
        }
    )


def events(path: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in RunStore.open(path).events() if event["event"] == kind]


@pytest.mark.parametrize("name", RUNS)
def test_an_exported_client_has_the_loss_that_the_run_recorded(name: str, tmp_path: Path) -> None:
    from peft import PeftModel

    method, adapter = RUNS[name]
    path = run(config(method, adapter), directory=tmp_path / "runs")
    trained = load_trained(path)
    parts = assemble(trained.config)
    recorded = events(path, "evaluation")[-1]["clients"]
    judged = validation_losses(parts.base, trained.adapters, parts.tokenized, trained.config.evaluation)
    assert [recorded[name]["loss_sum"] for name in trained.names] == pytest.approx([loss for loss, _ in judged])
    for row, client in ((0, trained.names[0]), (1, trained.names[1])):
        folder = export_clients(path, client, tmp_path / client)[client]
        base = AutoModelForCausalLM.from_pretrained(fedmira.embedded_base_path(), dtype=torch.float32)
        model = PeftModel.from_pretrained(base, str(folder)).eval()
        loss = 0.0
        for example in parts.tokenized[row].validation:
            tokens_T = torch.from_numpy(example.tokens).long()
            with torch.no_grad():
                scores = model(input_ids=tokens_T[None]).logits[0].log_softmax(-1)
            answer = range(example.prompt_length, len(tokens_T))
            loss -= sum(float(scores[place - 1, tokens_T[place]]) for place in answer)
        assert loss == pytest.approx(recorded[client]["loss_sum"], rel=1e-4)
        stated = json.loads((folder / "adapter_config.json").read_text())
        if adapter is RANKS and method != "flora":
            assert (stated["r"], stated["lora_alpha"]) == ((1, 8), (3, 24))[row]
        if "rank_pattern" in adapter:
            assert (stated["r"], stated["lora_alpha"]) == (4, 32)
            assert set(stated["rank_pattern"].values()) == {2}


def test_clients_of_smaller_rank_send_and_get_less(tmp_path: Path) -> None:
    uploads = {}
    for name, adapter in {"small": {"client_ranks": [1, 3, 2]}, "even": {"rank": 2}}.items():
        path = run(config("hetlora", adapter), directory=tmp_path / name)
        uploads[name] = [event["upload_bytes"] for event in events(path, "round")]
    # ranks 1, 3 and 2 are as many components as three times 2
    assert uploads["small"] == uploads["even"]
    fewer = run(config("hetlora", {"client_ranks": [1, 2, 2]}), directory=tmp_path / "fewer")
    assert [6 * event["upload_bytes"] for event in events(fewer, "round")] == [5 * full for full in uploads["even"]]


@pytest.mark.parametrize("name", ["flora", "fedex_lora", "flexlora"])
def test_a_run_continued_after_its_first_round_ends_with_the_same_bits(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedmira.federation.method import State
    from fedmira.types import Participants, Results

    wanted = config(*RUNS[name])
    whole = load_trained(run(wanted, directory=tmp_path / "whole")).adapters
    import fedmira.experiment as experiment

    original = experiment._Run._exchange

    def stops(self: Any, state: State, participants: Participants, progress: Any) -> Results:
        if participants.round == 2:
            raise KeyboardInterrupt
        return original(self, state, participants, progress)

    monkeypatch.setattr(experiment._Run, "_exchange", stops)
    with pytest.raises(KeyboardInterrupt):
        run(wanted, directory=tmp_path / "parts")
    monkeypatch.undo()
    again = load_trained(run(wanted, directory=tmp_path / "parts", resume=True)).adapters
    assert torch.equal(again.values_KP, whole.values_KP)
    assert (again.shift_W is None) == (whole.shift_W is None)
    assert whole.shift_W is None or torch.equal(again.shift_W, whole.shift_W)


def test_a_file_gives_ranks_by_name_in_turn_or_by_layer(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    for text, field, expected in (
        ("client_ranks: {ann: 3}", "client_ranks", {"ann": 3}),
        ("client_ranks: [2, 4]", "client_ranks", (2, 4)),
        ("rank_pattern: {v_proj: 4}", "rank_pattern", {"v_proj": 4}),
    ):
        file.write_text("model:\n  adapter:\n    " + text + "\n")
        assert getattr(load_config(file).model.adapter, field) == expected


def test_a_base_that_is_moved_is_kept_in_full_precision() -> None:
    """16 bits round most of a shift away."""
    moved = config("fedex_lora", {"rank": 2})
    assert moved.model_copy(update={"model": moved.model.model_copy(update={"dtype": "auto"})}).base_model.dtype == (
        "float32"
    )
    plain = config("fedit", {"rank": 2})
    assert plain.base_model is plain.model
    for dtype in ("bfloat16", "float16"):
        narrow = {**moved.model_dump(), "model": {**moved.model.model_dump(), "dtype": dtype}}
        with pytest.raises(ValidationError, match=f"what {dtype} would mostly round away; set model.dtype to float32"):
            RunConfig.model_validate(narrow)
        compared = {**narrow, "method": {"name": "fedit"}, "compare": {"methods": ["fedit", "flora"]}}
        with pytest.raises(ConfigError, match=r"compare\.methods names flora: .*adds to the weights"):
            compare(RunConfig.model_validate({**compared, "evaluation": {"test": True}}))
