"""Comparisons: tuned on validation data of a draw of its own, alike for all methods; paired; resumable."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tests.test_experiment import METHODS, tiny

from fedmira import embedded_base_path, experiment
from fedmira.assembly import Assembly
from fedmira.config.file import load_config
from fedmira.config.run import EvaluationConfig, RunConfig
from fedmira.errors import ConfigError, DataError, DivergedError, IntegrityError, Interrupted, UsageError
from fedmira.exchange.in_process import InProcess
from fedmira.experiment import SilentDisplay
from fedmira.recording import Recorder
from fedmira.report.page import write_report
from fedmira.report.reading import StudyRecord, read
from fedmira.runs.lock import locked
from fedmira.runs.store import RunStore
from fedmira.studies import compare as compare_module
from fedmira.studies.compare import compare, final_validation_loss, study_directory, variant
from fedmira.types import Job, Results

RATES = (0.001, 0.02)


def config(**compare_section: Any) -> RunConfig:
    compare_section = {"methods": ["local_only", "fedit", "mira"], **compare_section}
    return tiny("mira", compare=compare_section, federation={"rounds": 2})


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs that clients were asked to train."""
    jobs: list[Job] = []
    original = InProcess.run

    def spy(self: InProcess, job: Job, **arguments: Any) -> Results:
        jobs.append(job)
        return original(self, job, **arguments)

    monkeypatch.setattr(InProcess, "run", spy)
    return jobs


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three methods, two seeds, two learning rates tried for each."""
    folder = tmp_path_factory.mktemp("studies") / "mine"
    return compare(config(seeds=2, learning_rates=RATES), directory=folder)


def told(study: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((study / "study.json").read_text())
    return content


def runs_below(folder: Path) -> list[RunStore]:
    return [RunStore.open(path) for path in sorted(folder.iterdir())]


# ------------------------------------------------------------------------------------------------------------- tuning


def test_tuning_never_judges_a_test_split_and_uses_the_tuning_seed(study: Path) -> None:
    tuning = runs_below(study / "tuning")
    assert len(tuning) == 3 * len(RATES)
    for store in tuning:
        kinds = {(event["event"], event.get("split")) for event in store.events()}
        assert kinds == {("round", None), ("evaluation", "validation")}
        assert store.config.seed == 1000
    assert {store.config.seed for store in runs_below(study / "runs")} == {0, 1}


def test_tuning_never_touches_test_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the test examples taken away, tuning comes to the same numbers."""
    wanted = config(methods=["mira"], learning_rates=RATES)
    original = experiment.assemble
    with_test = told(compare(wanted, directory=tmp_path / "with"))["tuning"]

    def without_test(run: RunConfig, **arguments: Any) -> Assembly:
        parts = original(run, **arguments)
        if run.seed != 1000:
            return parts
        return parts._replace(tokenized=tuple(replace(client, test=()) for client in parts.tokenized))

    monkeypatch.setattr(experiment, "assemble", without_test)
    assert told(compare(wanted, directory=tmp_path / "without"))["tuning"] == with_test


def test_every_method_tries_the_same_rates_and_gets_its_best(study: Path) -> None:
    facts = told(study)
    for method in ("local_only", "fedit", "mira"):
        tried = {
            entry["learning_rate"]: entry["validation_loss"] for entry in facts["tuning"] if entry["method"] == method
        }
        assert tuple(tried) == RATES
        best = min(tried, key=lambda rate: tried[rate])
        chosen = {entry["learning_rate"] for entry in facts["runs"] if entry["method"] == method}
        assert chosen == {best}
        for seed in (0, 1):
            [entry] = [e for e in facts["runs"] if e["method"] == method and e["seed"] == seed]
            assert RunStore.open(study / entry["path"]).config.training.learning_rate == best


@pytest.mark.parametrize(
    ("losses", "chosen"), [((2.0, 1.0), RATES[1]), ((1.0, 2.0), RATES[0]), ((float("inf"), 9.0), RATES[1])]
)
def test_the_lowest_validation_loss_is_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, losses: tuple[float, float], chosen: float
) -> None:
    answers = dict(zip(RATES, losses, strict=True))

    def loss(path: Path) -> float:
        return answers[RunStore.open(path).config.training.learning_rate]

    monkeypatch.setattr(compare_module, "final_validation_loss", loss)
    folder = compare(config(methods=["local_only"], learning_rates=RATES), directory=tmp_path)
    assert [entry["learning_rate"] for entry in told(folder)["runs"]] == [chosen]


def test_a_rate_that_diverges_loses_and_does_not_end_the_comparison(tmp_path: Path) -> None:
    folder = compare(config(methods=["local_only"], learning_rates=(0.001, 1e38)), directory=tmp_path)
    facts = json.loads((folder / "study.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert [entry["validation_loss"] is None for entry in facts["tuning"]] == [False, True]
    assert [entry["learning_rate"] for entry in facts["runs"]] == [0.001]


def test_a_grid_that_diverges_altogether_says_so(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"local_only diverges at every learning rate .*\(1e\+38, 2e\+38\)"):
        compare(config(methods=["local_only"], learning_rates=(1e38, 2e38)), directory=tmp_path)


def test_one_rate_needs_no_tuning(tmp_path: Path) -> None:
    folder = compare(config(methods=["local_only"]), directory=tmp_path)
    assert told(folder)["tuning"] == []
    assert not (folder / "tuning").exists()
    assert told(folder)["runs"][0]["learning_rate"] == 0.01


def test_validation_loss_is_the_mean_over_clients_of_their_own_ratio(study: Path) -> None:
    [path] = [p for p in (study / "runs").iterdir() if p.name.startswith("tiny-mira-seed0")]
    last = [event for event in RunStore.open(path).events() if event["event"] == "evaluation"][-1]
    ratios = [client["loss_sum"] / client["tokens"] for client in last["clients"].values()]
    assert final_validation_loss(path) == pytest.approx(sum(ratios) / 4)


@pytest.mark.parametrize(("loss", "expected"), [(4.0, 3.0), (None, math.inf)])
def test_validation_loss_is_that_after_the_last_round_of_those_that_hold_such_examples(
    tmp_path: Path, loss: float | None, expected: float
) -> None:
    with RunStore.create(config(), None, tmp_path) as store:
        for round_, first in ((1, 9.0), (2, 6.0)):
            clients = {"a": (first, 3), "b": (0.0, 0), "c": (loss, 1)}
            told_of = {name: {"loss_sum": summed, "tokens": tokens} for name, (summed, tokens) in clients.items()}
            store.append({"event": "evaluation", "round": round_, "split": "validation", "clients": told_of})
    assert final_validation_loss(store.path) == expected


def test_without_validation_examples_no_rate_is_chosen(tmp_path: Path) -> None:
    with RunStore.create(config(), None, tmp_path) as store:
        store.append({"event": "evaluation", "round": 1, "clients": {"a": {"loss_sum": 0.0, "tokens": 0}}})
    with pytest.raises(DataError, match=r"no client of .* has validation examples to choose a learning rate by"):
        final_validation_loss(store.path)


# ------------------------------------------------------------------------------------------ one grid for all of a study


@pytest.mark.parametrize(
    ("section", "here"),
    [
        ({"learning_rates": (1e-4, 2e-4)}, "compare.learning_rates = [0.0001, 0.0002], compare.tuning_seed = 1000"),
        (
            {"learning_rates": RATES, "tuning_seed": 77},
            "compare.learning_rates = [0.001, 0.02], compare.tuning_seed = 77",
        ),
        ({"learning_rates": RATES[:1]}, "compare.learning_rates = 0.001 for every method"),
        ({}, "training.learning_rate = 0.01 for every method"),
    ],
)
def test_other_learning_rates_are_refused_beside_runs_that_stay(
    study: Path, trained: list[Job], section: dict[str, Any], here: str
) -> None:
    before = snapshot(study)
    with pytest.raises(UsageError, match=r"holds runs of local_only, fedit, for which other") as raised:
        compare(config(methods=["mira", "ffa_lora"], **section), directory=study)
    lines = raised.value.args[0].splitlines()
    assert lines[1:3] == [
        "  there: compare.learning_rates = [0.001, 0.02], compare.tuning_seed = 1000",
        f"  here: {here}",
    ]
    assert "name these methods in compare.methods too" in lines[3]
    assert trained == []
    assert snapshot(study) == before


def test_the_order_of_the_grid_makes_no_other_study(study: Path, tmp_path: Path, trained: list[Job]) -> None:
    again = shutil.copytree(study, tmp_path / "again")
    compare(config(methods=["mira"], seeds=2, learning_rates=RATES[::-1]), directory=again)
    assert trained == []
    assert len(told(again)["runs"]) == 6


def test_a_study_whose_methods_are_all_asked_for_can_be_tuned_anew(tmp_path: Path) -> None:
    compare(config(methods=["local_only"], seeds=2, learning_rates=RATES), directory=tmp_path)
    wider = (*RATES, 0.005)
    compare(config(methods=["local_only", "fedit"], learning_rates=wider), directory=tmp_path)
    assert [(entry["method"], entry["learning_rate"]) for entry in told(tmp_path)["tuning"]] == [
        (method, rate) for method in ("local_only", "fedit") for rate in wider
    ]
    # seed 1 was tuned otherwise
    assert [(entry["method"], entry["seed"]) for entry in told(tmp_path)["runs"]] == [("local_only", 0), ("fedit", 0)]
    compare(config(methods=["local_only", "fedit"]), directory=tmp_path)
    assert told(tmp_path)["tuning"] == []
    assert {entry["learning_rate"] for entry in told(tmp_path)["runs"]} == {0.01}


def test_a_study_that_is_stopped_while_it_is_tuned_anew_mixes_nothing(
    tmp_path: Path, trained: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = config(methods=["local_only"], learning_rates=RATES)
    before = told(compare(wanted, directory=tmp_path))

    def stop(self: Any, *arguments: Any) -> Results:
        raise Interrupted("stopped by a test", 15)

    with monkeypatch.context() as patch:
        patch.setattr(experiment._Run, "_exchange", stop)
        with pytest.raises(Interrupted):
            compare(config(methods=["local_only"], learning_rates=(1e-4, 2e-4)), directory=tmp_path)
    assert (told(tmp_path)["runs"], told(tmp_path)["tuning"]) == ([], [])
    trained.clear()
    assert {**told(compare(wanted, directory=tmp_path)), "created": None} == {**before, "created": None}
    assert trained == [], "the runs are still on disk"


def test_what_was_tried_stays_written_down_while_tuning_is_repeated(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = shutil.copytree(study, tmp_path / "again")
    losses = iter([5.0])
    monkeypatch.setattr(compare_module, "final_validation_loss", lambda path: next(losses))
    with pytest.raises(StopIteration):
        compare(config(seeds=2, learning_rates=RATES), directory=again)
    tried = [entry["learning_rate"] for entry in told(again)["tuning"] if entry["method"] == "local_only"]
    assert tuple(tried) == RATES


def test_what_an_earlier_version_left_of_a_grid_does_not_stay_beside_an_untuned_run(
    tmp_path: Path, trained: list[Job]
) -> None:
    compare(config(methods=["local_only"]), directory=tmp_path)
    facts = told(tmp_path)
    facts["tuning"] = [{"method": "local_only", "learning_rate": rate, "validation_loss": 2.0} for rate in RATES]
    (tmp_path / "study.json").write_text(json.dumps(facts))
    trained.clear()
    assert told(compare(config(methods=["local_only"]), directory=tmp_path))["tuning"] == []
    assert trained == []


@pytest.mark.parametrize("damage", ["", "{}", "[1]", '{"runs": [{}], "tuning": []}'])
def test_a_study_that_cannot_be_read_loses_no_method(tmp_path: Path, trained: list[Job], damage: str) -> None:
    compare(config(methods=["local_only"]), directory=tmp_path)
    (tmp_path / "study.json").write_text(damage)
    before = snapshot(tmp_path)
    trained.clear()
    with pytest.raises(IntegrityError, match=r"study\.json is damaged .*another --out"):
        compare(config(methods=["fedit"]), directory=tmp_path)
    assert trained == []
    assert snapshot(tmp_path) == before


NO_VALIDATION = {"source": "planted", "partition": {"by": "field", "validation": 0}}


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"compare": {"methods": []}}, "nothing to compare"),
        ({"compare": {"methods": ["mira", "fedit", "mira"]}}, "names 'mira' more than once"),
        ({"compare": {"variants": {"../escaped": {"name": "mira"}}}}, r"the name '\.\./escaped', which becomes part"),
    ],
)
def test_comparisons_that_make_no_sense_are_config_mistakes(
    tmp_path: Path, sections: dict[str, Any], words: str
) -> None:
    (tmp_path / "c.yaml").write_text(json.dumps(sections))
    with pytest.raises(ConfigError, match=words):
        load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"seed": 999, "compare": {"seeds": 3, "learning_rates": RATES}}, "tuning_seed = 1000 is one of the seeds"),
        ({"seed": 1000, "compare": {"learning_rates": RATES}}, "tuning_seed = 1000 is one of the seeds"),
        ({"data": NO_VALIDATION, "compare": {"learning_rates": RATES}}, "leaves nothing to choose by"),
        (
            {"compare": {"variants": {"local_only": {"name": "mira"}}}},
            r"variants\.local_only is called like a method, but has name = mira; call it something else",
        ),
    ],
)
def test_comparisons_that_would_mislead_are_refused(tmp_path: Path, sections: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        compare(RunConfig.model_validate(sections), directory=tmp_path / "study")
    assert list(tmp_path.iterdir()) == []


def test_one_learning_rate_is_no_tuning_and_may_use_any_seed_and_no_validation(tmp_path: Path) -> None:
    alone = config(methods=["local_only"], learning_rates=RATES[:1]).model_copy(update={"seed": 1000})
    partition = alone.data.partition.model_copy(update={"validation": 0.0})
    alone = alone.model_copy(update={"data": alone.data.model_copy(update={"partition": partition})})
    [entry] = told(compare(alone, directory=tmp_path))["runs"]
    assert (entry["seed"], entry["learning_rate"]) == (1000, RATES[0])


# ------------------------------------------------------------------------------------------------------------ pairing


def test_methods_differ_in_nothing_but_the_method(study: Path) -> None:
    stores = [RunStore.open(study / entry["path"]) for entry in told(study)["runs"]]
    for seed in (0, 1):
        same = [store for store in stores if store.config.seed == seed]
        assert [store.config.method.name for store in same] == ["local_only", "fedit", "mira"]
        for section in ("data", "model", "federation", "evaluation"):
            assert len({getattr(store.config, section).model_dump_json() for store in same}) == 1
        assert len({json.dumps(store.manifest()["data"], sort_keys=True) for store in same}) == 1
        assert len({json.dumps(store.manifest()["clients"], sort_keys=True) for store in same}) == 1
    data = [
        json.dumps(store.manifest()["data"], sort_keys=True) for store in stores if store.config.method.name == "mira"
    ]
    assert data[0] != data[1], "another seed makes other clients"


def test_a_method_may_have_other_settings_under_its_own_name() -> None:
    own = config(variants={"mira": {"name": "mira", "strength": 0.1}})
    assert variant(own, "mira", 0, 0.01).method.strength == 0.1  # type: ignore[union-attr]


def test_the_own_method_keeps_its_settings_and_others_have_their_defaults() -> None:
    own = tiny(
        {**METHODS["mira"], "strength": 7.0},
        compare={"variants": {"soft": {"name": "mira", "strength": 0.1}}, "methods": ["soft"]},
    )
    assert variant(own, "mira", 3, 0.5).method.strength == 7.0  # type: ignore[union-attr]
    assert variant(own, "soft", 3, 0.5).method.strength == 0.1  # type: ignore[union-attr]
    assert variant(own, "soft", 3, 0.5).name == "soft"
    assert variant(own, "mira_published", 3, 0.5).method.server_lr == 0.0015  # type: ignore[union-attr]
    changed = variant(own, "fedit", 3, 0.5)
    assert (changed.seed, changed.training.learning_rate, changed.data) == (3, 0.5, own.data)


# ------------------------------------------------------------------------------------------------------------- on disk


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_second_call_trains_nothing_and_changes_no_run(study: Path, trained: list[Job]) -> None:
    before, facts = snapshot(study), told(study)
    again = compare(config(seeds=2, learning_rates=RATES), directory=study)
    assert trained == []
    assert again == study
    assert {k: v for k, v in snapshot(study).items() if k != "study.json"} == {
        k: v for k, v in before.items() if k != "study.json"
    }
    assert {**told(study), "created": None} == {**facts, "created": None}


def test_an_interrupted_comparison_goes_on_where_it_stopped(
    tmp_path: Path, study: Path, trained: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the fourth run, called again: only what was missing is trained, and all numbers are the same."""
    wanted = config(seeds=2, learning_rates=RATES)
    original, begun = experiment._Run._exchange, 0

    def stop_in_the_fourth_run(self: Any, state: Any, participants: Any, progress: Any) -> Results:
        nonlocal begun
        begun += participants.round == 1
        if begun == 4 and participants.round == 2:
            raise Interrupted("stopped by a test", 15)
        return original(self, state, participants, progress)

    with monkeypatch.context() as patch:
        patch.setattr(experiment._Run, "_exchange", stop_in_the_fourth_run)
        with pytest.raises(Interrupted):
            compare(wanted, directory=tmp_path)
    assert len(trained) == 3 * 2 + 1
    trained.clear()
    compare(wanted, directory=tmp_path)
    assert len(trained) == (3 * 2 + 3 * 2) * 2 - 7
    assert {**told(tmp_path), "created": None} == {**told(study), "created": None}
    for entry in told(study)["runs"]:
        here, there = (
            [{**event, "timing": None} for event in RunStore.open(folder / entry["path"]).events()]
            for folder in (tmp_path, study)
        )
        assert here == there


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("when", ["final", "_starting_point"])
def test_a_signal_after_the_last_round_of_a_run_stops_the_comparison_before_the_next(
    tmp_path: Path, trained: list[Job], monkeypatch: pytest.MonkeyPatch, number: int, when: str
) -> None:
    """While clients are judged, or while a run that is finished is come by."""
    wanted = config(methods=["local_only", "fedit"])
    if when == "_starting_point":
        compare(config(methods=["local_only"]), directory=tmp_path)
        trained.clear()
    where = Recorder if when == "final" else experiment._Run
    original = getattr(where, when)

    def signalled(self: Any, *arguments: Any) -> Any:
        os.kill(os.getpid(), number)
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(where, when, signalled)
        with pytest.raises(Interrupted, match=f"{signal.Signals(number).name} between two runs") as raised:
            compare(wanted, directory=tmp_path)
    assert raised.value.exit_code == 128 + number
    assert len(trained) == (2 if when == "final" else 0), "nothing of fedit"
    assert [entry["method"] for entry in told(tmp_path)["runs"]] == ["local_only"]
    compare(wanted, directory=tmp_path)
    assert [entry["method"] for entry in told(tmp_path)["runs"]] == ["local_only", "fedit"]


def test_other_methods_and_seeds_of_earlier_calls_stay_in_the_study(study: Path, tmp_path: Path) -> None:
    again = shutil.copytree(study, tmp_path / "again")
    before = told(again)
    compare(config(methods=["ffa_lora"], learning_rates=RATES), directory=again)
    after = told(again)
    assert after["runs"][:-1] == before["runs"]
    assert after["runs"][-1]["method"] == "ffa_lora"
    assert after["tuning"][:-2] == before["tuning"]
    assert [(entry["method"], entry["learning_rate"]) for entry in after["tuning"][-2:]] == [
        ("ffa_lora", rate) for rate in RATES
    ]
    record = read(again)
    assert isinstance(record, StudyRecord)
    assert set(record.methods) == {"local_only", "fedit", "mira", "ffa_lora"}
    # seed 1 of a method that is asked for with seed 0 alone
    compare(config(methods=["fedit"], learning_rates=RATES), directory=again)
    assert sorted(map(str, told(again)["runs"])) == sorted(map(str, after["runs"]))
    assert sorted(map(str, told(again)["tuning"])) == sorted(map(str, after["tuning"]))


def test_other_seeds_of_a_method_that_runs_otherwise_now_are_not_mixed_with_it(tmp_path: Path) -> None:
    soft, hard = ({"variants": {"it": {"name": "mira", "strength": strength}}} for strength in (0.1, 1.0))
    compare(config(methods=["it"], seeds=2, **soft), directory=tmp_path)
    compare(config(methods=["it"], **hard), directory=tmp_path)
    assert [entry["seed"] for entry in told(tmp_path)["runs"]] == [0]


def test_more_methods_later_keep_the_runs_there_are(tmp_path: Path, trained: list[Job]) -> None:
    compare(config(methods=["local_only"]), directory=tmp_path)
    trained.clear()
    compare(config(methods=["local_only", "fedit"]), directory=tmp_path)
    assert len(trained) == 2, "fedit's two rounds"
    assert [entry["method"] for entry in told(tmp_path)["runs"]] == ["local_only", "fedit"]


def test_without_a_directory_the_folder_is_named_after_the_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    wanted = config(methods=["local_only"])
    folder = compare(wanted)
    assert folder == study_directory(wanted)
    assert folder.parent == Path("runs")
    assert study_directory(config(methods=["fedit"])) != folder
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert told(folder)["runs"][0]["path"].startswith("runs/")
    assert (folder / told(folder)["runs"][0]["path"]).is_dir()


def test_a_study_can_be_moved(study: Path, tmp_path: Path, trained: list[Job]) -> None:
    """Paths inside a study are relative to it."""
    moved = tmp_path / "elsewhere"
    shutil.copytree(study, moved)
    compare(config(seeds=2, learning_rates=RATES), directory=moved)
    assert trained == []


class Told(SilentDisplay):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, line: str) -> None:
        self.messages.append(line)


def test_a_run_that_diverges_is_left_out_and_the_others_go_on(tmp_path: Path) -> None:
    wild = {"name": "fedadam", "server_lr": 1e38}
    section = {"methods": ["wild", "local_only"], "variants": {"wild": wild}, "seeds": 2}
    broken, display = tiny("mira", compare=section, federation={"rounds": 3}), Told()
    with pytest.raises(DivergedError, match=r"(?s)^wild seed 0: .*\nwild seed 1: "):
        compare(broken, directory=tmp_path, display=display)
    assert [failure["run"] for failure in told(tmp_path)["failures"]] == ["wild seed 0", "wild seed 1"]
    assert [(entry["method"], entry["seed"]) for entry in told(tmp_path)["runs"]] == [
        ("local_only", 0),
        ("local_only", 1),
    ]
    assert sum("wild seed" in line and "left out" in line for line in display.messages) == 2
    write_report(tmp_path)


def test_finished_runs_stay_in_the_study_while_it_is_repeated(study: Path, tmp_path: Path) -> None:
    again = shutil.copytree(study, tmp_path / "again")
    seen: list[int] = []
    longer = config(seeds=3, learning_rates=RATES)

    class Watch(SilentDisplay):
        def start(self, title: str, total_rounds: int) -> None:
            seen.append(len(told(again)["runs"]))

    compare(longer, directory=again, display=Watch())
    assert min(seen) >= 6
    assert len(told(again)["runs"]) == 9


def test_a_comparison_does_not_overwrite_a_run(tmp_path: Path) -> None:
    path = experiment.run(tiny("local_only"), directory=tmp_path)
    before = snapshot(path)
    with pytest.raises(UsageError, match="holds a run, which a comparison would overwrite"):
        compare(config(), directory=path)
    assert snapshot(path) == before


def test_a_comparison_does_not_move_into_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "clients.jsonl").write_text("mine")
    with pytest.raises(UsageError, match=r"holds something else \(clients\.jsonl\); give a new folder with --out"):
        compare(config(), directory=tmp_path)
    with pytest.raises(UsageError, match="is not a folder"):
        compare(config(), directory=tmp_path / "clients.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["clients.jsonl"]


def test_a_study_that_lost_a_run_is_shown_without_it(study: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(study, tmp_path / "copy"))
    record = read(copy)
    assert isinstance(record, StudyRecord)
    shutil.rmtree(record.runs[0].path)
    left = read(copy)
    assert isinstance(left, StudyRecord)
    assert [run.path.name for run in left.runs] == [run.path.name for run in record.runs[1:]]
    assert (left.methods, left.seeds) == (record.methods, record.seeds)


def test_a_study_of_another_config_is_refused_with_what_differs(tmp_path: Path, trained: list[Job]) -> None:
    compare(config(methods=["local_only"]), directory=tmp_path)
    trained.clear()
    before = snapshot(tmp_path)
    other = config(methods=["local_only", "fedit"])
    data = other.data.model_copy(update={"clients_per_family": 3})
    other = other.model_copy(update={"data": data, "seed": 5, "name": "renamed"})
    with pytest.raises(UsageError, match=r"holds a study of another config") as raised:
        compare(other, directory=tmp_path)
    assert raised.value.args[0].splitlines()[1:] == [
        "  data.clients_per_family: 2 -> 3",
        "Give another --out for a new study, or put these values back to go on with that one.",
    ]
    many = tiny("fedit", compare={"methods": ["local_only"]}, federation={"rounds": 3}, training={"batch_size": 1})
    with pytest.raises(UsageError, match=r"\.\.\. \(\d+ in all\)\nGive another --out"):
        compare(many, directory=tmp_path)
    assert trained == []
    assert snapshot(tmp_path) == before
    (tmp_path / "config.resolved.yaml").write_text("no_such_key: 1\n")
    with pytest.raises(IntegrityError, match="damaged or was written by another version"):
        compare(config(methods=["local_only"]), directory=tmp_path)


def test_other_methods_variants_seeds_and_names_go_on_with_a_study(tmp_path: Path, trained: list[Job]) -> None:
    compare(config(methods=["local_only"]), directory=tmp_path)
    trained.clear()
    section = {"methods": ["local_only", "soft"], "variants": {"soft": {"name": "mira", "strength": 0.1}}, "seeds": 2}
    more = config(**section, tuning_seed=77).model_copy(update={"name": "tiny"})
    compare(more, directory=tmp_path)
    assert len(trained) == 3 * 2, "all but local_only on seed 0"
    compare(more.model_copy(update={"seed": 1}), directory=tmp_path)


def test_nothing_is_compared_without_test_numbers(tmp_path: Path, trained: list[Job]) -> None:
    untested = config().model_copy(update={"evaluation": EvaluationConfig(test=False)})
    with pytest.raises(ConfigError, match=r"evaluation\.test = false leaves nothing to compare"):
        compare(untested, directory=tmp_path / "study")
    assert not trained


def test_one_process_at_a_time_writes_a_study(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    with locked(folder), pytest.raises(UsageError, match=rf"another process \(number {os.getpid()}\) is writing"):
        compare(config(methods=["local_only"]), directory=folder)
    compare(config(methods=["local_only"]), directory=folder)
    assert [one["method"] for one in told(folder)["runs"]] == ["local_only"]


def test_a_warning_that_holds_for_all_runs_is_said_once_and_logged_in_each(tmp_path: Path) -> None:
    wanted, display = config(methods=["mira", "again"], variants={"again": METHODS["mira"]}, seeds=2), Told()
    partition = wanted.data.partition.model_copy(update={"validation": 0.0})
    wanted = wanted.model_copy(update={"data": wanted.data.model_copy(update={"partition": partition})})
    compare(wanted, directory=tmp_path, display=display)
    warnings = [line for line in display.messages if line.startswith("warning: ")]
    assert any("no client holds validation examples" in line for line in warnings)
    assert len(warnings) == len(set(warnings))
    logs = [path.read_text() for path in tmp_path.glob("runs/*/run.log")]
    assert len(logs) == 4
    assert all(line in log for log in logs for line in warnings)
    # what is no warning is told as often as it happens
    told_twice = compare_module._WarnsOnce(seen := Told())
    for line in ("seed 0 is left out", "warning: a", "seed 0 is left out", "warning: a", "warning: b"):
        told_twice.message(line)
    assert seen.messages == ["seed 0 is left out", "warning: a", "seed 0 is left out", "warning: b"]


@pytest.mark.parametrize("change", ["an answer", "a client", "the base"])
def test_new_methods_are_not_compared_with_runs_over_other_files(
    change: str, tmp_path: Path, trained: list[Job]
) -> None:
    data, base, out = tmp_path / "data", tmp_path / "base", tmp_path / "study"
    data.mkdir()
    for name in ("a", "b", "c"):
        records = [{"instruction": f"{name} {number}", "output": f"{number + 1}"} for number in range(8)]
        (data / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    shutil.copytree(embedded_base_path(), base)

    def wanted(method: str) -> RunConfig:
        return tiny(
            "fedit",
            compare={"methods": [method]},
            data={"source": "jsonl", "path": str(data), "partition": {"by": "field"}},
            model={"path": str(base), "adapter": {"rank": 1}},
        )

    compare(wanted("local_only"), directory=out)
    trained.clear()
    before = snapshot(out)
    if change == "the base":
        weights = load_file(base / "model.safetensors")
        weights[min(weights)] += 1
        save_file(weights, base / "model.safetensors")
    else:
        file = data / ("a.jsonl" if change == "an answer" else "d.jsonl")
        file.write_text((data / "a.jsonl").read_text().replace('"1"', '"one"').replace("a ", "other "))
    with pytest.raises(IntegrityError, match=r"could not be compared with: the .*give another --out"):
        compare(wanted("fedit"), directory=out)
    assert not trained
    assert snapshot(out) == before


def test_a_run_that_lost_its_manifest_does_not_keep_others_from_running(tmp_path: Path, trained: list[Job]) -> None:
    path = compare(config(methods=["local_only"]), directory=tmp_path / "study")
    (next((path / "runs").iterdir()) / "manifest.json").unlink()
    trained.clear()
    compare(config(methods=["fedit"]), directory=path)
    assert trained
