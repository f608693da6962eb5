"""How the process of the command line waits, keeps memory, and writes what cannot be encoded or to who left; a library
leaves all of it to the program that uses it.
"""

from __future__ import annotations

import ctypes
import io
import os
import sys
from typing import TextIO

_SPINS = "1000"
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Names of glibc's mallopt."""
_MOST_IN_HEAP = 32 * 2**20
"""glibc takes no larger threshold."""


def prepare_process() -> None:
    """Make waiting threads and freed memory cheap, and every text printable. To be called before torch is imported.

    What the user set stays. Standard output writes out what its encoding lacks, such as a Cyrillic path in Latin-1.

    OpenMP threads spin for a moment before they sleep: without it small steps take a third longer, with the default of
    spinning on they take many times longer where cores are shared. glibc keeps what training frees instead of giving it
    back and taking it again page by page in every step.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
    if not sys.platform.startswith("linux") or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _MOST_IN_HEAP)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def discard(stream: TextIO) -> None:
    """Let all that is still written to `stream` vanish: its reader left, and Python must not fail again at its exit."""
    try:
        descriptor = stream.fileno()
    except OSError:
        # not a file, such as a stream of a test
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
