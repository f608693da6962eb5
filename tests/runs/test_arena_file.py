"""Arenas on disk: rows come back, mixing is the matrix product, no crash or cut file is taken for a whole one."""

from __future__ import annotations

import errno
import fcntl
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.runs.faults import trace

from fedmira.errors import IntegrityError, SetupError
from fedmira.federation.multiply import sparse
from fedmira.runs import arena_mixing
from fedmira.runs.arena_file import ArenaFile, create, read_rows, write_rows
from fedmira.runs.arena_mixing import mix

K, P, COLUMNS = 12, 50, 16


def matrix() -> np.ndarray:
    draw = np.random.Generator(np.random.Philox(3))
    return np.where(draw.random((K, K)) < 0.3, draw.random((K, K)), 0.0)


def filled(path: Path, dtype: torch.dtype = torch.bfloat16) -> tuple[ArenaFile, torch.Tensor]:
    values = torch.randn(K, P, generator=torch.Generator().manual_seed(0)).to(dtype)
    arena = create(path, K, P, dtype, COLUMNS)
    write_rows(arena, range(K), values)
    return arena, values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_come_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    arena, values = filled(tmp_path / "a.safetensors", dtype)
    ids = [3, 4, 5, 0, 11, 10]
    assert torch.equal(read_rows(arena, ids), values[ids])
    assert read_rows(arena, []).shape == (0, P)
    write_rows(arena, [7, 2], values[[0, 1]].double())
    values[[7, 2]] = values[[0, 1]]
    assert torch.equal(read_rows(arena, range(K)), values)


def test_a_new_arena_is_zero_and_takes_its_room_at_once(tmp_path: Path) -> None:
    arena = create(tmp_path / "a", 100, 5000)
    assert not read_rows(arena, range(100)).any()
    assert os.stat(arena.path).st_blocks * 512 >= 100 * 5000 * 2
    assert os.stat(arena.path).st_size == arena.num_bytes


def test_blocks_are_about_128_mib_unless_said_otherwise(tmp_path: Path) -> None:
    arena = create(tmp_path / "a", 10_000, 7_000)
    # of the 6,710 columns that fill 128 MiB as many as end with a page: 20,000 bytes x 128 = 625 pages
    assert arena.block_columns == 6_656
    assert all(arena.position(columns.start) % 4096 == 0 for columns in arena.blocks)
    assert create(tmp_path / "b", 4, 5).block_columns == 5


def test_any_safetensors_reader_reads_it(tmp_path: Path) -> None:
    arena, values = filled(tmp_path / "a.safetensors")
    blocks = load_file(arena.path)
    assert sorted(blocks) == [f"columns-{start:012d}" for start in range(0, P, COLUMNS)]
    assert torch.equal(torch.cat([blocks[name] for name in sorted(blocks)], dim=1), values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixing_on_disk_is_the_matrix_product(tmp_path: Path, dtype: torch.dtype) -> None:
    arena, values = filled(tmp_path / "a", dtype)
    mixed = mix(arena, sparse(matrix()), tmp_path / "b")
    assert mixed == replace(arena, path=tmp_path / "b")
    expected = torch.from_numpy(matrix() @ values.double().numpy())
    # one rounding to the dtype after a sum in float32
    tolerance = 2.0**-8 if dtype == torch.bfloat16 else 1e-5
    assert torch.allclose(read_rows(mixed, range(K)).double(), expected, rtol=tolerance, atol=1e-5)
    assert torch.equal(read_rows(arena, range(K)), values)


def test_an_arena_may_be_mixed_onto_itself(tmp_path: Path) -> None:
    arena, _ = filled(tmp_path / "a")
    elsewhere = mix(arena, sparse(matrix()), tmp_path / "b")
    assert mix(arena, sparse(matrix()), arena.path) == arena
    assert arena.path.read_bytes() == elsewhere.path.read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_a_missing_file_or_a_link_is_refused(tmp_path: Path) -> None:
    arena, values = filled(tmp_path / "a")
    (tmp_path / "link").symlink_to(arena.path)
    link, nowhere = (replace(arena, path=tmp_path / name) for name in ("link", "b"))
    for refused, why in ((link, "symbolic link"), (nowhere, "No such file")):
        with pytest.raises(IntegrityError, match=why):
            read_rows(refused, [0])
        with pytest.raises(IntegrityError, match=why):
            write_rows(refused, [0], values[:1])
        with pytest.raises(IntegrityError, match=why):
            mix(refused, sparse(matrix()), tmp_path / "c")
    with pytest.raises(IntegrityError, match="exists already"):
        create(arena.path, K, P)


def test_a_file_cut_while_it_is_used_is_noticed(tmp_path: Path) -> None:
    arena, _ = filled(tmp_path / "a")
    (tmp_path / "b").write_text("what was there")
    os.truncate(arena.path, arena.num_bytes - 10)
    with pytest.raises(IntegrityError, match="it was cut"):
        read_rows(arena, [K - 1])
    with pytest.raises(IntegrityError, match="it was cut"):
        mix(arena, sparse(matrix()), tmp_path / "b")
    assert (tmp_path / "b").read_text() == "what was there"
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync", "replace"])
def test_a_disk_that_refuses_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    arena, values = filled(tmp_path / "a")

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, call, refuse)
        with pytest.raises(SetupError, match="the disk is full"):
            mix(arena, sparse(matrix()), arena.path)
    assert torch.equal(read_rows(arena, range(K)), values)
    assert os.listdir(tmp_path) == ["a"]


def test_everything_is_durable_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arena, _ = filled(tmp_path / "a")
    calls: list[str] = []
    for name in ("pwrite", "fsync", "replace"):
        original = getattr(os, name)

        def noted(*arguments: Any, name: str = name, original: Any = original) -> Any:
            calls.append(name)
            return original(*arguments)

        monkeypatch.setattr(os, name, noted)
    mix(arena, sparse(matrix()), tmp_path / "b")
    assert calls.count("pwrite") == 1 + len(arena.blocks)
    # the file, its name, the folder
    assert calls[-3:] == ["fsync", "replace", "fsync"]


def test_rows_are_durable_when_they_are_written(tmp_path: Path) -> None:
    arena, values = filled(tmp_path / "a")
    assert [name for name, _ in trace(lambda: write_rows(arena, [3], values[:1]))] == ["open", "fsync"]


def test_mixing_holds_four_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arena, _ = filled(tmp_path / "a")
    places = set()
    original = arena_mixing.read_at

    def noted(descriptor: int, values: torch.Tensor, position: int, path: Path) -> None:
        places.add(values.data_ptr())
        assert values.data_ptr() % 4096 == 0
        original(descriptor, values, position, path)

    monkeypatch.setattr(arena_mixing, "read_at", noted)
    mix(arena, sparse(matrix()), tmp_path / "b")
    assert len(places) == 2


def test_whole_pages_go_past_the_cache_and_the_rest_through_it(tmp_path: Path) -> None:
    values = torch.randn(16, 5000)
    # blocks of 32 pages, and a last one of 28,928 bytes
    arena = create(tmp_path / "a", 16, 5000, torch.bfloat16, 4096)
    write_rows(arena, range(16), values)
    mixed = mix(arena, sparse(2 * np.eye(16)), tmp_path / "b")
    assert torch.equal(read_rows(mixed, range(16)), 2 * values.bfloat16())


def test_a_file_system_without_direct_transfers_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    arena, values = filled(tmp_path / "a")
    original = fcntl.fcntl
    monkeypatch.setattr(fcntl, "fcntl", lambda fd, cmd, *rest: refuse() if cmd == fcntl.F_SETFL else original(fd, cmd))
    mixed = mix(arena, sparse(2 * np.eye(K)), tmp_path / "b")
    assert torch.equal(read_rows(mixed, range(K)), 2 * values)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    arena, values = filled(tmp_path / "a")
    with pytest.raises(ValueError, match="clients \\[12\\] are not in"):
        read_rows(arena, [K])
    with pytest.raises(ValueError, match="must be \\(2, 50\\); given \\(3, 50\\)"):
        write_rows(arena, [0, 1], values[:3])
    with pytest.raises(ValueError, match="rows of 1 distinct"):
        write_rows(arena, [0, 0], values[:2])
    with pytest.raises(ValueError, match="square matrix"):
        mix(arena, sparse(np.eye(K + 1)), tmp_path / "b")
    with pytest.raises(ValueError, match=r"given 0, 50, 16, torch\.bfloat16"):
        create(tmp_path / "c", 0, P, torch.bfloat16, COLUMNS)
    with pytest.raises(ValueError, match=r"torch\.float16"):
        create(tmp_path / "c", K, P, torch.float16)
