"""Every contestant trains the same adapters as ours, and one that does not is refused."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from benchmarks.gate import UnequalError, check_adapters, check_loss, final_loss
from benchmarks.groups import training as group
from benchmarks.options import Options
from benchmarks.peers import peer
from benchmarks.peers.ours import Ours
from benchmarks.peers.padded_cohort import PaddedCohort
from benchmarks.peers.peer import (
    FLOWER,
    KEPT,
    MIXED,
    ONE_CLIENT,
    OURS,
    PADDED,
    PEFT,
    PeerMissingError,
    make_peer,
    runs_here,
)
from benchmarks.peers.peft_mixed import PeftMixed
from benchmarks.peers.peft_sequential import PeftSequential
from benchmarks.peers.worker import Processes, Worker, environment
from benchmarks.results import Section
from benchmarks.table import render_section
from benchmarks.timing import Lap, Times
from benchmarks.workloads import Task, Workload, build, fingerprint

from fedmira.model.attention import Packing, plan_packing
from fedmira.training.objective import logits_at_once

LLAMA = Workload("llama-15m", "dolly", 3, 8, ("q_proj", "v_proj"))
GPT2 = Workload("gpt2-124m", "natural_instructions", 2, 8, ("c_attn", "c_proj"))
NATURAL = Workload("llama-15m", "natural_instructions", 8, 8, ("q_proj", "v_proj"))
EMBEDDED = Workload("embedded", "dolly", 1, 8, "all-linear")
OPTIONS = Options("cpu", threads=1, warm_up=0, repeats=2, peers_python=None, peers_note="no environment in tests")


def silent(_text: str) -> None:
    pass


@pytest.mark.parametrize("workload", [LLAMA, GPT2, EMBEDDED], ids=lambda workload: workload.model)
def test_all_contestants_of_this_process_pass_the_gate(workload: Workload) -> None:
    section = Section("test", "test")
    contestants = [OURS, ONE_CLIENT, PEFT, KEPT, MIXED, PADDED, FLOWER]
    assert all(runs_here(contestant) for contestant in contestants[:-1])
    assert group.gate(workload, contestants, section, OPTIONS, silent) == contestants[:-1]
    assert section.row(FLOWER).note == "not measured: no environment in tests"
    assert 0 < section.facts["gate_difference"] < 5e-6


def packings(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> list[Packing]:
    """How the steps of our round fall into sequences."""
    seen: list[Packing] = []

    def spy(*arguments: Any, **named: Any) -> Packing:
        seen.append(plan_packing(*arguments, **named))
        return seen[-1]

    monkeypatch.setattr("fedmira.model.base.plan_packing", spy)
    Ours(build(workload, "cpu"), cohort_size=4).round()
    return seen


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("workload", [NATURAL, replace(LLAMA, batch_size=4), GPT2, EMBEDDED])
def test_the_gate_runs_the_fast_paths(workload: Workload, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        twins = (workload.tiny(), replace(workload.tiny(), plain=True))
        alone = [one for twin in twins for packing in packings(twin, monkeypatch) for one in packing.alone]
    finally:
        torch.set_num_threads(before)
    assert alone, "long sequences stand alone"
    if workload.batch_size > 1:
        assert any(one.prefix.stop > one.prefix.start for one in alone), "behind what their client's examples share"
    base = build(workload.tiny(), "cpu").base
    _, columns = logits_at_once(base)
    assert columns < base.vocabulary, "logits come in more than one block"
    assert base.body is not None


class _OneStepShort(PeftSequential):
    """A contestant that saves work by leaving out the last step."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self._steps = [steps[:-1] for steps in self._steps]


class _OtherClients(PeftSequential):
    """A contestant that gives every client the adapter of another."""

    def round(self) -> torch.Tensor:
        return super().round().roll(1, dims=0)


class _WholeBatchMean(PaddedCohort):
    """A contestant that divides all clients' gradients by one number."""

    def _clip(self, stacks: dict[str, torch.Tensor]) -> None:
        for stack in stacks.values():
            assert stack.grad is not None
            stack.grad[0] *= 1e-3
            stack.grad[0] += 1e-6
        super()._clip(stacks)


class _TwiceTheGradient(PeftSequential):
    """A contestant whose gradients are too large, such as those of a sum instead of a mean."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        for parameter in self._parameters:
            parameter.register_hook(lambda gradient: 2 * gradient)


@pytest.mark.parametrize("workload", [LLAMA, GPT2], ids=lambda workload: workload.model)
def test_a_gradient_of_the_wrong_size_is_refused(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    shares = []
    for plain in (False, True):
        task = build(replace(workload.tiny(), plain=plain), "cpu")
        ours_SP, cheat_SP = Ours(task).round(), _TwiceTheGradient(task).round()
        shares.append(float((ours_SP - cheat_SP).norm() / (ours_SP - task.start_SP).norm()))
    assert shares[0] < 0.05, "Adam hardly sees it"
    assert shares[1] > 0.5, "SGD does"
    with pytest.raises(UnequalError, match="cheat trains other adapters"):
        check_adapters("cheat", ours_SP, cheat_SP, task.start_SP)

    def cheats_where_it_is_plain(task: Task, _form: int | None) -> PeftSequential:
        return (PeftSequential if task.training.optimizer == "adamw" else _TwiceTheGradient)(task)

    monkeypatch.setitem(peer._IN_PROCESS, PEFT, cheats_where_it_is_plain)
    with pytest.raises(UnequalError, match="PEFT, sequential trains other adapters than ours"):
        group.gate(workload, [OURS, PEFT], Section("test", "test"), OPTIONS, silent)


def test_mixed_batches_of_every_size_pass_and_the_fastest_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peer.forms(MIXED, 8) == [1, 2, 4, 8]
    assert peer.forms(MIXED, 4) == [1, 2, 4]
    assert peer.forms(PEFT, 8) == [None]
    made: list[int | None] = []

    class Mixed(PeftMixed):
        def __init__(self, task: Task, form: int | None) -> None:
            super().__init__(task, form)
            made.append(form)

        def round(self) -> torch.Tensor:
            time.sleep(0.0 if made[-1] == 2 else 0.5)
            return super().round()

    monkeypatch.setitem(peer._IN_PROCESS, MIXED, Mixed)
    section = group.measure_training("tiny", replace(LLAMA.tiny(), dtype="float32"), [OURS, MIXED], OPTIONS, silent)
    assert made == [1, 2, 4] * 3 + [2], "the gate by Adam and by SGD, the judged rounds, the timed ones"
    assert section.row(MIXED).clients_per_batch == 2
    assert "PEFT, mixed batch: 2 clients in a batch, the fastest of the sizes tried." in render_section(section)


def test_everyone_has_a_process_of_its_own() -> None:
    """Ours is prepared as the command line prepares itself, the others as their users have them."""
    workload = replace(LLAMA.tiny(), dtype="float32", num_clients=2)
    options = replace(OPTIONS, own_processes=True)
    section = group.measure_training("tiny", workload, [OURS, PEFT, KEPT], options, silent)
    ours, peft, kept = section.rows
    assert ours.settings == {"GOMP_SPINCOUNT": "1000", "freed memory": "asked to be kept"}
    assert peft.settings == {"GOMP_SPINCOUNT": "10000", "freed memory": "left to glibc"}
    assert kept.settings == peft.settings | {"freed memory": "asked to be kept"}, "only the allocator differs"
    for row in section.rows:
        assert row.seconds is not None
        assert row.processor_seconds is not None
        assert row.peak_bytes is not None
        assert row.peak_bytes > 100e6, "interpreter and libraries included"
    assert section.facts["gate_difference"] < 5e-6
    assert section.facts["cohort_size"] == 2
    page = render_section(section)
    assert "GOMP_SPINCOUNT 1000, freed memory asked to be kept: `ours`; GOMP_SPINCOUNT 10000" in page
    here = group.measure_training("tiny", workload, [OURS, PEFT], OPTIONS, silent)
    for row in here.rows:
        assert row.final_loss == pytest.approx(section.row(row.contestant).final_loss, abs=1e-6)
        assert row.settings == {}


def test_a_process_that_made_other_weights_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "fingerprint", lambda _task: "others")
    with pytest.raises(UnequalError, match="made another task"):
        group.measure_training("tiny", LLAMA.tiny(), [OURS], replace(OPTIONS, own_processes=True), silent)


def test_a_fingerprint_tells_weights_adapters_and_batches() -> None:
    task = build(LLAMA.tiny(), "cpu")
    found = fingerprint(task)
    assert found == fingerprint(build(LLAMA.tiny(), "cpu"))
    assert found != fingerprint(build(replace(LLAMA.tiny(), batch_size=2), "cpu"))
    assert found != fingerprint(replace(task, start_SP=task.start_SP + 1e-9))
    with torch.no_grad():
        next(task.base.model.parameters()).view(-1)[0] += 1e-6
    assert found != fingerprint(task)


def test_a_process_that_ends_says_its_last_words() -> None:
    worker = own_process()
    with closing(worker), pytest.raises(PeerMissingError, match="ended with status 1: KeyError: 'workload'"):
        worker.ask({"do": "take"})


def own_process(module: str = "benchmarks.peers.own_process") -> Worker:
    return Worker(Path(sys.executable), module, {"contestant": OURS}, 1, prepared=False, spins=True)


def test_a_process_that_is_killed_names_the_signal() -> None:
    worker = own_process()
    with closing(worker):
        assert worker.ready
        assert not worker.ended
        os.kill(worker.process_id, signal.SIGKILL)
        with pytest.raises(PeerMissingError, match="its process was killed by signal 9: it said nothing"):
            worker.ask({"do": "lap"})
        assert worker.ended


def test_a_process_that_is_stuck_is_ended_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = tmp_path / "child"
    (tmp_path / "stuck.py").write_text(
        "import pathlib, subprocess, sys, time\n"
        "one = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(child)!r}).write_text(str(one.pid))\n"
        "print('waiting for a client', file=sys.stderr, flush=True)\n"
        "time.sleep(600)\n",
        encoding="utf-8",
    )
    monkeypatch.setattr("benchmarks.peers.worker._LONGEST_ANSWER_SECONDS", 3.0)
    monkeypatch.setattr("benchmarks.peers.worker.REPOSITORY", tmp_path)
    worker = own_process("stuck")
    with closing(worker), pytest.raises(PeerMissingError, match=r"not answer in 0\.05 minutes: waiting for a client"):
        worker.ask({"do": "lap"})
    assert worker.ended
    with suppress(psutil.NoSuchProcess):
        assert psutil.Process(int(child.read_text())).wait(timeout=10) is None


class _Dies:
    """The process of a contestant that is killed for memory with some numbers of clients in a batch."""

    def __init__(self, task: Task, too_many: int, laps: int = 1000) -> None:
        self.process_id, self.ready, self.ended = os.getpid(), {"settings": {}}, False
        self._task, self._too_many, self._laps = task, too_many, laps
        self.rows_file = Path(tempfile.mkdtemp()) / "rows.npy"
        self.forms: list[int] = []

    def _die(self) -> None:
        self.ended = True
        raise PeerMissingError("its process was killed by signal 9: it said nothing")

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if self.ended:
            self._die()
        self.forms.append(request["form"])
        return {"fingerprint": fingerprint(self._task)}

    def lap(self) -> tuple[Lap, int]:
        self._laps -= 1
        if self.ended or self.forms[-1] >= self._too_many or self._laps < 0:
            self._die()
        np.save(self.rows_file, Ours(self._task).round().numpy())
        return Lap(0.1 * self.forms[-1], 0.1), 1

    def close(self) -> None:
        shutil.rmtree(self.rows_file.parent, ignore_errors=True)


def measured_with(started: list[_Dies], monkeypatch: pytest.MonkeyPatch, **limits: int) -> Section:
    """A section in which only the mixed batch has a process, a new one from `started` after each death."""
    workload = replace(LLAMA.tiny(), dtype="float32")
    task = build(workload, "cpu")

    def start(_self: Processes, _contestant: str) -> _Dies:
        started.append(_Dies(task, **limits))
        return started[-1]

    monkeypatch.setattr(Processes, "_start", start)
    monkeypatch.setattr(group, "start_processes", lambda *_: Processes([MIXED], (), (), 1))
    monkeypatch.setattr(group, "gate", lambda _workload, contestants, *_: contestants)
    return group.measure_training("tiny", workload, [OURS, PEFT, MIXED], OPTIONS, silent)


def test_a_mixed_batch_that_is_killed_at_one_size_is_timed_at_a_smaller_one(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[_Dies] = []
    section = measured_with(started, monkeypatch, too_many=4)
    assert [worker.forms[:3] for worker in started] == [[1, 2, 4], [section.row(MIXED).clients_per_batch]]
    assert section.row(MIXED).seconds is not None
    assert section.row(PEFT).seconds is not None


@pytest.mark.parametrize("limits", [{"too_many": 1}, {"too_many": 9, "laps": 4}])
def test_a_contestant_that_dies_has_a_row_that_says_so(limits: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    section = measured_with([], monkeypatch, **limits)
    assert section.row(MIXED).note == "not measured: its process was killed by signal 9: it said nothing"
    assert section.row(MIXED).seconds is None
    assert section.row(PEFT).seconds is not None
    assert f"over {PEFT}" in section.measures


def test_ours_has_to_get_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "interleave", lambda rounds, **_: {name: Times(missing="it died") for name in rounds})
    with pytest.raises(PeerMissingError, match="ours: it died"):
        group.measure_training("tiny", replace(LLAMA.tiny(), dtype="float32"), [OURS], OPTIONS, silent)


@pytest.mark.parametrize("workload", [LLAMA, GPT2], ids=lambda workload: workload.model)
@pytest.mark.parametrize("make", [PeftSequential, PeftMixed])
def test_peft_shares_the_frozen_weights(make: Callable[[Task], Any], workload: Workload) -> None:
    task = build(workload.tiny(), "cpu")
    before = fingerprint(task)
    frozen = {id(weight) for weight in task.base.model.parameters()}
    contestant = make(task)
    theirs = [weight for name, weight in contestant._model.named_parameters() if "lora_" not in name]
    assert {id(weight) for weight in theirs} == frozen
    contestant.round()
    assert fingerprint(task) == before
    assert not any(weight.requires_grad for weight in task.base.model.parameters())
    assert not any("lora" in name for name, _ in task.base.model.named_modules())


def test_what_the_caller_set_reaches_no_contestant() -> None:
    ours = {"GOMP_SPINCOUNT": "7", "MALLOC_ARENA_MAX": "1", "OMP_WAIT_POLICY": "active", "HOME": "/root"}
    prepared, stock = (environment(ours, 2, "/tmp/x", spins=spins) for spins in (False, True))
    assert stock.pop("GOMP_SPINCOUNT") == "10000"
    assert prepared == stock
    assert prepared["OMP_NUM_THREADS"] == "2"
    assert prepared["HOME"] == "/root"
    assert not prepared.keys() & {"GOMP_SPINCOUNT", "MALLOC_ARENA_MAX", "OMP_WAIT_POLICY"}


def test_a_second_round_warms_up_where_rounds_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    workload, options = replace(LLAMA.tiny(), dtype="float32"), replace(OPTIONS, warm_up=1)
    assert group.measure_training("tiny", workload, [OURS], options, silent).facts["warm_up"] == 2
    monkeypatch.setattr(group, "_LONGEST_WARM_UP_SECONDS", 0.0)
    assert group.measure_training("tiny", workload, [OURS], options, silent).facts["warm_up"] == 1


@pytest.mark.parametrize("cheat", [_OneStepShort, _OtherClients, _WholeBatchMean])
def test_a_contestant_that_does_other_work_is_refused(cheat: type) -> None:
    task = build(LLAMA.tiny(), "cpu")
    ours_SP = Ours(task).round()
    with pytest.raises(UnequalError, match="cheat trains other adapters"):
        check_adapters("cheat", ours_SP, cheat(task).round(), task.start_SP)


def test_a_gate_that_compares_nothing_is_refused() -> None:
    task = build(LLAMA.tiny(), "cpu")
    with pytest.raises(UnequalError, match="compares nothing"):
        check_adapters("idle", task.start_SP, task.start_SP, task.start_SP)
    nan_SP = torch.full_like(task.start_SP, torch.nan)
    with pytest.raises(UnequalError):
        check_adapters("broken", Ours(task).round(), nan_SP, task.start_SP)


def test_final_losses_must_agree() -> None:
    task = build(replace(LLAMA.tiny(), dtype="float32"), "cpu")
    start, trained = final_loss(task, task.start_SP), final_loss(task, Ours(task).round())
    assert trained < start
    check_loss("same", trained, trained + 5e-4, torch.float32)
    with pytest.raises(UnequalError, match="ends at a loss of"):
        check_loss("other", trained, trained + 2e-3, torch.float32)
    with pytest.raises(UnequalError):
        check_loss("broken", trained, float("nan"), torch.float32)


def test_a_contestant_without_its_environment_says_why() -> None:
    tiny = LLAMA.tiny()
    with pytest.raises(PeerMissingError, match="no environment in tests"):
        make_peer(FLOWER, build(tiny, "cpu"), tiny, OPTIONS)


@pytest.mark.parametrize("as_on_a_gpu", [False, True])
def test_all_run_in_bfloat16(as_on_a_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if as_on_a_gpu:
        monkeypatch.setattr("fedmira.model.families.state_dtype", lambda weight: weight.dtype)
    workload = replace(GPT2.tiny(), dtype="bfloat16")
    section = group.measure_training("tiny", workload, [OURS, ONE_CLIENT, PEFT, MIXED], OPTIONS, silent)
    assert all(row.seconds is not None for row in section.rows)


def test_a_batch_that_does_not_fit_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.peers.peer.available_bytes", lambda _device: 10_000)
    tiny = LLAMA.tiny()
    task = build(tiny, "cpu")
    for contestant in (MIXED, PADDED):
        with pytest.raises(PeerMissingError, match="full logits need some"):
            make_peer(contestant, task, tiny, OPTIONS)
    make_peer(PEFT, task, tiny, OPTIONS)


def test_a_section_holds_times_ratios_losses_and_memory() -> None:
    workload = replace(LLAMA.tiny(), dtype="float32")
    section = group.measure_training("tiny", workload, [OURS, PEFT, FLOWER], OPTIONS, silent)
    assert [row.contestant for row in section.rows] == [OURS, PEFT, FLOWER]
    ours, peft, flower = section.rows
    assert not ours.settings
    assert ours.seconds is not None
    assert peft.seconds is not None
    assert section.measures[f"over {PEFT}"] == pytest.approx(peft.seconds / ours.seconds)
    assert ours.final_loss == pytest.approx(peft.final_loss, abs=1e-3)
    assert peft.peak_bytes is not None
    assert flower.seconds is None
    assert section.measures["over floor"] > 1
    assert section.facts["cohort_size"] == workload.num_clients
    tokens = sum(
        len(example.tokens) for steps in build(workload, "cpu").steps_of_clients for b in steps for example in b
    )
    assert section.facts["tokens"] == tokens
    assert section.facts["padding_all_clients"] >= section.facts["padding_own_batch"] >= 1
