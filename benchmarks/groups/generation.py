"""Answering prompts of many clients: ours together against PEFT one client at a time.

Every answer has the full number of new tokens: models here have no end token, so that all do the same work. Tokens
become text by their numbers. PEFT merges each client's adapter into the base while that client answers, which is how it
is fastest. The answers must be the same: all in float64, nearly all in float32. In 16 bits merging rounds adapters, so
answers are compared with those of adapters that are kept apart, as ours are; and random weights have near ties that a
rounding turns, and what follows a turned token is another text: first tokens must agree, and how far answers do is
told.

Axes: K clients, P parameters of one adapter, B prompts of a batch, T tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.floors import generation_floor
from benchmarks.gate import UnequalError
from benchmarks.groups.training import OVER_FLOOR
from benchmarks.memory import with_peak
from benchmarks.options import Options
from benchmarks.peers.peer import OURS, PEFT, start_processes
from benchmarks.peers.peft_model import FIRST, adapter_parameters, load_row, make_peft_model
from benchmarks.peers.worker import Worker
from benchmarks.results import Row, Section
from benchmarks.timing import Lap, interleave
from benchmarks.workloads import Task, Workload, build, fingerprint
from fedmira.evaluation.generation import generate
from fedmira.model.base import BaseModel
from fedmira.types import Arena

Answers = list[list[str]]
GATE_NEW_TOKENS = 16
_FEWEST_EQUAL = 0.95
"""Share of answers that must be equal in float32, where a rounding can turn a near tie."""
_FEWEST_EQUAL_FIRST = 0.9
"""Share of answers whose first token must be equal in 16 bits."""


class Agreement(NamedTuple):
    """How far answers are those of another contestant."""

    equal: float
    """Share of answers that are equal."""
    equal_first: float
    """Share of answers whose first token is."""
    equal_tokens: float
    """Tokens of an answer before the first that differs, on average."""


@dataclass(frozen=True, slots=True)
class Generation:
    """One row of the benchmark: the prompts of a training workload's clients."""

    workload: Workload
    prompts_per_client: int
    new_tokens: int = 128

    @property
    def title(self) -> str:
        """For people."""
        workload = self.workload
        return (
            f"{workload.model}, {workload.dtype}: {workload.num_clients} clients, {self.prompts_per_client} prompts "
            f"of each in lengths of {workload.lengths}, {self.new_tokens} new tokens, rank {workload.rank}"
        )


class NumberTokenizer:
    """Writes tokens as their numbers; has no end token."""

    eos_token_id = None
    bos_token_id = None

    def decode(self, tokens: Sequence[int], **_unused: object) -> str:
        """The numbers, separated by spaces."""
        return " ".join(str(int(token)) for token in tokens)


class OursTogether:
    """All clients in shared batches."""

    def __init__(self, task: Task, prompts: list[list[np.ndarray]], new_tokens: int) -> None:
        self._base, self._arena = task.base, Arena(task.layout, task.start_SP)
        self._prompts, self._new_tokens = prompts, new_tokens

    def answer(self) -> Answers:
        """The answers of every client, in the order of its prompts."""
        return generate(self._base, self._arena, self._prompts, self._new_tokens)


class PeftOneByOne:
    """PEFT and transformers' generate; a batch holds the prompts of one client, padded on the left.

    Its adapter is merged into the base while it answers, unless it is kept `apart`. In 16 bits taking it out again
    leaves the base a little off, as it does for whoever answers so.
    """

    def __init__(self, task: Task, prompts: list[list[np.ndarray]], new_tokens: int, *, apart: bool = False) -> None:
        self._model = make_peft_model(task, merges=not apart).eval()
        self._parameters = adapter_parameters(self._model, task, FIRST)
        self._start_SP, self._prompts, self._new_tokens = task.start_SP, prompts, new_tokens
        self._decode, self._apart = task.base.tokenizer.decode, apart

    def answer(self) -> Answers:
        """The answers of every client, in the order of its prompts."""
        answers = []
        for start_P, prompts in zip(self._start_SP, self._prompts, strict=True):
            load_row(self._parameters, start_P)
            tokens_BT, mask_BT = _left_padded(prompts, start_P.device)
            if not self._apart:
                self._model.merge_adapter()
            with torch.inference_mode():
                output_BT = self._model.generate(
                    input_ids=tokens_BT,
                    attention_mask=mask_BT,
                    do_sample=False,
                    max_new_tokens=self._new_tokens,
                    pad_token_id=0,
                )
            if not self._apart:
                self._model.unmerge_adapter()
            answers.append([self._decode(row) for row in output_BT[:, tokens_BT.shape[1] :].tolist()])
        return answers


class InWorker:
    """A contestant that answers in a process of its own.

    Raises:
        UnequalError: its process made another task than `task`.
    """

    def __init__(self, worker: Worker, task: Task, generation: Generation) -> None:
        answers = {"prompts_per_client": generation.prompts_per_client, "new_tokens": generation.new_tokens}
        taken = worker.ask({"do": "take", "workload": asdict(generation.workload), "answers": answers})
        self._worker = worker
        self.settings: dict[str, str] = worker.ready["settings"]
        self.peak_bytes = 0
        """Of the last answers: the highest memory of the process, all of it."""
        if taken["fingerprint"] != fingerprint(task):
            raise UnequalError("a process made another task than this one")

    def answer(self) -> Answers:
        """The answers of every client, in the order of its prompts."""
        self.lap()
        answers: Answers = json.loads(self._worker.answers_file.read_text(encoding="utf-8"))
        return answers

    def lap(self) -> Lap:
        """The time of all answers, as the process measures it."""
        lap, self.peak_bytes = self._worker.lap()
        return lap


Answering = OursTogether | PeftOneByOne | InWorker


def answering_here(contestant: str, task: Task, generation: Generation) -> OursTogether | PeftOneByOne:
    """Make a contestant in this process."""
    prompts = _prompts(task, generation.prompts_per_client)
    return (OursTogether if contestant == OURS else PeftOneByOne)(task, prompts, generation.new_tokens)


def measure_generation(name: str, generation: Generation, options: Options, say: Callable[[str], None]) -> Section:
    """Compare the answers in float64, then time both."""
    section = Section(name, generation.title)
    with closing(start_processes((OURS, PEFT), options)) as processes:

        def answering(contestant: str, task: Task, generation: Generation) -> Answering:
            if contestant in processes:
                return InWorker(processes[contestant], task, generation)
            return answering_here(contestant, task, generation)

        gate = replace(
            generation,
            workload=replace(generation.workload, dtype="float64", num_clients=min(4, generation.workload.num_clients)),
            prompts_per_client=min(2, generation.prompts_per_client),
            new_tokens=GATE_NEW_TOKENS,
        )
        task = without_end(build(gate.workload, options.device))
        expected = answering(PEFT, task, gate).answer()
        share = agreement(answering(OURS, task, gate).answer(), expected).equal
        if share < 1.0:
            raise UnequalError(f"{1 - share:.0%} of the answers differ from PEFT's in float64; all must be equal")
        say("  gate: answers are equal in float64")
        task = without_end(build(generation.workload, options.device))
        prompts = _prompts(task, generation.prompts_per_client)
        in_16_bits = task.base.dtype.itemsize == 2
        kept_apart = PeftOneByOne(task, prompts, generation.new_tokens, apart=True).answer() if in_16_bits else None
        contestants = {contestant: answering(contestant, task, generation) for contestant in (OURS, PEFT)}
        answers, peaks = {}, {}
        for contestant, one in contestants.items():
            if isinstance(one, InWorker):
                answers[contestant] = one.answer()
                peaks[contestant] = one.peak_bytes
            else:
                answers[contestant], peaks[contestant] = with_peak(one.answer, options.device)
        agreed = agreement(answers[OURS], kept_apart or answers[PEFT])
        check_agreement(agreed, task.base.dtype)
        times = interleave(
            {name: one.lap if isinstance(one, InWorker) else one.answer for name, one in contestants.items()},
            warm_up=options.warm_up,
            repeats=options.repeats,
            device=options.device,
        )
    for contestant, one in contestants.items():
        row = Row.timed(contestant, times[contestant])
        row.peak_bytes, row.settings = peaks[contestant], getattr(one, "settings", {})
        section.rows.append(row)
    section.add_ratios(OURS)
    floor = generation_floor(task, prompts, generation.new_tokens)
    seconds = section.row(OURS).seconds
    assert seconds is not None
    section.measures[OVER_FLOOR] = seconds / floor.seconds
    section.facts = {
        "floor_seconds": floor.seconds,
        "floor_flops": floor.flops,
        "gemm_flops_per_second": floor.gemm_flops_per_second,
        "clients": len(prompts),
        "new_tokens": sum(len(answer.split()) for client in answers[OURS] for answer in client),
        "prompt_tokens": sum(len(prompt) for client in prompts for prompt in client),
        "equal_answers": agreed.equal,
        "equal_first_tokens": agreed.equal_first,
        "equal_tokens_per_answer": agreed.equal_tokens,
        "warm_up": options.warm_up + 1,
        "repeats": options.repeats,
    }
    for row in section.rows:
        say(f"  {row.contestant}: {row.seconds:.3f} s")
    return section


def agreement(answers: Answers, expected: Answers) -> Agreement:
    """Compare answers token by token."""
    pairs = [pair for ours, theirs in zip(answers, expected, strict=True) for pair in zip(ours, theirs, strict=True)]
    lengths = [_equal_tokens(ours.split(), theirs.split()) for ours, theirs in pairs]
    return Agreement(
        sum(ours == theirs for ours, theirs in pairs) / len(pairs),
        sum(length > 0 for length in lengths) / len(pairs),
        sum(lengths) / len(pairs),
    )


def check_agreement(found: Agreement, dtype: torch.dtype) -> None:
    """Refuse answers that a rounding does not explain.

    Raises:
        UnequalError: too few are equal; in 16 bits, too few begin with the same token.
    """
    if dtype.itemsize == 2:
        share, fewest, what = found.equal_first, _FEWEST_EQUAL_FIRST, "answers begin with PEFT's token"
    else:
        share, fewest, what = found.equal, _FEWEST_EQUAL, "answers equal PEFT's"
    if share < fewest:
        raise UnequalError(f"only {share:.0%} of the {what} in {str(dtype).removeprefix('torch.')}; {fewest:.0%} must")


def _equal_tokens(ours: Sequence[str], theirs: Sequence[str]) -> int:
    """How many tokens are equal before the first that differs."""
    return next((place for place, (one, other) in enumerate(zip(ours, theirs, strict=True)) if one != other), len(ours))


def without_end(task: Task) -> Task:
    """The task over a base without an end token, whose tokens become text by their numbers."""
    task.base.model.generation_config.eos_token_id = None
    base: BaseModel = replace(task.base, tokenizer=NumberTokenizer())
    return replace(task, base=base)


def _prompts(task: Task, count: int) -> list[list[np.ndarray]]:
    return [[example.tokens[: example.prompt_length] for example in client.train[:count]] for client in task.clients]


def _left_padded(prompts: Sequence[np.ndarray], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and attention mask, (B, T) each."""
    longest = max(len(prompt) for prompt in prompts)
    tokens_BT = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask_BT = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, longest - len(prompt) :] = torch.from_numpy(prompt).long()
        mask_BT[row, longest - len(prompt) :] = 1
    return tokens_BT.to(device), mask_BT.to(device)
