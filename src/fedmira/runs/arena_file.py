"""The adapters of very many clients on disk: a row at a time for clients, a block of columns at a time for the server.

    safetensors header, padded to whole pages
    columns-000000000000    (K, c)     columns 0 to c of every client
    columns-000000065536    (K, c)     the next c columns; the last block may be narrower

Mixing acts on each column alone, so it can stream whole blocks in bounded memory (`arena_mixing`); a client's row is
P / c short pieces. A new file is written beside its path and renamed when it is durable, so after a crash the path is
old or new. Rows are written in place: after a crash the rows being written are lost, the others are not.
There is no checksum. One process at a time writes. No pickle. Knows nothing about rounds or what the columns mean.

Axes: K clients, S some of them, P parameters of one adapter, c columns of a block.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fedmira.errors import IntegrityError
from fedmira.runs.atomic import CHUNK_BYTES, disk_errors_named, open_regular, replacing

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}
_BLOCK_BYTES = 128 << 20
PAGE_BYTES = 4096
"""What direct transfers are aligned to; headers are padded to it."""


@dataclass(frozen=True, slots=True)
class ArenaFile:
    """Where an arena lies on disk and how it is cut; a value, no file is held open."""

    path: Path
    num_clients: int
    num_parameters: int
    block_columns: int
    """c: columns of a block; the last may have fewer."""
    dtype: torch.dtype
    """float32 or bfloat16."""

    @property
    def blocks(self) -> tuple[slice, ...]:
        """The columns of each block, in the order of the file."""
        starts = range(0, self.num_parameters, self.block_columns)
        return tuple(slice(start, min(start + self.block_columns, self.num_parameters)) for start in starts)

    @property
    def num_bytes(self) -> int:
        """Length of the file."""
        return self.position(self.num_parameters)

    def position(self, column: int) -> int:
        """Where in the file the block that begins with `column` begins, bytes."""
        return len(_header(self)) + self.num_clients * column * self.dtype.itemsize


def create(
    path: Path,
    num_clients: int,
    num_parameters: int,
    dtype: torch.dtype = torch.bfloat16,
    block_columns: int | None = None,
) -> ArenaFile:
    """Create an arena of zeros with room on the disk for all of it.

    Args:
        path: a new file, by custom `*.safetensors`; its folder exists.
        num_clients: K, at least 1.
        num_parameters: P, at least 1.
        dtype: torch.bfloat16 or torch.float32.
        block_columns: c; None makes blocks of about 128 MiB. Mixing holds four blocks, a row is P / c pieces.

    Raises:
        IntegrityError: the path exists already.
        SetupError, IntegrityError: the disk is full or refused.
        ValueError: a size is below 1, or another dtype.
    """
    if block_columns is None:
        column_bytes = max(1, num_clients) * dtype.itemsize
        # so many columns end with a page
        step = PAGE_BYTES // math.gcd(PAGE_BYTES, column_bytes)
        block_columns = max(step, _BLOCK_BYTES // column_bytes // step * step)
    if min(num_clients, num_parameters, block_columns) < 1 or dtype not in _DTYPES:
        raise ValueError(
            f"num_clients, num_parameters and block_columns must be at least 1 and dtype one of {list(_DTYPES)}; "
            f"given {num_clients}, {num_parameters}, {block_columns}, {dtype}"
        )
    if os.path.lexists(path):
        raise IntegrityError(f"{path} exists already; remove it, or choose another path")
    arena = ArenaFile(path, num_clients, num_parameters, min(block_columns, num_parameters), dtype)
    with new_arena(arena):
        pass
    return arena


def read_rows(arena: ArenaFile, ids: Sequence[int]) -> torch.Tensor:
    """Return the adapters of the clients `ids`, (S, P), in their order and in the dtype of the file.

    Raises:
        SetupError, IntegrityError: the disk refused.
        IntegrityError: the file is no longer as long as it was.
        ValueError: an id is not in 0 to K - 1.
    """
    _refuse_ids(arena, ids)
    rows_SP = torch.empty(len(ids), arena.num_parameters, dtype=arena.dtype)
    with disk_errors_named(arena.path, "read"), open_regular(arena.path) as file:
        for columns, position, count in _pieces(arena, ids):
            piece = torch.empty(count.stop - count.start, columns.stop - columns.start, dtype=arena.dtype)
            read_at(file.fileno(), piece, position, arena.path)
            rows_SP[count, columns] = piece
    return rows_SP


def write_rows(arena: ArenaFile, ids: Sequence[int], rows_SP: torch.Tensor) -> None:
    """Write the adapters of the clients `ids` in place, rounded to the dtype of the file, and make them durable.

    Many rows at once are faster than one by one, and clients that follow each other are written together.

    Raises:
        SetupError, IntegrityError: the disk refused.
        ValueError: an id is not in 0 to K - 1 or comes twice, or `rows_SP` is not (S, P).
    """
    _refuse_ids(arena, ids)
    expected = (len(ids), arena.num_parameters)
    if tuple(rows_SP.shape) != expected or len(set(ids)) != len(ids):
        raise ValueError(f"rows of {len(set(ids))} distinct clients must be {expected}; given {tuple(rows_SP.shape)}")
    with disk_errors_named(arena.path, "write"):
        descriptor = os.open(arena.path, os.O_WRONLY | os.O_NOFOLLOW)
        try:
            for columns, position, count in _pieces(arena, ids):
                write_at(descriptor, rows_SP[count, columns].to("cpu", arena.dtype).contiguous(), position)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def new_arena(arena: ArenaFile) -> Iterator[int]:
    """Yield a descriptor of a new file of zeros with the header of `arena`; see `atomic.replacing`."""
    with replacing(arena.path) as beside:
        descriptor = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        try:
            # a full disk shows now, not after an hour
            allocate = getattr(os, "posix_fallocate", lambda file, _, length: os.ftruncate(file, length))
            allocate(descriptor, 0, arena.num_bytes)
            os.pwrite(descriptor, _header(arena), 0)
            yield descriptor
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _header(arena: ArenaFile) -> bytes:
    """Return the safetensors header: 8 bytes of length and JSON, padded with spaces to whole pages."""
    column_bytes = arena.num_clients * arena.dtype.itemsize
    tensors = {
        f"columns-{columns.start:012d}": {
            "dtype": _DTYPES[arena.dtype],
            "shape": [arena.num_clients, columns.stop - columns.start],
            "data_offsets": [columns.start * column_bytes, columns.stop * column_bytes],
        }
        for columns in arena.blocks
    }
    facts = {
        "dtype": _DTYPES[arena.dtype],
        "num_clients": str(arena.num_clients),
        "num_parameters": str(arena.num_parameters),
        "block_columns": str(arena.block_columns),
    }
    text = json.dumps({"__metadata__": facts, **tensors}).encode()
    size = -(-(8 + len(text)) // PAGE_BYTES) * PAGE_BYTES - 8
    return struct.pack("<Q", size) + text.ljust(size)


def _pieces(arena: ArenaFile, ids: Sequence[int]) -> Iterator[tuple[slice, int, slice]]:
    """Yield per block and run of clients that follow each other: columns, position in the file, range of `ids`."""
    breaks = (np.flatnonzero(np.diff(ids) != 1) + 1).tolist()
    runs = [slice(start, stop) for start, stop in zip([0, *breaks], [*breaks, len(ids)], strict=True) if start < stop]
    for columns in arena.blocks:
        position = arena.position(columns.start)
        row_bytes = (columns.stop - columns.start) * arena.dtype.itemsize
        for run in runs:
            yield columns, position + ids[run.start] * row_bytes, run


def _refuse_ids(arena: ArenaFile, ids: Sequence[int]) -> None:
    wrong = [k for k in ids if not 0 <= k < arena.num_clients]
    if wrong:
        raise ValueError(f"clients {wrong[:5]} are not in {arena.path}, which holds 0 to {arena.num_clients - 1}")


def read_at(descriptor: int, values: torch.Tensor, position: int, path: Path) -> None:
    """Fill a contiguous tensor from a position of a file.

    Raises:
        IntegrityError: the file ends too early.
        OSError: the disk refused.
    """

    def some(view: memoryview, at: int) -> int:
        return os.preadv(descriptor, [view], at)

    if not _transfer(some, values, position):
        raise IntegrityError(f"{path} ends before byte {position + values.nbytes}: it was cut; use a copy of it")


def write_at(descriptor: int, values: torch.Tensor, position: int) -> None:
    """Write a contiguous tensor at a position of a file.

    Raises:
        OSError: the disk refused.
    """
    _transfer(lambda view, at: os.pwrite(descriptor, view, at), values, position)


def _transfer(some: Callable[[memoryview, int], int], values: torch.Tensor, position: int) -> bool:
    """Move all bytes of a contiguous tensor, as many as the system takes at a time; false if it takes none."""
    view = memoryview(values.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    done = 0
    while done < len(view):
        count = some(view[done : done + CHUNK_BYTES], position + done)
        if count == 0:
            return False
        done += count
    return True
