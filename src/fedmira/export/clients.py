"""What the clients of a run get to keep: as PEFT folders or whole models, or put to use on a question.

Needs the run directory and the base model; the clients' data is never read.
"""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fedmira import embedded_base_path
from fedmira.data.partition import check_names
from fedmira.errors import UsageError, nearest
from fedmira.export.peft import EMBEDDED_NAME, Settings, adapter_files, model_card, new_folder, write_files
from fedmira.export.whole_model import write_model
from fedmira.paths import home_expanded
from fedmira.types import Arena, Example, Layout

if TYPE_CHECKING:
    from fedmira.config.run import RunConfig
    from fedmira.model.base import BaseModel

BASE_FOLDER = "base"


class Trained(NamedTuple):
    """A run with a finished round: who its clients are and the adapters they keep."""

    config: RunConfig
    names: tuple[str, ...]
    adapters: Arena
    """(K, P), row k belongs to `names[k]`."""
    base: BaseModel
    rounds: int
    """Rounds that are behind these adapters."""

    @property
    def unfinished_line(self) -> str:
        """How far a run has come that goes on or was interrupted; empty if it is finished."""
        rounds = self.config.federation.rounds
        if self.rounds >= rounds:
            return ""
        return f"this run has finished {self.rounds} of {rounds} rounds; the adapter is that of round {self.rounds}"

    def row(self, client: str) -> int:
        """The row of `client`; raises UsageError with the nearest right names if there is no such client."""
        if client not in self.names:
            shown = ", ".join(self.names[:12]) + (f", ... ({len(self.names)} in all)" if len(self.names) > 12 else "")
            raise UsageError(f"the run has no client {client!r}; its clients: {shown}{nearest(client, self.names)}")
        return self.names.index(client)


def load_trained(run: Path) -> Trained:
    """Return the clients of the run in the folder `run` and what they keep, from its newest valid checkpoint.

    Raises:
        UsageError: `run` is no run directory, or no round of it is finished.
        IntegrityError: its files are damaged, or the base model is not the one it was trained over.
        SetupError: the base model cannot be loaded.
    """
    from fedmira.assembly import refuse_other_base
    from fedmira.model.base import load_base
    from fedmira.model.kinds import adapter_layout
    from fedmira.runs.checkpoint import load_latest
    from fedmira.runs.store import RunStore, no_finished_round

    if (run / "study.json").is_file():
        example = next(iter(sorted((run / "runs").glob("*"))), run / "runs" / "RUN")
        raise UsageError(f"{run} is a comparison, which holds several runs; name one of them, such as {example}")
    store = RunStore.open(run)
    checkpoint = load_latest(run, config_hash=store.config_hash)
    if checkpoint is None or checkpoint.facts["completed_rounds"] == 0:
        raise no_finished_round(run)
    manifest = store.manifest()
    base = load_base(store.config.base_model)
    refuse_other_base(run, manifest["model"], base)
    layout = adapter_layout(base, store.config.model.adapter, store.config.method.num_pairs)
    values_KP = checkpoint.tensors.get("personalised", checkpoint.tensors["state.adapters"])
    # who joined is written down first, and has no row yet if the process ended there
    names = tuple(client["name"] for client in manifest["clients"])[: len(values_KP)]
    shift_W = checkpoint.tensors.get("state.memory.shift")
    adapters = Arena(layout, values_KP.to(base.device), None if shift_W is None else shift_W.to(base.device))
    return Trained(store.config, names, adapters, base, int(checkpoint.facts["completed_rounds"]))


def export_clients(
    run: Path,
    client: str | None,
    out: Path,
    *,
    with_base: bool = False,
    warn: Callable[[str], object] = warnings.warn,
) -> dict[str, Path]:
    """Write the adapter of one client of a run, or of each, as PEFT folders; return the folder of each name.

    Where every weight was tuned (kind `full`), the folders hold whole models instead.

    Args:
        run: The run directory.
        client: One name, whose folder is `out`; or None for every client, each in `out`/NAME.
        out: New or empty folder.
        with_base: Put a copy of the embedded base model beside the adapters, as `out`/base.
        warn: Told if the run is not finished.

    Raises:
        UsageError: an unknown client, a folder that is not empty, or `with_base` without the embedded model.
        DataError: a client's name cannot be the name of a folder.
    """
    from fedmira.model.full import is_full, one_by_one

    trained = load_trained(run)
    whole = is_full(trained.adapters.layout)
    if with_base and whole:
        raise UsageError("--with-base has no effect: this run tuned every weight, so each folder is a whole model")
    embedded = trained.config.model.path == "embedded"
    if with_base and not embedded:
        raise UsageError(
            f"--with-base copies the embedded model only; this run's base is {trained.config.model.path}, load that"
        )
    everyone = client is None
    chosen = trained.names if client is None else (client,)
    rows = [trained.row(name) for name in chosen]
    # a run directory may have been made elsewhere: its names become folders here, so they are checked again
    check_names(chosen)
    if everyone and with_base and (same := [name for name in chosen if name.casefold() == BASE_FOLDER]):
        raise UsageError(
            f"the client {same[0]!r} would lie where --with-base puts the model; leave out --with-base, or export it "
            f"apart with --client {same[0]}"
        )
    base_path = trained.config.model.path
    if (local := home_expanded(base_path)).is_dir():
        # as written it means something else, or nothing, to who loads the export from another folder
        base_path = str(local.resolve())
    if embedded:
        base_path = (f"../{BASE_FOLDER}" if everyone else BASE_FOLDER) if with_base else EMBEDDED_NAME
    if line := trained.unfinished_line:
        warn(line)
    with new_folder(out) as folder:
        if with_base:
            shutil.copytree(embedded_base_path(), folder / BASE_FOLDER, copy_function=shutil.copyfile)
        targets = [folder / name if everyone else folder for name in chosen]
        for target in targets:
            target.mkdir(exist_ok=True)
        if whole:
            kept = trained.adapters.replace(trained.adapters.values_KP[rows])
            for target, row, _ in zip(targets, rows, one_by_one(trained.base, kept), strict=True):
                write_model(target, trained.base, _card(trained, row, base_path, run.resolve().name))
        else:
            for target, row in zip(targets, rows, strict=True):
                write_files(target, _files(trained, row, base_path, run.resolve().name))
    return {name: out / name if everyone else out for name in chosen}


def _files(trained: Trained, row: int, base_path: str, run_name: str) -> dict[str, bytes]:
    config = trained.config
    adapter = config.model.adapter
    layout = trained.adapters.layout
    settings = Settings(
        rank=adapter.rank,
        alpha=adapter.alpha,
        dropout=adapter.dropout,
        base_path=base_path,
        revision=config.model.revision,
        fan_in_fan_out=_stores_transposed(trained.base, layout),
    )
    files = adapter_files(layout, trained.adapters.values_KP[row], settings, shift_W=trained.adapters.shift_W)
    # the rank is known once the files are: of the client, of several pairs together, of what was merged into the base
    rank = json.loads(files["adapter_config.json"]).get("r")
    return {**files, "README.md": _card(trained, row, base_path, run_name, rank).encode()}


def _card(trained: Trained, row: int, base_path: str, run_name: str, rank: int | None = None) -> str:
    config = trained.config
    adapter = config.model.adapter
    sizes: dict[str, dict[str, object]] = {
        "lora": {"rank": rank},
        "prompt": {"virtual tokens": adapter.num_virtual_tokens},
        "p_tuning": {"virtual tokens": adapter.num_virtual_tokens},
        "full": {},
    }
    facts = {
        "client": trained.names[row],
        "run": run_name,
        "method": config.method.name,
        "rounds": f"{trained.rounds} of {config.federation.rounds}" if trained.unfinished_line else trained.rounds,
        "seed": config.seed,
        **sizes[adapter.kind],
        "template of the prompts": config.data.template,
    }
    return model_card(base_path, facts, adapter.kind, config.model.revision)


def _stores_transposed(base: BaseModel, layout: Layout) -> bool:
    """Whether the adapted layers are GPT-2's `Conv1D`."""
    return any(type(base.model.get_submodule(spec.layer)).__name__ == "Conv1D" for spec in layout.specs)


def answer(
    run: Path, client: str, instruction: str, context: str = "", *, warn: Callable[[str], object] = warnings.warn
) -> str:
    """Return what the run's model writes after `instruction` (and `context`) with the adapter of `client`, greedily.

    `warn` is told if the run is not finished, and if the question is too long to be read whole.

    Raises:
        UsageError: an unknown client, a run without a finished round, or a question that is no text.
    """
    from fedmira.data.sources.records import UnusableRecordError, refuse_half_characters
    from fedmira.data.tokenization import end_token
    from fedmira.evaluation.generation import generate

    try:
        refuse_half_characters(instruction, context)
    except UnusableRecordError as error:
        raise UsageError(f"the question is not valid UTF-8: {error}; save or type it as UTF-8") from error
    trained = load_trained(run)
    row = trained.row(client)
    config, base = trained.config, trained.base
    if line := trained.unfinished_line:
        warn(line)
    prompt, line = _question(trained, Example(instruction=instruction, output="", input=context))
    if line:
        warn(line)
    one = trained.adapters.replace(trained.adapters.values_KP[row : row + 1])
    ends = {end_token(base.tokenizer, config.data.template)}
    return generate(base, one, [[prompt]], config.evaluation.generation.max_new_tokens, ends=ends)[0][0]


def _question(trained: Trained, example: Example) -> tuple[np.ndarray, str]:
    """The prompt (T,), and how many tokens of it the model does not read, if any, and why."""
    from fedmira.data.tokenization import prompt_tokens
    from fedmira.evaluation.generation import tokens_for

    config, base, layout = trained.config, trained.base, trained.adapters.layout
    longest = min(config.data.max_length, base.max_length - layout.num_virtual_tokens)
    whole, prompt = (
        prompt_tokens(example, base.tokenizer, config.data.template, most, cut=config.data.cut)
        for most in (sys.maxsize, longest)
    )
    new_tokens, room = tokens_for(base, layout, config.evaluation.generation.max_new_tokens)
    left_out = len(whole) - min(len(prompt), room)
    if not left_out:
        return prompt, ""
    why = f"the base model has room for {room:,} beside {new_tokens:,} new ones"
    if config.data.max_length <= room:
        why = f"data.max_length of this run is {config.data.max_length}"
    return prompt, f"{left_out:,} tokens of the question were left out: as a prompt it has {len(whole):,}, and {why}"
