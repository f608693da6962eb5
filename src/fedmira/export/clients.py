"""What the clients of a run get to keep: as PEFT folders or whole models, or put to use on a question.

Needs the run directory and the base model; the clients' data is never read.
"""

from __future__ import annotations

import json
import os
import sys
import unicodedata
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fedmira import embedded_base_path
from fedmira.data.partition import check_names
from fedmira.errors import SetupError, UsageError, nearest
from fedmira.export.card import EMBEDDED_NAME, card_bytes, model_card, prompt_lines
from fedmira.export.pairs import num_pairs
from fedmira.export.peft import Settings, adapter_files, new_folder, write_files
from fedmira.export.whole_model import merged as with_adapter
from fedmira.export.whole_model import write_model
from fedmira.formats import listed
from fedmira.paths import home_expanded
from fedmira.types import Arena, Example, Layout

if TYPE_CHECKING:
    from fedmira.config.run import ModelConfig, RunConfig
    from fedmira.model.base import BaseModel
    from fedmira.runs.store import RunStore

BASE_FOLDER = "base"
VLLM_MAX_RANK = 512
"""The largest that `vllm serve --max-lora-rank` takes."""


class Trained(NamedTuple):
    """A run with a finished round: who its clients are and the adapters they keep."""

    config: RunConfig
    names: tuple[str, ...]
    adapters: Arena
    """(K, P), row k belongs to `names[k]`."""
    base: BaseModel
    rounds: int
    """Rounds that are behind these adapters."""
    skipped: tuple[str, ...] = ()
    """Newer checkpoints that are damaged, each with the reason."""
    moved: str = ""
    """What had to be loaded otherwise than the config says; empty if nothing."""
    epsilon: Mapping[str, float] = MappingProxyType({})
    """With `exchange.privacy`, by client: what its uploads have given away, as recorded last."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a person may not expect of these adapters."""
        lines = [*filter(None, [self.moved]), *(f"skipped a damaged checkpoint: {reason}" for reason in self.skipped)]
        rounds = self.config.federation.rounds
        if self.rounds < rounds and self.skipped:
            lines.append(f"the adapter is that of round {self.rounds} of {rounds}")
        elif self.rounds < rounds:
            lines.append(
                f"this run has finished {self.rounds} of {rounds} rounds; the adapter is that of round {self.rounds}"
            )
        return tuple(lines)

    @property
    def revision(self) -> str | None:
        """Which commit of the hub the base is, or what the config calls it; None where it is no id of the hub."""
        model = self.config.model
        if model.path == "embedded" or home_expanded(model.path).is_dir():
            return None
        # a branch moves, and adapters fit only the weights they were trained over
        return self.base.commit or model.revision

    def row(self, client: str) -> int:
        """The row of `client`; raises UsageError with the nearest right names if there is no such client."""
        # some systems part letters from their accents, and the data's names do not
        client = unicodedata.normalize("NFC", client)
        if client not in self.names:
            shown = listed(self.names, 12)
            raise UsageError(f"the run has no client {client!r}; its clients: {shown}{nearest(client, self.names)}")
        return self.names.index(client)


def load_trained(run: str | os.PathLike[str]) -> Trained:
    """Return the clients of the run in the folder `run` and what they keep, from its newest valid checkpoint.

    Raises:
        UsageError: `run` is no run directory, or no round of it is finished.
        IntegrityError: its files are damaged, or the base model is not the one it was trained over.
        SetupError: the base model cannot be loaded.
    """
    from fedmira.model.base import load_base
    from fedmira.model.kinds import adapter_layout
    from fedmira.runs.checkpoint import load_latest
    from fedmira.runs.lines import recorded_epsilon
    from fedmira.runs.same_base import recorded_commit, refuse_other_base
    from fedmira.runs.store import no_finished_round

    run = Path(run)
    store = _opened(run)
    checkpoint = load_latest(run, config_hash=store.config_hash)
    if checkpoint is None or checkpoint.facts["completed_rounds"] == 0:
        raise no_finished_round(run)
    manifest = store.manifest()
    model, moved = _loadable(store.config, manifest["model"])
    base = load_base(model, recorded_commit(manifest))
    refuse_other_base(run, manifest["model"], base)
    layout = adapter_layout(base, store.config.model.adapter, store.config.method.num_pairs)
    values_KP = checkpoint.tensors.get("personalised", checkpoint.tensors["state.adapters"])
    # who joined is written down first, and has no row yet if the process ended there
    names = tuple(client["name"] for client in manifest["clients"])[: len(values_KP)]
    shift_W = checkpoint.tensors.get("state.memory.shift")
    adapters = Arena(layout, values_KP.to(base.device), None if shift_W is None else shift_W.to(base.device))
    rounds = int(checkpoint.facts["completed_rounds"])
    spent: dict[str, float] = {}
    if store.config.exchange.privacy.enabled:
        # who never took part has sent nothing
        spent = dict.fromkeys(names, 0.0)
        spent |= recorded_epsilon(store.events())
    return Trained(store.config, names, adapters, base, rounds, checkpoint.skipped, moved, spent)


def fields_of(run: str | os.PathLike[str]) -> Mapping[str, str]:
    """Return `data.fields` of the run in the folder `run`: which fields of its data are what, if it says so.

    Raises:
        UsageError: `run` is no run directory.
        IntegrityError: its config is damaged.
    """
    fields: Mapping[str, str] = getattr(_opened(Path(run)).config.data, "fields", {})
    return fields


def _opened(run: Path) -> RunStore:
    from fedmira.runs.store import RunStore

    if (run / "study.json").is_file():
        example = next(iter(sorted((run / "runs").glob("*"))), run / "runs" / "RUN")
        raise UsageError(f"{run} is a comparison, which holds several runs; name one of them, such as {example}")
    return RunStore.open(run)


def _loadable(config: RunConfig, recorded: Mapping[str, object]) -> tuple[ModelConfig, str]:
    """The base to load for what was trained by `config`, perhaps on another machine, and what is said about it.

    Adapters mean the same on every device and over a base in any dtype; whole models are weights in one dtype.
    """
    from fedmira.model.source import resolve_device

    model, line = config.base_model, ""
    try:
        resolve_device(model.device)
    except SetupError:
        line = f"this run was trained with model.device = {model.device}, which is not there; auto is used instead"
        model = model.model_copy(update={"device": "auto"})
    if model.adapter.kind == "full" and "dtype" in recorded:
        model = model.model_copy(update={"dtype": recorded["dtype"]})
    return model, line


def export_clients(
    run: str | os.PathLike[str],
    client: str | None,
    out: str | os.PathLike[str],
    *,
    with_base: bool = False,
    merged: bool = False,
    warn: Callable[[str], object] = warnings.warn,
) -> dict[str, Path]:
    """Write the adapter of one client of a run, or of each, as PEFT folders; return the folder of each name.

    Where every weight was tuned (kind `full`), the folders hold whole models instead.

    Args:
        run: The run directory.
        client: One name, whose folder is `out`; or None for every client, each in `out`/NAME.
        out: New or empty folder.
        with_base: Put a copy of the embedded base model beside the adapters, as `out`/base.
        merged: Write whole models: the base with the low-rank adapter added to its weights.
        warn: Told what of the run or of the adapters may be unexpected, such as a run that is not finished.

    Raises:
        UsageError: an unknown client, a folder that is not empty, `with_base` without the embedded model, or `merged`
            for what is no low-rank adapter.
        DataError: a client's name cannot be the name of a folder.
    """
    from fedmira.model.full import is_full, one_by_one

    run, out = Path(run), Path(out)
    if with_base and merged:
        raise UsageError("--with-base has no effect with --merged, which writes whole models; leave it out")
    trained = load_trained(run)
    whole = is_full(trained.adapters.layout)
    if (with_base or merged) and whole:
        option = "--merged" if merged else "--with-base"
        raise UsageError(f"{option} has no effect: this run tuned every weight, so each folder is a whole model")
    if merged and not num_pairs(trained.adapters.layout):
        raise UsageError(
            "--merged adds low-rank adapters to weights, and this run's are of kind "
            f"{trained.config.model.adapter.kind}: rows before the prompt, which no weights stand for; leave it out, "
            "and load the folder with peft"
        )
    embedded = trained.config.model.path == "embedded"
    if with_base and not embedded:
        raise UsageError(
            f"--with-base copies the embedded model only, and this run's base is {trained.config.model.path}; load the "
            "adapter over that, or take --merged instead, which writes a whole model"
        )
    everyone = client is None
    chosen = trained.names if client is None else (client,)
    rows = [trained.row(name) for name in chosen]
    # a run directory may have been made elsewhere: its names become folders here, so they are checked again
    check_names(chosen, known=chosen)
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
    for line in trained.warnings:
        warn(line)
    ranks: dict[str, int] = {}
    with new_folder(out) as folder:
        if with_base:
            (folder / BASE_FOLDER).mkdir()
            write_files(folder / BASE_FOLDER, {path.name: path.read_bytes() for path in embedded_base_path().iterdir()})
        targets = [folder / name if everyone else folder for name in chosen]
        for target in targets:
            target.mkdir(exist_ok=True)
        if whole:
            kept = trained.adapters.replace(trained.adapters.values_KP[rows])
            for target, row, _ in zip(targets, rows, one_by_one(trained.base, kept), strict=True):
                write_model(target, trained.base, _card(trained, row, base_path, run.resolve().name))
        elif merged:
            for target, row in zip(targets, rows, strict=True):
                card = _card(trained, row, base_path, run.resolve().name, merged=True)
                with with_adapter(trained.base, trained.adapters, row):
                    write_model(target, trained.base, card)
        else:
            for target, row in zip(targets, rows, strict=True):
                files, ranks[trained.names[row]] = _files(trained, row, base_path, run.resolve().name)
                write_files(target, files)
    if (most := max(ranks.values(), default=0)) > VLLM_MAX_RANK:
        largest = next(name for name, rank in ranks.items() if rank == most)
        warn(f"the adapter of {largest} has rank {most:,}; peft loads it, vLLM serves at most {VLLM_MAX_RANK}")
    return {name: out / name if everyone else out for name in chosen}


def _files(trained: Trained, row: int, base_path: str, run_name: str) -> tuple[dict[str, bytes], int]:
    """The files of a PEFT folder, and the rank that they state; 0 for soft prompts."""
    config = trained.config
    adapter = config.model.adapter
    layout = trained.adapters.layout
    settings = Settings(
        rank=adapter.rank,
        alpha=adapter.alpha,
        dropout=adapter.dropout,
        base_path=base_path,
        revision=trained.revision,
        fan_in_fan_out=_stores_transposed(trained.base, layout),
    )
    files = adapter_files(layout, trained.adapters.values_KP[row], settings, shift_W=trained.adapters.shift_W)
    # the rank is known once the files are: of the client, of several pairs together, of what was merged into the base
    rank = int(json.loads(files["adapter_config.json"]).get("r", 0))
    return {**files, "README.md": card_bytes(_card(trained, row, base_path, run_name, rank))}, rank


def _card(trained: Trained, row: int, base_path: str, run_name: str, rank: int = 0, merged: bool = False) -> str:
    config, name = trained.config, trained.names[row]
    adapter, rounds = config.model.adapter, config.federation.rounds
    sizes: dict[str, dict[str, object]] = {
        "lora": {"adapter": "low-rank, merged into the weights"} if merged else {"rank": rank},
        "prompt": {"virtual tokens": adapter.num_virtual_tokens},
        "p_tuning": {"virtual tokens": adapter.num_virtual_tokens},
        "full": {},
    }
    facts = {
        "client": name,
        "run": run_name,
        "method": config.method.name,
        "rounds": str(trained.rounds) + (f" of {rounds}" if trained.rounds < rounds else ""),
        "seed": config.seed,
        **sizes[adapter.kind],
        "template of the prompts": config.data.template,
    }
    if name in trained.epsilon:
        privacy = f"epsilon {trained.epsilon[name]:.4g} at delta {config.exchange.privacy.delta:g}"
        if config.exchange.privacy.noise_seed == "run":
            privacy += ", for those who do not know the seed, from which the noise follows (noise_seed: run)"
        facts["differential privacy of what this client sent in the run"] = privacy
    prompts = prompt_lines(config.data.template, trained.base.tokenizer)
    return model_card(base_path, facts, "full" if merged else adapter.kind, trained.revision, prompts)


def _stores_transposed(base: BaseModel, layout: Layout) -> bool:
    """Whether the adapted layers are GPT-2's `Conv1D`."""
    return any(type(base.model.get_submodule(spec.layer)).__name__ == "Conv1D" for spec in layout.specs)


def answer(
    run: str | os.PathLike[str],
    client: str,
    instruction: str,
    context: str = "",
    *,
    max_new_tokens: int | None = None,
    warn: Callable[[str], object] = warnings.warn,
) -> str:
    """Return what the run's model writes after `instruction` (and `context`) with the adapter of `client`, greedily.

    Args:
        run: The run directory.
        client: Whose adapter answers.
        instruction: What is asked.
        context: Further context of the instruction.
        max_new_tokens: Where the answer is cut; None takes evaluation.generation.max_new_tokens of the run.
        warn: Told what of the run may be unexpected, and if the question is too long to be read whole.

    Raises:
        UsageError: an unknown client, a run without a finished round, or a question that is no text.
    """
    from fedmira.data.sources.records import UnusableRecordError, refuse_half_characters

    try:
        refuse_half_characters(instruction, context)
    except UnusableRecordError as error:
        raise UsageError(f"the question is not valid UTF-8: {error}; save or type it as UTF-8") from error
    question = Example(instruction=instruction, output="", input=context)
    return answers(run, client, [question], max_new_tokens=max_new_tokens, warn=warn)[0]


def answers(
    run: str | os.PathLike[str],
    client: str,
    questions: Sequence[Example],
    *,
    max_new_tokens: int | None = None,
    warn: Callable[[str], object] = warnings.warn,
) -> list[str]:
    """Return what `answer` does for each question, all of them read and answered together.

    The outputs of `questions` are not looked at; where there are several, what was left out of long ones is said once
    for all.
    """
    from fedmira.data.tokenization import end_token
    from fedmira.evaluation.generation import generate

    trained = load_trained(run)
    row = trained.row(client)
    config, base = trained.config, trained.base
    for line in trained.warnings:
        warn(line)
    if not questions:
        return []
    most = config.evaluation.generation.max_new_tokens if max_new_tokens is None else max_new_tokens
    prompts, lines = zip(*(_question(trained, question, most) for question in questions), strict=True)
    cut = [(question.id, line) for question, line in zip(questions, lines, strict=True) if line]
    if cut and len(questions) == 1:
        warn(cut[0][1])
    elif cut:
        warn(f"{len(cut):,} of {len(questions):,} questions are too long to be read whole; {cut[0][0]}: {cut[0][1]}")
    one = trained.adapters.replace(trained.adapters.values_KP[row : row + 1])
    return generate(base, one, [prompts], most, ends={end_token(base.tokenizer, config.data.template)})[0]


def _question(trained: Trained, example: Example, max_new_tokens: int) -> tuple[np.ndarray, str]:
    """The prompt (T,), and how many tokens of it the model does not read, if any, and why."""
    from fedmira.data.tokenization import prompt_tokens
    from fedmira.evaluation.generation import tokens_for

    config, base, layout = trained.config, trained.base, trained.adapters.layout
    new_tokens, room = tokens_for(base, layout, max_new_tokens)
    # of a prompt that has room for one token only, which may be the start token's, generation chooses
    longest = min(config.data.max_length, max(room, 2))
    whole, prompt = (
        prompt_tokens(example, base.tokenizer, config.data.template, most, cut=config.data.cut)
        for most in (sys.maxsize, longest)
    )
    left_out = len(whole) - min(len(prompt), room)
    if not left_out:
        return prompt, ""
    why = f"the base model has room for {room:,} beside {new_tokens:,} new ones"
    if config.data.max_length <= room:
        why = f"data.max_length of this run is {config.data.max_length}"
    return prompt, f"{left_out:,} tokens of the question were left out: as a prompt it has {len(whole):,}, and {why}"
