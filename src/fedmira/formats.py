"""Writes numbers for people: losses, shares, bytes, seconds, and names that cannot harm a terminal. Pure functions.

Imports nothing slow, as every command writes numbers. Knows nothing about what is counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

NOTHING = "-"
"""Stands where nothing was measured."""


def printable(text: str, keep: str = "") -> str:
    """`text` with control characters written out, except those in `keep`.

    >>> printable("red\\x1b[31m\\n")
    'red\\\\x1b[31m\\\\n'
    """
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode("ascii") for c in text)


def finite(value: Any) -> Any:
    """`value` as JSON may hold it: None for a number that is not finite.

    >>> finite(math.nan), finite(0.5), finite("nan")
    (None, 0.5, 'nan')
    """
    return None if isinstance(value, float) and not math.isfinite(value) else value


def counted(count: int, noun: str) -> str:
    """A number of things.

    >>> counted(1, "round"), counted(2, "round")
    ('1 round', '2 rounds')
    """
    return f"{count} {noun}{'' if count == 1 else 's'}"


def listed(items: Sequence[object], most: int) -> str:
    """The first `most` of some things, and how many there are if these are not all.

    >>> listed("abc", 3), listed("abc", 2)
    ('a, b, c', 'a, b, ... (3 in all)')
    """
    more = f", ... ({len(items)} in all)" if len(items) > most else ""
    return ", ".join(map(str, items[:most])) + more


def format_loss(value: float | None) -> str:
    """Nats per token, three decimals.

    >>> format_loss(2.41834), format_loss(None), format_loss(float("nan"))
    ('2.418', '-', 'nan')
    """
    return NOTHING if value is None else f"{value:.3f}"


def format_perplexity(value: float | None) -> str:
    """Two decimals.

    >>> format_perplexity(11.0386), format_perplexity(None)
    ('11.04', '-')
    """
    return NOTHING if value is None else f"{value:.2f}"


def format_share(value: float | None) -> str:
    """A share in percent.

    >>> format_share(0.0625), format_share(1.0)
    ('6.2 %', '100 %')
    """
    if value is None:
        return NOTHING
    percent = 100 * value
    return f"{percent:.0f} %" if percent in (0, 100) else f"{percent:.1f} %"


def format_change(value: float) -> str:
    """A signed difference in nats per token.

    >>> format_change(-0.7), format_change(0.0), format_change(math.nan)
    ('-0.700', '0.000', 'nan')
    """
    text = f"{value:+.3f}"
    return text[1:] if text in ("+0.000", "-0.000", "+nan") else text


def format_relative(value: float | None) -> str:
    """A signed share in percent.

    >>> format_relative(0.0231), format_relative(-0.5), format_relative(0.0), format_relative(math.inf)
    ('+2.3 %', '-50.0 %', '0.0 %', 'not finite')
    """
    if value is None:
        return NOTHING
    if not math.isfinite(value):
        return "not finite"
    text = f"{100 * value:+.1f} %"
    return text[1:] if text in ("+0.0 %", "-0.0 %") else text


def format_answers(answers: int | None, tokens: int | None) -> str:
    """What Rouge-L and exact match cover: answers per client (None: all), each cut at so many tokens (None: unknown).

    >>> format_answers(8, 32), format_answers(None, 128), format_answers(None, None)
    ('at most 8 answers per client, each cut at 32 tokens', 'all answers, each cut at 128 tokens', '')
    """
    if tokens is None:
        return ""
    which = "all answers" if answers is None else f"at most {counted(answers, 'answer')} per client"
    return f"{which}, each cut at {counted(tokens, 'token')}"


def format_bytes(count: float) -> str:
    """Bytes in binary units.

    >>> format_bytes(12 * 2**20), format_bytes(512), format_bytes(1536)
    ('12.0 MiB', '512 B', '1.5 KiB')
    """
    name, size = byte_unit(count)
    return f"{count:.0f} B" if name == "B" else f"{count / size:.1f} {name}"


def format_mib(count: float, digits: int = 0) -> str:
    """Bytes in MiB however many they are, so that lines below each other can be compared.

    >>> format_mib(2**31), format_mib(3 * 2**19, 2)
    ('2,048 MiB', '1.50 MiB')
    """
    return f"{count / 2**20:,.{digits}f} MiB"


def byte_unit(count: float) -> tuple[str, float]:
    """The largest unit that `count` bytes fill, as (name, bytes).

    >>> byte_unit(2**21)
    ('MiB', 1048576.0)
    """
    name, size = "B", 1.0
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if count < 1024 * size:
            break
        name, size = larger, size * 1024
    return name, size


def format_seconds(seconds: float) -> str:
    """A duration.

    >>> format_seconds(0.43), format_seconds(47), format_seconds(323), format_seconds(7300)
    ('0.43 s', '47 s', '5 min 23 s', '2 h 02 min')
    """
    if not math.isfinite(seconds):
        return str(seconds)
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
