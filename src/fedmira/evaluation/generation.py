"""Answers prompts of many clients by greedy generation, each with its own adapter, all together.

Prompts are read in packed rows; then every unfinished answer grows by one token per step. Finished answers leave and
waiting prompts take their places. Knows nothing about references or scores.

Axes: K clients, P parameters of one adapter, B rows of a step, T tokens, d hidden features.
"""

from __future__ import annotations

from bisect import bisect
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, groupby

import numpy as np
import torch

from fedmira.data.packing import pack
from fedmira.data.tokenization import TokenizedExample
from fedmira.model.adapted import computes_in_parts
from fedmira.model.base import BaseModel
from fedmira.model.buckets import Growing
from fedmira.model.cache import KeyValueCache
from fedmira.model.full import is_full, one_by_one
from fedmira.model.shift import shifted
from fedmira.side_by_side import side_by_side
from fedmira.training.memory import AT_ONCE, available_bytes
from fedmira.types import Arena, Layout

_CPU_STEPS_BETWEEN_LOOKS = 1
_STEPS_BETWEEN_LOOKS = 8
"""How often finished answers are looked for: a look waits for a GPU, but costs nothing on a CPU."""
_KEPT_SHARE = 0.75
"""Rows are arranged anew when no more than this share of them is unfinished."""
_CPU_READ_TOKENS = 4096
_READ_TOKENS = 16384
"""Prompt tokens that are read together at most; a longer prompt is read alone."""
_MEMORY_SHARE = 0.4
"""Of the free memory, what keys and values may take."""
_FEWEST_ROWS = 32
"""Answers are written in two parts, side by side, where each has this many: with 16 each little is gained or lost."""
_GROUP_ROWS = 2
"""A group of rows costs a step as much as this many rows more: its adapter is read once."""


@dataclass(slots=True)
class _Answer:
    """One prompt with what has been written so far."""

    name: int
    client: int
    index: int
    """Among the client's prompts."""
    prompt: np.ndarray
    written: list[int] = field(default_factory=list)
    finished: bool = False


def generate(
    base: BaseModel,
    arena: Arena,
    prompts_per_client: Sequence[Sequence[np.ndarray]],
    max_new_tokens: int,
    *,
    ends: Collection[int] = (),
    batch_sequences: int = 256,
) -> list[list[str]]:
    """Answer every prompt greedily and return the answers without special tokens, in the order of the prompts.

    An answer ends at an end token (one of `ends`, the tokenizer's, or one that the model's generation config names) or
    after `max_new_tokens`. Settings of the model's generation config that change what is chosen, such as sampling or a
    repetition penalty, are left out.

    Args:
        base: the frozen model with its tokenizer.
        arena: (K, P); row k answers for client k.
        prompts_per_client: K lists of token ids, (T,) each, of at least one token. A prompt that leaves no room for
            `max_new_tokens` in the model's context loses its beginning, but for the tokenizer's start token; who knows
            of what else it can do without cuts it before, see `tokens_for`.
        max_new_tokens: at most this many tokens per answer, at least 1.
        ends: tokens that end an answer besides.
        batch_sequences: answers written at the same time, at most.

    Raises:
        ValueError: the arena has not one row per client, or a prompt is empty.
    """
    if arena.num_clients != len(prompts_per_client):
        raise ValueError(f"{arena.num_clients} adapters cannot answer for {len(prompts_per_client)} clients")
    for client, prompts in enumerate(prompts_per_client):
        for index, prompt in enumerate(prompts):
            if len(prompt) == 0:
                raise ValueError(f"prompt {index} of client {client} is empty; give it at least one token")
    if is_full(arena.layout):
        alone = zip(one_by_one(base, arena), prompts_per_client, strict=True)
        return [
            generate(moved, bare, [prompts], max_new_tokens, ends=ends, batch_sequences=batch_sequences)[0]
            for (moved, bare), prompts in alone
        ]
    new_tokens, room = tokens_for(base, arena.layout, max_new_tokens)
    answers = list(_waiting(prompts_per_client, room, getattr(base.tokenizer, "bos_token_id", None)))
    # outside of inference mode, so that the weights stay ordinary tensors
    with shifted(base, arena.layout, arena.shift_W):
        on_device = arena.replace(arena.values_KP.to(base.device))
        parts = _parts(answers, batch_sequences, new_tokens) if computes_in_parts(base, arena.layout) else [answers]
        rows, memory_share = batch_sequences // len(parts), _MEMORY_SHARE / len(parts)
        all_ends = _end_tokens(base).union(ends)

        def write(part: Sequence[_Answer]) -> None:
            # holds for one thread
            with torch.inference_mode():
                _Writer(base, on_device, new_tokens, all_ends, rows, memory_share).write(part)

        side_by_side([partial(write, part) for part in parts], AT_ONCE)
    texts = [[""] * len(prompts) for prompts in prompts_per_client]
    for answer in answers:
        texts[answer.client][answer.index] = base.tokenizer.decode(
            answer.written, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
    return texts


def tokens_for(base: BaseModel, layout: Layout, max_new_tokens: int) -> tuple[int, int]:
    """How many tokens an answer gets in the model's context, and how many are left for its prompt, 1 at least."""
    room = base.max_length - layout.num_virtual_tokens
    new_tokens = min(max_new_tokens, room - 1)
    return new_tokens, room - new_tokens


def _waiting(
    prompts_per_client: Sequence[Sequence[np.ndarray]], room: int, start_token: int | None
) -> Iterator[_Answer]:
    """The answers to write, client by client, long prompts first; a prompt keeps `room` tokens, see `_shortened`."""
    name = 0
    for client, prompts in enumerate(prompts_per_client):
        for index in sorted(range(len(prompts)), key=lambda index: -len(prompts[index])):
            prompt = np.asarray(prompts[index], dtype=np.int64)
            yield _Answer(name, client, index, _shortened(prompt, room, start_token))
            name += 1


def _shortened(prompt_T: np.ndarray, room: int, start_token: int | None) -> np.ndarray:
    """The last tokens, behind the start token if there was one: models are never without it.

    >>> _shortened(np.array([1, 5, 6, 7]), 3, 1).tolist(), _shortened(np.array([5, 6, 7]), 2, 1).tolist()
    ([1, 6, 7], [6, 7])
    """
    if len(prompt_T) > room > 1 and prompt_T[0] == start_token:
        return np.append(prompt_T[:1], prompt_T[1 - room :])
    return prompt_T[-room:]


def _end_tokens(base: BaseModel) -> frozenset[int]:
    named = base.model.generation_config.eos_token_id
    listed = named if isinstance(named, list) else [named]
    return frozenset(token for token in (*listed, base.tokenizer.eos_token_id) if token is not None)


def _parts(answers: list[_Answer], most_rows: int, new_tokens: int) -> list[list[_Answer]]:
    """All answers in one part, or in two of about as many tokens if there are enough; at most one client is in both."""
    if min(len(answers), most_rows) < AT_ONCE * _FEWEST_ROWS:
        return [answers]
    tokens = list(accumulate(len(answer.prompt) + new_tokens for answer in answers))
    half = bisect(tokens, tokens[-1] / 2)
    return [answers[:half], answers[half:]]


class _Writer:
    """Writes answers, `most_rows` at a time, with keys and values in `memory_share` of the free memory, at most."""

    def __init__(
        self, base: BaseModel, arena: Arena, new_tokens: int, ends: frozenset[int], most_rows: int, memory_share: float
    ) -> None:
        self._base = base
        self._on_cpu = base.device.type == "cpu"
        self._num_clients = arena.num_clients
        self._new_tokens = new_tokens
        self._ends = ends
        self._most_rows = most_rows
        self._virtual_tokens = arena.layout.num_virtual_tokens
        self._cache = KeyValueCache(base, arena)
        self._most_tokens = int(memory_share * available_bytes(base.device) / _bytes_per_token(base, arena))

    def write(self, answers: Sequence[_Answer]) -> None:
        """Fill `written` of every answer."""
        waiting = deque(answers)
        unfinished: list[_Answer] = []
        while waiting or unfinished:
            joining = self._join(waiting, unfinished)
            for batch in _batches(joining, _CPU_READ_TOKENS if self._on_cpu else _READ_TOKENS):
                self._read(batch)
            unfinished = sorted(
                (answer for answer in (*unfinished, *joining) if not answer.finished),
                key=lambda answer: (answer.client, answer.index),
            )
            if unfinished:
                self._step(unfinished, few=int(_KEPT_SHARE * len(unfinished)))
                unfinished = [answer for answer in unfinished if not answer.finished]

    def _join(self, waiting: deque[_Answer], unfinished: Sequence[_Answer]) -> list[_Answer]:
        """Take as many answers as there are rows and memory for, but one at least if nothing else is being written."""
        joining: list[_Answer] = []
        free = self._most_tokens - sum(self._length(answer) + self._new_tokens for answer in unfinished)
        while waiting and len(unfinished) + len(joining) < self._most_rows:
            free -= self._length(waiting[0]) + self._new_tokens
            if free < 0 and (unfinished or joining):
                break
            joining.append(waiting.popleft())
        return joining

    def _read(self, answers: Sequence[_Answer]) -> None:
        """Read prompts, sorted by client, and choose the first token of each."""
        examples: list[list[TokenizedExample]] = [[] for _ in range(self._num_clients)]
        for answer in answers:
            examples[answer.client].append(_as_example(answer.prompt))
        members = [Growing(answer.name, self._length(answer), self._new_tokens - 1) for answer in answers]
        hidden_Bd = self._cache.read(pack(examples, virtual_tokens=self._virtual_tokens), members)
        for answer, token in zip(answers, self._choose(hidden_Bd).tolist(), strict=True):
            self._append(answer, token)

    def _step(self, unfinished: Sequence[_Answer], few: int) -> None:
        """Write on until no more than `few` answers are unfinished, or one of them has all its tokens."""
        clients, rows_B = _in_groups(unfinished)
        tokens_B = torch.tensor([0 if answer is None else answer.written[-1] for answer in rows_B])
        tokens_B = tokens_B.to(self._base.device)
        steps = min(self._new_tokens - len(answer.written) for answer in unfinished)
        between = _CPU_STEPS_BETWEEN_LOOKS if self._on_cpu else _STEPS_BETWEEN_LOOKS
        with self._cache.rows([None if answer is None else answer.name for answer in rows_B], clients):
            while steps and sum(not answer.finished for answer in unfinished) > few:
                chosen = []
                for _ in range(min(between, steps)):
                    tokens_B = self._choose(self._cache.advance(tokens_B))
                    chosen.append(tokens_B)
                steps -= len(chosen)
                for answer, new in zip(rows_B, torch.stack(chosen, dim=1).tolist(), strict=True):
                    for token in new:
                        if answer is not None:
                            self._append(answer, token)

    def _length(self, answer: _Answer) -> int:
        """Tokens of the prompt, the virtual ones in front of it among them."""
        return self._virtual_tokens + len(answer.prompt)

    def _choose(self, hidden_Bd: torch.Tensor) -> torch.Tensor:
        return self._base.logits(hidden_Bd).argmax(dim=-1)

    def _append(self, answer: _Answer, token: int) -> None:
        if answer.finished:
            return
        answer.finished = token in self._ends
        if not answer.finished:
            answer.written.append(token)
            answer.finished = len(answer.written) == self._new_tokens


def _as_example(prompt_T: np.ndarray) -> TokenizedExample:
    """A prompt as packing takes it: its last row is the one whose next token is asked for."""
    return TokenizedExample(np.append(prompt_T, prompt_T[-1:]), len(prompt_T), "prompt")


def _bytes_per_token(base: BaseModel, arena: Arena) -> int:
    """Bytes of the keys and values of one token, found by reading one."""
    cache = KeyValueCache(base, arena.replace(arena.values_KP[:1]))
    virtual = arena.layout.num_virtual_tokens
    examples = [[_as_example(np.zeros(1, dtype=np.int64))]]
    cache.read(pack(examples, virtual_tokens=virtual), [Growing(0, virtual + 1, 0)])
    return -(-cache.num_bytes // (virtual + 1))


def _batches(answers: Sequence[_Answer], most_tokens: int) -> Iterator[list[_Answer]]:
    batch: list[_Answer] = []
    filled = 0
    for answer in answers:
        if batch and filled + len(answer.prompt) > most_tokens:
            yield batch
            batch, filled = [], 0
        batch.append(answer)
        filled += len(answer.prompt)
    if batch:
        yield batch


def _in_groups(answers: Sequence[_Answer]) -> tuple[list[int], list[_Answer | None]]:
    """The client of each group and the rows of all groups.

    All groups have the same number of rows, so that their low-rank products are one batched product; a client can
    have several, and the last one of a client is filled up with empty rows.

    >>> groups, rows = _in_groups([_Answer(i, client, i, np.ones(1)) for i, client in enumerate([0, 0, 2, 2, 2, 2])])
    >>> groups, [None if row is None else row.name for row in rows]
    ([0, 2, 2], [0, 1, 2, 3, 4, 5])
    """
    per_client = [(client, list(members)) for client, members in groupby(answers, key=lambda answer: answer.client)]
    counts = [len(members) for _, members in per_client]

    def cost(width: int) -> int:
        return sum(-(-count // width) for count in counts) * (width + _GROUP_ROWS)

    width = min(range(1, max(counts, default=1) + 1), key=cost)
    groups: list[int] = []
    rows: list[_Answer | None] = []
    for client, members in per_client:
        for start in range(0, len(members), width):
            part = members[start : start + width]
            groups.append(client)
            rows += part + [None] * (width - len(part))
    return groups, rows
