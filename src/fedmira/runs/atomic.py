"""Files that are either whole or not there: write beside, fsync, rename, fsync the folder.

Every failure of the disk becomes an error that names the path and the reason: a `SetupError` where the place must be
changed (no permission, no space, no folder), an `IntegrityError` where what is there cannot be trusted. What was there
before stays. Symbolic links are never followed. Modes follow the umask. Knows nothing about what the files mean.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from fedmira.errors import IntegrityError, SetupError

CHUNK_BYTES = 8 << 20

_ADVICE = {
    errno.ENOSPC: "the disk is full: free some space, then go on, a run with --resume",
    errno.EDQUOT: "your disk quota is used up: free some space, then go on, a run with --resume",
    errno.EACCES: "check who owns the folder and its permissions",
    errno.EPERM: "check who owns the folder and its permissions",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.EIO: "the disk reports a fault: choose a folder on another disk",
    errno.EFBIG: "the file is larger than the file system or a limit of this shell (ulimit -f) allows",
    errno.ENOTDIR: "a part of this path is a file: choose another folder",
    errno.ELOOP: "it is a symbolic link, which is not followed: put the real file or folder there",
}

_OF_THE_PLACE = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG),
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.ENOMEM),
}
"""What says nothing against the files that are there."""


def disk_error(error: OSError, path: Path, doing: str) -> SetupError | IntegrityError:
    """Return the exception that tells a person what happened while `doing` something with `path`."""
    name = errno.errorcode.get(error.errno or 0, "unknown")
    reason = error.strerror or str(error)
    advice = _ADVICE.get(error.errno or 0, "")
    kind = SetupError if error.errno in _OF_THE_PLACE else IntegrityError
    return kind(f"could not {doing} {path}: {reason} ({name})" + (f"; {advice}" if advice else ""))


@contextmanager
def disk_errors_named(path: Path, doing: str) -> Iterator[None]:
    """Turn an `OSError` of the block into a `disk_error` that names `path`."""
    try:
        yield
    except OSError as error:
        raise disk_error(error, path, doing) from error


def write_all(descriptor: int, data: Any) -> None:
    """Write every byte of the buffer `data`; `os.write` may write fewer."""
    view = memoryview(data).cast("B")
    position = 0
    while position < len(view):
        position += os.write(descriptor, view[position : position + CHUNK_BYTES])


def write_new_file(path: Path, chunks: Iterable[Any]) -> None:
    """Create `path`, which must not exist, from buffers and fsync it.

    Raises:
        OSError: as the system calls do; the caller removes what was begun.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    try:
        for chunk in chunks:
            write_all(descriptor, chunk)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable; file systems that cannot sync folders are left alone."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def nonce() -> str:
    """A name part that no other writer uses: the process id and random digits."""
    return f"{os.getpid()}-{secrets.token_hex(4)}"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a file to make and fsync, which then takes the place of `path`, durably.

    After a crash at any moment `path` holds either the old bytes or the new.

    Raises:
        SetupError, IntegrityError: the disk refused; the old file, if any, is untouched and nothing is left beside it.
    """
    beside = path.with_name(f".{path.name}.tmp-{nonce()}")
    with disk_errors_named(path, "write"):
        try:
            yield beside
            os.replace(beside, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(beside)
            raise
        sync_folder(path.parent)


def write_bytes_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by `data`; see `replacing`."""
    with replacing(path) as beside:
        write_new_file(beside, [data])


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading, not following a symbolic link.

    Raises:
        OSError: it is missing, unreadable, a link (ELOOP) or not a regular file (EINVAL).
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path) -> bytes:
    """Return the bytes of a regular file; see `open_regular`."""
    with open_regular(path) as file:
        return file.read()


def make_folder(path: Path) -> None:
    """Create a folder and its parents.

    Raises:
        SetupError: it cannot be made there, or a file is in the way.
        IntegrityError: it is a link, or the disk is at fault.
    """
    with disk_errors_named(path, "make the folder"):
        if path.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        try:
            path.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from None
        except FileNotFoundError as error:
            # such as below /proc, or where the current folder was removed
            raise SetupError(f"could not make the folder {path}: {error.strerror}; choose another folder") from error


def unwritable_line(path: Path) -> str:
    """Why nothing could be written into the folder `path`, which need not exist yet; empty if that looks possible."""
    there = next(folder for folder in (path, *path.absolute().parents) if os.path.lexists(folder))
    try:
        # the system's own answer: permissions alone do not tell about disks that are read-only
        with tempfile.TemporaryFile(dir=there):
            return ""
    except OSError as error:
        return str(disk_error(error, there, "write to"))


def remove_tree(path: Path) -> None:
    """Remove a folder under another name first, so that a half-removed one is never taken for a whole one.

    Failures are not reported: what remains is hidden, never read, and tried again by the next caller.
    """
    hidden = path.with_name(f".trash-{nonce()}")
    with suppress(OSError):
        os.rename(path, hidden)
        path = hidden
    shutil.rmtree(path, ignore_errors=True)
