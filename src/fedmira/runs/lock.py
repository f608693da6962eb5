"""A lock that lets one process at a time write in a folder; it is free again when the process ends, however it ends."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedmira.errors import UsageError
from fedmira.runs.atomic import disk_error, disk_errors_named

LOCK = ".lock"


def lock_folder(folder: Path) -> int:
    """Become the only writer of `folder`, until the descriptor that is returned is closed.

    Raises:
        UsageError: another process is; the message names it.
        SetupError: the disk refuses.
    """
    path = folder / LOCK
    with disk_errors_named(path, "open"):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    except OSError as error:
        holder = "unknown"
        with suppress(OSError):
            holder = os.pread(descriptor, 20, 0).decode(errors="replace").strip() or holder
        os.close(descriptor)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise UsageError(
                f"another process (number {holder}) is writing {folder}; wait until it is done or stop it"
            ) from None
        raise disk_error(error, path, "lock") from error
    return descriptor


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Be the only writer of `folder` inside the `with` block; raises what `lock_folder` does."""
    descriptor = lock_folder(folder)
    try:
        yield
    finally:
        os.close(descriptor)
