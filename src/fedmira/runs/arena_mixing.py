"""Mixes an arena on disk in one pass: a block is read and another written while a third is mixed.

Where the file system allows it, whole pages go past its cache (O_DIRECT): copying through the cache takes as much
processor time as mixing, and would push everything else out of memory. Knows nothing about where the matrix comes from.

Axes: K clients, P parameters of one adapter, c columns of a block.
"""

from __future__ import annotations

import fcntl
import os
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch

from fedmira.federation.multiply import SparseMatrix, multiply_sparse
from fedmira.runs.arena_file import PAGE_BYTES, ArenaFile, new_arena, read_at, write_at
from fedmira.runs.atomic import disk_errors_named, open_regular


def mix(arena: ArenaFile, matrix: SparseMatrix, target: Path) -> ArenaFile:
    """Write matrix @ arena to `target`, summed in float32 and rounded once, and return the arena there.

    One block is read and one written while another is mixed: four blocks of memory, and one pass over the disk. What
    lay at `target` before, the arena itself included, is replaced when everything is durable.

    Args:
        arena: (K, P).
        matrix: (K, K), such as `sparse(np.eye(K) - tau * laplacian(graph))`.
        target: a file in an existing folder, with room for another arena.

    Raises:
        SetupError, IntegrityError: the disk is full or refused; `target` is as it was.
        IntegrityError: the arena is shorter than it was; `target` is as it was.
        ValueError: the matrix is not (K, K).
    """
    if (matrix.num_rows, matrix.num_columns) != (arena.num_clients, arena.num_clients):
        raise ValueError(
            f"an arena of {arena.num_clients} clients is mixed by a square matrix of that size; given "
            f"({matrix.num_rows}, {matrix.num_columns})"
        )
    mixed = ArenaFile(target, arena.num_clients, arena.num_parameters, arena.block_columns, arena.dtype)
    with disk_errors_named(arena.path, "read"):
        file = open_regular(arena.path)
    with file, new_arena(mixed) as descriptor:
        _stream(arena, matrix, file.fileno(), descriptor)
    return mixed


def _stream(arena: ArenaFile, matrix: SparseMatrix, source: int, target: int) -> None:
    blocks = arena.blocks
    # taken once: a fresh page of memory costs more than what is computed on it
    buffers = [_page_aligned(arena.num_clients * arena.block_columns, arena.dtype) for _ in range(4)]

    def part(buffer: torch.Tensor, columns: slice) -> torch.Tensor:
        width = columns.stop - columns.start
        return buffer[: arena.num_clients * width].view(arena.num_clients, width)

    def read(index: int) -> torch.Tensor:
        block = part(buffers[index % 2], blocks[index])
        position = arena.position(blocks[index].start)
        with disk_errors_named(arena.path, "read"):
            _past_the_cache(source, position, block.nbytes)
            read_at(source, block, position, arena.path)
        return block

    def write(index: int, block: torch.Tensor) -> None:
        position = arena.position(blocks[index].start)
        _past_the_cache(target, position, block.nbytes)
        write_at(target, block, position)

    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        ahead = reader.submit(read, 0)
        behind: Future[None] | None = None
        for index, columns in enumerate(blocks):
            block = ahead.result()
            if index + 1 < len(blocks):
                ahead = reader.submit(read, index + 1)
            mixed = part(buffers[2 + index % 2], columns)
            multiply_sparse(matrix, block, mixed)
            if behind:
                behind.result()
            behind = writer.submit(write, index, mixed)
        if behind:
            behind.result()


def _page_aligned(num_elements: int, dtype: torch.dtype) -> torch.Tensor:
    num_bytes = num_elements * dtype.itemsize
    memory = torch.empty(num_bytes + PAGE_BYTES, dtype=torch.uint8)
    start = -memory.data_ptr() % PAGE_BYTES
    return memory[start : start + num_bytes].view(dtype)


def _past_the_cache(descriptor: int, position: int, num_bytes: int) -> None:
    """Let the next transfer be direct if it is one of whole pages and the file system can."""
    whole_pages = position % PAGE_BYTES == 0 and num_bytes % PAGE_BYTES == 0
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    direct = getattr(os, "O_DIRECT", 0)
    with suppress(OSError):
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | direct if whole_pages else flags & ~direct)
