"""Small files are whole or absent."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest
from tests.runs.faults import Crash, dying_at, failing_at, trace

from fedmira.errors import IntegrityError, SetupError
from fedmira.runs.atomic import (
    disk_error,
    read_bytes,
    remove_tree,
    unwritable_line,
    write_all,
    write_bytes_atomically,
)


def test_write_and_replace(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    for data in (b"first", b"", b"x" * 20_000_000):
        write_bytes_atomically(path, data)
        assert path.read_bytes() == data
    assert os.listdir(tmp_path) == ["facts.json"]


def test_dying_at_any_moment_leaves_the_old_bytes_or_the_new(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    write_bytes_atomically(path, b"old")
    total = len(trace(lambda: write_bytes_atomically(path, b"old")))
    seen = []
    for number in range(1, total + 1):
        write_bytes_atomically(path, b"old")
        with pytest.raises(Crash), dying_at(number):
            write_bytes_atomically(path, b"new bytes")
        seen.append(path.read_bytes())
    assert seen == sorted(seen, reverse=True), "once the new bytes are there they stay"
    assert set(seen) == {b"old", b"new bytes"}


def test_everything_is_durable_in_order(tmp_path: Path) -> None:
    """The new bytes before they get their name, and then the name."""
    calls = [name for name, _ in trace(lambda: write_bytes_atomically(tmp_path / "facts.json", b"new"))]
    assert calls == ["open", "write", "fsync", "replace", "open", "fsync"]


def test_a_failing_disk_is_reported_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    write_bytes_atomically(path, b"old")
    total = len(trace(lambda: write_bytes_atomically(path, b"old")))
    for number in range(1, total + 1):
        with (
            pytest.raises(IntegrityError, match=r"could not write .*facts\.json: .*\(EIO\)"),
            failing_at(number, errno.EIO),
        ):
            write_bytes_atomically(path, b"new")
        assert path.read_bytes() in (b"old", b"new")
        assert os.listdir(tmp_path) == ["facts.json"]
        write_bytes_atomically(path, b"old")


def test_short_writes_are_continued(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, bytes(data[:3])))
    descriptor = os.open(tmp_path / "x", os.O_WRONLY | os.O_CREAT)
    write_all(descriptor, b"0123456789")
    os.close(descriptor)
    assert (tmp_path / "x").read_bytes() == b"0123456789"


def test_a_link_is_replaced_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"mine")
    (tmp_path / "facts.json").symlink_to(outside)
    with pytest.raises(OSError, match="symbolic links"):
        read_bytes(tmp_path / "facts.json")
    write_bytes_atomically(tmp_path / "facts.json", b"new")
    assert outside.read_bytes() == b"mine"
    assert not (tmp_path / "facts.json").is_symlink()


def test_what_is_not_a_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(OSError, match="not a regular file"):
            read_bytes(path)


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        write_bytes_atomically(tmp_path / "x", b"")
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.EACCES, SetupError),
        (errno.EROFS, SetupError),
        (errno.ENOSPC, SetupError),
        (errno.ENOTDIR, SetupError),
        (errno.EIO, IntegrityError),
        (errno.ELOOP, IntegrityError),
        (errno.ENOENT, IntegrityError),
    ],
)
def test_a_place_to_change_is_told_from_contents_not_to_trust(number: int, kind: type[Exception]) -> None:
    assert type(disk_error(OSError(number, os.strerror(number)), Path("x"), "write")) is kind


def test_a_folder_is_tried_without_a_trace(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert unwritable_line(tmp_path) == unwritable_line(tmp_path / "not" / "yet") == ""
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        assert "could not write to" in unwritable_line(path)
        assert "file: Not a directory (ENOTDIR)" in unwritable_line(path)
    assert os.listdir(tmp_path) == ["file"]


def test_what_is_removed_loses_its_name_first(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "part").write_text("x")
    name, arguments = trace(lambda: remove_tree(tmp_path / "old"))[0]
    assert (name, arguments[0]) == ("rename", tmp_path / "old")
    assert os.listdir(tmp_path) == []


def test_removing_what_is_not_there_is_no_error(tmp_path: Path) -> None:
    remove_tree(tmp_path / "nothing")
    assert os.listdir(tmp_path) == []
