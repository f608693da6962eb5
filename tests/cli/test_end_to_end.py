"""From a recipe to an answer, as a user goes: data, run, report, export, predict, compare."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from fedmira.cli.main import main
from fedmira.cli.recipes import recipe_path
from fedmira.profile import lines as profile_lines
from fedmira.runs.store import RunStore
from fedmira.stages import STAGES

CONFIG = """
name: tiny
data: {source: planted, families: 2, clients_per_family: 2, examples: 16}
model: {adapter: {rank: 2, targets: [q_proj]}}
training: {local_steps: 2, batch_size: 2}
federation: {rounds: 2}
evaluation: {generation: {max_new_tokens: 4, examples_per_client: 1}}
"""
CLIENT = "family-1-client-0"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a config and one finished run; every command of this module is called from there."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "c.yaml").write_text(CONFIG, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["run", "c.yaml", "--quiet"]) == 0
        yield folder


@pytest.fixture
def run_path(place: Path) -> Path:
    [path] = (place / "runs").glob("tiny-mira-seed0-*")
    return path.relative_to(place)


def test_a_run_says_where_it_is_and_what_came_out(fedmira, place: Path, run_path: Path) -> None:
    outcome = fedmira("run", "c.yaml", "--resume", "--json")
    assert outcome.code == 0
    facts = json.loads(outcome.out)
    assert facts["run"] == str(run_path)
    assert facts["mean_loss"] > 0
    assert facts["rounds"] == 2
    assert "nothing to do" in outcome.err
    assert (run_path / "config.yaml").read_text() == CONFIG


def test_a_second_run_of_the_same_config_is_refused_and_says_how_to_go_on(fedmira, place: Path) -> None:
    outcome = fedmira("run", "c.yaml")
    assert outcome.code == 2
    assert "--resume" in outcome.err


def test_progress_is_a_line_per_round(fedmira, place: Path) -> None:
    outcome = fedmira("run", "c.yaml", "seed=7")
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    assert lines[0] == "Loading the base model (embedded) and the data (planted) ..."
    assert sum(line.startswith("  round ") for line in lines) == 2
    assert any(line.startswith("test loss") for line in lines)


def test_a_dry_run_estimates_and_keeps_nothing(fedmira, place: Path) -> None:
    before = sorted(place.rglob("*"))
    facts = json.loads(fedmira("run", "c.yaml", "--dry-run", "--json").out)
    assert facts["num_clients"] == facts["clients_per_round"] == 4
    assert facts["adapter_parameters"] > 0
    # losses of two shares and how sure it is which is better, in the second and last round the same of the average
    answers = (3 + 6) / 2 * 4
    assert facts["upload_bytes_per_round"] == 4 * (facts["adapter_parameters"] * 4 + answers)
    assert facts["seconds"] > 0
    assert "memory" in fedmira("run", "c.yaml", "--dry-run").out
    assert sorted(place.rglob("*")) == before


def test_a_profile_is_printed_kept_and_logged(fedmira, place: Path) -> None:
    outcome = fedmira("run", "c.yaml", "seed=9", "--profile")
    assert outcome.code == 0
    (run,) = (place / "runs").glob("*seed9*")
    profile = json.loads((run / "profile.json").read_text())
    assert all(profile["seconds"][name] > 0 for name in STAGES)
    log = [line.partition("Z ")[2] for line in (run / "run.log").read_text().splitlines()]
    for line in profile_lines(profile):
        assert line in outcome.out.splitlines()
        assert line in log
    again = json.loads(fedmira("run", "c.yaml", "seed=9", "--resume", "--profile", "--json").out)
    assert again["profile"] == profile, "nothing was left to do"


def test_data_shows_every_client_with_its_supervised_tokens_marked(fedmira, place: Path) -> None:
    outcome = fedmira("data", "c.yaml")
    assert outcome.code == 0
    for client in ("family-0-client-0", "family-0-client-1", CLIENT, "family-1-client-1"):
        assert outcome.out.count(client) >= 2
    assert outcome.out.count("[[") >= 4
    facts = json.loads(fedmira("data", "c.yaml", "--json").out)
    assert [row["client"] for row in facts["clients"]].count(CLIENT) == 1


def test_report_of_a_run(fedmira, place: Path, run_path: Path) -> None:
    outcome = fedmira("report", run_path)
    assert outcome.code == 0
    page = run_path / "report" / "index.html"
    assert str(page) in outcome.out
    assert CLIENT in page.read_text(encoding="utf-8")


def test_report_of_something_else_is_a_usage_error(fedmira, place: Path) -> None:
    assert fedmira("report", "nowhere").code == 2
    assert fedmira("report", ".").code == 2


def test_export_one_client_and_all(fedmira, place: Path, run_path: Path) -> None:
    outcome = fedmira("export", run_path, "--client", CLIENT, "--out", "one")
    assert outcome.code == 0, outcome.err
    assert sorted(path.name for path in Path("one").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert f"- client: {CLIENT}" in Path("one/README.md").read_text()
    outcome = fedmira("export", run_path, "--all", "--out", "all", "--with-base", "--json")
    folders = json.loads(outcome.out)["folders"]
    assert folders[CLIENT] == str(Path("all") / CLIENT)
    assert len(folders) == 4
    same = "adapter_model.safetensors"
    assert (Path("all") / CLIENT / same).read_bytes() == (Path("one") / same).read_bytes()
    assert Path("all/base/config.json").is_file()
    assert (
        json.loads((Path("all") / CLIENT / "adapter_config.json").read_text())["base_model_name_or_path"] == "../base"
    )


def test_export_loads_in_peft_and_answers_as_predict_does(fedmira, place: Path, run_path: Path) -> None:
    """The engine's answer and that of transformers with peft are the same text."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fedmira.config.file import load_config
    from fedmira.data.tokenization import prompt_tokens
    from fedmira.types import Example

    assert fedmira("export", run_path, "--client", CLIENT, "--out", "peft", "--with-base").code == 0
    base = AutoModelForCausalLM.from_pretrained("peft/base")
    tokenizer = AutoTokenizer.from_pretrained("peft/base")
    model = PeftModel.from_pretrained(base, "peft").eval()
    config = load_config("c.yaml")
    import torch

    tokens_T = prompt_tokens(Example("encode: kemo lira", ""), tokenizer, config.data.template, config.data.max_length)
    prompt_1T = torch.from_numpy(tokens_T).long()[None]
    with torch.no_grad():
        written_1T = model.generate(
            input_ids=prompt_1T, attention_mask=torch.ones_like(prompt_1T), max_new_tokens=4, do_sample=False
        )
    expected = tokenizer.decode(written_1T[0, prompt_1T.shape[1] :], skip_special_tokens=True)
    outcome = fedmira("predict", run_path, "--client", CLIENT, "encode: kemo lira")
    assert outcome.code == 0
    assert outcome.out.strip() == expected.strip()
    told = json.loads(fedmira("predict", run_path, "--client", CLIENT, "encode: kemo lira", "--json").out)
    assert told["answer"].strip() == expected.strip()


@pytest.mark.parametrize("command", ["export", "predict"])
def test_an_unknown_client_is_named_with_the_nearest(fedmira, place: Path, run_path: Path, command: str) -> None:
    more = ["--out", "unknown"] if command == "export" else ["text"]
    outcome = fedmira(command, run_path, "--client", "family-1-clinet-0", *more)
    assert outcome.code == 2
    assert f"did you mean '{CLIENT}'?" in outcome.err
    assert not Path("unknown").exists()


def test_export_needs_a_client_or_all_and_an_empty_folder(fedmira, place: Path, run_path: Path) -> None:
    assert fedmira("export", run_path, "--out", "neither").code == 2
    assert fedmira("export", run_path, "--all", "--client", CLIENT, "--out", "both").code == 2
    Path("full").mkdir()
    Path("full/mine").write_text("keep")
    outcome = fedmira("export", run_path, "--client", CLIENT, "--out", "full")
    assert outcome.code == 2
    assert "not an empty folder" in outcome.err
    assert Path("full/mine").read_text() == "keep"


def test_export_of_a_folder_that_is_no_run(fedmira, place: Path) -> None:
    assert fedmira("export", "nowhere", "--client", CLIENT, "--out", "x").code == 2


def test_a_client_name_with_path_tricks_is_refused(fedmira, place: Path, run_path: Path) -> None:
    """A run directory from elsewhere must not write outside the folder that was asked for."""
    manifest_path = run_path / "manifest.json"
    honest = manifest_path.read_text(encoding="utf-8")
    with RunStore.open(run_path) as store:
        manifest = store.manifest()
    manifest["clients"][0]["name"] = "../../escaped"
    manifest_path.write_text(json.dumps(manifest), encoding="utf-8")
    try:
        outcome = fedmira("export", run_path, "--all", "--out", "tricked")
    finally:
        manifest_path.write_text(honest, encoding="utf-8")
    assert outcome.code == 3
    assert "../../escaped" in outcome.err
    assert not Path("tricked").exists()
    assert not list(place.parent.rglob("escaped"))


@pytest.mark.parametrize("command", ["run", "export"])
def test_another_base_model_than_the_run_was_trained_over_is_refused(
    fedmira, place: Path, run_path: Path, command: str
) -> None:
    """The embedded base of another version of fedmira, or a folder that was trained further."""
    manifest_path = run_path / "manifest.json"
    honest = manifest_path.read_text(encoding="utf-8")
    manifest = json.loads(honest)
    manifest["model"]["weights_sha256"] = {"model.safetensors": "0" * 64}
    manifest_path.write_text(json.dumps(manifest), encoding="utf-8")
    try:
        if command == "run":
            outcome = fedmira("run", "c.yaml", "--resume")
        else:
            outcome = fedmira("export", run_path, "--client", CLIENT, "--out", "other-base")
    finally:
        manifest_path.write_text(honest, encoding="utf-8")
    assert outcome.code == 5
    assert "weights_sha256 differ" in outcome.err
    assert not Path("other-base").exists()


def test_compare_ends_with_a_table_and_a_report_and_goes_on_where_it_stopped(fedmira, place: Path) -> None:
    outcome = fedmira("compare", "c.yaml", "--methods", "local_only, mira", "--out", "study")
    assert outcome.code == 0, outcome.err
    assert "method" in outcome.out
    assert "harmed" in outcome.out
    assert "study/report/index.html" in outcome.out
    assert Path("study/report/index.html").is_file()
    again = fedmira("compare", "c.yaml", "--methods", "local_only,mira", "--out", "study", "--json")
    facts = json.loads(again.out)
    assert [row["method"] for row in facts["methods"]] == ["local_only", "mira"]
    assert facts["study"] == "study"
    assert again.err.count("nothing to do") == 2


def test_a_method_that_diverges_costs_the_exit_code_and_not_the_table(fedmira, place: Path) -> None:
    wild = "compare.variants={wild: {name: fedadam, server_lr: 1.0e38}}"
    outcome = fedmira("compare", "c.yaml", wild, "federation.rounds=3", "--methods", "wild,local_only", "--out", "wild")
    assert outcome.code == 1
    assert "local_only" in outcome.out
    assert Path("wild/report/index.html").is_file()


def test_a_comparison_in_which_runs_failed_answers_with_one_object(fedmira, place: Path) -> None:
    variants = "compare.variants={wild: {name: fedadam, server_lr: 1.0e38}, odd: {name: fedadam, server_lr: 1.0e37}}"
    arguments = ("c.yaml", variants, "federation.rounds=3", "--methods", "wild,odd,local_only", "--out", "wild")
    outcome = fedmira("compare", *arguments, "--json")
    facts = json.loads(outcome.out)
    assert outcome.code == facts["exit_code"] == 1
    assert [failure["run"] for failure in facts["failures"]] == ["wild seed 0", "odd seed 0"]
    assert "wild seed 0: " in facts["error"]
    assert "odd seed 0: " in facts["error"]
    assert {row["method"] for row in facts["methods"]} == {"wild", "odd", "local_only"}


def test_compare_keeps_a_study_of_another_config(fedmira, place: Path) -> None:
    before = Path("study/study.json").read_bytes()
    outcome = fedmira("compare", "c.yaml", "federation.rounds=3", "--methods", "local_only", "--out", "study")
    assert outcome.code == 2
    assert "federation.rounds: 2 -> 3\nGive another --out" in outcome.err
    assert Path("study/study.json").read_bytes() == before


def test_compare_with_a_misspelt_method(fedmira, place: Path) -> None:
    outcome = fedmira("compare", "c.yaml", "--methods", "local_only,fedti")
    assert outcome.code == 2
    assert "did you mean 'fedit'?" in outcome.err


def test_quickstart_needs_no_network_and_ends_with_a_table_and_a_report(
    fedmira, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command itself, on a recipe cut down to seconds; opening any connection would fail the test."""

    def no_network(*arguments: object, **_: object) -> None:
        raise AssertionError(f"a connection was opened: {arguments}")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, no_network)
    recipe = yaml.safe_load(recipe_path("quickstart").read_text(encoding="utf-8"))
    recipe["data"] |= {"families": 2, "clients_per_family": 2, "examples": 16}
    recipe["training"] |= {"local_steps": 1, "batch_size": 2}
    recipe["federation"] |= {"rounds": 2}
    recipe["evaluation"]["generation"] |= {"max_new_tokens": 2, "examples_per_client": 1}
    Path("small.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    monkeypatch.setattr("fedmira.cli.compare.recipe_path", lambda name: Path("small.yaml"))
    outcome = fedmira("quickstart", "--out", "quick")
    assert outcome.code == 0, outcome.err
    header, _, *rows = outcome.out[outcome.out.index("\nmethod ") + 1 :].splitlines()
    assert header.split()[:3] == ["method", "mean", "loss"]
    for column in ("worst tenth", "harmed", "Rouge-L", "up + down"):
        assert column in header
    assert [row.split()[0] for row in rows[:4]] == ["local_only", "fedit", "mira_published", "mira"]
    assert outcome.out.count("  round ") == 4 * 2, "progress: a line per round"
    assert outcome.out.splitlines()[-1] == f"Report: {Path('quick/report/index.html')}"
    page = Path("quick/report/index.html").read_text(encoding="utf-8")
    assert "The true graph" in page
