"""Super-NaturalInstructions: a folder of task files in the official schema (Wang et al. 2022, arXiv 2204.07705).

Knows nothing about how examples become clients.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedmira.config.data import NaturalInstructionsConfig
from fedmira.data.sources.files import Bad, file_provenance, read_text, visible
from fedmira.data.sources.records import UnusableRecordError, refuse_half_characters, refuse_mostly_bad
from fedmira.data.sources.source import Source
from fedmira.errors import DataError, nearest
from fedmira.paths import home_expanded
from fedmira.types import Example


def load(config: NaturalInstructionsConfig, seed: int) -> Source:
    """Read the task files of `config.path`, in the order of their names or of `config.tasks`, without hidden ones. The
    seed is not used.

    The instruction is the (first) Definition, task is the file name without `.json`, category the first of Categories,
    and an instance's outputs are its references, the first of them the answer.

    Raises:
        DataError: the folder or a task is missing, a file is unreadable or does not follow the schema.
    """
    examples: list[Example] = []
    files = []
    for path in _task_files(config):
        text, sha256 = read_text(path)
        found, bad = _read_task(path, text)
        examples += found
        files.append(file_provenance(path, sha256, len(found), bad))
    return Source(tuple(examples), {"source": "natural_instructions", "files": files})


def _task_files(config: NaturalInstructionsConfig) -> list[Path]:
    folder = home_expanded(config.path)
    if not os.path.isdir(folder):
        raise DataError(
            f"data.path = {config.path!r} is not a folder. Give the folder that holds the task files (task*.json)."
        )
    available = {path.name.removesuffix(".json"): path for path in visible(folder.glob("*.json"))}
    if not available:
        raise DataError(f"the folder {config.path!r} holds no .json file. Give the folder that holds the task files.")
    if config.tasks is None:
        return list(available.values())
    wanted = dict.fromkeys(task.removesuffix(".json") for task in config.tasks)
    unknown = [task for task in wanted if task not in available]
    if unknown:
        raise DataError(
            f"data.tasks names {unknown[0]!r}, which is not among the {len(available)} task files in {config.path!r}"
            f"{nearest(unknown[0], available)}. Correct the name, or leave data.tasks out to take all."
        )
    return [available[task] for task in wanted]


def _read_task(path: Path, text: str) -> tuple[list[Example], list[Bad]]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"the task file {str(path)!r} is not JSON: {error}. Repair or remove it.") from error
    if not isinstance(content, Mapping):
        raise _schema_error(path, f"it holds a {type(content).__name__}, not an object")
    definition = _first_text(content, "Definition", path)
    category = _first_text(content, "Categories", path)
    instances = content.get("Instances")
    if not isinstance(instances, list):
        raise _schema_error(path, "Instances is missing or not a list")
    task = path.name.removesuffix(".json")
    examples, bad = [], []
    for number, instance in enumerate(instances, start=1):
        try:
            input_, outputs, id_ = _parts(instance)
        except UnusableRecordError as error:
            bad.append(Bad(number, str(error)))
            continue
        examples.append(
            Example(
                instruction=definition,
                input=input_,
                output=outputs[0],
                references=outputs if len(outputs) > 1 else (),
                task=task,
                category=category,
                id=id_ or f"{task}:{number}",
            )
        )
    refuse_mostly_bad(path.name, len(examples), bad)
    return examples, bad


def _parts(instance: Any) -> tuple[str, tuple[str, ...], str]:
    """Input, outputs and id, which may be empty."""
    if not isinstance(instance, Mapping):
        raise UnusableRecordError(f"an instance must be an object, not {type(instance).__name__}")
    if not isinstance(instance.get("input"), str):
        raise UnusableRecordError("input is missing or not text")
    output, id_ = instance.get("output"), str(instance.get("id") or "")
    texts = [output] if isinstance(output, str) else output
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
        raise UnusableRecordError("output is missing, empty or not a list of texts")
    refuse_half_characters(instance["input"], *texts, id_)
    return instance["input"], tuple(texts), id_


def _first_text(content: Mapping[str, Any], field: str, path: Path) -> str:
    value = content.get(field)
    first = value[0] if isinstance(value, list) and value else value
    if not isinstance(first, str) or not first.strip():
        raise _schema_error(path, f"{field} is missing or not a list of texts")
    try:
        refuse_half_characters(first)
    except UnusableRecordError as error:
        raise _schema_error(path, f"in {field}, {error}") from None
    return first


def _schema_error(path: Path, problem: str) -> DataError:
    return DataError(
        f"the task file {str(path)!r} does not follow the Super-NaturalInstructions schema: {problem}. It needs "
        "Definition, Categories and Instances with input and output. Repair it, or list other tasks in data.tasks."
    )
