"""What happens to a job and its results between server and clients: encoded, noised, counted, checked.

A download is the difference to what the client received last, where that is configured; what rests at a client after
that is there as it came, though the server has it exactly. An upload is the difference d between where a client ended
and where it started; with error memory e (Seide et al. 2014; Karimireddy et al., ICML 2019) it sends Q(d + e) and
remembers e <- d + e - Q(d + e). The server goes on with start + Q(d + e), nothing else. Noise comes before compression.
Tensors that do not cross stay as they are. Without compression and noise every row is the client's own, bit for bit.

Of a job with seeds only numbers of directions and scalars cross, and are counted; the rows that they stand for move
here as they are.

What both sides remember is plain tensors and facts, so that a checkpoint can keep it; what they say changes only when a
round is complete. Knows nothing about how clients train.

Axes: K clients, S rows of a job, G groups, P parameters of one adapter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from fedmira.config.exchange import ExchangeConfig
from fedmira.errors import ConfigError
from fedmira.exchange.admission import sound
from fedmira.exchange.messages import carried, crossing, crossing_bytes, encoded_bytes
from fedmira.exchange.privacy import NO_LOSSES, privatise_, refuse_overspending, require_accountant
from fedmira.types import ClientReport, Job, Layout, SeedPool

_CHUNK_ELEMENTS = 1 << 24
_SCALAR_BYTES = 4
"""A slope crosses as a float32, the number of its direction as an int32."""


class Kept(NamedTuple):
    """What an exchange remembers between rounds; survives a checkpoint unchanged."""

    tensors: Mapping[str, torch.Tensor]
    """`error.B`, (K, P): what compression left out of the B-th row of each client. `copy.B`, (K, P): what it received
    last, and `known.B`, (K, G): of which groups; `held.B`, (K, G): of which it still has that, as they rested since."""
    facts: Mapping[str, Any]
    """JSON-able: `uploads`, how many noised uploads each client has made."""


class Sent(NamedTuple):
    """A job as the clients see it."""

    job: Job
    download_bytes: int


class Received(NamedTuple):
    """What the server gets to see."""

    ids: tuple[int, ...]
    values_SP: torch.Tensor
    reports: tuple[ClientReport, ...]
    upload_bytes: int


class Seam:
    """Carries jobs and results across, and remembers what both sides must."""

    def __init__(self, config: ExchangeConfig, layout: Layout, names: Sequence[str], seed: int) -> None:
        self._config, self._layout, self._names, self._seed = config, layout, tuple(names), seed
        self._tensors: dict[str, torch.Tensor] = {}
        self._uploads = [0] * len(self._names)
        if config.privacy.enabled:
            require_accountant()

    def state(self) -> Kept:
        """What must be saved with a checkpoint."""
        return Kept(dict(self._tensors), {"uploads": list(self._uploads)})

    def restore(self, kept: Kept) -> None:
        """Go on from what `state` returned; of clients that joined since, which are the last, nothing is remembered.

        Uploads may be of more clients: of those who had joined by then, and will again.
        """
        before, num_clients = [int(count) for count in kept.facts["uploads"]], len(self._names)
        self._uploads = before + [0] * (num_clients - len(before))
        self._tensors = {
            name: torch.cat([rows, rows.new_zeros(num_clients - len(rows), rows.shape[1])])
            if len(rows) < num_clients
            else rows
            for name, rows in kept.tensors.items()
        }

    def refuse(self, job: Job) -> None:
        """Refuse a job that would spend a client's privacy budget.

        Raises:
            ParticipationError: with the client and what it would have spent.
        """
        if self._config.privacy.enabled and job.upload:
            rows = Counter(job.ids[: job.num_crossing])
            after = [self._uploads[id_] + count for id_, count in rows.items()]
            refuse_overspending(self._config.privacy, job.round, [self._names[id_] for id_ in rows], after)

    def refuse_losses(self) -> None:
        """Refuse to ask clients for losses where uploads are noised, because losses are not.

        Raises:
            ConfigError: noise is on.
        """
        if self._config.privacy.enabled:
            raise ConfigError(NO_LOSSES)

    def send(self, job: Job) -> Sent:
        """Return `job` with what the clients decode. Nothing new is remembered: the round may be stopped."""
        if job.seeds is not None:
            return Sent(job, _sums_bytes(job, job.seeds))
        form = self._config.download_compression
        shift_bytes = len(set(job.ids)) * job.shift_bytes
        if form == "none":
            return Sent(job, shift_bytes + crossing_bytes(self._layout, job.download, job.start_SP[: job.num_crossing]))
        crossed_SP = _crossed(job)
        got_SP, total_bytes = crossed_SP.clone(), shift_bytes
        for rows, ids, block in self._chunks(job, list(range(job.num_crossing))):
            for number, group in enumerate(self._layout.groups):
                if group not in job.download:
                    if f"held.{block}" not in self._tensors:
                        continue
                    held = self._remembered(f"held.{block}", job, len(self._layout.groups), torch.bool)[ids, number]
                    still = [row for row, has in zip(rows, held.tolist(), strict=True) if has]
                    if still:
                        copy_KP = self._remembered(f"copy.{block}", job, self._layout.num_parameters, got_SP.dtype)
                        self._put(got_SP, still, copy_KP[[job.ids[row] for row in still]], {group})
                    continue
                known = self._remembered(f"known.{block}", job, len(self._layout.groups), torch.bool)[ids, number]
                told = [row for row, knows in zip(rows, known.tolist(), strict=True) if knows]
                full = [row for row, knows in zip(rows, known.tolist(), strict=True) if not knows]
                total_bytes += crossing_bytes(self._layout, {group}, crossed_SP[full])
                if told:
                    copy_KP = self._remembered(f"copy.{block}", job, self._layout.num_parameters, crossed_SP.dtype)
                    copy_SP, wanted_SP = _wide(copy_KP[[job.ids[row] for row in told]]), _wide(crossed_SP[told])
                    moved_SP, num_bytes = carried(self._layout, {group}, wanted_SP - copy_SP, wanted_SP, form)
                    total_bytes += num_bytes
                    self._put(got_SP, told, copy_SP + moved_SP, {group})
        return Sent(_arrived(job, crossed_SP, got_SP), total_bytes)

    def receive(
        self, job: Job, values_SP: torch.Tensor, reports: tuple[ClientReport, ...], planned: Job | None = None
    ) -> Received:
        """Return what the server gets from the clients of `job`, and remember the round.

        Args:
            job: as `send` returned it.
            values_SP: the trained rows of those reports that name no failure; changed in place.
            reports: one per row of the job.
            planned: as `send` got it. Of tensors that rested and did not come back the server keeps these.
        """
        came = [row for row, report in enumerate(reports) if not report.failure]
        groups = job.upload & set(self._layout.groups)
        start_SP = job.start_SP if len(came) == len(reports) else job.start_SP[came]
        names = [self._names[job.ids[row]] for row in came]
        # rows that stay with their clients are the last ones
        sent = [row for row in came if row < job.num_crossing]
        sent_SP, sent_start_SP = values_SP[: len(sent)], start_SP[: len(sent)]
        upload_bytes = crossing_bytes(self._layout, groups, sent_SP)
        if job.seeds is not None:
            upload_bytes = _pairs_bytes(sum(reports[row].num_steps for row in sent))
        errors: list[tuple[list[int], int, torch.Tensor]] = []
        if groups and self._config.privacy.enabled:
            blocks = job.blocks
            streams = [(name, job.round, blocks[row]) for name, row in zip(names, sent, strict=False)]
            privatise_(self._layout, groups, sent_SP, sent_start_SP, streams, self._config.privacy, self._seed)
            for row in sent:
                self._uploads[job.ids[row]] += 1
        if groups and self._config.compression != "none":
            upload_bytes, errors = self._compressed(job, sent, sent_SP, sent_start_SP)
        admitted = sound(self._layout, groups, values_SP, names, start_SP, self._config.max_norm_ratio, len(sent))
        told = list(reports)
        for place, reason in admitted.rejected.items():
            told[came[place]] = told[came[place]]._replace(failure=reason)
        # a client that lost one of its rows is missing in all
        lost = {job.ids[row] for row, report in enumerate(told) if report.failure}
        used = {place for place in admitted.accepted if job.ids[came[place]] not in lost}
        self._remember(job, came, used, errors)
        rows = [came[place] for place in admitted.accepted]
        if planned is not None and (resting := set(self._layout.groups) - job.trainable - groups):
            self._put(admitted.values_SP, list(range(len(rows))), planned.start_SP[rows], resting)
        ids = tuple(job.ids[row] for row in rows)
        return Received(ids, admitted.values_SP, tuple(told), upload_bytes)

    # -------------------------------------------------------------------------------------------------------- one round

    def _compressed(
        self, job: Job, came: list[int], values_SP: torch.Tensor, start_SP: torch.Tensor
    ) -> tuple[int, list[tuple[list[int], int, torch.Tensor]]]:
        """Replace, in place, the rows by what the server decodes; the bytes, and (places, block, what was left out)."""
        config, groups = self._config, job.upload
        total_bytes, errors = 0, []
        for places, ids, block in self._chunks(job, came):
            wide_SP = _wide(start_SP[places])
            wanted_SP = _wide(values_SP[places]) - wide_SP
            if config.error_feedback:
                error_KP = self._remembered(f"error.{block}", job, self._layout.num_parameters, wanted_SP.dtype)
                wanted_SP += error_KP[ids]
            got_SP, num_bytes = carried(self._layout, groups, wanted_SP, wide_SP, config.compression, config.top_k)
            total_bytes += num_bytes
            self._put(values_SP, places, wide_SP + got_SP, groups)
            if config.error_feedback:
                errors.append((places, block, wanted_SP - got_SP))
        return total_bytes, errors

    def _remember(
        self, job: Job, came: list[int], used: set[int], errors: list[tuple[list[int], int, torch.Tensor]]
    ) -> None:
        """Keep what the round leaves behind; a client whose upload is not used forgets that it sent it."""
        for places, block, error_SP in errors:
            kept = [number for number, place in enumerate(places) if place in used]
            rows = [came[places[number]] for number in kept]
            memory_KP = self._tensors[f"error.{block}"]
            for spec in crossing(self._layout, job.upload):
                columns = spec.columns
                memory_KP[[job.ids[row] for row in rows], columns] = error_SP[kept, columns]
        if self._config.download_compression == "none":
            return
        num_groups, crossed_SP = len(self._layout.groups), _crossed(job)
        for rows, ids, block in self._chunks(job, list(range(job.num_crossing))):
            copy_KP = self._remembered(f"copy.{block}", job, self._layout.num_parameters, job.start_SP.dtype)
            known_KG = self._remembered(f"known.{block}", job, num_groups, torch.bool)
            for spec in crossing(self._layout, job.download):
                columns = spec.columns
                copy_KP[ids, columns] = crossed_SP[rows, columns]
                known_KG[ids, self._layout.groups.index(spec.group)] = True
            if f"held.{block}" not in self._tensors and job.download <= job.trainable:
                continue
            held_KG = self._remembered(f"held.{block}", job, num_groups, torch.bool)
            for number, group in enumerate(self._layout.groups):
                if group in job.download | job.trainable:
                    held_KG[ids, number] = group not in job.trainable

    def _remembered(self, name: str, job: Job, width: int, dtype: torch.dtype) -> torch.Tensor:
        """The memory `name`, (K, width), on the device of the job; zeros before it was first written."""
        device = job.start_SP.device
        if name not in self._tensors:
            self._tensors[name] = torch.zeros(len(self._names), width, dtype=dtype, device=device)
        self._tensors[name] = self._tensors[name].to(device)
        return self._tensors[name]

    def _put(
        self, into_SP: torch.Tensor, rows: list[int], from_SP: torch.Tensor, groups: frozenset[str] | set[str]
    ) -> None:
        for spec in crossing(self._layout, groups):
            columns = spec.columns
            into_SP[rows, columns] = from_SP[:, columns].to(into_SP)

    def _chunks(self, job: Job, rows: list[int]) -> list[tuple[list[int], list[int], int]]:
        """Places in `rows`, their clients and their block, a few at a time, so that no copy of all rows is made."""
        step = max(1, _CHUNK_ELEMENTS // max(1, self._layout.num_parameters))
        by_block: dict[int, list[int]] = {}
        blocks = job.blocks
        for place, row in enumerate(rows):
            by_block.setdefault(blocks[row], []).append(place)
        return [
            (chunk := places[first : first + step], [job.ids[rows[place]] for place in chunk], block)
            for block, places in by_block.items()
            for first in range(0, len(places), step)
        ]


def _crossed(job: Job) -> torch.Tensor:
    """What each crossing row's client is sent, (S, P): its start, or what it is pulled towards if that is something
    else; then the start is its own last adapter, which it has."""
    start_SP = job.start_SP[: job.num_crossing]
    if job.pull is None:
        return start_SP
    target_SP = job.pull.target_SP[: job.num_crossing]
    pulled_S1 = start_SP.new_tensor(job.pull.strength_S[: job.num_crossing])[:, None] > 0
    elsewhere_S1 = pulled_S1 & (target_SP != start_SP).any(dim=1, keepdim=True)
    return torch.where(elsewhere_S1, target_SP, start_SP)


def _arrived(job: Job, crossed_SP: torch.Tensor, got_SP: torch.Tensor) -> Job:
    """Return `job` as the clients have it: wherever a row starts from, or is pulled to, what was sent, what it got."""
    crossing = list(range(job.num_crossing))
    first_row: dict[int, int] = {}
    for row in crossing:
        first_row.setdefault(job.ids[row], row)

    def at_clients(rows_SP: torch.Tensor, rows: list[int], sent: list[int]) -> torch.Tensor:
        is_what_was_sent_S1 = (rows_SP[rows] == crossed_SP[sent]).all(dim=1, keepdim=True)
        arrived_SP = rows_SP.clone()
        arrived_SP[rows] = torch.where(is_what_was_sent_S1, got_SP[sent], rows_SP[rows])
        return arrived_SP

    job = job._replace(start_SP=at_clients(job.start_SP, crossing, crossing))
    if job.pull is None:
        return job
    # a row that stays with its client knows what the client's first row got
    staying = [row for row in range(job.num_crossing, len(job.ids)) if job.ids[row] in first_row]
    sent = crossing + [first_row[job.ids[row]] for row in staying]
    return job._replace(pull=job.pull._replace(target_SP=at_clients(job.pull.target_SP, crossing + staying, sent)))


def uncompressed_bytes(layout: Layout, job: Job, reports: Sequence[ClientReport]) -> int:
    """What upload and download of `job` would take if the tensors crossed as they are; who failed uploads nothing."""
    crossing_SP = job.start_SP[: job.num_crossing]
    came = [row for row, report in enumerate(reports[: job.num_crossing]) if not report.failure]
    up = crossing_bytes(layout, job.upload, crossing_SP if len(came) == len(crossing_SP) else crossing_SP[came])
    return up + crossing_bytes(layout, job.download, crossing_SP) + len(set(job.ids)) * job.shift_bytes


def planned_bytes(config: ExchangeConfig, layout: Layout, job: Job, num_steps: int) -> tuple[int, int]:
    """Upload and download bytes of `job`, of `num_steps` steps in all, once every client has received something."""
    if job.seeds is not None:
        return _pairs_bytes(num_steps), _sums_bytes(job, job.seeds)
    crossing_SP = job.start_SP[: job.num_crossing]
    up = encoded_bytes(layout, job.upload, crossing_SP, config.compression, config.top_k)
    down = encoded_bytes(layout, job.download, crossing_SP, config.download_compression, 1.0)
    return up, down + len(set(job.ids)) * job.shift_bytes


def _pairs_bytes(num_steps: int) -> int:
    """What a direction and a slope for each step take."""
    return 2 * _SCALAR_BYTES * num_steps


def _sums_bytes(job: Job, pool: SeedPool) -> int:
    """What the sum of scalars along each direction of the pool takes, for each row that is rebuilt from them."""
    return job.num_crossing * pool.size * _SCALAR_BYTES if job.download else 0


def _wide(rows_SP: torch.Tensor) -> torch.Tensor:
    """At least float32, where differences are formed."""
    return rows_SP.to(torch.promote_types(rows_SP.dtype, torch.float32))
