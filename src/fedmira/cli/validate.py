"""`fedmira validate`: every mistake of a config at once, without loading anything heavy."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fedmira.cli.arguments import config_arguments, read_config
from fedmira.cli.session import Session, standard_options
from fedmira.errors import DataError, FedmiraError, SetupError
from fedmira.paths import home_expanded, looks_local

if TYPE_CHECKING:
    from fedmira.config.run import RunConfig

_ENDINGS = (".jsonl", ".ndjson", ".json", ".gz", ".csv", ".tsv", ".parquet")
"""Of files, which no id of a data set has."""


@click.command(short_help="Check a config: every mistake at once.")
@config_arguments
@standard_options
@click.pass_obj
def validate(session: Session, config: Path, overrides: tuple[str, ...]) -> None:
    """Check CONFIG, the KEY=VALUE pairs given with it, and that the files it names exist. Trains and loads nothing."""
    from fedmira.runs.naming import run_directory

    run_config = read_config(config, overrides)
    problems = missing_files(run_config)
    if problems:
        # one report of all that is missing; the exit code is that of the first
        raise type(problems[0])("\n".join(str(problem) for problem in problems))
    directory = run_directory(run_config)
    session.result(
        {"valid": True, "config": str(config), "run_directory": str(directory)},
        f"{config} is valid\n{_needs_tasks(run_config, config)}Run directory: {directory}",
    )


def _needs_tasks(config: RunConfig, name: Path) -> str:
    """A line about what only the data can tell: whether it says its tasks, where the graph is made of them."""
    graph = getattr(config.method, "graph", None)
    if graph is None or graph.kind != "labels" or config.data.source in ("planted", "natural_instructions"):
        return ""
    return f"method.graph.kind = labels needs tasks that clients share; `fedmira data {name}` shows those of the data\n"


def missing_files(config: RunConfig) -> list[FedmiraError]:
    """Return an error for each file or folder that `config` names and that is not there. Hub ids are left alone.

    A leading `~` is the home folder, as in a run.
    """
    problems: list[FedmiraError] = []
    data = config.data
    data_path = getattr(data, "path", None)
    only_local = data.source in ("natural_instructions", "jsonl")
    if (
        data_path is not None
        and (only_local or looks_local(data_path) or data_path.endswith(_ENDINGS))
        and not _is_there(data_path)
    ):
        what = "a folder of task files" if data.source == "natural_instructions" else "a file, a folder or a pattern"
        problems.append(
            DataError(f"data.path: {data_path} does not exist; give {what} (paths are relative to the current folder)")
        )
    graph = getattr(config.method, "graph", None)
    if graph is not None and graph.path is not None and not os.path.isfile(home_expanded(graph.path)):
        problems.append(
            DataError(f"method.graph.path: {graph.path} does not exist; give a .json, .npy or .csv file of the graph")
        )
    if graph is not None and graph.probe_path is not None and not _is_there(graph.probe_path):
        problems.append(
            DataError(f"method.graph.probe_path: {graph.probe_path} does not exist; give a file of examples")
        )
    model = config.model.path
    if model != "embedded" and looks_local(model) and not os.path.isfile(home_expanded(model) / "config.json"):
        problems.append(
            SetupError(
                f"model.path: {model} is not a folder with a model in Hugging Face format (it has no config.json); "
                "give such a folder, a Hugging Face id such as Qwen/Qwen3-0.6B, or `embedded`"
            )
        )
    return problems


def _is_there(path: str) -> bool:
    expanded = str(home_expanded(path))
    # unlike Path.exists, these do not raise where a folder may not be read or a name is too long
    return os.path.exists(expanded) or any(glob.iglob(expanded, recursive=True))
