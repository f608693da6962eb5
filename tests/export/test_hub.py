"""Bases that are ids of the hub: what a run was trained over is known by its content, wherever `main` points today."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from fedmira import assembly, embedded_base_path
from fedmira.assembly import assemble
from fedmira.config.run import CompareConfig, ModelConfig, RunConfig
from fedmira.errors import IntegrityError
from fedmira.experiment import run
from fedmira.export.clients import export_clients
from fedmira.model.base import load_base
from fedmira.runs.same_base import recorded_commit, refuse_other_base
from fedmira.runs.store import RunStore
from fedmira.studies.compare import compare

NAME = "acme/tiny"
OLD, NEW = "a" * 40, "b" * 40
CLIENT = "family-0-client-0"


class Hub:
    """The cache of the hub with one model, as downloads leave it."""

    def __init__(self, cache: Path) -> None:
        self.folder = cache / "models--acme--tiny"

    def snapshot(self, commit: str) -> Path:
        return self.folder / "snapshots" / commit

    def add(self, commit: str, *, weights: float | None = None, readme: str = "") -> None:
        """Make `commit` the newest: the embedded model, its weights shifted; None shifts nothing."""
        shutil.copytree(embedded_base_path(), self.snapshot(commit), copy_function=shutil.copyfile)
        if weights is not None:
            path = self.snapshot(commit) / "model.safetensors"
            save_file({name: tensor + weights for name, tensor in load_file(path).items()}, path, {"format": "pt"})
        (self.snapshot(commit) / "README.md").write_text(readme)
        (self.folder / "refs").mkdir(exist_ok=True)
        (self.folder / "refs" / "main").write_text(commit)


def config(rounds: int = 1) -> RunConfig:
    return RunConfig.model_validate(
        {
            "data": {"source": "planted", "families": 1, "clients_per_family": 1, "examples": 8},
            "model": {"path": NAME, "revision": "main", "adapter": {"rank": 2, "targets": ["q_proj"]}, "device": "cpu"},
            "training": {"local_steps": 1, "batch_size": 1},
            "federation": {"rounds": rounds},
            "method": {"name": "local_only"},
            "evaluation": {"generation": {"enabled": False}},
        }
    )


def begin(cache: Path, patch: pytest.MonkeyPatch) -> None:
    """As a process of its own would, with this cache."""
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    assembly._BASES.clear()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run over the commit OLD."""
    place = tmp_path_factory.mktemp("hub")
    Hub(place / "cache").add(OLD)
    with pytest.MonkeyPatch.context() as patch:
        begin(place / "cache", patch)
        return run(config(), directory=place / "runs")


@pytest.fixture
def path(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "runs" / finished.name))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    begin(tmp_path / "cache", monkeypatch)
    hub = Hub(tmp_path / "cache")
    hub.add(OLD)
    return hub


def test_an_id_is_known_by_its_commit_and_content(hub: Hub) -> None:
    facts = load_base(config().base_model).facts()
    local = load_base(ModelConfig(path=str(hub.snapshot(OLD)), device="cpu")).facts()
    assert facts["commit"] == OLD
    assert facts["weights_sha256"] == local["weights_sha256"]
    assert set(facts["weights_sha256"]) == {"model.safetensors"}
    assert facts["config_sha256"] == local["config_sha256"] is not None
    assert local["commit"] is None


def test_large_files_of_the_cache_are_known_by_their_names(hub: Hub) -> None:
    """Hashing the weights of a large model takes a minute each time; downloads are stored under their hash."""
    blob = hub.folder / "blobs" / ("c" * 64)
    blob.parent.mkdir()
    weights = hub.snapshot(OLD) / "model.safetensors"
    weights.rename(blob)
    weights.symlink_to(blob)
    # downloaded by something else, and not read here
    (hub.snapshot(OLD) / "consolidated.safetensors").write_bytes(b"")
    assert load_base(config().base_model).facts()["weights_sha256"] == {"model.safetensors": "c" * 64}


def test_a_run_is_exported_over_the_commit_it_was_trained_over(hub: Hub, path: Path, tmp_path: Path) -> None:
    """A branch moves."""
    hub.add(NEW, weights=0.25)
    folder = export_clients(path, CLIENT, tmp_path / "out")[CLIENT]
    assert json.loads((folder / "adapter_config.json").read_text())["revision"] == OLD
    assert f"revision='{OLD}'" in (folder / "README.md").read_text()


def test_other_weights_under_the_same_id_are_refused(hub: Hub, path: Path, tmp_path: Path) -> None:
    hub.add(NEW, weights=0.25)
    shutil.rmtree(hub.snapshot(OLD))
    words = rf"\(weights_sha256 differ\).*commit {OLD} of it available again \(it is at {NEW} now\)"
    with pytest.raises(IntegrityError, match=words):
        export_clients(path, CLIENT, tmp_path / "out")
    with pytest.raises(IntegrityError, match=words):
        run(config(), directory=path.parent, resume=True)


def test_another_readme_is_no_other_base(hub: Hub, path: Path, tmp_path: Path) -> None:
    hub.add(NEW, readme="more words")
    shutil.rmtree(hub.snapshot(OLD))
    assert export_clients(path, CLIENT, tmp_path / "out")
    assert run(config(), directory=path.parent, resume=True) == path


def test_a_run_goes_on_over_the_commit_it_was_begun_with(hub: Hub, path: Path) -> None:
    with RunStore.open(path) as store:
        manifest = store.manifest()
    hub.add(NEW, weights=0.25)
    assembly._BASES.clear()
    longer = config(rounds=2)
    (hub.snapshot(OLD) / "README.md").unlink()
    assert run(longer, directory=path.parent, resume=True) == path
    assert len([event for event in RunStore.open(path).events() if event["event"] == "round"]) == 2
    assembly._BASES.clear()
    newest = assemble(longer).base
    assert newest.commit == NEW
    with pytest.raises(IntegrityError, match="weights_sha256 differ"):
        refuse_other_base(path, manifest["model"], newest)


def test_a_comparison_stays_over_one_commit(hub: Hub, tmp_path: Path) -> None:
    first = config().model_copy(update={"compare": CompareConfig(methods=("local_only",))})
    compare(first, directory=tmp_path / "study")
    hub.add(NEW, weights=0.25)
    assembly._BASES.clear()
    compare(first.model_copy(update={"compare": CompareConfig(methods=("fedit",))}), directory=tmp_path / "study")
    manifests = [json.loads(path.read_text())["model"] for path in tmp_path.glob("study/runs/*/manifest.json")]
    assert [manifest["commit"] for manifest in manifests] == [OLD, OLD]


def test_a_commit_of_which_the_cache_holds_a_part_is_not_there(hub: Hub) -> None:
    hub.add(NEW)
    (hub.snapshot(OLD) / "model.safetensors").unlink()
    assert load_base(config().base_model, OLD).commit == NEW


@pytest.mark.parametrize("commit", [None, OLD])
def test_runs_of_earlier_versions_open(hub: Hub, path: Path, tmp_path: Path, commit: str | None) -> None:
    """They recorded a commit, or nothing at all."""
    place = path / "manifest.json"
    manifest = json.loads(place.read_text())
    manifest["model"] |= {"commit": commit, "config_sha256": None, "weights_sha256": {}}
    place.write_text(json.dumps(manifest))
    assert recorded_commit(manifest) is None
    assert recorded_commit({}) is None
    assert export_clients(path, CLIENT, tmp_path / "out")
    hub.add(NEW, weights=0.25)
    # weights of which nothing is recorded, as of ids whose safetensors the hub made: a commit changes with any file
    assert export_clients(path, CLIENT, tmp_path / "again")
