"""Bases that are ids of the hub: what a run was trained over is known by its content, wherever `main` points today."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from fedmira import assembly, embedded_base_path
from fedmira.assembly import assemble, recorded_commit, refuse_other_base
from fedmira.config.run import ModelConfig, RunConfig
from fedmira.errors import IntegrityError
from fedmira.experiment import run
from fedmira.export.clients import export_clients
from fedmira.model.base import load_base
from fedmira.runs.store import RunStore

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
            "evaluation": {"test": False},
        }
    )


def begin(cache: Path, patch: pytest.MonkeyPatch) -> None:
    """As a process of its own would, with this cache."""
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    assembly._base.cache_clear()


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
    assembly._base.cache_clear()
    longer = config(rounds=2)
    assert run(longer, directory=path.parent, resume=True) == path
    assert len([event for event in RunStore.open(path).events() if event["event"] == "round"]) == 2
    newest = assemble(longer).base
    assert newest.commit == NEW
    with pytest.raises(IntegrityError, match="weights_sha256 differ"):
        refuse_other_base(path, manifest["model"], newest)


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
    if commit is None:
        assert export_clients(path, CLIENT, tmp_path / "again")
    else:
        with pytest.raises(IntegrityError, match=r"\(commit differ\)"):
            export_clients(path, CLIENT, tmp_path / "again")


def test_shards_are_those_of_the_index(hub: Hub) -> None:
    folder = hub.snapshot(OLD)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    halves = [dict(list(tensors.items())[part::2]) for part in range(2)]
    files = [f"model-{part}.safetensors" for part in range(2)]
    for file, half in zip(files, halves, strict=True):
        save_file(half, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: f for f, half in zip(files, halves, strict=True) for name in half}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "consolidated.safetensors").write_bytes(b"")
    base = load_base(config().base_model)
    assert sorted(base.facts()["weights_sha256"]) == files
    name, tensor = next(iter(tensors.items()))
    assert torch.equal(base.model.state_dict()[name], tensor)
