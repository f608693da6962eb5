"""The server's mixing of an arena file against copying the same file; both end when the bytes are on the disk.

The file is scaled down in parameters per client, not in clients: memory does not depend on the former, and time is
proportional to it. Before every repetition the system is told to forget the files.

Axes: K clients, P parameters of one adapter.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.gate import UnequalError
from benchmarks.groups.mixing import COPY, MIX, NEIGHBOURS, TAU, edges
from benchmarks.memory import with_peak
from benchmarks.options import Options
from benchmarks.results import Row, Section
from benchmarks.timing import interleave
from fedmira.federation.multiply import SparseMatrix
from fedmira.randomness import torch_generator
from fedmira.runs.arena_file import ArenaFile, create, read_rows, write_rows
from fedmira.runs.arena_mixing import mix

FULL_PARAMETERS = 5_000_000
SCRATCH = Path("runs")
"""Beside the runs, because a folder for temporary files may lie in memory."""
OVER_COPY, MEMORY = "times copying", "peak GB"
_ROWS_WRITTEN_TOGETHER = 500
_TOLERANCE = 2**-7
"""Of numbers below 2 that are rounded to bfloat16 once."""


def measure_disk_mixing(
    name: str, num_clients: int, num_parameters: int, options: Options, say: Callable[[str], None]
) -> Section:
    """Time one pass of the published step over a bfloat16 file, and a copy of the file."""
    SCRATCH.mkdir(exist_ok=True)
    section = Section(
        name,
        f"{num_clients:,} clients x {num_parameters:,} parameters, bfloat16, {NEIGHBOURS} neighbours, on disk; "
        f"{FULL_PARAMETERS:,} parameters would take {FULL_PARAMETERS / num_parameters:g} times as long",
    )
    matrix = step_matrix(num_clients)
    with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
        arena = create(Path(folder) / "arena.safetensors", num_clients, num_parameters)
        _fill(arena)
        mixed, copied = (Path(folder) / file for file in ("mixed.safetensors", "copied.safetensors"))
        say(f"  a file of {arena.num_bytes / 1e9:.2f} GB is made")
        _, peak_bytes = with_peak(lambda: mix(arena, matrix, mixed), "cpu")
        _check(arena, matrix, mixed)

        def mix_afresh() -> None:
            mix(arena, matrix, mixed)

        def copy_afresh() -> None:
            shutil.copyfile(arena.path, copied)
            with copied.open("rb+") as file:
                os.fsync(file.fileno())

        # mixing has had its warm-up
        copy_afresh()
        times = interleave(
            {MIX: mix_afresh, COPY: copy_afresh},
            warm_up=options.warm_up,
            repeats=options.repeats,
            prepare=lambda: _forget(arena.path, mixed, copied),
        )
    section.rows = [Row.timed(contestant, times[contestant]) for contestant in times]
    section.row(MIX).peak_bytes = peak_bytes
    section.measures = {OVER_COPY: times[MIX].median / times[COPY].median, MEMORY: peak_bytes / 1e9}
    section.facts = {"bytes": arena.num_bytes}
    say(f"  mixing {times[MIX].median:.2f} s, copying {times[COPY].median:.2f} s, peak {peak_bytes / 1e9:.2f} GB")
    return section


def step_matrix(num_clients: int) -> SparseMatrix:
    """I - tau L of the benchmark's graph, by its non-zero entries."""
    parts = edges(num_clients)
    here_K = np.arange(num_clients)
    rows, columns = [here_K], [here_K]
    values = [np.full(num_clients, 1.0 - 2.0 * TAU * sum(weight for *_, weight in parts))]
    for one, other, weight in parts:
        rows += [one, other]
        columns += [other, one]
        values += [np.full(num_clients, TAU * weight)] * 2
    rows_E, columns_E, values_E = (np.concatenate(arrays) for arrays in (rows, columns, values))
    # row after row and by column within each, as `sparse` leaves them
    order = np.lexsort((columns_E, rows_E))
    starts = np.arange(num_clients + 1) * len(rows)
    return SparseMatrix(
        torch.from_numpy(starts.astype(np.int32)),
        torch.from_numpy(columns_E[order].astype(np.int32)),
        torch.from_numpy(values_E[order]),
        num_clients,
    )


def _fill(arena: ArenaFile) -> None:
    """Random numbers, the same for every group of clients but for a factor of each."""
    draw = torch_generator(0, "benchmark arena file")
    rows_SP = torch.empty(_ROWS_WRITTEN_TOGETHER, arena.num_parameters).uniform_(-1.0, 1.0, generator=draw)
    for start in range(0, arena.num_clients, _ROWS_WRITTEN_TOGETHER):
        ids = range(start, min(start + _ROWS_WRITTEN_TOGETHER, arena.num_clients))
        write_rows(arena, ids, rows_SP[: len(ids)] * (1.0 - start / arena.num_clients))


def _check(arena: ArenaFile, matrix: SparseMatrix, mixed: Path) -> None:
    """Compare a client with the sum over its neighbours in float64."""
    client = arena.num_clients // 2
    entries = slice(int(matrix.starts[client]), int(matrix.starts[client + 1]))
    near_EP = read_rows(arena, matrix.columns_E[entries].tolist()).double()
    expected_P = matrix.weights_E[entries] @ near_EP
    target = ArenaFile(mixed, arena.num_clients, arena.num_parameters, arena.block_columns, arena.dtype)
    difference = float((read_rows(target, [client])[0].double() - expected_P).abs().max())
    if not difference <= _TOLERANCE:
        raise UnequalError(f"mixing on disk differs from (I - tau L) Theta by {difference:.1e}, more than rounding")


def _forget(*paths: Path) -> None:
    """Ask the system to read these files from the disk again."""
    for path in paths:
        if path.exists():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
