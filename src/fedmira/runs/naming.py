"""Where a run lives, from its config alone. Imports nothing heavy: `fedmira validate` names the directory at once."""

from __future__ import annotations

from pathlib import Path

from fedmira.config.file import config_hash
from fedmira.config.run import RunConfig
from fedmira.paths import home_expanded


def run_directory(config: RunConfig, directory: Path | None = None) -> Path:
    """Return where the run of `config` lives: `<directory>/<name>-<method>-seed<seed>-<hash>`.

    `directory` is `config.output.directory` unless given, with a leading `~` replaced. Nothing is created.
    """
    parent = home_expanded(config.output.directory) if directory is None else directory
    return parent / f"{run_stem(config)}-{config_hash(config)}"


def run_stem(config: RunConfig) -> str:
    """Return the part of a run directory's name that people choose; runs that share it differ in other settings."""
    return f"{config.name}-{config.method.name}-seed{config.seed}"
