"""Makes the system calls of the saver fail at a chosen moment."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

CALLS = ("open", "write", "fsync", "rename", "replace", "mkdir", "listdir", "unlink", "rmdir", "ftruncate")


class Crash(BaseException):
    """Stands for the process dying: nothing catches it, and no later system call happens."""


@contextmanager
def syscalls(before: Callable[[int, str, tuple[Any, ...]], None]) -> Iterator[None]:
    """Within the block, call `before(number, name, arguments)` ahead of each system call; numbers start at 1."""
    originals = {name: getattr(os, name) for name in CALLS}
    count = 0

    def wrapped(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            nonlocal count
            count += 1
            before(count, name, arguments)
            return originals[name](*arguments, **keywords)

        return call

    for name in CALLS:
        setattr(os, name, wrapped(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(os, name, original)


def trace(action: Callable[[], object]) -> list[tuple[str, tuple[Any, ...]]]:
    """Return the system calls that `action` makes."""
    seen: list[tuple[str, tuple[Any, ...]]] = []
    with syscalls(lambda number, name, arguments: seen.append((name, arguments))):
        action()
    return seen


@contextmanager
def failing_at(number: int, error_number: int) -> Iterator[None]:
    """The system call with this number fails once."""

    def before(count: int, name: str, arguments: tuple[Any, ...]) -> None:
        if count == number:
            raise OSError(error_number, os.strerror(error_number))

    with syscalls(before):
        yield


@contextmanager
def dying_at(number: int) -> Iterator[None]:
    """The process dies instead of making the system call with this number; a write gets half of its bytes out."""
    write = os.write

    def before(count: int, name: str, arguments: tuple[Any, ...]) -> None:
        if count == number and name == "write":
            descriptor, data = arguments
            write(descriptor, bytes(data)[: len(data) // 2])
        if count >= number:
            raise Crash

    with syscalls(before):
        yield
