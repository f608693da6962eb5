"""Checkpoints that are whole or absent: tensors and facts of one round, with a manifest that proves it.

    checkpoints/round-00012/            after round 12; -r2, -r3, ... if the same round is saved again
        state.safetensors               the tensors
        facts.json                      everything else
        MANIFEST.json                   sha256 and size of both, names and shapes of the tensors, its own sha256
    checkpoints/round-00012-partial/    inside round 13, so after round-00012; removed by the next save

A save writes a hidden folder, fsyncs every file and the folder, renames it and fsyncs the parent. Nothing that exists
is ever overwritten, so at every moment the last good checkpoint is there. A load walks from the newest to the oldest
and believes nothing that its manifest does not prove. No pickle. Knows nothing about what the tensors mean.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from fedmira.errors import IntegrityError
from fedmira.runs.atomic import (
    CHUNK_BYTES,
    disk_error,
    make_folder,
    nonce,
    open_regular,
    read_bytes,
    remove_tree,
    sync_folder,
    write_new_file,
)
from fedmira.runs.generations import FOLDER, Generation, generation_path, generations

SCHEMA = 1
TENSORS, FACTS, MANIFEST = "state.safetensors", "facts.json", "MANIFEST.json"
_MAY_PASS = {
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
}
"""Why reading may fail today and not tomorrow; everything else is damage."""
_LISTINGS = 5

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class Checkpoint(NamedTuple):
    """What a load found."""

    round: int
    tensors: dict[str, torch.Tensor]
    facts: dict[str, Any]
    skipped: tuple[str, ...] = ()
    """Newer checkpoints that were not used, each with the reason."""


class _Damaged(Exception):
    """Why a checkpoint is not believed."""


def save(
    run_path: Path,
    round_: int,
    tensors: Mapping[str, torch.Tensor],
    facts: Mapping[str, Any],
    *,
    config_hash: str,
    keep: int,
) -> Path:
    """Write a checkpoint of round `round_` and return its folder; then remove all but the newest `keep` and this one.

    With `facts["partial"]` true it is a state after round `round_` inside the next round: newer than the complete
    checkpoint of `round_`, and removed by the next save. Anything later than what is saved belongs to a future that is
    being computed again, and is removed.

    Raises:
        SetupError, IntegrityError: the disk refused; the message says where and why, older checkpoints are untouched.
        ValueError: a fact is not JSON (NaN included) or a tensor has a dtype that safetensors lacks.
    """
    parent = run_path / FOLDER
    partial = bool(facts.get("partial", False))
    facts_bytes = json.dumps(facts, allow_nan=False, sort_keys=True).encode()
    header, specs = _header(tensors)

    make_folder(parent)
    existing = generations(parent)
    revision = 1 + max((g.revision for g in existing if g.same == (round_, partial)), default=0)
    target = generation_path(parent, round_, partial, revision)
    beside = parent / f".tmp-{nonce()}"
    doing = target
    try:
        os.mkdir(beside)
        doing = target / TENSORS
        tensors_digest = _Digest()
        write_new_file(beside / TENSORS, tensors_digest.over(_safetensors_chunks(header, tensors)))
        doing = target / FACTS
        facts_digest = _Digest()
        write_new_file(beside / FACTS, facts_digest.over([facts_bytes]))
        doing = target / MANIFEST
        manifest = {
            "schema": SCHEMA,
            "round": round_,
            "partial": partial,
            "config_hash": config_hash,
            "files": {TENSORS: tensors_digest.entry(), FACTS: facts_digest.entry()},
            "tensors": specs,
        }
        write_new_file(beside / MANIFEST, [json.dumps({**manifest, "sha256": _digest_of(manifest)}, indent=1).encode()])
        doing = target
        sync_folder(beside)
        os.rename(beside, target)
        sync_folder(parent)
    except BaseException as error:
        remove_tree(beside)
        if isinstance(error, OSError):
            raise disk_error(error, doing, "save the checkpoint") from error
        raise
    with suppress(OSError):
        # the checkpoint is safe; what cannot be removed now is tried again by the next save
        _prune(parent, Generation(round_, partial, revision, target), existing, keep)
    return target


def load_latest(run_path: Path, *, config_hash: str) -> Checkpoint | None:
    """Return the newest checkpoint that its manifest proves whole, or None if there are none at all.

    A process that saves meanwhile may remove what was listed: then it is listed again.

    Raises:
        IntegrityError: there are checkpoints but none is whole, or the newest whole one is of another config.
    """
    parent = run_path / FOLDER
    if parent.is_symlink():
        raise IntegrityError(f"{parent} is a symbolic link, which is not followed; put the real folder there")
    for _ in range(_LISTINGS):
        listed = generations(parent)
        found, skipped = _newest_whole(listed, config_hash)
        if found is not None or not skipped or generations(parent) == listed:
            break
    if found is None and skipped:
        raise IntegrityError(
            f"no checkpoint in {parent} can be trusted: {'; '.join(skipped)}. Restore one of them from a copy, "
            "or remove the run directory and start again"
        )
    return found


def _newest_whole(listed: Sequence[Generation], config_hash: str) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint of those listed, and why newer ones were skipped."""
    skipped: list[str] = []
    for generation in reversed(listed):
        try:
            manifest = _verified_manifest(generation)
            if manifest["config_hash"] != config_hash:
                raise IntegrityError(
                    f"{generation.path} was written under config {manifest['config_hash']}, "
                    f"this run has {config_hash}; resume with the config it was started with, "
                    "or start a new run in another output.directory"
                )
            facts = _verified_facts(generation, manifest)
            tensors = _verified_tensors(generation, manifest)
        except _Damaged as damage:
            skipped.append(f"{generation.path.name}: {damage}")
        except (KeyError, TypeError) as error:
            skipped.append(f"{generation.path.name}: {MANIFEST} or {TENSORS} lacks an entry: {error}")
        except OSError as error:
            if error.errno in _MAY_PASS:
                # it may be whole: going on from the one before would supersede it
                raise disk_error(error, generation.path, "read the checkpoint") from error
            skipped.append(f"{generation.path.name}: {error.strerror or error}: {Path(error.filename or '').name}")
        else:
            return Checkpoint(generation.round, tensors, facts, tuple(skipped)), skipped
    return None, skipped


def _prune(parent: Path, saved: Generation, existing: list[Generation], keep: int) -> None:
    """Remove what `saved` makes superfluous; never `saved` itself, which is whole because every byte was synced."""
    older = [g for g in existing if g < saved and not g.partial and g.same != saved.same]
    kept = {g.same: g for g in older}
    newest = sorted(kept.values(), reverse=True)[: max(keep, 1) if saved.partial else max(keep - 1, 0)]
    for generation in existing:
        if generation not in newest:
            remove_tree(generation.path)
    # left behind by a process that was killed; the lock of the run guarantees that nobody is at work on them
    for name in os.listdir(parent):
        if name.startswith((".tmp-", ".trash-")):
            remove_tree(parent / name)


# --------------------------------------------------------------------------------------------------------- writing


class _Digest:
    """Size and sha256 of what passes by."""

    def __init__(self) -> None:
        self.sha256 = hashlib.sha256()
        self.size = 0

    def update(self, chunk: Any) -> None:
        self.sha256.update(chunk)
        self.size += memoryview(chunk).nbytes

    def over(self, chunks: Iterable[Any]) -> Iterator[Any]:
        for chunk in chunks:
            self.update(chunk)
            yield chunk

    def entry(self) -> dict[str, Any]:
        return {"sha256": self.sha256.hexdigest(), "size": self.size}


def _digest_of(manifest: Mapping[str, Any]) -> str:
    canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _header(tensors: Mapping[str, torch.Tensor]) -> tuple[bytes, dict[str, Any]]:
    """Return the safetensors header (names sorted, so equal tensors give equal bytes) and name -> dtype, shape."""
    specs, entries = dict[str, Any](), dict[str, Any]()
    offset = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        if tensor.dtype not in _DTYPES or name == "__metadata__":
            raise ValueError(
                f"tensor {name!r} of dtype {tensor.dtype} cannot be stored; allowed: {', '.join(map(str, _DTYPES))}"
            )
        specs[name] = _spec(tensor)
        entries[name] = {**specs[name], "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, specs


def _spec(tensor: torch.Tensor) -> dict[str, Any]:
    return {"dtype": _DTYPES.get(tensor.dtype), "shape": list(tensor.shape)}


def _safetensors_chunks(header: bytes, tensors: Mapping[str, torch.Tensor]) -> Iterator[Any]:
    """The bytes of a safetensors file, one tensor at a time; the library's own writer neither streams nor syncs."""
    yield header
    for name in sorted(tensors):
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            yield flat.view(torch.uint8).numpy().data


# --------------------------------------------------------------------------------------------------------- reading


def _verified_manifest(generation: Generation) -> dict[str, Any]:
    if generation.path.is_symlink() or not generation.path.is_dir():
        raise _Damaged("is not a folder")
    manifest = _json_object(read_bytes(generation.path / MANIFEST), MANIFEST)
    claimed = manifest.pop("sha256", None)
    try:
        whole = claimed == _digest_of(manifest)
    except (ValueError, RecursionError):
        # NaN, or a number beyond what a float holds
        whole = False
    if not whole:
        raise _Damaged(f"{MANIFEST} is damaged (its own sha256 differs)")
    if manifest.get("schema") != SCHEMA:
        raise _Damaged(f"{MANIFEST} has schema {manifest.get('schema')}, this version reads {SCHEMA}")
    if (manifest["round"], manifest["partial"]) != (generation.round, generation.partial):
        raise _Damaged(f"belongs to round {manifest['round']}{' (partial)' if manifest['partial'] else ''}")
    return manifest


def _verified_facts(generation: Generation, manifest: Mapping[str, Any]) -> dict[str, Any]:
    data = read_bytes(generation.path / FACTS)
    digest = _Digest()
    digest.update(data)
    _compare(FACTS, digest, manifest)
    return _json_object(data, FACTS)


def _verified_tensors(generation: Generation, manifest: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    path = generation.path / TENSORS
    digest = _Digest()
    with open_regular(path) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    _compare(TENSORS, digest, manifest)
    try:
        loaded = load_file(path)
    except SafetensorError as error:
        raise _Damaged(f"{TENSORS} is not a safetensors file: {error}") from None
    if {name: _spec(tensor) for name, tensor in loaded.items()} != manifest["tensors"]:
        raise _Damaged(f"names, shapes or dtypes in {TENSORS} are not those of {MANIFEST}")
    # copies, because what the library returns keeps the file mapped after it is pruned
    return {name: loaded[name].clone() for name in manifest["tensors"]}


def _compare(name: str, digest: _Digest, manifest: Mapping[str, Any]) -> None:
    expected = manifest["files"][name]
    if digest.size != expected["size"]:
        raise _Damaged(f"{name} has {digest.size} bytes instead of {expected['size']}")
    if digest.entry()["sha256"] != expected["sha256"]:
        raise _Damaged(f"{name} is damaged (sha256 differs)")


def _json_object(data: bytes, name: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise _Damaged(f"{name} is not JSON") from None
    if not isinstance(value, dict):
        raise _Damaged(f"{name} is not a JSON object")
    return value
