"""Makes the environment of the peers that must not share ours: a virtual environment in `benchmarks/.venv`.

Made anew when the requirements change. Knows nothing about what runs in it.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
FOLDER = HERE / ".venv"
REQUIREMENTS = HERE / "requirements-peers.txt"
CONSTRAINTS = HERE.parent / "constraints.txt"


class EnvironmentMissingError(Exception):
    """The environment could not be made; the message says why."""


def peers_python(say: Callable[[str], None]) -> Path:
    """The interpreter of the peers' environment, made if it is missing or out of date.

    Raises:
        EnvironmentMissingError: something could not be installed.
    """
    python = FOLDER / "bin" / "python"
    done = FOLDER / "installed"
    pinned = [line for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines() if line.startswith("torch==")]
    wanted = hashlib.sha256("\n".join([*pinned, REQUIREMENTS.read_text(encoding="utf-8")]).encode()).hexdigest()
    if done.is_file() and done.read_text(encoding="ascii") == wanted:
        return python
    say("making the environment of the peers in benchmarks/.venv (once; some 2 GB)")
    _run(sys.executable, "-m", "venv", "--clear", str(FOLDER))
    # torch goes first and alone: the pinned release has a small CPU build
    _run(str(python), "-m", "pip", "install", "--quiet", *pinned)
    _run(str(python), "-m", "pip", "install", "--quiet", "--requirement", str(REQUIREMENTS))
    done.write_text(wanted, encoding="ascii")
    return python


def _run(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        output = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        last = output[-1] if output else "no output"
        raise EnvironmentMissingError(f"the peers' environment could not be made: {last}") from error
