"""A checkpoint is whole or it is not used: whatever fails, dies or rots, the last good one loads."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tests.runs.faults import Crash, dying_at, failing_at, trace

from fedmira.errors import IntegrityError, SetupError
from fedmira.runs import checkpoint
from fedmira.runs.checkpoint import FACTS, FOLDER, MANIFEST, TENSORS, Checkpoint, load_latest, save

HASH = "0123abcd"


def state(round_: int) -> dict[str, torch.Tensor]:
    """Different in every element from round to round; every dtype, and shapes that are easily mistreated."""
    generator = torch.Generator().manual_seed(round_)
    values = torch.randn(6, 5, generator=generator)
    return {
        "adapters": values,
        "transposed": values.T,
        "bf16": values.bfloat16(),
        "half": values.half(),
        "double": values.double(),
        "empty": torch.zeros(0, 7),
        "scalar": torch.tensor(float(round_)),
        "flags": values > 0,
        "steps": torch.arange(round_, round_ + 5),
        "bytes": torch.arange(9, dtype=torch.uint8) + round_,
        "not finite": torch.tensor([float("nan"), float("inf"), -0.0]),
    }


def put(run: Path, round_: int, keep: int = 2, partial: bool = False) -> Path:
    return save(run, round_, state(round_), {"round": round_, "partial": partial}, config_hash=HASH, keep=keep)


def get(run: Path) -> Checkpoint:
    found = load_latest(run, config_hash=HASH)
    assert found is not None
    return found


def same(found: Checkpoint, round_: int) -> bool:
    wanted = state(round_)
    return (
        found.round == round_
        and found.facts["round"] == round_
        and set(found.tensors) == set(wanted)
        and all(
            found.tensors[name].dtype == tensor.dtype
            and found.tensors[name].shape == tensor.shape
            and raw(found.tensors[name]) == raw(tensor)
            for name, tensor in wanted.items()
        )
    )


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def names(run: Path) -> list[str]:
    return sorted(os.listdir(run / FOLDER))


# ------------------------------------------------------------------------------------------------------- round and back


def test_what_is_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    path = put(tmp_path, 12)
    assert path == tmp_path / FOLDER / "round-00012"
    assert same(get(tmp_path), 12)
    assert get(tmp_path).skipped == ()


def test_the_file_is_an_ordinary_safetensors_file(tmp_path: Path) -> None:
    with safe_open(put(tmp_path, 3) / TENSORS, framework="pt") as file:
        loaded = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 not a mapping
    assert {name: raw(tensor) for name, tensor in loaded.items()} == {n: raw(t) for n, t in state(3).items()}


def test_equal_states_give_equal_bytes(tmp_path: Path) -> None:
    first, second = put(tmp_path / "a", 3), put(tmp_path / "b", 3)
    for name in (TENSORS, FACTS, MANIFEST):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_loaded_tensors_are_independent_of_the_file(tmp_path: Path) -> None:
    put(tmp_path, 1)
    found = get(tmp_path)
    found.tensors["adapters"].zero_()
    assert same(get(tmp_path), 1), "changing a loaded tensor must not change the file"
    kept = get(tmp_path)
    shutil.rmtree(tmp_path / FOLDER)
    assert same(kept, 1), "removing the file must not change a loaded tensor"


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert load_latest(tmp_path, config_hash=HASH) is None
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "notes").mkdir()
    assert load_latest(tmp_path, config_hash=HASH) is None


def test_another_config_is_refused(tmp_path: Path) -> None:
    put(tmp_path, 1)
    with pytest.raises(IntegrityError, match="was written under config 0123abcd, this run has ffffffff") as caught:
        load_latest(tmp_path, config_hash="ffffffff")
    assert caught.value.exit_code == 5


@pytest.mark.parametrize(
    "tensor", [torch.zeros(2, dtype=torch.complex64), torch.zeros(2, dtype=torch.int32).to_sparse()]
)
def test_what_the_format_cannot_hold_is_refused_before_anything_is_written(
    tensor: torch.Tensor, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, RuntimeError, NotImplementedError)):
        save(tmp_path, 1, {"x": tensor}, {}, config_hash=HASH, keep=1)
    assert load_latest(tmp_path, config_hash=HASH) is None


def test_nan_among_the_facts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        save(tmp_path, 1, {}, {"loss": float("nan")}, config_hash=HASH, keep=1)


# ---------------------------------------------------------------------------------------------------------- generations


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for round_ in range(1, 6):
        put(tmp_path, round_, keep=2)
    assert names(tmp_path) == ["round-00004", "round-00005"]
    put(tmp_path, 6, keep=1)
    assert names(tmp_path) == ["round-00006"]


def test_a_partial_checkpoint_is_newer_than_its_round_and_goes_with_the_next_save(tmp_path: Path) -> None:
    put(tmp_path, 4)
    put(tmp_path, 5)
    assert put(tmp_path, 5, partial=True).name == "round-00005-partial"
    assert get(tmp_path).facts["partial"] is True
    assert put(tmp_path, 5, partial=True).name == "round-00005-partial-r2"
    assert names(tmp_path) == ["round-00004", "round-00005", "round-00005-partial-r2"]
    put(tmp_path, 6)
    assert names(tmp_path) == ["round-00005", "round-00006"]


def test_a_partial_checkpoint_before_the_first_round(tmp_path: Path) -> None:
    put(tmp_path, 0, partial=True)
    assert get(tmp_path).round == 0
    put(tmp_path, 1)
    assert names(tmp_path) == ["round-00001"]


def test_the_same_round_again_replaces_without_overwriting(tmp_path: Path) -> None:
    put(tmp_path, 1)
    put(tmp_path, 2)
    assert put(tmp_path, 2).name == "round-00002-r2"
    assert names(tmp_path) == ["round-00001", "round-00002-r2"]
    assert same(get(tmp_path), 2)


def test_a_round_that_is_there_twice_counts_once(tmp_path: Path) -> None:
    """As where a process was killed before it removed the earlier one."""
    put(tmp_path, 1, keep=3)
    earlier = put(tmp_path, 2, keep=3)
    shutil.copytree(earlier, earlier.with_name("round-00002-r2"))
    put(tmp_path, 3, keep=3)
    assert names(tmp_path) == ["round-00001", "round-00002-r2", "round-00003"]


def test_a_save_after_falling_back_removes_the_damaged_future(tmp_path: Path) -> None:
    for round_ in (1, 2, 3):
        put(tmp_path, round_, keep=3)
    (tmp_path / FOLDER / "round-00003" / FACTS).write_text("{}")
    (tmp_path / FOLDER / "round-00002" / FACTS).write_text("{}")
    assert get(tmp_path).round == 1
    put(tmp_path, 2, keep=3)
    assert names(tmp_path) == ["round-00001", "round-00002-r2"]
    assert same(get(tmp_path), 2)


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    put(tmp_path, 1)
    (tmp_path / FOLDER / ".tmp-1-ab").mkdir()
    (tmp_path / FOLDER / ".tmp-1-ab" / TENSORS).write_bytes(b"half")
    put(tmp_path, 2)
    assert names(tmp_path) == ["round-00001", "round-00002"]


# -------------------------------------------------------------------------------------------------- failing and dying


def test_everything_is_durable_before_it_gets_its_name(tmp_path: Path) -> None:
    """Each file is synced after its last write, the folder after that, then renamed, then the parent is synced."""
    put(tmp_path, 1)
    calls = [name for name, _ in trace(lambda: put(tmp_path, 2))]
    renamed = calls.index("rename")
    written = [name for name in calls[:renamed] if name in ("write", "fsync")]
    assert written.count("fsync") == 4, "three files and their folder"
    assert all(before != after for before, after in pairwise(written[:-1]) if "fsync" in (before, after))
    assert written[-2:] == ["fsync", "fsync"], "the last file, then the folder"
    assert calls[renamed + 1 : renamed + 3] == ["open", "fsync"], "the parent"


def boundaries(tmp_path: Path) -> int:
    """How many system calls a save over two existing checkpoints makes."""
    run = tmp_path / "counted"
    put(run, 1)
    put(run, 2)
    return len(trace(lambda: put(run, 3)))


def test_dying_at_any_system_call_leaves_the_last_good_state(tmp_path: Path) -> None:
    total = boundaries(tmp_path)
    assert total > 25, "the wrappers see the saver"
    outcomes = []
    for number in range(1, total + 1):
        run = tmp_path / str(number)
        put(run, 1)
        put(run, 2)
        with pytest.raises(Crash), dying_at(number):
            put(run, 3)
        found = get(run)
        assert found.skipped == ()
        assert same(found, found.round)
        outcomes.append(found.round)
        put(run, 3)
        assert same(get(run), 3)
        assert len(names(run)) == 2, f"{names(run)} after dying at call {number}"
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {2, 3}


@pytest.mark.parametrize("error_number", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EDQUOT])
def test_a_failing_disk_at_any_system_call_is_reported_and_loses_nothing(error_number: int, tmp_path: Path) -> None:
    reported = 0
    for number in range(1, boundaries(tmp_path) + 1):
        run = tmp_path / str(number)
        put(run, 1)
        put(run, 2)
        caught = None
        try:
            with failing_at(number, error_number):
                put(run, 3)
        except (IntegrityError, SetupError) as error:
            caught = error
        if caught is None:
            assert get(run).round == 3, "only cleaning up may fail in silence"
        else:
            reported += 1
            assert caught.exit_code == (5 if error_number == errno.EIO else 4)
            assert str(run / FOLDER) in str(caught)
            assert errno.errorcode[error_number] in str(caught)
            assert not [name for name in names(run) if name.startswith(".tmp")]
        found = get(run)
        assert found.round in (2, 3)
        assert same(found, found.round)
        put(run, 3)
        assert same(get(run), 3)
    assert reported > 15


def test_a_full_disk_says_what_to_do(tmp_path: Path) -> None:
    put(tmp_path, 1)
    with pytest.raises(SetupError) as caught, failing_at(8, errno.ENOSPC):
        put(tmp_path, 2)
    message = str(caught.value)
    assert "could not save the checkpoint" in message
    assert "No space left on device (ENOSPC)" in message
    assert "free some space, then go on, a run with --resume" in message


def test_a_limit_of_the_real_kernel(tmp_path: Path) -> None:
    put(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        with pytest.raises(SetupError, match=r"state\.safetensors: File too large \(EFBIG\)"):
            put(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["round-00001"]
    assert same(get(tmp_path), 1)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / FOLDER).write_text("a file where the folder should be")
    with pytest.raises(SetupError, match="checkpoints: Not a directory"):
        put(tmp_path, 1)


# --------------------------------------------------------------------------------------------------------------- rot


def truncate(path: Path, generator: np.random.Generator) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: generator.integers(len(data))])


def flip_a_bit(path: Path, generator: np.random.Generator) -> None:
    data = bytearray(path.read_bytes())
    data[generator.integers(len(data))] ^= 1 << int(generator.integers(8))
    path.write_bytes(data)


def zero_a_block(path: Path, generator: np.random.Generator) -> None:
    data = bytearray(path.read_bytes())
    start = int(generator.integers(len(data)))
    data[start : start + 16] = bytes(len(data[start : start + 16]))
    path.write_bytes(data)


def append(path: Path, generator: np.random.Generator) -> None:
    path.write_bytes(path.read_bytes() + b" {}"[: 1 + generator.integers(3)] + b"x")


def delete(path: Path, generator: np.random.Generator) -> None:
    path.unlink()


def empty(path: Path, generator: np.random.Generator) -> None:
    path.write_bytes(b"")


def swap_with_the_previous(path: Path, generator: np.random.Generator) -> None:
    other = path.parent.parent / "round-00001" / path.name
    path.write_bytes(other.read_bytes())


def become_a_link(path: Path, generator: np.random.Generator) -> None:
    moved = path.with_name("moved")
    path.rename(moved)
    path.symlink_to(moved)


def become_a_folder(path: Path, generator: np.random.Generator) -> None:
    path.unlink()
    path.mkdir()


ROT = [
    truncate, flip_a_bit, zero_a_block, append, delete, empty, swap_with_the_previous, become_a_link, become_a_folder
]  # fmt: skip


@pytest.mark.parametrize("rot", ROT, ids=lambda rot: rot.__name__)
def test_a_damaged_newest_checkpoint_is_detected_and_the_one_before_is_used(
    rot: Callable[[Path, np.random.Generator], None], tmp_path: Path
) -> None:
    """36 cases for each of 9 kinds of damage: 324 in all, none may load in silence."""
    pristine = tmp_path / "pristine"
    put(pristine, 1)
    put(pristine, 2)
    generator = np.random.Generator(np.random.Philox(11))
    for case in range(36):
        run = tmp_path / str(case)
        shutil.copytree(pristine, run)
        victim = run / FOLDER / "round-00002" / (TENSORS, FACTS, MANIFEST)[case % 3]
        before = victim.read_bytes()
        while victim.is_file() and not victim.is_symlink() and victim.read_bytes() == before:
            rot(victim, generator)
        found = get(run)
        assert found.round == 1, f"{rot.__name__} of {victim.name} was not noticed"
        assert same(found, 1)
        assert len(found.skipped) == 1
        assert found.skipped[0].startswith("round-00002: ")
        shutil.rmtree(run)


def test_swapped_folders_are_noticed(tmp_path: Path) -> None:
    put(tmp_path, 1)
    put(tmp_path, 2)
    first, second = tmp_path / FOLDER / "round-00001", tmp_path / FOLDER / "round-00002"
    first.rename(first.with_name("x"))
    second.rename(first)
    first.with_name("x").rename(second)
    with pytest.raises(IntegrityError, match="belongs to round 1"):
        get(tmp_path)


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_a_manifest_with_a_number_that_is_none_costs_its_checkpoint_only(number: str, tmp_path: Path) -> None:
    put(tmp_path, 1)
    manifest = put(tmp_path, 2) / MANIFEST
    manifest.write_text(manifest.read_text().replace('"round": 2', f'"round": {number}'))
    found = get(tmp_path)
    assert same(found, 1)
    assert found.skipped == ("round-00002: MANIFEST.json is damaged (its own sha256 differs)",)


def test_if_none_is_whole_all_are_named(tmp_path: Path) -> None:
    put(tmp_path, 1)
    put(tmp_path, 2)
    for path in (tmp_path / FOLDER).iterdir():
        (path / FACTS).unlink()
    with pytest.raises(IntegrityError, match=r"round-00002: No such file.*round-00001: No such file") as caught:
        get(tmp_path)
    assert caught.value.exit_code == 5


def with_own_digest(manifest: dict[str, Any]) -> str:
    """A manifest whose own checksum is right, whatever it says."""
    manifest.pop("sha256", None)
    canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    return json.dumps({**manifest, "sha256": hashlib.sha256(canonical.encode()).hexdigest()})


def forge(path: Path, data: bytes) -> None:
    """Replace the tensors of a checkpoint by `data`, with a manifest whose checksums are right."""
    (path / TENSORS).write_bytes(data)
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"][TENSORS] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    manifest["tensors"] = {"x": {"dtype": "U8", "shape": [2]}}
    (path / MANIFEST).write_text(with_own_digest(manifest))


ENTRY = '{"dtype":"U8","shape":[2],"data_offsets":[0,2]}'
HALF = '{"dtype":"U8","shape":[1],"data_offsets":[%d,%d]}'


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (f'{{"x":{HALF % (0, 1)},"x":{HALF % (1, 2)}}}', "not a safetensors file"),
        (f'{{"y":{ENTRY}}}', "are not those of"),
        (f'{{"x":{ENTRY},"../../y":{ENTRY}}}', "not a safetensors file"),
        (f'{{"x":{ENTRY},"../../y":{{"dtype":"U8","shape":[0],"data_offsets":[2,2]}}}}', "are not those of"),
        ('{"x":{"dtype":"I8","shape":[2],"data_offsets":[0,2]}}', "are not those of"),
        ('{"x":{"dtype":"U8","shape":[2],"data_offsets":[0,9]}}', "not a safetensors file"),
        ('{"x":{"shape":[2]}}', "not a safetensors file"),
        ("[1, 2]", "not a safetensors file"),
        ("{", "not a safetensors file"),
        ('{"x":3}', "not a safetensors file"),
    ],
)
def test_names_in_the_file_are_not_trusted(header: str, reason: str, tmp_path: Path) -> None:
    forge(put(tmp_path, 1), len(header).to_bytes(8, "little") + header.encode() + b"ab")
    with pytest.raises(IntegrityError, match=reason):
        get(tmp_path)


def test_a_header_of_absurd_length_is_not_read(tmp_path: Path) -> None:
    forge(put(tmp_path, 1), (2**62).to_bytes(8, "little"))
    with pytest.raises(IntegrityError, match="not a safetensors file"):
        get(tmp_path)


def test_a_linked_checkpoint_folder_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere", 1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / FOLDER).symlink_to(tmp_path / "elsewhere" / FOLDER)
    with pytest.raises(IntegrityError, match="symbolic link"):
        load_latest(tmp_path / "run", config_hash=HASH)
    with pytest.raises(IntegrityError, match="symbolic link"):
        put(tmp_path / "run", 2)
    assert names(tmp_path / "elsewhere") == ["round-00001"]


# ---------------------------------------------------------------------------------------------------- modes and pickle


@pytest.mark.parametrize(
    ("umask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750), (0o077, 0o600, 0o700)]
)
def test_modes_follow_the_umask(umask: int, file_mode: int, folder_mode: int, tmp_path: Path) -> None:
    previous = os.umask(umask)
    try:
        path = put(tmp_path, 1)
    finally:
        os.umask(previous)
    assert stat.S_IMODE(path.stat().st_mode) == folder_mode
    assert {stat.S_IMODE(item.stat().st_mode) for item in path.iterdir()} == {file_mode}


def test_no_pickle_on_the_way_out_or_in(tmp_path: Path) -> None:
    code = f"""
import sys
seen = []
sys.addaudithook(lambda event, arguments: seen.append(event) if event.startswith("pickle") else None)
from pathlib import Path
import torch
from fedmira.runs.checkpoint import load_latest, save
del seen[:]
run = Path({str(tmp_path)!r})
save(run, 1, {{"x": torch.arange(5.0), "y": torch.ones(3, dtype=torch.bfloat16)}}, {{"a": 1}}, config_hash="h", keep=1)
assert torch.equal(load_latest(run, config_hash="h").tensors["x"], torch.arange(5.0))
assert not seen, seen
import pickle
pickle.loads(pickle.dumps(Path))
assert seen, "the hook works"
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EMFILE])
def test_what_may_be_readable_tomorrow_is_not_passed_over(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, 1)
    put(tmp_path, 2)

    def refuse(path: Path) -> bytes:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr("fedmira.runs.checkpoint.read_bytes", refuse)
    kind = IntegrityError if number == errno.EIO else SetupError
    with pytest.raises(kind, match=r"could not read the checkpoint .*round-00002"):
        load_latest(tmp_path, config_hash=HASH)


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_looked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {"state.adapters": torch.zeros(2, 3)}
    save(tmp_path, 1, tensors, {}, config_hash="x", keep=1)
    original, calls = checkpoint._verified_manifest, [0]

    def replaced(generation: Any) -> Any:
        calls[0] += 1
        if calls[0] == 1:
            save(tmp_path, 2, tensors, {}, config_hash="x", keep=1)
        return original(generation)

    monkeypatch.setattr(checkpoint, "_verified_manifest", replaced)
    found = load_latest(tmp_path, config_hash="x")
    assert found is not None
    assert found.round == 2
