"""A real process is killed at random moments and resumed until it is done: every bit is as if nothing had happened.

FEDMIRA_KILLS=200 makes the number of kills (6 by default) larger, FEDMIRA_KILLS_SEED draws other moments.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from fedmira.cli.main import main
from fedmira.config.file import config_hash, load_config
from fedmira.runs.checkpoint import FACTS, FOLDER, TENSORS, load_latest
from fedmira.runs.manifest import MANIFEST
from fedmira.runs.naming import run_directory
from fedmira.runs.store import GRAPH, LOCK, LOG, METRICS, RunStore

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("FEDMIRA_KILLS", "6"))
SEED = int(os.environ.get("FEDMIRA_KILLS_SEED", "0"))
PATIENCE_SECONDS = 300
EMBEDDED = Path(__file__).resolve().parents[2] / "src" / "fedmira" / "assets" / "base"

CONFIG: dict[str, Any] = {
    "name": "killed",
    "data": {"source": "planted", "families": 2, "clients_per_family": 2, "examples": 12, "words": 16, "codes": 4},
    # dropout, sampling and a graph with a memory: everything that draws or remembers is in play
    "model": {"adapter": {"rank": 2, "dropout": 0.1}},
    "training": {"local_steps": 30, "batch_size": 2, "schedule": "cosine", "keep_moments": True},
    "federation": {"rounds": 12, "participation": 0.75},
    "method": {
        "name": "mira",
        "graph": {"kind": "gram", "memory": 0.5, "neighbours": 2},
        "choice": {"enabled": False},
    },
    # what compression leaves out, what clients hold and what they gave away is remembered at the seam
    "exchange": {
        "compression": "int8",
        "download_compression": "bf16",
        "privacy": {"enabled": True, "clip_norm": 0.5, "noise_multiplier": 0.02},
    },
    # events between two checkpoints are written again after a kill
    "output": {"checkpoint_every": 2},
    "evaluation": {"generation": {"max_new_tokens": 3, "examples_per_client": 1}},
}


class Work(NamedTuple):
    """A config on disk and the environment its processes run in."""

    config: Path
    environment: dict[str, str]

    def start(self, output: Path, *arguments: str) -> subprocess.Popen[str]:
        """Begin the run, or go on with it; its first line of output means that it is about to load the model."""
        command = [sys.executable, "-m", "fedmira", "run", str(self.config), f"output.directory={output}", *arguments]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=self.environment, bufsize=1
        )

    def finish(self, output: Path, *arguments: str) -> None:
        """Carry the run to its end."""
        process = self.start(output, *arguments)
        text, _ = process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == 0, text

    def in_this_process(self, capsys: pytest.CaptureFixture[str], output: Path, *arguments: str) -> tuple[int, str]:
        """Exit code and output of a command that has nothing to train, so that no process need be started."""
        code = main(["run", str(self.config), f"output.directory={output}", *arguments])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    def run_path(self, output: Path) -> Path:
        return run_directory(load_config(self.config), output)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    """A base model of one thin layer with the shipped tokenizer, so that a round takes a fraction of a second."""
    folder = tmp_path_factory.mktemp("work")
    base = folder / "base"
    vocabulary = json.loads((EMBEDDED / "config.json").read_text())["vocab_size"]
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(shape).save_pretrained(base)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED / name, base / name)
    config = folder / "config.yaml"
    model = {**CONFIG["model"], "path": str(base), "dtype": "float32", "device": "cpu"}
    config.write_text(yaml.safe_dump({**CONFIG, "model": model}))
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "NO_COLOR": "1",
        "PYTHONUNBUFFERED": "1",
    }
    return Work(config, environment)


class Outcome(NamedTuple):
    """All that a finished run leaves behind, apart from times."""

    tensors: dict[str, str]
    facts: dict[str, Any]
    events: list[dict[str, Any]]
    graph: dict[str, Any]


def outcome(path: Path) -> Outcome:
    store = RunStore.open(path)
    checkpoint = load_latest(path, config_hash=config_hash(store.config))
    assert checkpoint is not None
    digests = {
        name: hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in checkpoint.tensors.items()
    }
    facts = {key: value for key, value in checkpoint.facts.items() if key != "metrics_position"}
    events = [{key: value for key, value in event.items() if key != "timing"} for event in store.events()]
    return Outcome(digests, {**facts, "round": checkpoint.round}, events, json.loads((path / GRAPH).read_bytes()))


class Finished(NamedTuple):
    """A run that nobody disturbed."""

    output: Path
    path: Path
    outcome: Outcome
    loading_seconds: float
    """From the first line of output to the second, which says that the rounds begin."""
    rounds_seconds: float
    """From there to the end."""


@pytest.fixture(scope="module")
def uninterrupted(work: Work, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    output = tmp_path_factory.mktemp("uninterrupted")
    process = work.start(output)
    assert process.stdout is not None
    times = []
    for _ in range(2):
        assert process.stdout.readline()
        times.append(time.perf_counter())
    text, _ = process.communicate(timeout=PATIENCE_SECONDS)
    times.append(time.perf_counter())
    assert process.returncode == 0, text
    found = outcome(work.run_path(output))
    assert found.facts["round"] == CONFIG["federation"]["rounds"]
    assert len(found.tensors) > 0
    assert [event["event"] for event in found.events].count("round") == found.facts["round"]
    return Finished(output, work.run_path(output), found, times[1] - times[0], times[2] - times[1])


def kill(process: subprocess.Popen[str], after_lines: int, seconds: float) -> bool:
    """Kill the process that long after that many lines of output; False if it was done before."""
    assert process.stdout is not None
    for _ in range(after_lines):
        # one that was killed before its first event has nothing to resume, and says so
        while process.stdout.readline().startswith("warning:"):
            pass
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
    rest = process.stdout.read()
    process.stdout.close()
    code = process.wait(timeout=PATIENCE_SECONDS)
    assert code in (0, -signal.SIGKILL), rest
    return code != 0


def test_killed_and_resumed_is_bit_identical(work: Work, uninterrupted: Finished, tmp_path: Path) -> None:
    """One kill in six comes while the model is loaded, the others at any moment of the rounds."""
    generator = np.random.Generator(np.random.Philox(SEED))
    kills = runs = 0
    reached: list[int] = []
    while kills < KILLS:
        output = tmp_path / str(runs)
        path = work.run_path(output)
        arguments: tuple[str, ...] = ()
        while kills < KILLS:
            loading = generator.random() < 1 / 6
            seconds = generator.uniform(
                0, uninterrupted.loading_seconds if loading else uninterrupted.rounds_seconds / 2
            )
            if not kill(work.start(output, *arguments), 1 if loading else 2, float(seconds)):
                break
            kills += 1
            arguments = ("--resume",)
            metrics = path / METRICS
            reached.append(metrics.read_bytes().count(b"\n") if metrics.exists() else 0)
        else:
            work.finish(output, *arguments)
        runs += 1
        assert outcome(path) == uninterrupted.outcome, f"differs after {kills} kills; events at the kills: {reached}"
    print(f"{kills} kills over {runs} runs; events written at the kills: {reached}")
    assert max(reached) > 0, "no kill came after the first event; the moments are badly chosen"


def test_signals_save_inside_a_round_and_the_run_goes_on_as_if_nothing_had_happened(
    work: Work, uninterrupted: Finished, tmp_path: Path
) -> None:
    """SIGTERM and SIGINT in turn, until each has come and one has come inside a round, then to the end."""
    path = work.run_path(tmp_path)
    inside: list[bool] = []
    for attempt, number in enumerate([signal.SIGTERM, signal.SIGINT] * 3):
        process = work.start(tmp_path, *(["--resume"] if attempt else []))
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.strip().startswith("round "):
                break
        time.sleep(uninterrupted.rounds_seconds / CONFIG["federation"]["rounds"] / 2)
        process.send_signal(number)
        rest, _ = process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == 128 + number, "".join([*lines, rest])
        assert number.name in rest
        assert "--resume" in rest
        assert "Traceback" not in rest
        checkpoint = load_latest(path, config_hash=config_hash(load_config(work.config)))
        assert checkpoint is not None
        assert checkpoint.round > attempt, "each process finished a round"
        inside.append(checkpoint.facts["partial"])
        if attempt and any(inside):
            break
    assert any(inside), "all signals came between two rounds; none tested a checkpoint inside a round"
    work.finish(tmp_path, "--resume")
    assert outcome(path) == uninterrupted.outcome


# ------------------------------------------------------------------------------------------------- damage and changes


def copy_of(finished: Finished, tmp_path: Path) -> Path:
    """A copy of the undisturbed run, to be mistreated; returns the run directory."""
    shutil.copytree(finished.output, tmp_path, dirs_exist_ok=True)
    return tmp_path / finished.path.name


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_damaged_newest_checkpoint_costs_time_and_nothing_else(
    work: Work, uninterrupted: Finished, tmp_path: Path
) -> None:
    path = copy_of(uninterrupted, tmp_path)
    newest = max((path / FOLDER).iterdir())
    with (newest / TENSORS).open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"rot")
    work.finish(tmp_path, "--resume")
    assert outcome(path) == uninterrupted.outcome
    assert f"{newest.name}: {TENSORS} is damaged (sha256 differs)" in (path / LOG).read_text()


def test_a_finished_run_has_nothing_to_resume(
    work: Work, uninterrupted: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copy_of(uninterrupted, tmp_path)
    code, text = work.in_this_process(capsys, tmp_path, "--resume")
    assert code == 0, text
    assert outcome(path) == uninterrupted.outcome


def test_resume_under_a_changed_config_is_refused(
    work: Work, uninterrupted: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copy_of(uninterrupted, tmp_path)
    before = files(tmp_path)
    code, text = work.in_this_process(
        capsys, tmp_path, "--resume", "federation.rounds=13", "training.learning_rate=1e-3"
    )
    assert code == 5, text
    assert "federation.rounds" not in text, "more rounds alone would be no reason"
    assert "training.learning_rate: 0.002 -> 0.001" in text
    assert path.name in text
    assert "Traceback" not in text
    assert files(tmp_path) == before


def test_a_run_is_not_started_over(
    work: Work, uninterrupted: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy_of(uninterrupted, tmp_path)
    before = files(tmp_path)
    code, text = work.in_this_process(capsys, tmp_path)
    assert code == 2, text
    assert "--resume" in text
    assert {name: data for name, data in files(tmp_path).items() if not name.endswith(LOCK)} == {
        name: data for name, data in before.items() if not name.endswith(LOCK)
    }


@pytest.mark.parametrize("lost", [MANIFEST, METRICS, "every checkpoint's facts"])
def test_a_lost_file_is_a_clear_error(
    lost: str, work: Work, uninterrupted: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copy_of(uninterrupted, tmp_path)
    for victim in [path / lost] if (path / lost).exists() else (path / FOLDER).glob(f"*/{FACTS}"):
        victim.unlink()
    code, text = work.in_this_process(capsys, tmp_path, "--resume")
    assert code == 5, text
    assert path.name in text
    assert "Traceback" not in text
