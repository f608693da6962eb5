"""`fedmira init` and the recipes behind it."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

import pytest

from fedmira.cli.recipes import purpose, recipe_folder, recipe_names
from fedmira.config.file import load_config
from fedmira.config.method import METHOD_NAMES

REPOSITORY = Path(__file__).resolve().parents[2]


def test_lists_every_recipe_with_its_purpose(fedmira) -> None:
    outcome = fedmira("init")
    assert outcome.code == 0
    for path in (REPOSITORY / "recipes").glob("*.yaml"):
        assert path.stem in outcome.out
        assert purpose(path.stem) in outcome.out
    assert json.loads(fedmira("init", "--json").out)["recipes"]["quickstart"] == purpose("quickstart")


def test_copies_a_recipe_byte_for_byte_and_never_overwrites(fedmira, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert fedmira("init", "jsonl").code == 0
    copy = tmp_path / "jsonl.yaml"
    assert copy.read_bytes() == (recipe_folder() / "jsonl.yaml").read_bytes()
    copy.write_text("mine")
    again = fedmira("init", "jsonl")
    assert again.code == 2
    assert "jsonl.yaml exists" in again.err
    assert copy.read_text() == "mine"
    assert fedmira("init", "jsonl", "other.yaml").code == 0
    assert (tmp_path / "other.yaml").is_file()


def test_a_recipe_that_could_not_be_written_is_not_in_the_way_of_the_next_try(
    fedmira, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, opened = tmp_path / "my file.yaml", Path.open

    def full(self: Path, *arguments: Any, **named: Any) -> Any:
        """What is written shows when the file is closed."""
        stream = opened(self, *arguments, **named)
        if self == target:
            os.dup2(os.open("/dev/full", os.O_WRONLY), stream.fileno())
        return stream

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        outcome = fedmira("init", "jsonl", target)
    assert outcome.code == 4
    assert "No space left" in outcome.err
    assert not target.exists()
    again = fedmira("init", "jsonl", target)
    assert again.code == 0
    assert shlex.split(again.out.splitlines()[-1]) == ["fedmira", "run", str(target)]


def test_a_folder_that_does_not_exist_is_named(fedmira, tmp_path: Path) -> None:
    outcome = fedmira("init", "jsonl", tmp_path / "nowhere" / "x.yaml")
    assert outcome.code == 4
    assert "nowhere" in outcome.err


def test_an_unknown_recipe_names_the_nearest(fedmira) -> None:
    outcome = fedmira("init", "flann")
    assert outcome.code == 2
    assert "did you mean 'flan'?" in outcome.err


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_a_valid_config_with_a_purpose(name: str) -> None:
    config = load_config(recipe_folder() / f"{name}.yaml")
    assert 20 < len(purpose(name)) < 120
    assert config.name
    for method in config.compare.methods:
        config.method_named(method)


@pytest.mark.parametrize("name", recipe_names())
def test_validate_finds_nothing_wrong_with_a_recipe_but_its_data(fedmira, name: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = fedmira("validate", recipe_folder() / f"{name}.yaml")
    if load_config(recipe_folder() / f"{name}.yaml").data.source == "planted":
        assert outcome.code == 0
    else:
        assert outcome.code == 3
        assert outcome.err.startswith("Error: data.path: ")
        assert outcome.err.count("\n") == 1


def test_the_paper_recipes_state_the_papers_settings() -> None:
    """60 rounds, 10 % of the clients, batch 8, rank 16 (letter, section IV)."""
    for name in ("paper-dolly-gpt2-large", "paper-natural-instructions-data-juicer"):
        config = load_config(recipe_folder() / f"{name}.yaml")
        assert config.federation.rounds == 60
        assert config.federation.participation == 0.1
        assert config.training.batch_size == 8
        assert config.model.adapter.rank == 16
        assert config.method.name == "mira_published"


def test_every_method_has_a_recipe() -> None:
    config = load_config(recipe_folder() / "all-methods.yaml")
    compared = {config.method_named(name).name for name in config.compare.methods}
    assert compared == set(METHOD_NAMES)
