"""A profile says where the time went and changes nothing else."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from fedmira.config.run import RunConfig
from fedmira.errors import Interrupted
from fedmira.exchange.in_process import InProcess
from fedmira.experiment import run
from fedmira.runs.store import RunStore

CONFIG = RunConfig.model_validate(
    {
        "data": {"source": "planted", "families": 2, "clients_per_family": 2, "examples": 12},
        "model": {"adapter": {"rank": 2, "targets": ["q_proj"]}, "dtype": "float32", "device": "cpu"},
        "training": {"local_steps": 2, "batch_size": 2, "cohort_size": 2},
        "federation": {"rounds": 2},
        "evaluation": {"generation": {"max_new_tokens": 2, "examples_per_client": 1}},
    }
)


def events_without_times(path: Path) -> list[dict[str, Any]]:
    return [{**event, "timing": None} for event in RunStore.open(path).events()]


def test_a_profiled_run_computes_the_same_bits(tmp_path: Path) -> None:
    plain = run(CONFIG, directory=tmp_path / "plain")
    profiled = run(CONFIG, directory=tmp_path / "profiled", profile=True)
    assert plain.name == profiled.name, "a profile is no part of what a run is"
    assert events_without_times(plain) == events_without_times(profiled)
    states = [load_file(path / "checkpoints" / "round-00002" / "state.safetensors") for path in (plain, profiled)]
    assert all(bool((states[0][name] == states[1][name]).all()) for name in states[0])
    assert RunStore.open(plain).profile() == {}
    assert not (plain / "profile.json").exists()


def test_all_the_time_of_a_run_is_in_its_profile(tmp_path: Path) -> None:
    path = run(CONFIG, directory=tmp_path, profile=True)
    profile = RunStore.open(path).profile()
    assert all(seconds > 0 for seconds in profile["seconds"].values())
    assert profile["run_seconds"] == pytest.approx(sum(profile["seconds"].values()) - profile["seconds"]["start"])
    timings = [event["timing"] for event in RunStore.open(path).events()]
    trained = sum(timing.get("train_seconds", 0.0) for timing in timings)
    stages = sum(profile["seconds"][name] for name in ("data", "forward", "backward", "optimizer"))
    assert 0.5 * trained < stages < trained
    judged = sum(timing.get("evaluate_seconds", 0.0) for timing in timings)
    assert 0.5 * judged < profile["seconds"]["evaluation"] < judged
    assert profile["peak_memory_bytes"] >= max(timing.get("peak_memory_bytes", 0) for timing in timings)
    run(CONFIG, directory=tmp_path, profile=True, resume=True)
    assert RunStore.open(path).profile() == profile, "nothing was left to do"


def test_an_interrupted_run_keeps_the_profile_of_what_it_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = InProcess.run

    def interrupted(self: InProcess, *arguments: Any, **settings: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments, **settings)

    monkeypatch.setattr(InProcess, "run", interrupted)
    with pytest.raises(Interrupted):
        run(CONFIG, directory=tmp_path, profile=True)
    (path,) = tmp_path.iterdir()
    profile = RunStore.open(path).profile()
    assert profile["seconds"]["start"] > 0
    assert profile["seconds"]["forward"] == 0
