"""Runs that are opened elsewhere or after damage: what is loaded then, and what is said about it."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedmira import assembly, embedded_base_path
from fedmira.assembly import assemble
from fedmira.config.file import parse_resolved, resolved_yaml
from fedmira.config.run import RunConfig
from fedmira.errors import SetupError
from fedmira.experiment import run
from fedmira.export import clients
from fedmira.export.clients import answer, export_clients, load_trained
from fedmira.model import base as base_module

CLIENT = "family-0-client-0"


def config(rounds: int = 1, **model: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "data": {"source": "planted", "families": 1, "clients_per_family": 1, "examples": 8, "max_length": 64},
            "model": {"adapter": {"rank": 2, "targets": ["q_proj"]}, "dtype": "float32", "device": "cpu", **model},
            "training": {"local_steps": 1, "batch_size": 1},
            "federation": {"rounds": rounds},
            "method": {"name": "local_only"},
            "evaluation": {"test": False, "generation": {"max_new_tokens": 2}},
        }
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(config(rounds=2), directory=tmp_path_factory.mktemp("opening"))


@pytest.fixture
def path(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / finished.name))


def damage(path: Path) -> None:
    """Of the newest checkpoint."""
    newest = sorted((path / "checkpoints").iterdir())[-1]
    (newest / "state.safetensors").write_bytes(b"")


def test_an_older_round_is_handed_out_with_a_warning(path: Path, tmp_path: Path) -> None:
    damage(path)
    told: list[str] = []
    folder = export_clients(path, CLIENT, tmp_path / "out", warn=told.append)[CLIENT]
    skipped, which = told
    assert skipped.startswith("skipped a damaged checkpoint: round-00002: ")
    assert which == "the adapter is that of round 1 of 2"
    assert "- rounds: 1 of 2\n" in (folder / "README.md").read_text()
    answer(path, CLIENT, "What?", warn=(asked := []).append)
    assert asked == told


def test_a_finished_run_is_opened_without_a_word(path: Path) -> None:
    assert load_trained(path).warnings == ()


def test_a_run_of_a_device_that_is_not_there_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(base_module, "resolve_device", lambda name: torch.device("cpu"))
        path = run(config(device="cuda:99"), directory=tmp_path)
    told: list[str] = []
    export_clients(path, CLIENT, tmp_path / "out", warn=told.append)
    answer(path, CLIENT, "What?", warn=told.append)
    words = "this run was trained with model.device = cuda:99, which is not there; auto is used instead"
    assert told == [words, words]


def test_a_whole_model_keeps_the_dtype_it_was_trained_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` means another one on a GPU than here."""
    original = base_module.resolve_dtype
    monkeypatch.setattr(
        base_module, "resolve_dtype", lambda name, device: original({"auto": "bfloat16"}.get(name, name), device)
    )
    assembly._BASES.clear()
    path = run(config(adapter={"kind": "full"}, dtype="auto"), directory=tmp_path)
    assert load_trained(path).base.dtype == torch.bfloat16
    monkeypatch.undo()
    assembly._BASES.clear()
    folder = export_clients(path, CLIENT, tmp_path / "out")[CLIENT]
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    # as earlier versions wrote it
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["model"]["dtype"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert load_trained(path).base.dtype == torch.float32


def test_a_run_that_would_be_refused_today_is_exported(tmp_path: Path) -> None:
    """Clusters of clients with different ranks were found before anybody knew that they show the ranks."""
    of_before = resolved_yaml(config()).replace("name: local_only", "name: fedlease")
    path = run(parse_resolved(of_before.replace("client_ranks: []", "client_ranks: [1, 2]")), directory=tmp_path)
    assert load_trained(path).config.model.adapter.client_ranks == (1, 2)
    assert (
        json.loads((export_clients(path, CLIENT, tmp_path / "out")[CLIENT] / "adapter_config.json").read_text())["r"]
        == 1
    )


def test_a_rank_beyond_what_vllm_serves_is_said(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    export_clients(path, CLIENT, tmp_path / "fits", warn=told.append)
    assert told == []
    monkeypatch.setattr(clients, "VLLM_MAX_RANK", 1)
    export_clients(path, None, tmp_path / "more", warn=told.append)
    assert told == [f"the adapter of {CLIENT} has rank 2; peft loads it, vLLM serves at most 1"]


def test_a_copy_of_the_base_follows_the_umask(path: Path, tmp_path: Path) -> None:
    previous = os.umask(0o077)
    try:
        export_clients(path, CLIENT, tmp_path / "out", with_base=True)
    finally:
        os.umask(previous)
    found = {stat.S_IMODE(one.stat().st_mode) for one in (tmp_path / "out").rglob("*") if one.is_dir()}
    assert found == {0o700}
    ours, theirs = (
        sorted(one.name for one in of.iterdir()) for of in (tmp_path / "out" / "base", embedded_base_path())
    )
    assert ours == theirs


@pytest.mark.parametrize("adapter", [{"rank": 2, "targets": ["q_proj"]}, {"kind": "full"}])
def test_a_base_whose_path_is_no_text_can_be_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: dict[str, Any]
) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/place\xe9"))
    shutil.copytree(embedded_base_path(), folder / "m", copy_function=shutil.copyfile)
    monkeypatch.chdir(folder)
    made = run(config(path="./m", adapter=adapter), directory=Path("runs"))
    out = export_clients(made, CLIENT, Path("out"))[CLIENT]
    assert "/place\\udce9/m" in (out / "README.md").read_bytes().decode("ascii")


def test_a_revision_of_a_folder_has_no_effect_and_is_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(embedded_base_path(), tmp_path / "m", copy_function=shutil.copyfile))
    with pytest.raises(SetupError, match=r"model\.revision = v1 has no effect.*is a local folder.*remove model\.rev"):
        assemble(config(path=str(folder), revision="v1"))
    with pytest.raises(SetupError, match=r"is the embedded model"):
        assemble(config(revision="v1"))


def test_a_run_with_such_a_revision_that_was_begun_goes_on_and_exports_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as earlier:
        earlier.setattr(assembly, "refuse_idle_revision", lambda config: None)
        path = run(config(revision="v1"), directory=tmp_path)
    assert run(config(revision="v1"), directory=tmp_path, resume=True) == path
    folder = export_clients(path, CLIENT, tmp_path / "out")[CLIENT]
    assert json.loads((folder / "adapter_config.json").read_text())["revision"] is None
    assert "revision" not in (folder / "README.md").read_text()
