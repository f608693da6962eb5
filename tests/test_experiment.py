"""The round loop: who starts from what, who is judged by what, what is counted, and what happens when clients fail.

Tiny runs over the embedded base: 2 families of 2 clients, 2 or 3 rounds of 2 steps, judged by validation and test loss.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fedmira import experiment
from fedmira.assembly import Assembly, assemble
from fedmira.config.file import config_hash
from fedmira.config.run import RunConfig
from fedmira.data.tokenization import TokenizedClient
from fedmira.errors import DivergedError, IntegrityError, Interrupted, UsageError
from fedmira.evaluation.judge import final_records, validation_losses
from fedmira.exchange.in_process import InProcess
from fedmira.experiment import run
from fedmira.export.clients import load_trained
from fedmira.report.reading import read_run
from fedmira.report.words import headline
from fedmira.runs.checkpoint import FOLDER, TENSORS, load_latest
from fedmira.runs.signals import StopFlag
from fedmira.runs.store import RunStore
from fedmira.types import Arena, Job, Losses, Results, Trial

METHODS: dict[str, dict[str, Any]] = {
    "local_only": {"name": "local_only"},
    "fedit": {"name": "fedit"},
    "mira_published": {"name": "mira_published", "graph": {"kind": "true"}, "strength": 0.3, "server_lr": 1.0},
    "mira": {"name": "mira", "graph": {"kind": "true"}},
}
CLIENTS = ("family-0-client-0", "family-0-client-1", "family-1-client-0", "family-1-client-1")


def tiny(method: str | Mapping[str, Any] = "mira", **sections: Any) -> RunConfig:
    """A run of half a second; `sections` replace whole sections of its config."""
    return RunConfig.model_validate(
        {
            "name": "tiny",
            "data": {"source": "planted", "families": 2, "clients_per_family": 2, "examples": 12},
            "model": {"adapter": {"rank": 2, "targets": ["q_proj", "down_proj"]}, "dtype": "float32", "device": "cpu"},
            "training": {"local_steps": 2, "batch_size": 2, "learning_rate": 0.01, "cohort_size": 4},
            "federation": {"rounds": 2},
            "method": METHODS[method] if isinstance(method, str) else method,
            "evaluation": {"generation": {"max_new_tokens": 3, "examples_per_client": 1}},
            **sections,
        }
    )


class Crossing:
    """What crossed the seam: every job and its results, in order."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.results: list[Results] = []


@pytest.fixture
def crossing(monkeypatch: pytest.MonkeyPatch) -> Crossing:
    seen, original = Crossing(), InProcess.run

    def spy(self: InProcess, job: Job, **arguments: Any) -> Results:
        results = original(self, job, **arguments)
        seen.jobs.append(job._replace(start_SP=job.start_SP.clone()))
        seen.results.append(results._replace(values_SP=results.values_SP.clone()))
        return results

    monkeypatch.setattr(InProcess, "run", spy)
    return seen


def events(path: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in RunStore.open(path).events() if event["event"] == kind]


def sha256(row: torch.Tensor) -> str:
    return hashlib.sha256(row.contiguous().numpy().tobytes()).hexdigest()


def per_token(event: Mapping[str, Any]) -> dict[str, float]:
    return {name: client["loss_sum"] / client["tokens"] for name, client in event["clients"].items()}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------------ own adapters


def personalised_adapters(path: Path) -> tuple[Arena, Assembly]:
    """What the clients of the run in `path` get to keep, and the parts of the run."""
    trained = load_trained(path)
    return trained.adapters, assemble(trained.config)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Arena, Assembly]:
    path = run(tiny(), directory=tmp_path_factory.mktemp("runs"))
    return path, *personalised_adapters(path)


def row_alone(arena: Arena, k: int) -> Arena:
    return arena.replace(arena.values_KP[k : k + 1])


def test_recorded_losses_are_those_of_each_row_alone(finished: tuple[Path, Arena, Assembly]) -> None:
    """Judging one client with nothing but its own row of the checkpoint gives the number in metrics.jsonl."""
    path, arena, parts = finished
    [final], last = events(path, "final"), events(path, "evaluation")[-1]
    assert len({sha256(row) for row in arena.values_KP}) == 4, "all adapters differ, so a mix-up would show"
    for k, name in enumerate(CLIENTS):
        alone = row_alone(arena, k), [parts.tokenized[k]], parts.config.evaluation
        [record] = final_records(parts.base, *alone)
        assert final["clients"][name]["tokens"] == record.tokens > 0
        assert final["clients"][name]["loss_sum"] == pytest.approx(record.loss_sum, rel=1e-5)
        assert final["clients"][name]["rouge_l_sum"] == record.rouge_l_sum
        [(loss_sum, tokens)] = validation_losses(parts.base, *alone)
        assert last["clients"][name]["tokens"] == tokens
        assert last["clients"][name]["loss_sum"] == pytest.approx(loss_sum, rel=1e-5)


def test_swapping_two_rows_changes_the_losses_of_these_two_alone(finished: tuple[Path, Arena, Assembly]) -> None:
    _, arena, parts = finished
    swapped = arena.replace(arena.values_KP[[2, 1, 0, 3]])
    before = validation_losses(parts.base, arena, parts.tokenized, parts.config.evaluation)
    after = validation_losses(parts.base, swapped, parts.tokenized, parts.config.evaluation)
    changed = [abs(b - a) > 1e-4 * b for (b, _), (a, _) in zip(before, after, strict=True)]
    assert changed == [True, False, True, False]


def test_a_returning_client_starts_from_exactly_the_mixed_adapter(tmp_path: Path, crossing: Crossing) -> None:
    """Half of the clients take part; whoever does starts from the bytes of its row in the checkpoint before."""
    config = tiny(
        federation={"rounds": 4, "participation": 0.5}, output={"keep_checkpoints": 9}, evaluation={"test": False}
    )
    path = run(config, directory=tmp_path)
    stored = {
        round_: load_file(path / FOLDER / f"round-{round_:05d}" / TENSORS)["state.adapters"] for round_ in (1, 2, 3)
    }
    returned, moved = set(crossing.jobs[0].ids), 0
    for job in crossing.jobs[1:]:
        before = stored[job.round - 1]
        assert [sha256(row) for row in job.start_SP] == [sha256(before[k]) for k in job.ids]
        for row, k in zip(job.start_SP, job.ids, strict=True):
            sent = [
                results.values_SP[results.ids.index(k)]
                for results in crossing.results[: job.round - 1]
                if k in results.ids
            ]
            if sent:
                moved += sha256(sent[-1]) != sha256(row)
        returned |= set(job.ids)
    assert len(returned) > 2, "somebody new came, somebody stayed away"
    assert moved > 0, "what a client starts from is mixed, not what it sent"


def test_a_run_without_test_judges_no_test(tmp_path: Path) -> None:
    path = run(tiny(evaluation={"test": False}), directory=tmp_path)
    assert events(path, "final") == []


# ------------------------------------------------------------------------------------------------------------ pairing


def same_everywhere(parts: Assembly) -> tuple[Any, ...]:
    tokens = [[example.tokens.tolist() for example in client.train + client.test] for client in parts.tokenized]
    return parts.clients.names, tokens, sha256(parts.initial_adapters().values_KP)


def test_methods_of_one_seed_meet_the_same_clients_adapters_and_batches(tmp_path: Path, crossing: Crossing) -> None:
    """Round 1 of local_only, mira_published and mira is the same computation; another seed's is not."""
    draws = {}
    for method, seed in [("local_only", 0), ("mira_published", 0), ("mira", 0), ("local_only", 1)]:
        config = tiny(method, seed=seed, federation={"rounds": 1}, evaluation={"test": False})
        run(config, directory=tmp_path)
        trained = [sha256(row) for row in crossing.results[-1].values_SP]
        draws[method, seed] = (*same_everywhere(assemble(config)), crossing.jobs[-1].ids, trained)
    assert draws["local_only", 0] == draws["mira_published", 0] == draws["mira", 0]
    for one, other in zip(draws["local_only", 0][1:3], draws["local_only", 1][1:3], strict=True):
        assert one != other
    assert draws["local_only", 0][-1] != draws["local_only", 1][-1]


def test_fedit_has_the_same_clients_and_batches_but_one_start(tmp_path: Path, crossing: Crossing) -> None:
    config = tiny("fedit", federation={"rounds": 1}, evaluation={"test": False})
    run(config, directory=tmp_path)
    assert same_everywhere(assemble(config)) == same_everywhere(assemble(tiny("local_only")))
    assert len({sha256(row) for row in crossing.jobs[0].start_SP}) == 1
    [results] = crossing.results
    run(tiny("local_only", federation={"rounds": 1}, evaluation={"test": False}), directory=tmp_path)
    # client 0 starts where it always starts, and draws the same batches
    assert torch.equal(results.values_SP[0], crossing.results[-1].values_SP[0])
    assert [report.num_tokens for report in results.reports] == [
        report.num_tokens for report in crossing.results[-1].reports
    ]


@pytest.mark.parametrize("graph", ["true", "gram"])
def test_strength_zero_is_local_only_bit_for_bit_through_the_whole_run(tmp_path: Path, graph: str) -> None:
    federation = {"rounds": 3, "participation": 0.75}
    outcomes = []
    for method in ("local_only", {"name": "mira", "strength": 0.0, "ema_decay": 0.0, "graph": {"kind": graph}}):
        path = run(tiny(method, federation=federation), directory=tmp_path)
        arena, _ = personalised_adapters(path)
        judged = [{**event, "timing": None} for event in events(path, "evaluation") + events(path, "final")]
        outcomes.append((sha256(arena.values_KP), judged))
    assert outcomes[0] == outcomes[1]


def test_another_strength_is_not_local_only(tmp_path: Path) -> None:
    everything = {**METHODS["mira"], "choice": {"enabled": False}}
    losses = [per_token(events(run(tiny(m), directory=tmp_path), "final")[0]) for m in ("local_only", everything)]
    assert all(losses[0][name] != losses[1][name] for name in CLIENTS)


# -------------------------------------------------------------------------------------------------------------- bytes


def asked(method: str, crossing: Crossing, round_: int) -> tuple[int, int]:
    """How many clients of `mira` are asked, and numbers that each answers: those that returned the losses of two shares
    of their mixture and how sure it is which is better, after the last round all that ever did, and the same about the
    average over rounds."""
    if method != "mira":
        return 0, 0
    last = round_ == len(crossing.results)
    ids = {id_ for results in crossing.results[0 if last else round_ - 1 : round_] for id_ in results.ids}
    return len(ids), 6 if last else 3


@pytest.mark.parametrize("method", METHODS)
def test_the_bytes_recorded_are_those_that_crossed(tmp_path: Path, crossing: Crossing, method: str) -> None:
    config = tiny(method, federation={"rounds": 2, "clients_per_round": 3}, evaluation={"test": False})
    recorded = events(run(config, directory=tmp_path), "round")
    for event, job, results in zip(recorded, crossing.jobs, crossing.results, strict=True):
        sent = 0 if method == "local_only" else results.values_SP.nbytes
        num_asked, num_answers = asked(method, crossing, event["round"])
        assert event["upload_bytes"] == sent + 4 * num_asked * num_answers
        # by its next turn a client of `mira` starts from another mixture than the one that it judges; in the last round
        # one that was away does not hold what is averaged
        judged = num_asked * job.start_SP[0].nbytes
        assert event["download_bytes"] == (0 if method == "local_only" else job.start_SP.nbytes + judged)
        assert len(event["participants"]) == len(job.ids) == 3
        assert event["tokens"] == sum(report.num_tokens for report in results.reports) > 0
        assert event["train_loss_sum"] == sum(report.loss_sum for report in results.reports)


# ----------------------------------------------------------------------------------------------------------- failures


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of clients whose loss is not finite: the engine meets NaN where their adapter should be."""
    names: set[str] = set()
    original = InProcess.run

    def run_poisoned(self: InProcess, job: Job, **arguments: Any) -> Results:
        clients: tuple[TokenizedClient, ...] = tuple(self._clients)
        start_SP = job.start_SP.clone()
        for row, k in enumerate(job.ids):
            if clients[k].name in names:
                start_SP[row] = math.nan
        return original(self, job._replace(start_SP=start_SP), **arguments)

    monkeypatch.setattr(InProcess, "run", run_poisoned)
    return names


class Told(experiment.SilentDisplay):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, line: str) -> None:
        self.messages.append(line)


@pytest.mark.parametrize("method", METHODS)
def test_a_client_that_is_not_finite_is_left_out_named_and_the_run_goes_on(
    tmp_path: Path, poisoned: set[str], crossing: Crossing, method: str
) -> None:
    poisoned.add(CLIENTS[1])
    told = Told()
    path = run(tiny(method), directory=tmp_path, display=told)
    rounds = events(path, "round")
    assert len(rounds) == 2
    for event, results in zip(rounds, crossing.results, strict=True):
        assert [failure["client"] for failure in event["failures"]] == [CLIENTS[1]]
        assert "is not finite" in event["failures"][0]["reason"]
        assert event["participants"] == list(CLIENTS)
        assert results.ids == (0, 2, 3)
        assert math.isfinite(event["train_loss_sum"])
        sent = 0 if method == "local_only" else results.values_SP.nbytes
        num_asked, num_answers = asked(method, crossing, event["round"])
        assert event["upload_bytes"] == sent + 4 * num_asked * num_answers
    assert sum(CLIENTS[1] in line and "left out" in line for line in told.messages) == 2
    assert f"{CLIENTS[1]} was left out" in (path / "run.log").read_text()
    arena, _ = personalised_adapters(path)
    assert torch.isfinite(arena.values_KP).all()
    assert all(math.isfinite(loss) for loss in per_token(events(path, "final")[0]).values())


def test_the_others_are_untouched_by_a_failure(tmp_path: Path, poisoned: set[str]) -> None:
    """Training alone, three clients end where they would with the fourth; only sums inside products are reordered."""
    arenas = []
    for name in ("healthy", "ill"):
        if name == "ill":
            poisoned.add(CLIENTS[1])
        arenas.append(personalised_adapters(run(tiny("local_only"), directory=tmp_path / name))[0].values_KP)
    for k in (0, 2, 3):
        assert torch.allclose(arenas[0][k], arenas[1][k], rtol=1e-4, atol=1e-6)
    initial = assemble(tiny("local_only")).initial_adapters().values_KP
    assert torch.equal(arenas[1][1], initial[1]), "who never returned keeps its initial adapter"


def test_a_run_in_which_all_clients_fail_stops_with_the_reason(tmp_path: Path, poisoned: set[str]) -> None:
    poisoned.update(CLIENTS)
    with pytest.raises(DivergedError, match="round 1: no client returned a result") as raised:
        run(tiny(), directory=tmp_path)
    assert raised.value.exit_code == 1
    assert f"the loss of client {CLIENTS[0]} is not finite in round 1, step 1" in str(raised.value)
    assert "learning_rate" in str(raised.value)
    [path] = tmp_path.iterdir()
    words = headline(read_run(path))
    assert words[0] == "mira, 0 rounds so far; nothing has been evaluated yet."
    assert words[1].startswith(
        "Round 1 left 4 client results out and did not end. The first reason: "
        f"the loss of client {CLIENTS[0]} is not finite in round 1, step 1"
    )


def test_a_run_whose_clients_fail_late_can_go_on_once_they_are_well(
    tmp_path: Path, poisoned: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of the rounds before is lost: the run continues from its checkpoint and ends as if nothing had been."""
    expected, _ = personalised_adapters(run(tiny(), directory=tmp_path / "undisturbed"))
    original = experiment._Run._exchange

    def ill_in_round_2(self: Any, state: Any, participants: Any, progress: Any) -> Results:
        poisoned.update(CLIENTS if participants.round == 2 else ())
        return original(self, state, participants, progress)

    with monkeypatch.context() as patch:
        patch.setattr(experiment._Run, "_exchange", ill_in_round_2)
        with pytest.raises(DivergedError, match="round 2: no client returned"):
            run(tiny(), directory=tmp_path)
    poisoned.clear()
    path = run(tiny(), directory=tmp_path, resume=True)
    assert [event["round"] for event in events(path, "round")] == [1, 2]
    assert torch.equal(personalised_adapters(path)[0].values_KP, expected.values_KP)


# --------------------------------------------------------------------------------------------------- the run directory


def test_the_run_directory_holds_what_architecture_promises(finished: tuple[Path, Arena, Assembly]) -> None:
    path, _, parts = finished
    names = {entry.name for entry in path.iterdir()}
    assert {"config.resolved.yaml", "manifest.json", "metrics.jsonl", "run.log", "checkpoints", "graph.json"} <= names
    manifest = json.loads((path / "manifest.json").read_text())
    assert {"versions", "seed", "data", "clients", "model", "memory", "graph", "created"} <= manifest.keys()
    assert [client["name"] for client in manifest["clients"]] == list(CLIENTS)
    assert manifest["model"]["weights_sha256"]
    graph = json.loads((path / "graph.json").read_text())
    assert graph["names"] == list(CLIENTS)
    assert graph["name"] == "true"
    assert graph["true_adjacency"] == graph["adjacency"] == parts.clients.true_adjacency_KK.tolist()  # type: ignore[union-attr]
    assert not [file for file in path.rglob("*") if file.suffix in {".pkl", ".pt", ".bin", ".pickle"}]


def test_validation_is_recorded_every_so_many_rounds_and_after_the_last(tmp_path: Path) -> None:
    config = tiny(federation={"rounds": 5}, training={"local_steps": 1, "batch_size": 1}, evaluation={"every": 2})
    path = run(config, directory=tmp_path)
    assert [event["round"] for event in events(path, "evaluation")] == [2, 4, 5]


def test_what_clients_take_home_is_never_worse_on_their_validation_examples_than_their_upload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guarantee of docs/papers.md: with neither shrinkage nor an average over rounds."""
    # strangers by force, at a rate that moves far: mixtures that are worse for some
    mixed = {"name": "mira", "graph": {"kind": "uniform"}, "strength": 100, "ema_decay": 0}
    choice = {"shrinkage": False, "memory": 0, "grid": [0, 0.25, 0.5, 0.75, 1]}
    data = {"source": "planted", "families": 2, "clients_per_family": 2, "examples": 40}
    config = tiny(
        {**mixed, "choice": choice},
        data=data,
        training={"local_steps": 8, "batch_size": 4, "learning_rate": 0.01},
        federation={"rounds": 3},
    )
    answers: list[Losses] = []
    original = InProcess.judge

    def spy(self: InProcess, trial: Trial) -> Losses:
        answers.append(original(self, trial))
        return answers[-1]

    monkeypatch.setattr(InProcess, "judge", spy)
    path = run(config, directory=tmp_path)
    kept = np.array(list(per_token(events(path, "evaluation")[-1]).values()))
    own, mixture = answers[-1].mean_SQ[:, 0].numpy(), answers[-1].mean_SQ[:, -1].numpy()
    assert (mixture > own).any(), "nobody was asked to take anything worse"
    assert (kept <= own * (1 + 1e-5)).all()
    assert (kept < own).any()


def test_without_validation_examples_no_validation_loss_is_claimed(tmp_path: Path) -> None:
    data = {
        "source": "planted",
        "families": 2,
        "clients_per_family": 2,
        "examples": 12,
        "partition": {"by": "field", "validation": 0},
    }
    path = run(tiny(data=data), directory=tmp_path)
    assert "validation loss" not in (path / "run.log").read_text()
    assert {client["tokens"] for client in events(path, "evaluation")[-1]["clients"].values()} == {0}
    assert len(per_token(events(path, "final")[0])) == 4


def test_data_or_graph_that_changed_since_the_start_is_refused_on_resume(tmp_path: Path) -> None:
    graph, data = tmp_path / "g.csv", tmp_path / "a.jsonl"
    data.write_text("".join(json.dumps({"instruction": f"say {n}", "output": "yes"}) + "\n" for n in range(12)))
    config = tiny(
        {"name": "mira", "graph": {"kind": "given", "path": str(graph)}},
        data={"source": "jsonl", "path": str(data), "partition": {"by": "iid", "num_clients": 2}},
        federation={"rounds": 2},
    )
    graph.write_text("0,1\n1,0\n")
    path = run(config, directory=tmp_path)
    before = files(path)
    graph.write_text("0,2\n2,0\n")
    with pytest.raises(IntegrityError, match=r"the graph changed since the run was started \(sha256 differ\)"):
        run(config, directory=tmp_path, resume=True)
    graph.write_text("0,1\n1,0\n")
    with data.open("a") as file:
        file.write(json.dumps({"instruction": "say more", "output": "yes"}) + "\n")
    with pytest.raises(IntegrityError, match="the data changed since the run was started"):
        run(config, directory=tmp_path, resume=True)
    assert files(path) == before, "a refusal loses nothing"


def test_an_unfinished_run_has_no_adapters_to_give(tmp_path: Path, poisoned: set[str]) -> None:
    poisoned.update(CLIENTS)
    with pytest.raises(DivergedError):
        run(tiny(), directory=tmp_path)
    [path] = tmp_path.iterdir()
    with pytest.raises(UsageError, match="no finished round yet"):
        personalised_adapters(path)


def test_a_comparison_is_not_a_run_and_says_which_it_holds(tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text("{}")
    (tmp_path / "runs" / "fedit-seed0").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"is a comparison.*runs/fedit-seed0"):
        personalised_adapters(tmp_path)


def test_what_a_method_keeps_apart_is_saved_and_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method whose clients are judged by something else than they train from: that is what the checkpoint gives."""

    def halved(config: RunConfig, **arguments: Any) -> Assembly:
        parts = assemble(config, **arguments)
        method = parts.method
        own = method._replace(personalise=lambda state: state.adapters.replace(state.adapters.values_KP / 2))
        return parts._replace(method=own)

    monkeypatch.setattr(experiment, "assemble", halved)
    path = run(tiny("local_only"), directory=tmp_path)
    checkpoint = load_latest(path, config_hash=config_hash(tiny("local_only")))
    assert checkpoint is not None
    arena, parts = personalised_adapters(path)
    assert torch.equal(arena.values_KP, checkpoint.tensors["state.adapters"] / 2)
    [record, *_] = final_records(parts.base, arena, parts.tokenized, parts.config.evaluation)
    assert events(path, "final")[0]["clients"][CLIENTS[0]]["loss_sum"] == pytest.approx(record.loss_sum, rel=1e-5)


def test_a_signal_at_the_end_of_a_round_finds_that_round_saved_whenever_it_comes(tmp_path: Path) -> None:
    """Between the questions whether to save and whether to end, a signal once ended a run that had not been saved."""
    config = tiny("fedit", federation={"rounds": 2}, evaluation={"test": False}, output={"checkpoint_every": 5})

    class Late(StopFlag):
        """Raised after it was asked once since the first round ended."""

        asked: int | None = None

        def __call__(self) -> bool:
            if self.asked is not None:
                self.asked += 1
                self.signal_number = 15 if self.asked > 1 else 0
            return super().__call__()

    flag = Late()

    class Display(experiment.SilentDisplay):
        def round(self, round_: int, line: str) -> None:
            flag.asked = 0

    with pytest.raises(Interrupted, match="everything is saved"):
        experiment.carry_out(RunStore.create(config, None, tmp_path), Display(), stop=flag)
    [path] = tmp_path.iterdir()
    checkpoint = load_latest(path, config_hash=config_hash(config))
    assert checkpoint is not None
    assert [event["round"] for event in events(path, "round")] == [checkpoint.facts["completed_rounds"]] == [1]


# ------------------------------------------------------------------------------------------------ claims about graphs


@pytest.mark.slow
def test_the_true_graph_beats_none_and_a_permuted_one(tmp_path: Path) -> None:
    """Mean validation loss of two draws of planted tasks: the true graph helps, the same one on wrong clients less."""
    graphs: dict[str, dict[str, Any]] = {
        "none": {"name": "local_only"},
        "true": {"name": "mira", "graph": {"kind": "true"}},
        "permuted": {"name": "mira", "graph": {"kind": "permuted"}},
    }
    losses = dict.fromkeys(graphs, 0.0)
    for seed in (0, 1):
        for name, method in graphs.items():
            config = tiny(
                method,
                seed=seed,
                data={
                    "source": "planted",
                    "families": 2,
                    "clients_per_family": 3,
                    "examples": 20,
                    "words": 8,
                    "codes": 4,
                    "shared": 1.0,
                },
                model={
                    "adapter": {"rank": 4, "targets": ["v_proj", "up_proj", "down_proj"]},
                    "dtype": "float32",
                    "device": "cpu",
                },
                training={"local_steps": 6, "batch_size": 4, "learning_rate": 0.01, "cohort_size": 6},
                federation={"rounds": 6},
                evaluation={"test": False, "every": 6},
            )
            final = per_token(events(run(config, directory=tmp_path), "evaluation")[-1])
            losses[name] += sum(final.values()) / len(final) / 2
    print(losses)
    # measured: none 1.41, true 0.38, permuted 0.96
    assert losses["true"] < 0.7 * losses["none"], losses
    assert losses["true"] < 0.8 * losses["permuted"], losses


# ------------------------------------------------------------------------------------------------- on another machine


def test_a_run_goes_on_elsewhere_only_in_its_dtype_and_says_what_differs(tmp_path: Path) -> None:
    path = run(tiny(federation={"rounds": 1}), directory=tmp_path)
    store = RunStore.open(path)
    before = store.manifest()
    older = {**before["versions"], "torch": "1.0"}
    with store:
        store.write_manifest({**before, "versions": older, "model": {**before["model"], "dtype": "bfloat16"}})
    # nothing is left to do, so nothing is asked
    run(tiny(federation={"rounds": 1}), directory=tmp_path, resume=True)
    with pytest.raises(IntegrityError, match=r"was trained in bfloat16 on cpu, but .* gives float32 on cpu"):
        run(tiny(), directory=tmp_path, resume=True)
    with store:
        store.write_manifest({**before, "versions": older})
    run(tiny(), directory=tmp_path, resume=True)
    after = RunStore.open(path).manifest()
    assert after["versions"] == before["versions"]
    assert after["versions_before"] == [{"fedmira": before["fedmira"], "device": "cpu", **older}]
    assert "warning: it goes on with torch" in (path / "run.log").read_text()
