"""The list of sections and targets, the page that shows them, and the command."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import weakref
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.client_memory import measure_client_memory
from benchmarks.environment import REQUIREMENTS
from benchmarks.gate import UnequalError
from benchmarks.groups import generation
from benchmarks.groups.disk_mixing import OVER_COPY, measure_disk_mixing, step_matrix
from benchmarks.groups.generation import (
    Agreement,
    Generation,
    NumberTokenizer,
    OursTogether,
    PeftOneByOne,
    agreement,
    check_agreement,
    measure_generation,
)
from benchmarks.groups.memory import OVER_FLOOR, measure_memory
from benchmarks.groups.mixing import (
    SHARE_IN_TASKS,
    SHARE_OF_COPY,
    SHARE_SCATTERED,
    TAU,
    measure_mixing_in_memory,
    neighbour_graph,
    task_graph,
)
from benchmarks.options import Options
from benchmarks.peers.own_process import Seat
from benchmarks.peers.peer import OURS, PEFT
from benchmarks.results import Results, Row, Section, read_results, write_results
from benchmarks.suite import MORE, SUITES, TARGETS, Target, Training, judge
from benchmarks.table import DOCS_PAGE, PAGE, RESULTS, found_in, render, render_section, with_targets, write_pages
from benchmarks.workloads import Task, Workload, build, fingerprint
from peft.tuners.tuners_utils import BaseTunerLayer

from benchmarks import imports, run, table
from fedmira.config.training import TrainingConfig
from fedmira.federation.graph import Graph, connected_components, laplacian

REPOSITORY = Path(__file__).resolve().parents[2]
OPTIONS = Options("cpu", threads=1, warm_up=0, repeats=2)
MACHINE = {"device": "a machine", "threads": 2, "torch": "2", "copy_bytes_per_second": 1e9}


def silent(_text: str) -> None:
    pass


def results_with(name: str, **measures: float) -> Results:
    row = Row(OURS, seconds=2.0, lower=1.5, upper=2.5, peak_bytes=2**20, final_loss=3.25)
    section = Section(name, "A title", [row], measures, {"tokens": 1000, "supervised_tokens": 250})
    return Results(MACHINE, [section])


def test_every_target_names_a_section_and_a_contestant_of_its_suite() -> None:
    for target in TARGETS:
        measurement = SUITES[target.device][target.section]
        contestant = target.measure.removeprefix("over ")
        if isinstance(measurement, Training) and target.measure.startswith("over "):
            assert contestant in measurement.contestants, target


def test_every_training_section_has_ours_first() -> None:
    trainings = [one for suite in SUITES.values() for one in suite.values() if isinstance(one, Training)]
    assert all(one.contestants[0] == OURS for one in trainings)
    assert {one.workload.num_clients for one in trainings} == {8, 22, 32, 80}


def test_a_gpu_run_that_is_cut_off_has_measured_what_carries_targets() -> None:
    carrying = {target.section for target in TARGETS if target.device == "cuda"}
    assert set(list(SUITES["cuda"])[: len(carrying)]) == carrying


def test_targets_are_met_missed_or_not_measured() -> None:
    found = {"cpu-fast": results_with("train-15m", **{f"over {PEFT}": 4.5, "over PEFT, mixed batch": 2.4})}
    verdicts = {(one.target.section, one.target.measure, one.target.device): one.word for one in judge(found)}
    assert {(one.target.device, one.machine) for one in judge(found)} == {("cpu", "cpu-fast"), ("cuda", "cuda")}
    assert verdicts["train-15m", f"over {PEFT}", "cpu"] == "met"
    assert verdicts["train-15m", "over PEFT, mixed batch", "cpu"] == "missed"
    assert verdicts["train-15m", "over Flower simulation", "cpu"] == "not measured"
    assert verdicts["train-1.3b", f"over {PEFT}", "cuda"] == "not measured"
    memory = Target("cpu", "memory", "m", "bytes", 1.1, at_least=False)
    assert memory.reached(1.05)
    assert not memory.reached(1.2)


def test_the_page_shows_targets_and_rows(tmp_path: Path) -> None:
    results = results_with("train-15m", **{f"over {PEFT}": 4.5})
    results.sections[0].rows.append(Row(PEFT, note="not measured: out of memory"))
    write_results(tmp_path / "cpu-fast.json", results)
    assert read_results(tmp_path / "cpu-fast.json") == results
    slow = results_with("train-15m", **{f"over {PEFT}": 3.5})
    write_results(tmp_path / "cpu-slow.json", slow)
    write_pages(tmp_path)
    page = (tmp_path / PAGE).read_text(encoding="utf-8")
    assert page == render({"cpu-fast": results, "cpu-slow": slow})
    assert "| target | bound | cpu-fast | cpu-slow | cuda |" in page
    assert "| 15M shape, batch 4, over stock PEFT | at least 4 | 4.50 met | 3.50 missed |  |" in page
    results.sections[0].commit = slow.sections[0].commit = "abc1234"
    slow.sections[0].date = "2026-12-01"
    page = render({"cpu-fast": results, "cpu-slow": slow})
    assert "| 4.50 met, abc1234 | 3.50 missed, abc1234 of 2026-12-01 |  |" in page
    assert "| ours | 2.000 | 1.500 - 2.500 | 1.00 | 500 | 125 | 1 | 3.2500 |" in page
    assert "| PEFT, sequential | not measured: out of memory |" in page


def test_notes_tell_the_size_of_cohorts_and_what_was_measured(tmp_path: Path) -> None:
    results = results_with("train-15m")
    page = render_section(results.sections[0])
    assert "at a time" not in page
    assert "Measured at" not in page
    results.sections[0].facts["cohort_size"] = 4
    results.sections[0].commit = "abc1234"
    write_results(tmp_path / "cpu.json", results)
    assert read_results(tmp_path / "cpu.json") == results
    results.sections[0].date = "2026-12-01"
    page = render_section(results.sections[0])
    assert page.endswith(
        "Ours trains 4 clients at a time. All in one process; `peak MiB` is what a round adds, on a GPU in bytes that "
        "torch's allocator gave out. Measured at abc1234 of 2026-12-01."
    )
    older = json.loads((tmp_path / "cpu.json").read_text(encoding="utf-8"))
    for unknown in ("commit", "date"):
        del older["sections"][0][unknown]
    for unknown in ("settings", "clients_per_batch"):
        del older["sections"][0]["rows"][0][unknown]
    (tmp_path / "cpu.json").write_text(json.dumps(older), encoding="utf-8")
    section = read_results(tmp_path / "cpu.json").sections[0]
    assert (section.commit, section.date) == ("", "")


def test_the_commit_is_empty_where_git_does_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "__file__", str(tmp_path / "benchmarks" / "run.py"))
    assert run.sources_commit() == ""


def test_the_pages_show_the_committed_results() -> None:
    """If this fails: python -m benchmarks.table."""
    found = found_in(RESULTS)
    assert found, "no results are committed"
    assert (RESULTS / PAGE).read_text(encoding="utf-8") == render(found)
    page = DOCS_PAGE.read_text(encoding="utf-8")
    assert page == with_targets(page, found)
    assert " met, " in page


@pytest.mark.parametrize("target", ["bench", "bench-more", "bench-gpu", "bench-gpu-more"])
def test_one_command_measures_each_list(target: str) -> None:
    """What issue 3 names is in one of the four lists, each with a command of its own."""
    make = shutil.which("make")
    if make is None:
        pytest.skip("no make here")
    printed = subprocess.run(
        [make, "--dry-run", target], cwd=REPOSITORY, check=True, capture_output=True, text=True
    ).stdout
    [command] = [line for line in printed.splitlines() if "benchmarks.run" in line]
    arguments = run._parser().parse_args(command.split("benchmarks.run ")[1].split())
    assert arguments.out == Path("benchmarks/results")
    kind = "cuda" if "gpu" in target else "cpu"
    assert arguments.device == kind
    chosen = run.choose(kind, arguments.only, more=arguments.more)
    assert chosen == (MORE if target.endswith("-more") else SUITES)[kind]
    assert "GOMP_SPINCOUNT" in command


def test_the_rows_that_the_issue_names_are_in_the_lists() -> None:
    assert {"train-15m-batch-8", "train-gpt2-batch-1", "train-gpt2-batch-8"} <= MORE["cpu"].keys()
    assert "generate-embedded-80" in MORE["cpu"]
    assert {"train-1.3b-32", "generate-gpt2-80"} <= MORE["cuda"].keys()
    with pytest.raises(SystemExit):
        run.main(["--more", "--only", "mix-memory"])


def test_an_unknown_section_is_refused() -> None:
    with pytest.raises(SystemExit, match="no such section"):
        run.main(["--only", "train-nothing"])


def test_what_fails_in_one_section_takes_nothing_from_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = {
        "train-1.3b": torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB"),
        "train-gpt2-large": UnequalError("answers differ"),
    }
    emptied = []

    def measure(name: str, *_: object) -> Section:
        if name in failures:
            raise failures[name]
        return Section(name, "A title")

    monkeypatch.setattr(run, "measure", measure)
    monkeypatch.setattr(run, "describe_machine", lambda _device: MACHINE)
    monkeypatch.setattr(run, "sources_commit", lambda: "abc1234")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    arguments = ["--device", "cuda", "--threads", "1", "--out", str(tmp_path), "--only"]
    assert run.main([*arguments, "train-gpt2-large", "train-1.3b", "mix-memory"]) == 1
    titles = {section.name: section.title for section in read_results(tmp_path / "cuda-a-machine.json").sections}
    assert titles == {
        "train-gpt2-large": "Refused: answers differ",
        "train-1.3b": "Failed: torch.OutOfMemoryError: CUDA out of memory.",
        "mix-memory": "A title",
    }
    assert len(emptied) == 2
    monkeypatch.setattr(run, "sources_commit", lambda: "def5678")
    assert run.main([*arguments, "mix-memory"]) == 0
    commits = {section.name: section.commit for section in read_results(tmp_path / "cuda-a-machine.json").sections}
    assert commits == {"train-gpt2-large": "abc1234", "train-1.3b": "abc1234", "mix-memory": "def5678"}

    def cut_off(name: str, *_: object) -> Section:
        if name == "mix-memory":
            raise KeyboardInterrupt
        return Section(name, "Measured anew")

    monkeypatch.setattr(run, "measure", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run.main([*arguments, "train-gpt2-large", "mix-memory"])
    titles = {section.name: section.title for section in read_results(tmp_path / "cuda-a-machine.json").sections}
    assert titles["train-gpt2-large"] == "Measured anew"
    assert titles["mix-memory"] == "A title", "what was there stands until it is measured again"


def test_a_run_into_the_committed_results_brings_the_docs_up_to_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "performance.md"
    page.write_text(f"before {table.BEGIN} old {table.END} after", encoding="utf-8")
    monkeypatch.setattr(table, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(table, "DOCS_PAGE", page)
    monkeypatch.setattr(run, "measure", lambda name, *_: Section(name, "A title", measures={OVER_FLOOR: 1.05}))
    monkeypatch.setattr(run, "describe_machine", lambda _device: MACHINE)
    arguments = ["--threads", "1", "--only", "client-memory", "--out"]
    assert run.main([*arguments, str(tmp_path / "elsewhere")]) == 0
    assert " old " in page.read_text(encoding="utf-8")
    assert run.main([*arguments, str(tmp_path / "results")]) == 0
    assert f"| 1.05 met, {run.sources_commit()} of {date.today().isoformat()} |" in page.read_text(encoding="utf-8")
    assert found_in(tmp_path / "results")["cpu-a-machine"].sections[0].name == "client-memory"


def test_a_package_that_is_missing_or_of_another_python_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imports.main()
    (tmp_path / "package_of_another_python.py").write_text("from . import _compiled\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit, match=r"no_such_package .*of_another_python .*make bench-gpu-packages"):
        imports.main(["torch", "no_such_package", "package_of_another_python"])


def test_generation_compares_answers_and_counts_tokens() -> None:
    workload = Workload("llama-tiny", "dolly", 1, 4, ("q_proj",), num_clients=3, shrink=8)
    section = measure_generation("tiny", Generation(workload, 2, new_tokens=5), OPTIONS, silent)
    assert section.facts["new_tokens"] == 3 * 2 * 5
    assert section.facts["equal_answers"] == 1.0
    assert section.measures[f"over {PEFT}"] > 0
    assert section.measures["over floor"] > 0
    assert "times the floor" in render_section(section)


def test_generation_in_processes_of_their_own() -> None:
    workload = Workload("llama-tiny", "dolly", 1, 4, ("q_proj",), num_clients=2, shrink=8)
    options = replace(OPTIONS, own_processes=True)
    section = measure_generation("tiny", Generation(workload, 2, new_tokens=5), options, silent)
    assert section.facts["equal_answers"] == 1.0
    assert section.row(OURS).settings == {"GOMP_SPINCOUNT": "1000", "freed memory": "asked to be kept"}
    assert section.row(PEFT).settings == {"GOMP_SPINCOUNT": "10000", "freed memory": "left to glibc"}
    assert all(row.peak_bytes and row.peak_bytes > 100e6 for row in section.rows)


def test_a_process_that_merges_adapters_holds_the_weights_once() -> None:
    workload = Workload("llama-tiny", "dolly", 1, 4, ("q_proj",), num_clients=2, shrink=8)
    request = {"workload": asdict(workload), "answers": {"prompts_per_client": 1, "new_tokens": 2}}
    seat = Seat(PEFT)
    made: list[weakref.ref[Any]] = []

    def spy(task: Task) -> Task:
        made.append(weakref.ref(task.base.model))
        return generation_without_end(task)

    generation_without_end = generation.without_end
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "without_end", spy)
        taken = seat.take(request)
    gc.collect()
    assert taken["fingerprint"] == fingerprint(build(workload, "cpu"))
    assert [one() for one in made] == [None], "what was merged into is a copy; the original is let go"
    assert len(seat.call()) == 2


@pytest.mark.parametrize("apart", [False, True])
def test_peft_merges_each_adapter_while_its_client_answers(apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    workload = Workload("llama-tiny", "dolly", 1, 4, ("q_proj",), num_clients=2, shrink=8, dtype="float64")
    task = generation.without_end(build(workload, "cpu"))
    peer = PeftOneByOne(task, generation._prompts(task, 2), 3, apart=apart)
    generate, seen = peer._model.generate, []

    def spy(**arguments: Any) -> torch.Tensor:
        seen.append([module.merged for module in peer._model.modules() if isinstance(module, BaseTunerLayer)])
        return generate(**arguments)

    before = fingerprint(task)
    shared = {weight.data_ptr() for weight in task.base.model.parameters()}
    assert any(weight.data_ptr() in shared for weight in peer._model.parameters()) == apart
    monkeypatch.setattr(peer._model, "generate", spy)
    answers = peer.answer()
    assert fingerprint(task) == before
    assert [set(layers) for layers in seen] == [{not apart}] * 2
    assert peer.answer() == answers == OursTogether(task, generation._prompts(task, 2), 3).answer()


def test_answers_are_compared_one_by_one() -> None:
    found = agreement([["1 2 3"], ["4 5 6", "7 8 9"]], [["1 2 3"], ["4 0 6", "0 8 9"]])
    assert found == pytest.approx((1 / 3, 2 / 3, 4 / 3))
    assert NumberTokenizer().decode([3, 14]) == "3 14"


def test_in_16_bits_a_turned_near_tie_is_no_other_answer() -> None:
    turned = Agreement(equal=0.2, equal_first=0.95, equal_tokens=40.0)
    check_agreement(turned, torch.bfloat16)
    with pytest.raises(UnequalError, match=r"only 20% of the answers equal PEFT's in float32; 95% must"):
        check_agreement(turned, torch.float32)
    with pytest.raises(UnequalError, match=r"only 80% of the answers begin with PEFT's token in bfloat16; 90% must"):
        check_agreement(turned._replace(equal_first=0.8), torch.bfloat16)


def test_generation_in_16_bits_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmira.model.families.state_dtype", lambda weight: weight.dtype)
    workload = Workload("gpt2-tiny", "dolly", 1, 4, ("c_attn",), num_clients=3, shrink=8, dtype="bfloat16")
    section = measure_generation("tiny", Generation(workload, 2, new_tokens=5), OPTIONS, silent)
    assert section.facts["equal_first_tokens"] >= 0.9
    assert section.facts["equal_tokens_per_answer"] <= 5
    section.facts["equal_answers"] = 0.5
    assert "of the first tokens are; answers agree for" in render_section(section)


def test_mixing_in_memory_is_checked_and_compared_with_a_copy() -> None:
    section = measure_mixing_in_memory("tiny", 40, 2000, OPTIONS, silent)
    assert section.facts["bytes"] == 2 * 40 * 2000 * 4
    assert min(section.measures[share] for share in (SHARE_OF_COPY, SHARE_IN_TASKS, SHARE_SCATTERED)) > 0


@pytest.mark.parametrize(
    "make", [neighbour_graph, partial(task_graph, in_order=True), partial(task_graph, in_order=False)]
)
def test_every_client_mixes_with_ten(make: Callable[[int], Graph]) -> None:
    assert {len(row.nonzero()[0]) for row in make(44).adjacency_KK} == {10}


def test_tasks_lie_in_order_or_anywhere() -> None:
    ordered, scattered = (connected_components(task_graph(44, in_order=order)) for order in (True, False))
    assert ordered == tuple(tuple(range(start, start + 11)) for start in range(0, 44, 11))
    assert [len(task) for task in scattered] == [11] * 4
    assert scattered != ordered


def test_neighbours_lie_anywhere() -> None:
    """The neighbours of one client are not those of the client before, shifted by one."""
    matrix = step_matrix(400)
    columns = matrix.columns_E.view(400, 11).long()
    streams = [torch.unique((columns[:, place] - torch.arange(400)) % 400) for place in range(11)]
    assert min(map(len, streams)) > 50
    assert matrix.columns_E.dtype == matrix.starts.dtype == torch.int32, "as `sparse` makes them"


def test_memory_of_one_more_client_is_at_least_its_tensors() -> None:
    section = measure_memory("memory", OPTIONS, silent)
    assert 0.9 < section.measures[OVER_FLOOR] < 4


def test_memory_of_one_more_client_on_a_gpu_counts_the_narrow_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two bytes a parameter more over a base in 16 bits, which is what workloads on a GPU have."""
    training = TrainingConfig(local_steps=2, batch_size=1)
    wide = measure_client_memory("cpu", training).bytes_per_client
    monkeypatch.setattr("fedmira.model.families.state_dtype", lambda weight: weight.dtype)
    found = measure_client_memory("cpu", training, dtype=torch.bfloat16)
    assert (found.bytes_per_client - wide) / found.parameters == pytest.approx(2.0, abs=0.3)


def test_mixing_on_disk_is_checked_and_compared_with_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    section = measure_disk_mixing("tiny", 700, 300, OPTIONS, silent)
    assert section.facts["bytes"] == pytest.approx(700 * 300 * 2, rel=0.05)
    assert section.measures[OVER_COPY] > 0
    assert list((tmp_path / "runs").iterdir()) == [], "nothing is left behind"


def test_the_step_on_disk_is_the_step_in_memory() -> None:
    matrix = step_matrix(40)
    dense = torch.zeros(40, 40, dtype=torch.float64)
    for row in range(40):
        entries = slice(int(matrix.starts[row]), int(matrix.starts[row + 1]))
        dense[row, matrix.columns_E[entries]] += matrix.weights_E[entries]
    expected = np.eye(40) - TAU * laplacian(neighbour_graph(40))
    np.testing.assert_allclose(dense.numpy(), expected, atol=1e-12)


def test_the_peers_requirements_agree_with_the_pinned_versions() -> None:
    pinned = dict(
        line.lower().split("==") for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if "==" in line
    )
    wanted = dict(line.lower().split("==") for line in REQUIREMENTS.read_text().splitlines() if "==" in line)
    shared = wanted.keys() & pinned.keys()
    assert {"peft", "transformers", "numpy"} <= shared
    assert {name: wanted[name] for name in shared} == {name: pinned[name] for name in shared}
    assert not wanted.keys() & {"torch", "fedmira"}


def test_workloads_survive_the_way_to_a_worker() -> None:
    from benchmarks.peers.serving import read_workload

    workload = replace(Workload("llama-tiny", "dolly", 1, 4, ("q_proj",)), shrink=3)
    assert read_workload(json.loads(json.dumps(asdict(workload)))) == workload
