"""Files of lines that only grow: events as JSON, and words for people.

Every line is whole or absent: a write that the disk refuses leaves nothing behind, and a line that a crash tore is
ignored by readers and cut by the next writer. Knows nothing about what the lines mean.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedmira.errors import IntegrityError
from fedmira.runs.atomic import disk_error, disk_errors_named, read_bytes, write_all


def open_lines(path: Path) -> int:
    """Return a descriptor of the file for appending, once the part after its last newline is cut; made if need be."""
    with disk_errors_named(path, "open"):
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        try:
            _cut_torn_line(descriptor)
        except OSError:
            os.close(descriptor)
            raise
    return descriptor


def add_line(path: Path, descriptor: int, line: str) -> None:
    """Add one line.

    Raises:
        SetupError, IntegrityError: the disk refused; no part of the line is left in the file.
    """
    size = os.fstat(descriptor).st_size
    try:
        write_all(descriptor, line.encode("utf-8", "backslashreplace") + b"\n")
    except OSError as error:
        # a disk that refuses this too leaves a torn line, which readers ignore
        with suppress(OSError):
            os.ftruncate(descriptor, size)
        raise disk_error(error, path, "add a line to") from error


def synced_size(path: Path, descriptor: int) -> int:
    """Make all lines durable and return the size of the file in bytes."""
    with disk_errors_named(path, "sync"):
        os.fsync(descriptor)
        return os.fstat(descriptor).st_size


def cut_back(path: Path, descriptor: int, position: int) -> None:
    """Cut the file back to a `synced_size` of the past.

    Raises:
        IntegrityError: the file is shorter, or no line ends there: it is not the file it was.
    """
    with disk_errors_named(path, "cut"):
        size = os.fstat(descriptor).st_size
        if not 0 <= position <= size or (position and os.pread(descriptor, 1, position - 1) != b"\n"):
            raise IntegrityError(
                f"{path} has {size} bytes and no line that ends at byte {position}, where the checkpoint expects "
                "one: events were lost or changed. Restore the file, or remove the run directory and start again"
            )
        os.ftruncate(descriptor, position)
        os.fsync(descriptor)


def event_line(event: Mapping[str, Any]) -> str:
    """Return the event as one line of JSON.

    JSON has no NaN and no infinity: null is stored, and `non_finite` says where and which.
    """
    whole, non_finite = plain(event)
    if non_finite:
        whole["non_finite"] = non_finite
    return json.dumps(whole, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def read_events(path: Path) -> list[dict[str, Any]]:
    """Return all events, oldest first; a torn last line is left out, and a file that is not there has none.

    Raises:
        IntegrityError: any other line is damaged.
        SetupError, IntegrityError: the file cannot be read.
    """
    try:
        data = read_bytes(path)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise disk_error(error, path, "read") from error
    events = []
    for number, line in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), 1):
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            event = None
        if not isinstance(event, dict):
            raise IntegrityError(
                f"{path}, line {number}, is damaged; restore the file from a copy. Resuming writes again only what "
                "came after the newest checkpoint"
            )
        events.append(event)
    return events


def recorded_epsilon(events: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return what each client that uploaded noised numbers has given away by the last of the events, by its name.

    >>> recorded_epsilon([{"privacy": {"epsilon": {"a": 1.5, "b": None}}}, {"privacy": {"epsilon": {"a": 2.0}}}, {}])
    {'a': 2.0, 'b': inf}
    """
    spent: dict[str, float] = {}
    for event in events:
        found = event.get("privacy", {}).get("epsilon", {})
        # null stands for what is not finite
        spent |= {name: math.inf if value is None else float(value) for name, value in found.items()}
    return spent


def plain(value: Any) -> tuple[Any, dict[str, str]]:
    """Return `value` as JSON can hold it, and the places where a number that is not finite became null."""
    non_finite: dict[str, str] = {}

    def convert(item: Any, place: str) -> Any:
        if isinstance(item, Mapping):
            return {str(key): convert(part, f"{place}.{key}" if place else str(key)) for key, part in item.items()}
        if isinstance(item, list | tuple):
            if set(map(type, item)) == {float} and all(map(math.isfinite, item)):
                # a graph of a thousand clients has a million weights, too many to look at one by one
                return list(item)
            return [convert(part, f"{place}[{index}]") for index, part in enumerate(item)]
        if hasattr(item, "tolist"):
            # numpy arrays and scalars, torch tensors
            return convert(item.tolist(), place)
        if isinstance(item, float) and not math.isfinite(item):
            non_finite[place] = str(item)
            return None
        if isinstance(item, Path):
            return str(item)
        return item

    return convert(value, ""), non_finite


def _cut_torn_line(descriptor: int) -> None:
    """Cut what follows the last newline: a line that a crash tore."""
    size = end = os.fstat(descriptor).st_size
    while end:
        start = max(0, end - 65536)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        os.ftruncate(descriptor, end)
