"""Run the benchmark: `python -m benchmarks.run [--more | --only NAME ...] [--quick] [--device cuda]`.

After every section it writes one JSON file per machine and one page over all of them; where these are the
committed results, docs/performance.md too. Prints what it does as it goes.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.environment import EnvironmentMissingError, peers_python
from benchmarks.floors import copy_rate
from benchmarks.gate import UnequalError
from benchmarks.groups.disk_mixing import measure_disk_mixing
from benchmarks.groups.generation import Generation, measure_generation
from benchmarks.groups.memory import measure_memory
from benchmarks.groups.mixing import measure_mixing_in_memory
from benchmarks.groups.training import measure_training
from benchmarks.options import Options
from benchmarks.peers.peer import needs_environment
from benchmarks.results import Results, Section, read_results, write_results
from benchmarks.suite import MORE, SUITES, ClientMemory, DiskMixing, Measurement, MemoryMixing, Training
from benchmarks.table import write_pages

Say = Callable[[str], None]


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, measure, write; 1 if a section was refused by the equality gate or failed."""
    parsed = _parser().parse_args(arguments)
    torch.set_num_threads(parsed.threads)
    started = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - started:6.0f} s] {text}", flush=True)

    chosen = choose("cuda" if parsed.device.startswith("cuda") else "cpu", parsed.only, more=parsed.more)
    repeats, warm_up = (2, 0) if parsed.quick else (5, 1)
    python, note = _peers_environment(chosen, parsed.without_frameworks, say)
    # what a process prepares, memory of the processor and waiting threads, is not what a GPU's time depends on, and to
    # start one for each contestant would take half of the ten minutes
    apart = not parsed.device.startswith("cuda")
    options = Options(parsed.device, parsed.threads, warm_up, repeats, python, note, own_processes=apart)
    machine = describe_machine(parsed.device)
    file = parsed.out / f"{file_name(parsed.device, machine['device'])}.json"
    commit = sources_commit()
    results, all_measured = _continued(file, machine), True
    for name, measurement in chosen.items():
        say(name)
        section, measured = _measured_or_why(name, measurement, options, say)
        all_measured &= measured
        section.commit, section.date = commit, date.today().isoformat()
        results.put(section)
        write_results(file, results)
        write_pages(parsed.out)
        if not measured:
            _let_go(parsed.device)
    say(f"wrote {parsed.out}")
    return 0 if all_measured else 1


def _measured_or_why(name: str, measurement: Measurement, options: Options, say: Say) -> tuple[Section, bool]:
    """The section and True, or one that says what went wrong and False: the others are measured all the same."""
    try:
        return measure(name, measurement, options, say), True
    except UnequalError as error:
        section = Section(name, f"Refused: {error}")
    except Exception as error:
        traceback.print_exc()
        section = Section(name, "Failed: " + "".join(traceback.format_exception_only(error)).splitlines()[0])
    say(section.title)
    return section, False


def _let_go(device: str) -> None:
    """Hand back what a section held that ended early."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def _continued(file: Path, machine: dict[str, Any]) -> Results:
    """Nothing yet, but for what was measured on the same machine; each section stands until it is measured again."""
    if not file.is_file():
        return Results(machine)
    found = read_results(file)
    varying = {"copy_bytes_per_second"}
    if any(found.machine.get(fact) != value for fact, value in machine.items() if fact not in varying):
        return Results(machine)
    return Results(machine, found.sections)


def choose(kind: str, only: list[str] | None, *, more: bool = False) -> dict[str, Measurement]:
    """The sections of a kind of machine, the further ones, or those named.

    Raises:
        SystemExit: a name is unknown.
    """
    if only is None:
        return MORE[kind] if more else SUITES[kind]
    known = SUITES[kind] | MORE[kind]
    unknown = [name for name in only if name not in known]
    if unknown:
        raise SystemExit(f"--only {unknown[0]}: no such section; there are {', '.join(known)}")
    return {name: one for name, one in known.items() if name in only}


def measure(name: str, measurement: Measurement, options: Options, say: Say) -> Section:
    """Measure one section."""
    if isinstance(measurement, Training):
        return measure_training(name, measurement.workload, measurement.contestants, options, say)
    if isinstance(measurement, Generation):
        return measure_generation(name, measurement, options, say)
    if isinstance(measurement, MemoryMixing):
        return measure_mixing_in_memory(name, *measurement, options, say)
    if isinstance(measurement, DiskMixing):
        return measure_disk_mixing(name, *measurement, options, say)
    assert isinstance(measurement, ClientMemory)
    return measure_memory(name, options, say)


def _peers_environment(chosen: dict[str, Measurement], without: bool, say: Say) -> tuple[Path | None, str]:
    """The interpreter of the peers' environment, or None and why there is none."""
    if without:
        return None, "left out by --without-frameworks"
    if not any(needs_environment(one.contestants) for one in chosen.values() if isinstance(one, Training)):
        return None, ""
    try:
        return peers_python(say), ""
    except EnvironmentMissingError as error:
        say(str(error))
        return None, str(error)


def describe_machine(device: str) -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "copy_bytes_per_second": copy_rate(device),
    }


def sources_commit() -> str:
    """The commit of the sources, short, and whether they were changed since; empty where git does not know them."""
    here = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=here, check=True, capture_output=True, text=True).stdout.strip()

    try:
        commit = git("rev-parse", "--short", "HEAD")
        changes = git("status", "--porcelain", "--", "src", "benchmarks", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f"{commit} with changes" if changes else commit


def file_name(device: str, processor: str) -> str:
    """Name of the results of a machine: its kind and what computes.

    >>> file_name("cpu", "Intel(R) Xeon(R) Processor")
    'cpu-intel-xeon'
    """
    words = re.findall(r"[a-z0-9]+", processor.lower().replace("(r)", "").replace("processor", ""))
    return "-".join([device.partition(":")[0], *words])


def _processor() -> str:
    """The processor's name where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--only", nargs="+", metavar="NAME", help="measure these sections only")
    which.add_argument(
        "--more", action="store_true", help="measure the further sections, which a plain call leaves out"
    )
    parser.add_argument("--quick", action="store_true", help="two repetitions instead of five, for development")
    parser.add_argument("--without-frameworks", action="store_true", help="leave out Flower and pfl-research")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=2, help="threads of every contestant on the processor")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder of the results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
