"""Every contestant trains the same adapters as ours, and one that does not is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from benchmarks.gate import UnequalError, check_adapters, check_loss, final_loss
from benchmarks.groups import training as group
from benchmarks.options import Options
from benchmarks.peers.ours import Ours
from benchmarks.peers.padded_cohort import PaddedCohort
from benchmarks.peers.peer import FLOWER, MIXED, ONE_CLIENT, OURS, PADDED, PEFT, PeerMissingError, make_peer, runs_here
from benchmarks.peers.peft_sequential import PeftSequential
from benchmarks.results import Section
from benchmarks.workloads import Task, Workload, build

LLAMA = Workload("llama-15m", "dolly", 3, 8, ("q_proj", "v_proj"))
GPT2 = Workload("gpt2-124m", "natural_instructions", 2, 8, ("c_attn", "c_proj"))
EMBEDDED = Workload("embedded", "dolly", 1, 8, "all-linear")
OPTIONS = Options("cpu", threads=1, warm_up=0, repeats=2, peers_python=None, peers_note="no environment in tests")


def silent(_text: str) -> None:
    pass


@pytest.mark.parametrize("workload", [LLAMA, GPT2, EMBEDDED], ids=lambda workload: workload.model)
def test_all_contestants_of_this_process_pass_the_gate(workload: Workload) -> None:
    section = Section("test", "test")
    contestants = [OURS, ONE_CLIENT, PEFT, MIXED, PADDED, FLOWER]
    assert all(runs_here(contestant) for contestant in contestants[:-1])
    assert group.gate(workload, contestants, section, OPTIONS, silent) == contestants[:-1]
    assert section.row(FLOWER).note == "not measured: no environment in tests"
    assert 0 < section.facts["gate_difference"] < 5e-6


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
